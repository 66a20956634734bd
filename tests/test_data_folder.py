"""Task data and text from a local folder: the hub's names, no server, and one sentence for what is missing."""

import hashlib
import importlib
import shutil
import socket
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

from cats.evaluation import load_tasks
from cats.models import load_tokenizer
from cats.task_data import check_answer, local_sets, tasks_identity
from experiments import data
from experiments.__main__ import main
from experiments.cli import configs_of, forwarded, parser, profile_of
from experiments.data import check_length, check_text, on_hub, text_identity, texts
from experiments.framework import runner
from experiments.framework.profiles import EXPERIMENTS

from .hub_content import ITEMS, TASKS, save_task_data

INSTRUCTIONS = Path(__file__).parents[1] / "experiments" / "instructions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with the eight tasks' sets and text; the cache of `datasets` is beside it."""
    root = tmp_path_factory.mktemp("data")
    save_task_data(root / "hub")
    (root / "text").mkdir()
    for split, count in {"train": 30, "heldout": 10}.items():
        rows = [{"text": f"{split} document {i}", "source": "made up"} for i in range(count)]
        pd.DataFrame(rows).to_parquet(root / "text" / f"{split}.parquet")
    blocks = [f"  - split: {split}\n    path: {split}.parquet" for split in ("train", "heldout")]
    readme = "\n".join(["---", "configs:", "- config_name: default", "  data_files:", *blocks, "---", ""])
    (root / "text" / "README.md").write_text(readme)
    return root


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every connection is an error, and nothing is found in an earlier test's cache."""

    def refuse(*_arguments: Any) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def copy_of(folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_the_eight_tasks_load_from_the_folder_without_a_connection(folder: Path) -> None:
    original = datasets.load_dataset
    tasks = load_tasks(TASKS, data_folder=folder)
    assert datasets.load_dataset is original
    assert {name: len(task.eval_docs) for name, task in tasks.items()} == dict.fromkeys(TASKS, ITEMS)
    assert (
        tasks["arc_easy"].eval_docs[0]["answerKey"] == "A" and tasks["arc_challenge"].eval_docs[0]["answerKey"] == "B"
    )
    assert tasks["boolq"].config.dataset_path == "aps/super_glue"
    boolq = load_tasks(["instruct_boolq"], INSTRUCTIONS, folder)["instruct_boolq"]
    assert list(boolq.training_docs()) and boolq.doc_to_target(boolq.eval_docs[0]) == 1


def test_the_identity_of_tasks_has_versions_files_and_items(folder: Path, tmp_path: Path) -> None:
    tasks = load_tasks(["boolq", "sciq"], data_folder=folder)
    known = tasks_identity(tasks, folder)
    assert known["boolq"]["version"] == "2.0" and known["boolq"]["data"] == ["aps/super_glue", "boolq"]
    path = "hub/aps/super_glue/boolq/validation-00000-of-00001.parquet"
    assert known["boolq"]["files"][path] == hashlib.sha256((folder / path).read_bytes()).hexdigest()
    assert known["sciq"]["items"] == ITEMS and known["sciq"]["data"] == ["allenai/sciq", None]
    other = copy_of(folder, tmp_path)
    frame = pd.read_parquet(other / path)
    frame["label"] = 0
    frame.to_parquet(other / path)
    changed = tasks_identity(load_tasks(["boolq", "sciq"], data_folder=other), other)
    assert changed["boolq"]["sha256"] != known["boolq"]["sha256"] and changed["sciq"] == known["sciq"]


def test_a_set_that_has_changed_is_read_again(folder: Path, tmp_path: Path) -> None:
    """Not from the cache of `datasets`, which knows a set by its directory's name alone."""
    root = copy_of(folder, tmp_path)
    labels, lines = [], []
    for label in (0, 1):
        for path in (root / "hub/aps/super_glue").rglob("*.parquet"):
            pd.read_parquet(path).assign(label=label).to_parquet(path)
        text = pd.read_parquet(root / "text/train.parquet").assign(text=f"line {label}")
        text.to_parquet(root / "text/train.parquet")
        labels.append(load_tasks(["boolq"], data_folder=root)["boolq"].eval_docs[0]["label"])
        lines.append(next(texts({"folder": str(root)}, "train", 0)))
    assert labels == [0, 1] and lines == ["line 0", "line 1"]


def _rename(root: Path, name: str, column: str) -> None:
    for path in (root / "hub" / name).rglob("*.parquet"):
        pd.read_parquet(path).rename(columns={column: f"{column}_2"}).to_parquet(path)


def _without_split(root: Path) -> None:
    readme = root / "hub/allenai/sciq/README.md"
    readme.write_text(readme.read_text().replace("split: test", "split: testing"))


def _without_configuration(root: Path) -> None:
    readme = root / "hub/allenai/ai2_arc/README.md"
    readme.write_text(readme.read_text().replace("ARC-Easy\n", "ARC-Hard\n"))


@pytest.mark.parametrize(
    ("task", "damage", "says"),
    [
        (
            "piqa",
            lambda root: shutil.rmtree(root / "hub/baber"),
            "has no set baber/piqa: it has Rowan/hellaswag, allenai",
        ),
        ("sciq", lambda root: shutil.rmtree(root / "hub"), r"has no directory hub/"),
        ("sciq", shutil.rmtree, "does not exist"),
        ("sciq", _without_split, r"allenai/sciq in .* does not fit the task .*splits train with .*; testing with"),
        ("arc_easy", _without_configuration, r"allenai/ai2_arc \(ARC-Easy\) in .* cannot be read .*ARC-Hard"),
        ("boolq", lambda root: _rename(root, "aps/super_glue", "passage"), r"aps/super_glue \(boolq\).*passage_2"),
        (
            "boolq",
            lambda root: _rename(root, "aps/super_glue", "label"),
            "answer of its first item, 'label', is none of 2",
        ),
        ("hellaswag", lambda root: _rename(root, "Rowan/hellaswag", "ctx_a"), "KeyError: 'ctx_a'.*ctx_a_2"),
        ("winogrande", lambda root: _rename(root, "allenai/winogrande", "answer"), "KeyError: 'answer'"),
    ],
)
def test_a_set_that_is_missing_or_does_not_fit_is_one_sentence(
    task, damage, says, folder: Path, tmp_path: Path
) -> None:
    root = copy_of(folder, tmp_path)
    damage(root)
    with pytest.raises(OSError, match=f"task {task} cannot be loaded: .*{says}") as caught:
        load_tasks([task], data_folder=root)
    assert "\n" not in str(caught.value) and str(root) in str(caught.value)


def test_only_names_of_the_hub_are_looked_for_in_the_folder(folder: Path) -> None:
    with local_sets(folder) as sets:
        local = datasets.load_dataset("json", data_files=str(_json(folder)), split="train")
        assert local[0] == {"a": 1} and not sets.asked
        assert datasets.load_dataset("allenai/sciq")["train"].num_rows == ITEMS
        assert datasets.load_dataset(str(folder / "hub/allenai/sciq"))["train"].num_rows == ITEMS
        assert sets.asked == ["allenai/sciq"]
    with local_sets(None) as sets, pytest.raises(AssertionError, match="a connection was asked for"):
        socket.create_connection(("localhost", 1))


def _json(folder: Path) -> Path:
    path = folder / "rows.json"
    path.write_text('{"a": 1}\n')
    return path


def test_an_answer_that_is_no_choice_is_refused() -> None:
    class Task:
        OUTPUT_TYPE = "multiple_choice"
        eval_docs = ({"answer": 1},)

        def __init__(self, answer: object) -> None:
            self.answer = answer

        def doc_to_choice(self, _item: object) -> list[str]:
            return ["no", "yes"]

        def doc_to_target(self, _item: object) -> object:
            return self.answer

    for answer in (0, 1, "yes", [0, 1]):
        check_answer(Task(answer))  # type: ignore[arg-type]
    for answer in (-1, 2, "label", [0, 2]):
        with pytest.raises(ValueError, match="is none of 2 choices"):
            check_answer(Task(answer))  # type: ignore[arg-type]


def test_text_comes_from_the_folder_whatever_the_profile_says(folder: Path) -> None:
    for rest in ({"source": "pocket"}, {"source": "hub", "path": "tiiuae/falcon-refinedweb", "split": "train"}):
        source = {**rest, "folder": str(folder)}
        assert not on_hub(source)
        train, heldout = list(texts(source, "train", 0)), list(texts(source, "heldout", 0))
        assert len(train) == 30 and len(heldout) == 10 and not set(train) & set(heldout)
        assert train != list(texts(source, "train", 1)) and sorted(train) == sorted(texts(source, "train", 1))
        assert train == list(texts(source, "train", 0))
    known = text_identity({"folder": str(folder)})
    assert known["text/train.parquet"] == hashlib.sha256((folder / "text/train.parquet").read_bytes()).hexdigest()
    assert text_identity({"source": "pocket"}) == {}


def test_text_that_is_missing_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    root = copy_of(folder, tmp_path)
    source = {"folder": str(root)}
    check_text(source)
    readme = root / "text/README.md"
    readme.write_text(readme.read_text().replace("split: heldout", "split: validation"))
    with pytest.raises(ValueError, match="has no split heldout: it has train, validation"):
        check_text(source)
    frame = pd.read_parquet(root / "text/train.parquet").rename(columns={"text": "content"})
    frame.to_parquet(root / "text/train.parquet")
    (root / "text/README.md").unlink()
    (root / "text/heldout.parquet").unlink()
    with pytest.raises(ValueError, match="has no column text in its split train: it has content, source"):
        check_text(source)
    (root / "text/train.parquet").write_bytes(b"not parquet")
    with pytest.raises(OSError, match=r"the text in .*text cannot be read") as caught:
        check_text(source)
    assert "\n" not in str(caught.value)
    shutil.rmtree(root / "text")
    with pytest.raises(OSError, match="has no directory text/"):
        check_text(source)
    with pytest.raises(OSError, match="does not exist"):
        next(texts({"folder": str(root / "absent")}, "train", 0))


@pytest.mark.parametrize("experiment", ["e01", "e02", "e03", "e07", "e08", "e09"])
def test_a_text_that_is_too_short_is_said_before_a_model_is_loaded(
    experiment: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["run", experiment, "--data", str(folder), "--output", str(tmp_path)]
    (config,) = configs_of(parser().parse_args(words), [experiment])
    module = importlib.import_module(EXPERIMENTS[experiment])
    for name in ("check", "check_models"):
        monkeypatch.setattr(module, name, lambda *_arguments: None, raising=False)
    monkeypatch.setattr(config, "unit", lambda *_arguments: pytest.fail("a unit was begun"))
    monkeypatch.setattr(config, "compute_ahead", lambda *_arguments: pytest.fail("workers were started"))
    options = config.options
    asked = options.blocks if experiment == "e01" else options.calibration_blocks
    if experiment == "e03":
        asked += max(*options.steps, options.sweep_steps) * options.train_batch_size
    if experiment == "e07":
        asked += options.steps * options.train_batch_size
    sentence = rf"the text has only \d+ tokens, but {asked} blocks of {options.length} were asked for"
    with pytest.raises(ValueError, match=sentence):
        list(module.run(config))


def test_a_run_of_several_experiments_says_first_what_the_folder_lacks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the first experiment, which has what it needs, nor any other is begun."""
    monkeypatch.setattr(runner, "run_child", lambda *_arguments: pytest.fail("an experiment was begun"))
    words = ["reproduce", "--data", str(folder), "--output", str(tmp_path / "run"), "--profile", "small"]
    small = [
        "--model",
        "pocket",
        "--device",
        "cpu",
        "--set",
        "e02.calibration_blocks=1",
        "--set",
        "e02.heldout_blocks=1",
        "--set",
        "e02.length=8",
    ]
    for names in (["e02", "e03"], ["e08"]):
        assert main([*words, *small, "--set", 'e08.only=["mlp-speed"]', "--only", *names]) == 2
        assert "the text has only" in capsys.readouterr().err
    shutil.rmtree(copy_of(folder, tmp_path) / "hub" / "allenai" / "sciq")
    words[2] = str(tmp_path / "copy")
    assert main([*words, *small, "--only", "e02"]) == 2
    assert "has no set allenai/sciq" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_left_to_the_experiment_that_refuses_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experiments that only time it run nonetheless."""
    begun: list[str] = []
    monkeypatch.setattr(runner, "run_child", lambda words, *_arguments: begun.append(words[4]) or 0)
    words = ["reproduce", "--data", str(folder), "--output", str(tmp_path / "run"), "--model", "shape:small"]
    main([*words, "--device", "cpu", "--only", "e01", "e05"])
    assert begun == ["e01", "e05"]


def test_all_of_a_text_is_tokenised_only_where_it_may_be_too_short(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer("pocket")
    assert tokenizer is not None
    source = {"folder": str(folder)}
    tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts(source, "train", 0))
    begun: list[int] = []
    original = data.blocks
    monkeypatch.setattr(data, "blocks", lambda *arguments: begun.append(arguments[2]) or original(*arguments))
    monkeypatch.setattr(data, "SAMPLE", 5)
    check_length(source, tokenizer, "train", 0, tokens // 2, 1)
    assert not begun
    check_length(source, tokenizer, "train", 0, tokens, 1)
    assert begun == [tokens]
    with pytest.raises(ValueError, match=f"the text has only {tokens} tokens, but {tokens + 1} blocks of 1"):
        check_length(source, tokenizer, "train", 0, tokens + 1, 1)
    check_length({"source": "pocket"}, tokenizer, "train", 0, 10**9, 1)  # known only once it is read


@pytest.mark.parametrize("profile", ["pocket", "laptop", "paper"])
def test_the_option_reaches_every_profile_and_child_processes(profile: str) -> None:
    arguments = parser().parse_args(["reproduce", "--profile", profile, "--data", "some/folder"])
    assert profile_of(arguments)["data"]["folder"] == "some/folder"
    words = forwarded(arguments)
    assert words[words.index("--data") + 1] == "some/folder"
