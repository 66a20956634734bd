"""The experiment framework in this process, over toy experiments: resuming, locking, failing, overriding, its files."""

import csv
import errno
import importlib.metadata
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file

from experiments.__main__ import main
from experiments.framework import config as config_module
from experiments.framework import runner
from experiments.framework.config import Config, load_profile, make_config, override
from experiments.framework.results import Row, read_provenance, write_tables
from experiments.framework.runner import is_done, locked, run_experiment

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Measured(Row):
    table: ClassVar[str] = "e90_measured"
    name: str
    value: float | None
    count: int


@pytest.fixture(autouse=True)
def _sigterm() -> Iterable[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Register a function as experiment e90: ``toy(function)``."""

    def register(run: Callable[[Config], Iterable[Row]]) -> None:
        monkeypatch.setitem(config_module.EXPERIMENTS, "e90", "toy_e90")
        monkeypatch.setattr(config_module, "_KEYS", {*config_module._KEYS, "e90"})
        monkeypatch.setitem(sys.modules, "toy_e90", SimpleNamespace(run=run))

    return register


def config_in(folder: Path, **options) -> Config:
    return Config("e90", "toy", folder, options=options)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


# Units and results


def test_unit_runs_once_and_again_when_settings_change(tmp_path: Path) -> None:
    done: list[int] = []

    def compute() -> list[Row]:
        done.append(1)
        return [Measured("a", None, 3), Measured("b", 0.1 + 0.2, 4)]

    first = config_in(tmp_path, limit=1).unit("model/cats-50", compute, (Measured,))
    assert config_in(tmp_path, limit=1).unit("model/cats-50", compute, (Measured,)) == first and len(done) == 1
    assert first[1] == Measured("b", 0.30000000000000004, 4)
    config_in(tmp_path, limit=2).unit("model/cats-50", compute, (Measured,))
    config_in(tmp_path, limit=2).unit("model/cats 50", compute, (Measured,))  # another key with the same slug
    assert len(done) == 3


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"settings": 1}', '{"settings": "SAME", "rows": [["gone", {}]]}'])
def test_a_damaged_unit_is_measured_again(tmp_path: Path, damage: str) -> None:
    config = config_in(tmp_path)
    expected = config.unit("one", lambda: [Measured("a", 1.0, 1)], (Measured,))
    (stored,) = (tmp_path / "state" / "e90").glob("*.json")
    stamp = json.loads(stored.read_text())["settings"]
    stored.write_text(damage.replace("SAME", stamp))
    assert config.unit("one", lambda: [Measured("a", 1.0, 1)], (Measured,)) == expected


def test_an_interrupted_experiment_goes_on(tmp_path: Path, toy: Callable) -> None:
    measured: list[str] = []

    def measure(name: str) -> list[Row]:
        measured.append(name)
        if measured == ["a", "b"]:
            raise KeyboardInterrupt
        return [Measured(name, 1.0, 1)]

    def run(config: Config) -> Iterable[Row]:
        for name in ("a", "b", "c"):
            yield from config.unit(name, lambda name=name: measure(name), [Measured])

    toy(run)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config_in(tmp_path))
    assert not (tmp_path / "results").exists()
    (path,) = run_experiment(config_in(tmp_path))
    assert [row["name"] for row in rows_of(path)] == ["a", "b", "c"]
    assert measured == ["a", "b", "b", "c"]  # "a" once
    assert not (tmp_path / "state" / "e90").exists() and is_done(config_in(tmp_path))
    assert run_experiment(config_in(tmp_path)) == []
    assert run_experiment(config_in(tmp_path), force=True) == [path] and measured[4:] == ["a", "b", "c"]
    path.unlink()
    assert not is_done(config_in(tmp_path))
    assert not is_done(config_in(tmp_path, limit=2))


def test_csv_cells(tmp_path: Path) -> None:
    rows: list[Row] = [Measured('with "quotes", and comma', None, 0), Measured("nan", float("nan"), 2)]
    (path,) = write_tables([*rows, Measured("third", 1 / 3, 10**12)], tmp_path)
    assert path.name == "e90_measured.csv"
    assert path.read_text() == (
        'name,value,count\n"with ""quotes"", and comma",,0\nnan,,2\nthird,0.3333333,1000000000000\n'
    )
    with pytest.raises(ValueError, match="produced no rows"):
        write_tables([], tmp_path)


def test_a_table_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tables([Measured("old", 1.0, 1)], tmp_path)
    before = (tmp_path / "e90_measured.csv").read_text()

    def full(*_arguments) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_tables([Measured("new", 2.0, 2)], tmp_path)
    assert (tmp_path / "e90_measured.csv").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["e90_measured.csv"]  # and no temporary file stays


def test_provenance_says_where_numbers_come_from(tmp_path: Path, toy: Callable) -> None:
    def run(config: Config) -> Iterable[Row]:
        config.notes["data_hash"] = "abc"
        return [Measured("a", 1.0, 1)]

    toy(run)
    run_experiment(config_in(tmp_path, limit=7))
    entry = json.loads((tmp_path / "provenance.json").read_text())["experiments"]["e90"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert entry["commit"] == (commit or None) and entry["dirty"] in (True, False, None)
    assert entry["settings"]["options"] == {"limit": 7} and entry["settings"]["seed"] == 0
    assert entry["versions"]["torch"] == importlib.metadata.version("torch") and entry["versions"]["python"].startswith(
        "3."
    )
    assert entry["hardware"]["cores"] >= 1 and entry["hardware"]["gpus"] == [
        torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
    ]
    assert entry["data_hash"] == "abc" and entry["tables"] == ["e90_measured.csv"] and entry["seconds"] >= 0


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


OUT_OF_MEMORY = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "driver": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "Triton": RuntimeError("Triton Error [CUDA]: out of memory"),
}


@pytest.mark.parametrize("who", OUT_OF_MEMORY)
def test_when_gpu_memory_runs_out_batches_are_halved_and_it_is_said(
    who: str, tmp_path: Path, toy: Callable, capsys
) -> None:
    tried: list[int] = []

    def run(config: Config) -> Iterable[Row]:
        yield from config.unit("small", lambda: [Measured("small", 1.0, 1)], [Measured])
        tried.append(config.options["batch_size"])
        if tried[-1] > 4:
            raise OUT_OF_MEMORY[who]
        yield Measured("large", 2.0, 2)

    toy(run)
    config = config_in(tmp_path, batch_size=16, train_batch_size=8)
    settings = config.settings()
    (path,) = run_experiment(config)
    assert tried == [16, 8, 4] and len(rows_of(path)) == 2
    said = capsys.readouterr().err
    assert "out of GPU memory" in said and "batch_size = 8" in said and "batch_size = 4" in said
    entry = read_provenance(tmp_path)["experiments"]["e90"]
    assert entry["lowered_for_memory"] == {"batch_size": 4} and entry["settings"] == settings
    assert is_done(config_in(tmp_path, batch_size=16, train_batch_size=8))


@pytest.mark.parametrize("device, chosen", [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_the_gpu_asked_for_is_the_current_one(
    device: str, chosen: list[str], tmp_path: Path, toy: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events, streams and graphs of the timings are the current device's."""
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    found: list[list[str]] = []
    toy(lambda config: found.append(list(seen)) or [Measured("a", 1.0, 1)])
    config = config_in(tmp_path)
    config.device = device
    run_experiment(config)
    assert found == [chosen]


def test_other_errors_of_a_gpu_are_not_taken_for_its_memory(tmp_path: Path, toy: Callable) -> None:
    def run(config: Config) -> Iterable[Row]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    toy(run)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_experiment(config_in(tmp_path, batch_size=2))


def test_memory_that_is_too_small_for_one_is_one_sentence(tmp_path: Path, toy: Callable, capsys) -> None:
    def run(config: Config) -> Iterable[Row]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    toy(run)
    profile = tmp_path / "small.toml"
    profile.write_text("[e90]\nbatch_size = 2\n")
    output = tmp_path / "out"
    assert main(["run", "e90", "--profile", str(profile), "--output", str(output), "--device", "cpu"]) == 2
    assert "error: e90 needs more memory than the GPU has" in capsys.readouterr().err


def write_rows(folder: Path) -> list[Row]:
    return [Measured("b" * 50, 1.0, 1)] * 200


def write_pickle(folder: Path) -> list[Row]:
    torch.save(torch.zeros(5000), folder / "optimizer.pt")
    return [Measured("b", 1.0, 1)]


def write_tensors(folder: Path) -> list[Row]:
    save_file({"weight": torch.zeros(5000)}, folder / "adapter_model.safetensors")
    return [Measured("b", 1.0, 1)]


def write_wrapped(folder: Path) -> list[Row]:
    try:
        (folder / "data").write_bytes(bytes(5000))
    except OSError:
        raise RuntimeError("An error occurred while generating the dataset")  # noqa: B904, as libraries do
    return [Measured("b", 1.0, 1)]


@pytest.mark.parametrize("write", [write_rows, write_pickle, write_tensors, write_wrapped])
def test_a_full_disk_is_said_and_loses_nothing(write: Callable, tmp_path: Path, toy: Callable, capsys) -> None:
    """Files of this process are limited to 4 kB while the second unit is written, so that the write itself fails."""
    measured: list[str] = []

    def measure(config: Config, name: str) -> list[Row]:
        measured.append(name)
        return [Measured("a", 1.0, 1)] if name == "a" else write(config.workdir("b"))

    def run(config: Config) -> Iterable[Row]:
        for name in ("a", "b"):
            yield from config.unit(name, lambda name=name: measure(config, name), [Measured])

    toy(run)
    profile = tmp_path / "small.toml"
    profile.write_text("[e90]\n")
    words = ["run", "e90", "--profile", str(profile), "--output", str(tmp_path / "out"), "--device", "cpu"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        assert main(words) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert said.startswith("error: the disk is full (") and "what was finished is kept" in said
    assert main(words) == 0
    assert measured == ["a", "b", "b"]
    assert not list((tmp_path / "out").rglob(".*json*"))


def test_ctrl_c_while_modules_are_imported_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    class Interrupted:
        def find_spec(self, name: str, *_more: object) -> None:
            if name == "experiments.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "experiments.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    assert main([]) == 130
    assert capsys.readouterr().err.startswith("interrupted: what was finished is kept")


def test_an_experiment_that_the_system_killed_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    monkeypatch.setattr(runner, "_command", lambda *_arguments: words)
    (failure,) = runner.run_all([Config("e01", "toy", tmp_path)], [])
    assert failure.startswith("e01 failed with SIGKILL, which the system sends when the machine's memory runs out")


# Locks, names and options


def test_two_runs_in_one_directory_are_refused(tmp_path: Path, toy: Callable, capsys, monkeypatch) -> None:
    toy(lambda config: [Measured("a", 1.0, 1)])
    profile = tmp_path / "small.toml"
    profile.write_text("[e90]\n")
    output = tmp_path / "out"
    words = ["run", "e90", "--profile", str(profile), "--output", str(output), "--device", "cpu"]
    with locked(output):
        monkeypatch.delenv("CATS_LOCK_HELD_FOR")  # as in a process that this one did not start
        assert main(words) == 2
        assert f"another run is writing to {output}" in capsys.readouterr().err
        monkeypatch.setenv("CATS_LOCK_HELD_FOR", str(output.resolve()))
        assert main(words) == 0  # a child of the run that holds it
    assert main(words) == 0


def test_an_output_that_cannot_be_written_to_is_named(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main(["run", "e01", "--output", str(tmp_path / "file" / "out")]) == 2
    said = capsys.readouterr().err
    assert f"error: cannot write to {tmp_path / 'file' / 'out'} (Not a directory): choose another --output\n" == said


BAD = {
    "profile": (["run", "e01", "--profile", "laptp"], "no profile 'laptp': allowed are "),
    "device": (["run", "e01", "--device", "tpu"], "unknown device 'tpu': allowed are auto, cpu, cuda, cuda:N"),
    "dtype": (["run", "e01", "--dtype", "int4"], "unknown dtype 'int4': allowed are auto, float32"),
    "set without =": (["run", "e01", "--set", "e01.bins"], "must look like e02.limit=50"),
    "set of an unknown table": (["run", "e01", "--set", "e99.bins=3"], "must look like e02.limit=50"),
    "set of an unknown option": (
        ["run", "e02", "--set", "e02.limt=50"],
        "e02 has no option limt: allowed are batch_size",
    ),
    "set below a value": (["run", "e01", "--set", "e01.bins.x=3"], "bins is not a table"),
    "nothing left": (["reproduce", "--only", "e01", "--skip", "e01"], "nothing to run"),
    "data without a split": (["run", "e01", "--set", "data.path=a/b"], "a path but no split"),
    "empty models": (["run", "e01", "--set", "models=[]"], "models must be a non-empty list"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case: str, tmp_path: Path, capsys) -> None:
    words, expected = BAD[case]
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and expected in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_unknown_experiments_are_refused_with_the_known_ones(tmp_path: Path, capsys) -> None:
    for words in (["run", "e99"], ["reproduce", "--only", "e99"], ["reproduce", "--skip", "e99"]):
        with pytest.raises(SystemExit) as stopped:
            main([*words, "--output", str(tmp_path)])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and "e99" in said and "e01" in said


@pytest.mark.parametrize(
    ("content", "expected"),
    [("models = [", "is not valid TOML"), ("modles = []", "unknown keys modles"), ("[e01]\n", "no table [e90]")],
)
def test_a_profile_of_ones_own_is_checked(content: str, expected: str, tmp_path: Path, toy: Callable, capsys) -> None:
    toy(lambda config: [])
    profile = tmp_path / "own.toml"
    profile.write_text(content)
    assert main(["run", "e90", "--profile", str(profile), "--output", str(tmp_path)]) == 2
    assert expected in capsys.readouterr().err


def test_overrides_are_typed_and_reach_the_experiment(tmp_path: Path) -> None:
    profile = load_profile("pocket")
    for assignment in (
        "e01.bins=7",
        "e01.targets=[0.25]",
        "data.path=a/b",
        "data.split=c",
        "e01.include_path = a word",
        "e01.models=['x']",
    ):
        override(profile, assignment)
    made = make_config("e01", "pocket", profile, tmp_path)
    assert made.options["bins"] == 7 and made.options["targets"] == [0.25] and made.options["include_path"] == "a word"
    assert made.models == ["x"] and made.data["path"] == "a/b"
    assert make_config("e01", "pocket", load_profile("pocket"), tmp_path).models == ["pocket"]
