"""Tables of a run that has not ended: what an interruption writes, and ``--finished-only`` by hand."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.__main__ import main
from experiments.framework import entries, finished
from experiments.framework.config import Config, RunError
from experiments.framework.finished import write_finished
from experiments.framework.provenance import read_provenance
from experiments.framework.results import damage
from experiments.framework.runner import is_done, run_all, run_experiment
from experiments.framework.tables import Row
from experiments.framework.units import write_checked
from tests.toy_experiments import Measured, Sample, config_in, rows_of

NAMES = ("a", "b", "c", "d")


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class World:
    """An experiment of the units a, b, c and d; ``ends_in``: what ends it, once, in a unit."""

    def __init__(self) -> None:
        self.measured: list[str] = []
        self.ends_in: dict[str, Callable[[], object]] = {}

    def run(self, config: Config) -> Iterable[Row]:
        for name in NAMES:
            yield from config.unit(name, lambda name=name: self.measure(config, name), [Measured, Sample])

    def measure(self, config: Config, name: str) -> list[Row]:
        self.measured.append(name)
        config.notes.setdefault("tokens", {})[name] = 7
        if name in self.ends_in:
            self.ends_in.pop(name)()
        return [Measured(name, float(len(self.measured)), 1), Sample(name, "01")]


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.fixture
def world(toy: Callable) -> World:
    made = World()
    toy(made.run)
    return made


def entry_of(folder: Path) -> dict[str, Any]:
    return read_provenance(folder)["experiments"]["e90"]


def names_in(folder: Path) -> list[str]:
    return [row["name"] for row in rows_of(folder / "results" / "e90_measured.csv")]


def interrupted(world: World, folder: Path, name: str = "c", **options: Any) -> None:
    world.ends_in[name] = interrupt
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config_in(folder), **options)


def words(folder: Path, *more: str, device: str = "cpu") -> list[str]:
    """A command line for e90 in a profile of its own."""
    profile = folder / "toy.toml"
    profile.write_text('device = "auto"\n[e90]\n')
    return ["run", "e90", "--profile", str(profile), "--output", str(folder / "out"), "--device", device, *more]


def test_an_interruption_writes_what_is_finished_and_going_on_replaces_it(world: World, tmp_path: Path, capsys) -> None:
    interrupted(world, tmp_path)
    assert names_in(tmp_path) == ["a", "b"]
    said = capsys.readouterr().err
    assert said.endswith("e90: the tables hold 2 finished units; 2 are missing (c, d)\n")
    entry = entry_of(tmp_path)
    assert entry["incomplete"] == {"finished": 2, "missing": ["c", "d"]} and entry["finished"] is None
    assert list(entry["units"]) == ["a", "b"] and entry["tokens"] == {"a": 7, "b": 7}  # not the note of c
    assert entry["tables"] == ["e90_measured.csv", "samples/e90_sample.csv.gz"]
    assert damage(tmp_path / "results", entry) is None  # checksums are those of the files
    assert entry["hardware"]["cores"] >= 1 and entry["versions"]["torch"] and entry["peak_memory_gib"]["resident"] > 0
    assert not is_done(config_in(tmp_path)) and (tmp_path / "state" / "e90").exists()

    run_experiment(config_in(tmp_path))
    assert world.measured == ["a", "b", "c", "c", "d"] and names_in(tmp_path) == list(NAMES)
    assert "is measured again" not in capsys.readouterr().err
    entry = entry_of(tmp_path)
    assert not {"incomplete", "written", "written_by"} & set(entry) and entry["started"] <= entry["finished"]
    assert is_done(config_in(tmp_path)) and not (tmp_path / "state" / "e90").exists()


def test_reproduce_does_not_take_an_unfinished_run_for_a_finished_one(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    interrupted(world, tmp_path)
    monkeypatch.setattr("experiments.framework.runner.purpose", lambda _experiment: "")
    monkeypatch.setattr("experiments.framework.runner.run_child", lambda *_arguments: 0)
    run_all([config_in(tmp_path)], [])
    assert "done already" not in capsys.readouterr().out
    run_experiment(config_in(tmp_path))
    run_all([config_in(tmp_path)], [])
    assert "done already" in capsys.readouterr().out


def test_a_unit_that_fails_leaves_the_tables_of_the_others(world: World, tmp_path: Path) -> None:
    def out_of_memory() -> None:
        raise MemoryError("no memory for d")

    world.ends_in["d"] = out_of_memory
    with pytest.raises(MemoryError, match="no memory for d"):
        run_experiment(config_in(tmp_path))
    assert names_in(tmp_path) == ["a", "b", "c"] and entry_of(tmp_path)["incomplete"]["missing"] == ["d"]


def test_an_interruption_before_the_first_unit_writes_nothing(world: World, tmp_path: Path, capsys) -> None:
    interrupted(world, tmp_path, "a")
    assert not (tmp_path / "results").exists() and not (tmp_path / "provenance.json").exists()
    assert "tables" not in capsys.readouterr().err


def test_a_finished_run_is_not_replaced_by_an_unfinished_one(world: World, tmp_path: Path, capsys) -> None:
    """Neither by a --force that is interrupted, nor by one with other settings, nor by hand."""
    run_experiment(config_in(tmp_path))
    before = (tmp_path / "provenance.json").read_text()
    interrupted(world, tmp_path, force=True)
    assert "holds the tables of a finished run of e90" in capsys.readouterr().err
    with pytest.raises(RunError, match="holds the tables of a finished run of e90"):
        write_finished(config_in(tmp_path))
    assert (tmp_path / "provenance.json").read_text() == before and names_in(tmp_path) == list(NAMES)
    (tmp_path / "results" / "e90_measured.csv").unlink()  # it is no finished run any more
    assert write_finished(config_in(tmp_path)).missing == ["c", "d"] and names_in(tmp_path) == ["a", "b"]


def test_when_the_last_unit_was_finished_the_run_is(world: World, tmp_path: Path) -> None:
    """Killed between its last unit and its tables."""
    list(world.run(config_in(tmp_path)))
    assert write_finished(config_in(tmp_path)).missing == []
    assert "incomplete" not in entry_of(tmp_path) and is_done(config_in(tmp_path))
    assert not (tmp_path / "state" / "e90").exists()


def test_an_experiment_that_needs_what_is_missing_writes_nothing_and_says_so(
    tmp_path: Path, toy: Callable, capsys
) -> None:
    def run(config: Config) -> Iterable[Row]:
        rows = config.unit("a", lambda: [Measured("a", 1.0, 1)], [Measured])
        rows += config.unit("b", lambda: interrupt() or [], [Measured])
        yield replaced(rows)

    def replaced(rows: list[Row]) -> Row:
        first, _second = rows
        return first

    toy(run)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config_in(tmp_path))
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("e90: no tables of the finished units are written (e90 cannot make tables without the units")
    assert "missing (b)" in said and not (tmp_path / "results").exists()


def test_work_outside_of_units_does_not_keep_an_interrupted_run_alive(
    tmp_path: Path, toy: Callable, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(config: Config) -> Iterable[Row]:
        yield from config.unit("a", lambda: [Measured("a", 1.0, 1)], [Measured])
        if not config.finished_only:
            interrupt()
        time.sleep(20)

    toy(run)
    monkeypatch.setattr(finished, "LONGEST", 0.2)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config_in(tmp_path))
    assert time.monotonic() - begin < 10 and not (tmp_path / "results").exists()
    assert "more than 0.2 s of work lie outside of its units" in capsys.readouterr().err
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_failure_outside_of_units_is_said_to_be_one(tmp_path: Path, toy: Callable, capsys) -> None:
    def run(config: Config) -> Iterable[Row]:
        yield from config.unit("a", lambda: [Measured("a", 1.0, 1)], [Measured])
        raise ValueError("broken")

    toy(run)
    with pytest.raises(ValueError, match="broken"):
        run_experiment(config_in(tmp_path))
    assert "written (e90 fails outside of its units: ValueError('broken'))" in capsys.readouterr().err


def test_a_damaged_unit_counts_as_missing(world: World, tmp_path: Path, capsys) -> None:
    interrupted(world, tmp_path, "d")
    config_in(tmp_path).store.path("b").write_text("{")
    assert write_finished(config_in(tmp_path)).missing == ["b", "d"] and names_in(tmp_path) == ["a", "c"]
    assert "e90: b counts as missing: what" in capsys.readouterr().err


def test_workers_are_not_started_for_what_is_finished(tmp_path: Path, toy: Callable) -> None:
    def run(config: Config) -> Iterable[Row]:
        jobs = {name: lambda name=name: [Measured(name, 1.0, 1)] for name in NAMES}
        config.compute_ahead(jobs, [Measured])
        for name, compute in jobs.items():
            yield from config.unit(name, compute, [Measured])

    toy(run)
    config = config_in(tmp_path)
    config.unit("b", lambda: [Measured("b", 1.0, 1)], [Measured])
    config.workers, config.command = 2, ["false"]
    with pytest.raises(RunError, match="2 of 2 workers failed"):  # the parent then writes what is finished
        run_experiment(config)
    assert names_in(tmp_path) == ["b"] and entry_of(tmp_path)["incomplete"]["missing"] == ["a", "c", "d"]


# --- by hand


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_finished_units_are_written_where_the_device_is_not(
    device: str, world: World, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state from a GPU, whose run was killed, on a machine without one and without the model."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    there = config_in(tmp_path / "out")
    there.device, there.models, there.data = "cuda", ["gone.gguf"], {"source": "pocket"}
    gpu = {"hardware": {"gpus": ["H200"]}, "versions": {"torch": "9.9"}}
    there.store.begin_attempt(entries.attempt_facts(there), "2001-01-01T00:00:00", lambda: gpu)
    world.ends_in["d"] = interrupt
    with pytest.raises(KeyboardInterrupt):
        list(world.run(there))
    command = words(tmp_path, "--model", "gone.gguf", device=device)
    assert main(command) == 2 and not (tmp_path / "out" / "results").exists()
    capsys.readouterr()
    measured = list(world.measured)
    assert main([*command, "--finished-only"]) == 0
    out = capsys.readouterr().out
    assert f"wrote {tmp_path / 'out' / 'results' / 'e90_measured.csv'}" in out
    assert "e90: the tables hold 3 finished units; 1 is missing (d)" in out
    assert names_in(tmp_path / "out") == ["a", "b", "c"] and world.measured == measured
    entry = entry_of(tmp_path / "out")
    assert entry["settings"]["device"] == "cuda" and "device" not in entry["differs_from_profile"]
    assert {key: entry[key] for key in gpu} == gpu and entry["peak_memory_gib"] is None
    assert entry["started"] == "2001-01-01T00:00:00" and entry["written_by"].startswith("python -m experiments")
    assert (tmp_path / "out" / "state" / "e90").exists()


def test_what_an_older_state_has_not_noted_is_null(world: World, tmp_path: Path) -> None:
    interrupted(world, tmp_path)
    state = tmp_path / "state" / "e90" / "progress" / "attempts.json"
    write_checked(state, {"attempts": [{"started": "2001-01-01T00:00:00", "seconds": 5.0, "commit": "a" * 40}]})
    write_finished(config_in(tmp_path))
    entry = entry_of(tmp_path)
    for key in ("hardware", "versions", "command", "source_sha256", "processes", "workers", "peak_memory_gib"):
        assert entry[key] is None, key
    assert entry["seconds"] == 5.0 and entry["attempts"] == 1
    state.unlink()
    write_finished(config_in(tmp_path))
    entry = entry_of(tmp_path)
    assert entry["started"] is None and entry["seconds"] is None and entry["attempts"] is None
    run_experiment(config_in(tmp_path))
    assert entry_of(tmp_path)["hardware"]["cores"] >= 1


def test_attempts_on_two_machines_are_both_named(world: World, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(entries, "hardware", lambda: {"gpus": ["H100"]})
    interrupted(world, tmp_path)
    assert entry_of(tmp_path)["hardware"] == {"gpus": ["H100"]} and "hardware_by_attempt" not in entry_of(tmp_path)
    monkeypatch.setattr(entries, "hardware", lambda: {"gpus": ["H200"]})
    run_experiment(config_in(tmp_path))
    entry = entry_of(tmp_path)
    assert entry["hardware"] == {"gpus": ["H200"]} and "versions_by_attempt" not in entry
    assert entry["hardware_by_attempt"] == [{"gpus": ["H100"]}, {"gpus": ["H200"]}]


def test_an_attempt_that_measured_nothing_is_no_machine_of_the_run(world: World, tmp_path: Path, monkeypatch) -> None:
    for gpu, ends_in in (("H100", "c"), ("other", "c")):
        monkeypatch.setattr(entries, "hardware", lambda gpu=gpu: {"gpus": [gpu]})
        interrupted(world, tmp_path, ends_in)
    entry = entry_of(tmp_path)
    assert entry["hardware"] == {"gpus": ["H100"]} and "hardware_by_attempt" not in entry and entry["attempts"] == 2


def test_an_experiment_without_units_names_its_machine_too(tmp_path: Path, toy: Callable) -> None:
    toy(lambda config: [Measured("a", 1.0, 1)])
    run_experiment(config_in(tmp_path))
    assert entry_of(tmp_path)["hardware"]["cores"] >= 1 and entry_of(tmp_path)["versions"]["torch"]


def test_with_nothing_finished_there_is_one_sentence(world: World, tmp_path: Path, capsys) -> None:
    assert main(words(tmp_path, "--finished-only")) == 2
    assert f"error: {tmp_path / 'out' / 'state' / 'e90'} holds no finished unit: there is" in capsys.readouterr().err
    assert not (tmp_path / "out" / "results").exists() and world.measured == []
    world.ends_in["c"] = interrupt
    assert main(words(tmp_path)) == 130
    capsys.readouterr()
    assert main(words(tmp_path, "--finished-only", "--seed", "3")) == 2
    said = capsys.readouterr().err
    assert "holds no finished unit of these settings, but 2 that are damaged or of other settings" in said
    assert main(words(tmp_path, "--finished-only", "--force")) == 2
    assert "--force measures again what --finished-only is to write" in capsys.readouterr().err
    assert main(words(tmp_path, "--finished-only")) == 0 and world.measured == ["a", "b", "c"]


def test_a_finished_run_needs_no_writing(world: World, tmp_path: Path, capsys) -> None:
    assert main(words(tmp_path)) == 0
    before = json.dumps(entry_of(tmp_path / "out"))
    assert main(words(tmp_path, "--finished-only")) == 0
    assert "e90 is done already" in capsys.readouterr().out and json.dumps(entry_of(tmp_path / "out")) == before


def test_a_signal_sent_twice_is_one_interruption(world: World, tmp_path: Path, capsys) -> None:
    """coreutils' timeout sends it twice, and a parent SIGTERM after the terminal's Ctrl-C: tables are still written."""

    def twice() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(os.getpid(), number)

    world.ends_in["b"] = twice
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert main(words(tmp_path)) == 130
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2] == "e90: the tables hold 1 finished unit; 3 are missing (b, c, d)"
    assert lines[-1].startswith("interrupted: what was finished is kept") and names_in(tmp_path / "out") == ["a"]
    assert main(words(tmp_path)) == 0 and names_in(tmp_path / "out") == list(NAMES)
