"""Three tasks to fine-tune on, of the forms of CoLA, SST-2 and BoolQ: Tables 2 and 3 of the paper on the pocket model.

Training items come from training modules, test items from held-out ones.

Cost: about 15 seconds to build. Answers are " True" or " False", one token each, and equally frequent:
    pocket_acceptability   a line of code, real or with its tokens in a random order (CoLA)
    pocket_polarity        a string literal: is it the message of an exception? (SST-2: negative or not)
    pocket_question        a function and a question: does it raise, return a value, loop, use self? (BoolQ)
"""

from __future__ import annotations

import ast
import io
import random
import tokenize
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from experiments.pocket.corpus import read_modules
from experiments.pocket.sources import Function, Item, Source, TrainingText
from experiments.pocket.task_files import fingerprint, read_listing, write_items, write_listing, write_task

TRAIN_ITEMS, TEST_ITEMS = 2000, 500
LINES_A_MODULE = 60
CHOICES = (" True", " False")
Draft = Callable[[Source, random.Random], Iterator[Item]]


def _item(passage: str, question: str, answer: bool, source: str) -> Item:
    return Item(f"{passage}\n{question} =", CHOICES, CHOICES.index(f" {answer}"), source)


def shuffle_tokens(line: str, rng: random.Random) -> str | None:
    """The line with its tokens in a random order, the blanks between them where they were.

    None for a line of fewer than five tokens, or one that is not whole (a bracket left open).
    """
    text = line.strip()
    try:
        tokens = [t for t in tokenize.generate_tokens(io.StringIO(text + "\n").readline) if t.string.strip()]
    except (tokenize.TokenError, SyntaxError):
        return None
    if len(tokens) < 5:
        return None
    blanks = [text[a.end[1] : b.start[1]] for a, b in pairwise(tokens)]
    words = rng.sample([token.string for token in tokens], len(tokens))
    indent = line[: len(line) - len(line.lstrip())]
    return indent + words[0] + "".join(blank + word for blank, word in zip(blanks, words[1:], strict=True))


def acceptability(source: Source, rng: random.Random) -> Iterator[Item]:
    """Whether a line is real or has its tokens shuffled."""
    rows = [row for row, line in enumerate(source.lines, 1) if 20 <= len(line.strip()) <= 80]
    lines = {line.rstrip() for line in source.lines}
    for row in rng.sample(rows, min(LINES_A_MODULE, len(rows))):
        line = source.lines[row - 1].rstrip()
        if row in source.inside_string or line.lstrip().startswith(("#", '"', "'")):
            continue
        changed = shuffle_tokens(line, rng)
        if changed is not None and changed not in lines:
            real = rng.random() < 0.5
            yield _item(line if real else changed, "valid", real, f"{source.name}:{row}")


def polarity(source: Source, rng: random.Random) -> Iterator[Item]:
    """Whether a string literal is the message of an exception."""
    raised = {id(s) for node in source.nodes if isinstance(node, ast.Raise) for s in ast.walk(node)}
    prose = {id(node.value) for node in source.nodes if isinstance(node, ast.Expr)}
    for node in source.nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            text = node.value.strip()
            if 12 <= len(text) <= 160 and " " in text and "\n" not in text:
                yield _item(text, "error", id(node) in raised, f"{source.name}:{node.lineno}")


def _answers(function: Function) -> dict[str, bool]:
    nodes = [node for statement in function.body for node in ast.walk(statement)]
    return {
        "raises": any(isinstance(node, ast.Raise) for node in nodes),
        "returns_value": any(isinstance(node, ast.Return) and node.value is not None for node in nodes),
        "loops": any(isinstance(node, ast.For | ast.While) for node in nodes),
        "uses_self": any(isinstance(node, ast.Name) and node.id == "self" for node in nodes),
    }


def question(source: Source, rng: random.Random) -> Iterator[Item]:
    """Yes or no over a function of 100 to 350 characters."""
    for function in source.functions:
        passage = "".join(source.lines[function.lineno - 1 : function.end_lineno]).rstrip()
        if 100 <= len(passage) <= 350:
            for asked, answer in _answers(function).items():
                yield _item(passage, asked, answer, f"{source.name}:{function.lineno}")


TASKS: dict[str, tuple[str, Draft]] = {
    "pocket_acceptability": ("cola", acceptability),
    "pocket_polarity": ("sst2", polarity),
    "pocket_question": ("boolq", question),
}


def balance(items: Sequence[Item], count: int, rng: random.Random) -> list[Item]:
    """A sample of `count` different items in which each question has as many items for True as for False."""
    unique = {item.prompt: item for item in rng.sample(items, len(items))}.values()
    groups: dict[tuple[str, int], list[Item]] = {}
    for item in unique:
        groups.setdefault((item.prompt.rsplit("\n", 1)[-1], item.label), []).append(item)
    asked = sorted({question for question, _ in groups})
    pairs = []
    for name in asked:
        pairs += list(zip(groups.get((name, 0), []), groups.get((name, 1), []), strict=False))
    chosen = [item for pair in rng.sample(pairs, min(count // 2, len(pairs))) for item in pair]
    return rng.sample(chosen, len(chosen))


def build_finetuning_tasks(out_dir: str | Path, train: int = TRAIN_ITEMS, test: int = TEST_ITEMS) -> list[str]:
    """Write, for each task, `NAME_train.jsonl` and the lm-eval task NAME over held-out modules; return the names.

    A line of the training file has `prompt`, `choices`, `label` and `source`; the text to learn is
    prompt + choices[label]. A folder that already holds the same is left as it is.

    Raises ValueError for a stripped installation or if a side gets no item.
    """
    folder = Path(out_dir)
    modules = read_modules()
    mark = fingerprint(modules, train, test)
    if rows := read_listing(folder, mark):
        return [row["name"] for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    seen = TrainingText(modules)
    sources = {side: [Source(module) for module in modules if module.heldout is side] for side in (False, True)}
    for name, (mirrors, draft) in TASKS.items():
        rng = random.Random(name)
        items = {side: [item for source in sources[side] for item in draft(source, rng)] for side in (False, True)}
        training = balance(items[False], train, rng)
        asked = {item.prompt for item in training}
        unseen = [i for i in items[True] if i.prompt not in asked and not seen.contains(i.prompt.rsplit("\n", 1)[0])]
        testing = balance(unseen, test, rng)
        if not training or not testing:
            raise ValueError(f"the standard library of this Python gives no item for {name}")
        row = {"name": name, "mirrors": mirrors, "chance": 1 / len(CHOICES), "items": len(testing)}
        rows.append({**row, "description": (draft.__doc__ or "").strip()})
        write_items(folder / f"{name}_train.jsonl", training)
        write_task(folder, testing, rows[-1])
    write_listing(folder, mark, rows)
    return list(TASKS)
