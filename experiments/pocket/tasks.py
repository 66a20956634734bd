"""Eight multiple-choice tasks over held-out modules, as local lm-eval tasks: the pocket profile's zero-shot benchmark.

Purpose: stand-ins for the paper's eight tasks that need no download. Cost: about six seconds to build. Commands:
    python -m experiments.pocket.tasks FOLDER              # build the eight
    python -m experiments.pocket.tasks FOLDER --drafts     # all twelve drafts, with the pocket model's accuracy on each
Of the twelve drafts the eight with the largest accuracy above chance of the dense pocket model are kept. No single item
is ever chosen by a model: items are a seeded sample of all places that fit.

Wrong answers come from the same file and have about the same number of tokens; the position of the right one is
uniform; an item whose passage occurs verbatim in a training module is dropped, and so is a repeated one.
"""

from __future__ import annotations

import argparse
import functools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from cats.models import pocket_path
from experiments.pocket import names, passages
from experiments.pocket.corpus import read_modules
from experiments.pocket.finetuning_tasks import build_finetuning_tasks
from experiments.pocket.sources import Item, Source, Tokens, TrainingText
from experiments.pocket.task_files import fingerprint, read_listing, write_listing, write_task

__all__ = ["DROPPED", "TASKS", "Task", "build_finetuning_tasks", "build_tasks"]

ITEMS = 500
LARGEST_SHARE = 0.2  # of a task's items that may have the same right answer: "=" is three quarters of all operators

Draft = Callable[[Source, random.Random, Tokens], Iterator[Item | None]]


@dataclass(frozen=True)
class Task:
    """A task, the one of the paper's eight whose form it mirrors, and its number of choices: chance is 1 / choices."""

    name: str
    mirrors: str
    choices: int
    description: str
    draft: Draft


TASKS = (
    Task("pocket_next_line", "hellaswag", 4, "the next line of a function", passages.next_line),
    Task("pocket_name", "winogrande", 4, "which name in scope comes next", names.name_in_scope),
    Task("pocket_keyword", "arc_easy", 4, "the missing keyword", names.keyword),
    Task("pocket_attribute", "arc_challenge", 4, "the attribute of an imported module", names.attribute),
    Task("pocket_docstring", "boolq", 2, "to which of two definitions a docstring belongs", passages.docstring),
    Task("pocket_body", "piqa", 2, "goal and means: to which of two definitions a body belongs", passages.body),
    Task("pocket_operator", "sciq", 4, "the missing operator", names.operator),
    Task("pocket_exception", "openbookqa", 4, "the exception raised or caught", names.exception),
)
DROPPED = (
    Task("pocket_referent", "winogrande", 2, "the name that a blank in a line stands for", names.referent),
    Task("pocket_self_attribute", "arc_challenge", 4, "the attribute of self", names.self_attribute),
    Task("pocket_first_statement", "piqa", 2, "goal (docstring) and means (first line)", passages.first_statement),
    Task("pocket_comment", "piqa", 2, "goal (comment) and means (the line below)", passages.comment),
)


def select(candidates: Sequence[Item], seen: TrainingText, limit: int, rng: random.Random) -> list[Item]:
    """A random sample of at most `limit` items, without repeats, leaked passages and too frequent answers."""
    passages_taken: set[str] = set()
    answers: Counter[str] = Counter()
    chosen: list[Item] = []
    for item in rng.sample(candidates, len(candidates)):
        if len(chosen) == limit:
            break
        answer = item.answer.strip()
        if item.passage in passages_taken or answers[answer] >= LARGEST_SHARE * limit or seen.contains(item.passage):
            continue
        passages_taken.add(item.passage)
        answers[answer] += 1
        chosen.append(item)
    return chosen


def token_counter() -> Tokens:
    """Number of tokens of a text for the pocket tokenizer."""
    tokenizer = Tokenizer.from_file(str(pocket_path() / "tokenizer.json"))
    return functools.cache(lambda text: len(tokenizer.encode(text).ids))


def build_tasks(out_dir: str | Path, limit: int | None = None, tasks: Sequence[Task] = TASKS) -> list[str]:
    """Write the tasks into `out_dir` for `lm_eval.tasks.TaskManager(include_path=out_dir)`; return their names.

    `tasks.json` beside them lists name, mirrored task, chance, items and description. A folder that already holds the
    same tasks is left as it is. `limit`: items a task, 500 by default.

    Raises ValueError for a limit below 1, a stripped installation, or a library that gives no item for a task.
    """
    limit = ITEMS if limit is None else limit
    if limit < 1:
        raise ValueError(f"limit must be at least 1 item, not {limit}")
    folder = Path(out_dir)
    modules = read_modules()
    mark = fingerprint(modules, limit, [task.name for task in tasks])
    if rows := read_listing(folder, mark):
        return [row["name"] for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    sources = [Source(module) for module in modules if module.heldout]
    seen, tokens = TrainingText(modules), token_counter()
    for task in tasks:
        rng = random.Random(task.name)
        candidates = [item for source in sources for item in task.draft(source, rng, tokens) if item is not None]
        items = select(candidates, seen, limit, rng)
        if not items:
            raise ValueError(f"the standard library of this Python gives no item for {task.name}")
        row = {"name": task.name, "mirrors": task.mirrors, "chance": 1 / task.choices, "items": len(items)}
        rows.append({**row, "description": task.description})
        write_task(folder, items, rows[-1])
    write_listing(folder, mark, rows)
    return [task.name for task in tasks]


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, help=f"items a task, {ITEMS} by default")
    parser.add_argument("--drafts", action="store_true", help="all drafts, and the pocket model's accuracy on each")
    options = parser.parse_args()
    tasks = build_tasks(options.folder, options.limit, TASKS + DROPPED if options.drafts else TASKS)
    accuracy: dict[str, float] = {}
    if options.drafts:
        from cats.evaluation import evaluate
        from cats.models import load_model

        model, tokenizer = load_model("pocket")
        results = evaluate(model, tokenizer, tasks, batch_size=32, include_path=options.folder)
        accuracy = {result.task: result.accuracy for result in results}
    for row in sorted(read_listing(options.folder), key=lambda row: row["chance"] - accuracy.get(row["name"], 0)):
        score = f"accuracy {accuracy[row['name']]:.3f}, " if accuracy else ""
        print(f"{row['name']:24s} {score}chance {row['chance']:.2f}, {row['items']} items, mirrors {row['mirrors']}")


if __name__ == "__main__":
    main()
