"""The pocket tasks: well formed, without leakage, deterministic, and scored by lm-eval as by hand."""

import ast
import functools
import json
import os
import random
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from cats.evaluation import evaluate
from cats.models import load_model, pocket_path
from experiments.pocket import corpus, finetuning_tasks, names, tasks
from experiments.pocket.sources import Pool, Source, TrainingText, arrange

EIGHT = [task.name for task in tasks.TASKS]


@pytest.fixture(scope="module")
def modules() -> list[corpus.Module]:
    return corpus.read_modules()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    assert tasks.build_tasks(path) == EIGHT
    return path


@pytest.fixture(scope="module")
def finetuning_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finetuning")
    finetuning_tasks.build_finetuning_tasks(path)
    return path


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@functools.cache
def choices_first(folder: Path, name: str) -> bool:
    """Whether lm-eval puts the choices before the prompt, from the YAML file alone."""
    return yaml.safe_load((folder / f"{name}.yaml").read_text())["doc_to_text"] == "label"


def passage(folder: Path, name: str, row: dict) -> str:
    """The right choice and the prompt in the order in which lm-eval joins them."""
    right = row["choices"][row["label"]]
    return right + row["prompt"] if choices_first(folder, name) else row["prompt"] + right


# --- tasks ----------------------------------------------------------------------------------------------------------


def test_items_are_well_formed(folder: Path) -> None:
    for task in tasks.TASKS:
        items = rows(folder, task.name)
        assert len(items) >= 500
        for row in items:
            assert len(row["choices"]) == task.choices == len(set(row["choices"]))
            assert 0 <= row["label"] < task.choices and row["prompt"].strip()
        assert len({passage(folder, task.name, row) for row in items}) == len(items)
        answers = Counter(row["choices"][row["label"]].strip() for row in items)
        assert max(answers.values()) <= 0.2 * len(items)


def test_chance_is_stated_and_positions_are_uniform(folder: Path) -> None:
    listing = {row["name"]: row for row in json.loads((folder / "tasks.json").read_text())["tasks"]}
    assert list(listing) == EIGHT
    assert len({row["mirrors"] for row in listing.values()}) == 8
    for name in EIGHT:
        items = rows(folder, name)
        assert listing[name]["items"] == len(items)
        assert listing[name]["chance"] == pytest.approx(np.mean([1 / len(row["choices"]) for row in items]))
        assert yaml.safe_load((folder / f"{name}.yaml").read_text())["metadata"]["chance"] == listing[name]["chance"]
        choices = len(items[0]["choices"])
        counts = Counter(row["label"] for row in items)
        # within four standard deviations of n / choices
        spread = (len(items) / choices * (1 - 1 / choices)) ** 0.5
        assert all(abs(counts[label] - len(items) / choices) < 4 * spread for label in range(choices))


def test_passages_are_heldout_text_and_occur_in_no_training_module(folder: Path, modules: list[corpus.Module]) -> None:
    texts = {module.name: module.text for module in modules if module.heldout}
    training = [module.text for module in modules if not module.heldout]
    for name in EIGHT:
        items = rows(folder, name)
        assert all(passage(folder, name, row) in texts[row["source"].rsplit(":", 1)[0]] for row in items)
        for row in items[:25]:  # a search of nine megabytes each
            assert not any(passage(folder, name, row) in text for text in training)


def test_wrong_answers_come_from_the_same_file_and_differ_little_in_length(
    folder: Path, modules: list[corpus.Module]
) -> None:
    texts = {module.name: module.text for module in modules if module.heldout}
    tokenizer = AutoTokenizer.from_pretrained(pocket_path())
    for name in EIGHT:
        for row in rows(folder, name)[:100]:
            assert all(choice.strip() in texts[row["source"].rsplit(":", 1)[0]] for choice in row["choices"])
            lengths = [len(tokenizer(choice)["input_ids"]) for choice in row["choices"]]
            # where the choices come first they are not scored
            assert choices_first(folder, name) or max(lengths) - min(lengths) <= 4


def test_two_builds_are_identical_whatever_the_hash_seed(folder: Path, tmp_path: Path) -> None:
    script = "import sys; from experiments.pocket.tasks import build_tasks; build_tasks(sys.argv[1])"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env=environment)

    def contents(where: Path) -> dict[str, str]:
        files = [path for path in where.iterdir() if path.is_file()]
        return {path.name: path.read_text(encoding="utf-8").replace(str(where.resolve()), "HERE") for path in files}

    assert contents(tmp_path) == contents(folder)
    assert len(contents(folder)) == 2 * 8 + 1


def test_a_finished_folder_is_left_alone_and_an_outdated_one_rebuilt(tmp_path: Path) -> None:
    tasks.build_tasks(tmp_path, 5, tasks.TASKS[2:3])
    data = tmp_path / "pocket_keyword.jsonl"
    before = data.stat().st_mtime_ns
    tasks.build_tasks(tmp_path, 5, tasks.TASKS[2:3])
    assert data.stat().st_mtime_ns == before
    tasks.build_tasks(tmp_path, 6, tasks.TASKS[2:3])
    assert len(rows(tmp_path, "pocket_keyword")) == 6


def test_bad_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="limit must be at least 1 item, not 0"):
        tasks.build_tasks(tmp_path, 0)


def test_lm_eval_scores_a_task_as_a_plain_loop_does(folder: Path) -> None:
    """Both forms, choices after and choices before, on items that the shipped model answers well above chance."""
    model, tokenizer = load_model("pocket")
    names, items = ["pocket_attribute", "pocket_docstring"], 60
    for result in evaluate(model, tokenizer, names, limit=items, batch_size=8, include_path=folder):
        expected = []
        for row in rows(folder, result.task)[:items]:
            scores = []
            for choice in row["choices"]:
                first = result.task == "pocket_docstring"
                before, after = (choice, row["prompt"]) if first else (row["prompt"], choice)
                blanks = len(before) - len(before.rstrip())
                given = tokenizer(before[: len(before) - blanks])["input_ids"]
                start = len(given)  # where a token spans the border (".__"), lm-eval scores what follows after these
                ids = torch.tensor([given + tokenizer(before + after)["input_ids"][start:]])
                with torch.no_grad():
                    logprobs = model(ids).logits.double().log_softmax(-1)
                scores.append(float(logprobs[0, start - 1 : -1].gather(1, ids[0, start:, None]).sum()))
            expected.append(float(np.argmax(scores) == row["label"]))
        assert result.correct == tuple(expected)
        assert result.accuracy > result.chance + 0.25


# --- material -------------------------------------------------------------------------------------------------------


def source(text: str) -> Source:
    return Source(corpus.Module("example.py", "example", True, text))


def words(text: str) -> int:
    return len(text.split())


@given(st.lists(st.text("abc", min_size=1, max_size=3), max_size=8), st.integers(2, 4), st.integers(0, 99))
def test_arrange_keeps_one_right_answer(wrong: list[str], count: int, seed: int) -> None:
    result = arrange(random.Random(seed), "prompt", "right", [*wrong, "right"], count, "here")
    if len(set(wrong)) < count - 1:
        assert result is None
    else:
        assert result.choices.count("right") == 1 and result.answer == "right"
        assert len(set(result.choices)) == count and set(result.choices) <= {*wrong, "right"}


def test_pool_matches_lengths() -> None:
    pool = Pool(words, ["a", "b c", "d e", "f g h", "b c"])
    assert pool.near("x y") == ["b c", "d e"]
    assert pool.near("x y z", 1) == ["b c", "d e", "f g h"]


def test_prompt_is_whole_lines_before_a_place() -> None:
    example = source("a = 1\n\nbb = 2\nccc = a + bb\n")
    assert example.before(4, 6, 100) == "a = 1\n\nbb = 2\nccc = "
    assert example.before(4, 6, 14) == "bb = 2\nccc = "
    assert example.before(4, 6, 1) == "ccc = "


def test_training_text_finds_verbatim_passages_only() -> None:
    code = "def f(x):\n    y = x + 1\n    return y\n"
    seen = TrainingText([corpus.Module("m.py", "m", False, code), corpus.Module("h.py", "h", True, "secret = 1\n")])
    assert seen.contains("x + 1\n    return")
    assert not seen.contains("x + 1\n    return x")
    assert not seen.contains("secret")


def test_columns_count_characters() -> None:
    example = source("é = 'ü'; x = 1\n")
    assert example.character_column(1, len("é = 'ü'; ".encode())) == len("é = 'ü'; ")


def test_drafts_on_a_worked_example() -> None:
    text = (
        "import os\nimport sys\n\n\ndef first(path, names):\n    if path not in names:\n        raise KeyError(path)\n"
        "    return os.sep\n\n\ndef second(count):\n    '''Say how many there are.'''\n    print(count, sys.argv)\n"
    )
    example, rng = source(text), random.Random(0)
    keywords = [item for item in names.keyword(example, rng, words) if item]
    assert {item.answer for item in keywords} == {" not", " in"}
    assert all(item.passage in text for item in keywords)
    assert [item for item in names.exception(example, rng, words) if item] == []  # one exception: no wrong answer
    assert [item for item in names.attribute(example, rng, words) if item] == []


# --- fine-tuning tasks ----------------------------------------------------------------------------------------------


def test_finetuning_tasks_are_balanced_and_split(finetuning_folder: Path) -> None:
    for name in finetuning_tasks.TASKS:
        train, test = rows(finetuning_folder, f"{name}_train"), rows(finetuning_folder, name)
        assert len(train) >= 2000 and len(test) >= 500
        for side in (train, test):
            assert Counter(row["label"] for row in side) == {0: len(side) // 2, 1: len(side) // 2}
            assert all(row["choices"] == [" True", " False"] for row in side)
        assert not any(corpus.is_heldout(row["source"].rsplit(":", 1)[0]) for row in train)
        assert all(corpus.is_heldout(row["source"].rsplit(":", 1)[0]) for row in test)
        assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    tokenizer = AutoTokenizer.from_pretrained(pocket_path())
    assert [len(tokenizer(choice)["input_ids"]) for choice in finetuning_tasks.CHOICES] == [1, 1]


def test_answers_about_a_function_are_right(finetuning_folder: Path) -> None:
    kinds = {"raises": ast.Raise, "loops": (ast.For, ast.While)}
    for row in rows(finetuning_folder, "pocket_question")[:200]:
        code, question = row["prompt"].removesuffix(" =").rsplit("\n", 1)
        nodes = list(ast.walk(ast.parse(textwrap.dedent(code))))
        if question in kinds:
            found = any(isinstance(node, kinds[question]) for node in nodes)
            assert found is (row["label"] == 0), code


def test_shuffled_lines_have_the_same_tokens_and_blanks() -> None:
    line = "    value = self.read(size) + offset"
    changed = {finetuning_tasks.shuffle_tokens(line, random.Random(seed)) for seed in range(50)}
    assert len(changed - {line}) > 10
    letters = sorted(line.replace(" ", ""))
    assert all(text.startswith("    ") and sorted(text.replace(" ", "")) == letters for text in changed)
    assert {len(text) for text in changed} == {len(line)}
    assert finetuning_tasks.shuffle_tokens("f(a, b, c,", random.Random(0)) is None
    assert finetuning_tasks.shuffle_tokens("x = 1", random.Random(0)) is None
