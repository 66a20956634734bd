"""Provenance: commits, checksums, attempts, differences from the profile."""

import hashlib
import importlib.metadata
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.framework import config as config_module
from experiments.framework import entries, provenance
from experiments.framework.config import Config
from experiments.framework.identity import text_identity
from experiments.framework.provenance import merged_sources, read_provenance, source_state
from experiments.framework.runner import run_experiment
from experiments.framework.tables import Row
from tests.toy_experiments import Measured, config_in

ROOT = Path(__file__).parents[1]


def entry_of(folder: Path) -> dict[str, Any]:
    return read_provenance(folder)["experiments"]["e90"]


def test_provenance_says_where_numbers_come_from(tmp_path: Path, toy: Callable, monkeypatch) -> None:
    def run(config: Config) -> Iterable[Row]:
        config.notes["calibration_tokens"] = 7
        return config.unit("a", lambda: [Measured("a", 1.0, 1)], [Measured])

    toy(run)
    monkeypatch.setattr(sys, "argv", ["experiments", "run", "e90", "--set", "e90.limit=a b"])
    run_experiment(config_in(tmp_path, limit=7))
    entry = entry_of(tmp_path)
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert entry["commit"] == (done.stdout.strip() or "unknown") and entry["commits"] == [entry["commit"]]
    assert entry["dirty"] in (True, False, "unknown") and len(entry["source_sha256"]) == 64
    assert entry["settings"]["options"] == {"limit": 7, "batch_size": 16, "train_batch_size": 8, "levels": [0.5]}
    assert entry["settings"]["seed"] == 0 and entry["schema"] == 2
    assert entry["command"] == "python -m experiments run e90 --set 'e90.limit=a b'"
    assert entry["versions"]["torch"] == importlib.metadata.version("torch")
    assert entry["versions"]["python"].startswith("3.")
    assert 0.1 < entry["peak_memory_gib"]["resident"] < entry["hardware"]["memory_gib"]
    assert entry["hardware"]["cores"] >= 1 and entry["hardware"]["gpus"] == [
        torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
    ]
    assert entry["calibration_tokens"] == 7 and entry["tables"] == ["e90_measured.csv"]
    assert entry["attempts"] == 1 and entry["seconds"] >= 0 and entry["units"]["a"]["commit"] == entry["commit"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("/srv/models/gemma.gguf", "gemma.gguf"),
        ("/srv/my models/gemma/", "gemma"),
        (str(ROOT / "runs" / "pocket"), "runs/pocket"),
        (f"--output={ROOT}/runs/a b", "--output=runs/a b"),
        ('e02.include_path="/srv/tasks"', 'e02.include_path="tasks"'),
        ('models=["/srv/a.gguf", "google/gemma-3-270m", "shape:small"]',
         'models=["a.gguf", "google/gemma-3-270m", "shape:small"]'),
        ("models={a:/srv/m}", "models={a:m}"),
        ("file:///srv/m/x", "file://x"),
        ("texts=/srv/a.txt /srv/b.txt", "texts=a.txt b.txt"),
        ("a / b", "a / b"),
        (f"{ROOT}/../elsewhere/x", "x"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("runs/pocket", "runs/pocket"),
        ("../elsewhere", "../elsewhere"),
        ("e02.limit=a b", "e02.limit=a b"),
        ("/", "/"),
    ],
)  # fmt: skip
def test_commands_name_no_folders_of_the_machine(monkeypatch, word: str, expected: str) -> None:
    monkeypatch.setattr(sys, "argv", ["experiments", "run", word])
    assert entries.command_line() == shlex.join(["python", "-m", "experiments", "run", expected])
    monkeypatch.setenv(entries.COMMAND, shlex.join(["python", "-m", "experiments", "reproduce", word]))
    assert entries.command_line() == shlex.join(["python", "-m", "experiments", "reproduce", expected])


def test_a_run_over_two_commits_says_both_and_the_seconds_of_all_attempts(
    tmp_path: Path, toy: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = [{"commit": "a" * 40, "dirty": True}]
    for module in (config_module, entries):
        monkeypatch.setattr(module, "source_state", lambda: states[-1])

    def measure(name: str) -> list[Row]:
        time.sleep(0.2)
        if name == "b" and len(states) == 1:
            raise KeyboardInterrupt
        return [Measured(name, 1.0, 1)]

    def run(config: Config) -> Iterable[Row]:
        for name in ("a", "b"):
            yield from config.unit(name, lambda name=name: measure(name), [Measured])

    toy(run)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config_in(tmp_path))
    states.append({"commit": "b" * 40, "dirty": False})
    run_experiment(config_in(tmp_path))
    entry = entry_of(tmp_path)
    assert entry["commits"] == ["a" * 40, "b" * 40] and entry["commit"] == "b" * 40 and entry["dirty"] is True
    assert [unit["commit"][0] for unit in entry["units"].values()] == ["a", "b"]
    assert entry["attempts"] == 2 and entry["seconds"] >= 0.6 and entry["started"] <= entry["finished"]


@pytest.mark.parametrize(
    ("dirts", "expected"), [([False], False), ([False, "unknown"], "unknown"), (["unknown", True, False], True)]
)
def test_unknown_is_never_clean(dirts: list, expected: object) -> None:
    assert merged_sources([{"commit": "a", "dirty": dirt} for dirt in dirts])["dirty"] == expected


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree with a history, that `source_state` looks at."""
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "a.py").write_text("")
    (tmp_path / ".gitignore").write_text("*.pyc\n")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.delenv("CATS_COMMIT", raising=False)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    return tmp_path


def test_untracked_source_files_are_dirt_and_others_are_not(checkout: Path) -> None:
    state = source_state.__wrapped__
    assert state()["dirty"] is False and len(state()["commit"]) == 40
    (checkout / "runs").mkdir()
    (checkout / "runs" / "a.csv").write_text("")
    (checkout / "cats" / "a.pyc").write_text("")
    assert state()["dirty"] is False
    (checkout / "cats" / "b.py").write_text("")
    assert state()["dirty"] is True


def test_a_tree_inside_of_another_history_is_of_no_known_commit(checkout: Path, monkeypatch) -> None:
    monkeypatch.setattr(provenance, "ROOT", checkout / "cats")
    assert source_state.__wrapped__() == {"commit": "unknown", "dirty": "unknown"}
    monkeypatch.setenv("CATS_COMMIT", "c" * 40)
    assert source_state.__wrapped__() == {"commit": "c" * 40, "dirty": "unknown"}


def test_models_data_and_tasks_are_identified(tmp_path: Path, toy: Callable) -> None:
    def run(config: Config) -> Iterable[Row]:
        config.identify("pocket")
        config.identify_data("text", {"path": "a/b"})
        return [Measured("a", 1.0, 1)]

    toy(run)
    run_experiment(config_in(tmp_path))
    entry = entry_of(tmp_path)
    assert set(entry["models"]) == {"pocket"} and entry["inputs"] == {"text": {"path": "a/b"}}


def test_local_files_of_text_are_hashed(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("{}")
    data = {"path": "json", "data_files": str(tmp_path / "text.jsonl"), "split": "train"}
    assert text_identity(data) == {**data, "sha256": {"text.jsonl": hashlib.sha256(b"{}").hexdigest()}}
    assert text_identity({"source": "pocket"}) == {"source": "pocket"}


BROKEN = [
    "{",
    "[]",
    '{"experiments": []}',
    "{}",
    '{"experiments": {"e90": []}}',
    '{"experiments": {"e90": {"tables": []}}}',
]


@pytest.mark.parametrize("content", BROKEN)
def test_broken_provenance_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "provenance.json").write_text(content)
    with pytest.raises(ValueError, match=r"provenance\.json is broken"):
        read_provenance(tmp_path)
