"""A made-up experiment, one module and one section in folders of their own: it runs, resumes, and is rendered."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

EXPERIMENT = '''"""Weighs apples: a made-up experiment."""
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from experiments.framework.cost import Cost
from experiments.framework.options import Count
from experiments.framework.tables import Row


@dataclass(frozen=True)
class AppleRow(Row):
    """The weight of one apple."""

    table: ClassVar[str] = "e91_apples"
    key: ClassVar[tuple[str, ...]] = ("apple",)
    apple: str
    grams: float


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of e91."""

    grams: Count
    worm: str


def cost(config):
    return Cost(fixed_seconds=90.0, uses_models=False)


def run(config):
    for number, apple in enumerate(("gala", "fuji")):
        yield from config.unit(apple, lambda: weigh(config, apple, number), [AppleRow])


def weigh(config, apple, number):
    if apple == "fuji" and Path(config.options.worm).exists():
        raise ValueError("there is a worm in it")
    print("weighing", apple)
    return [AppleRow(apple, config.options.grams + number)]
'''
SECTION = """
from experiments.e91_toy import AppleRow
from reports.core.document import Table
from reports.core.section import Section


def contents(run):
    return [Table(run.table(AppleRow), "Weights of apples.")]


SECTION = Section("e91", "Apples on the scales", (AppleRow,), contents=contents)
"""


@pytest.fixture
def reproduce(tmp_path: Path):
    for folder, name, text in (("measuring", "e91_toy.py", EXPERIMENT), ("telling", "e91.py", SECTION)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    (tmp_path / "toy.toml").write_text(f"device = 'cpu'\n[e91]\ngrams = 180\nworm = '{tmp_path / 'worm'}'\n")
    environment = {
        **os.environ,
        "CATS_EXPERIMENTS": str(tmp_path / "measuring"),
        "CATS_REPORTS": str(tmp_path / "telling"),
    }

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "experiments", "reproduce", "--profile", str(tmp_path / "toy.toml")]
        command += ["--output", str(tmp_path / "out"), *words]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)

    return run


@pytest.mark.slow
def test_a_made_up_experiment_runs_resumes_and_is_rendered(reproduce, tmp_path: Path) -> None:
    (tmp_path / "worm").touch()
    planned = reproduce("--plan")
    assert planned.returncode == 0, planned.stderr
    line = next(line for line in planned.stdout.splitlines() if line.startswith("e91"))
    assert line.split()[-4:] == ["1.5", "min", "this", "one"]  # on an H200; here it follows this host
    wrong = reproduce("--set", "e91.grams=0")
    assert wrong.returncode == 2 and wrong.stderr == "error: e91.grams must be a whole number, 1 or more, not 0\n"
    assert not (tmp_path / "out").exists()
    failed = reproduce()
    assert failed.returncode != 0 and "[1/1] e91 Weighs apples: a made-up experiment." in failed.stdout
    assert "e91 failed with exit status 2" in failed.stderr and "there is a worm in it" in failed.stdout
    (tmp_path / "worm").unlink()
    done = reproduce("--set", "e91.grams=180")
    assert done.returncode == 0, done.stderr
    assert "e91 goes on: 1 finished unit kept from before (gala)" in done.stdout
    assert "weighing fuji" in done.stdout and "weighing gala" not in done.stdout
    assert (tmp_path / "out" / "results" / "e91_apples.csv").read_text() == "apple,grams\ngala,180\nfuji,181\n"
    report = (tmp_path / "out" / "report.md").read_text()
    assert "Apples on the scales" in report and "Weights of apples." in report and "181" in report
    entry = json.loads((tmp_path / "out" / "provenance.json").read_text())["experiments"]["e91"]
    assert entry["attempts"] == 2 and entry["differs_from_profile"] == {}
    assert entry["command"].startswith("python -m experiments reproduce --profile ")
