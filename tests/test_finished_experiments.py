"""Every experiment makes tables of any part of its units, without a model, in a tiny world."""

import csv
import gzip
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import cats.models
from experiments.framework.config import Config
from experiments.framework.finished import write_finished
from experiments.framework.profiles import load_profile, make_config
from experiments.framework.provenance import read_provenance
from experiments.framework.runner import run_experiment
from experiments.framework.units import UnitStore
from tests import accuracy_world
from tests.test_e08 import E08
from tests.test_e09 import E09

pytestmark = pytest.mark.usefixtures("little_to_flush")
EXPERIMENTS = ("e01", "e02", "e03", "e04", "e07", "e08", "e09")
LATER = ("chosen", "difference", "difference_stderr", "cats_difference", "cats_difference_stderr")
"""Columns that several units make together: without one of them they are empty, or nothing is chosen yet."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = accuracy_world.build_world(tmp_path_factory.mktemp("world"))
    tables = accuracy_world.profile(root) + E08.format(world=root) + E09.format(world=root)
    (root / "tiny.toml").write_text(tables)
    return root


@pytest.fixture(scope="module")
def states(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole runs whose units are still there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UnitStore, "clear", lambda _self: None)
        folder = tmp_path_factory.mktemp("states")
        for experiment in EXPERIMENTS:
            run_experiment(config_of(world, experiment, folder / experiment, None))
    return folder


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(spec: str) -> None:
        raise AssertionError(f"{spec} is read")

    monkeypatch.setattr(cats.models, "loader_of", load)


def config_of(world: Path, experiment: str, output: Path, auto: str | None = "cpu") -> Config:
    return make_config(experiment, "tiny", load_profile(str(world / "tiny.toml")), output, auto)


def rows_in(output: Path) -> Iterator[tuple[tuple[str, str], ...]]:
    """Every row of every table, without the columns `LATER`."""
    for path in sorted((output / "results").rglob("*.csv*")):
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            for row in csv.DictReader(file):
                shown = {key: value for key, value in row.items() if key not in LATER}
                yield (("table", path.name), *shown.items())


def part_of(states: Path, experiment: str, output: Path, kept: list[Path]) -> Path:
    folder = output / "state" / experiment
    folder.mkdir(parents=True)
    for path in kept:
        shutil.copy(path, folder)
    return output


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_any_part_of_the_units_makes_tables(experiment: str, world: Path, states: Path, tmp_path: Path) -> None:
    files = sorted((states / experiment / "state" / experiment).glob("*.json"))
    every = {*read_provenance(states / experiment)["experiments"][experiment]["units"]}
    whole = {*rows_in(states / experiment)}
    assert len(every) == len(files) > 1
    for number, file in enumerate(files):
        without = part_of(states, experiment, tmp_path / f"without {number}", [one for one in files if one != file])
        finished = write_finished(config_of(world, experiment, without))
        assert finished.units == len(files) - 1 and len(finished.missing) == 1
        rows = {*rows_in(without)}
        assert rows < whole or (experiment == "e03" and rows <= whole), file  # all that is written was measured

        alone = part_of(states, experiment, tmp_path / f"alone {number}", [file])
        finished = write_finished(config_of(world, experiment, alone))
        entry = read_provenance(alone)["experiments"][experiment]
        assert set(entry["units"]) | set(finished.missing) == every and len(entry["units"]) == 1
        assert {*rows_in(alone)} < whole and {*rows_in(alone)} | rows == whole, file
    units = part_of(states, experiment, tmp_path / "all", files)
    assert write_finished(config_of(world, experiment, units)).missing == []
    for path in (states / experiment / "results").rglob("*.csv*"):
        assert (units / path.relative_to(states / experiment)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("experiment", ["e03", "e04"])
def test_no_learning_rate_is_chosen_before_all_have_been_tried(
    experiment: str, world: Path, states: Path, tmp_path: Path
) -> None:
    files = sorted((states / experiment / "state" / experiment).glob("*.json"))
    (dropped,) = [file for file in files if "-dense-rate-0.01" in file.name]
    output = part_of(states, experiment, tmp_path / "part", [file for file in files if file != dropped])
    write_finished(config_of(world, experiment, output))
    chosen: dict[str, list[str]] = {}
    for row in accuracy_world.table(output, f"{experiment}_sweep"):
        chosen.setdefault(row["variant"], []).append(row["chosen"])
    assert chosen.pop("dense") == ["False"]
    assert len(chosen) == 2 and all(sorted(flags) == ["False", "True"] for flags in chosen.values())
