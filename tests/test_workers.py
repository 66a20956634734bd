"""Worker processes that compute a run's units side by side give what one process gives."""

import csv
import json
import os
import signal
import sys

import pytest
import torch

from experiments.__main__ import main
from experiments.framework import workers as workers_module
from experiments.framework.config import Config, RunError
from experiments.framework.workers import SHARE, WORKER, Claims, WorkerFinished, keep_to_share
from tests.accuracy_world import build_world, profile


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = build_world(tmp_path_factory.mktemp("world"))
    (root / "tiny.toml").write_text(profile(root))
    return root


@pytest.fixture(autouse=True)
def _signals():
    """The command line sets handlers: pytest gets its own back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(world, experiment, output, workers):
    """The command's exit status; workers are processes of their own, what starts them and reads their units is not."""
    words = ["run", experiment, "--output", str(output), "--profile", str(world / "tiny.toml")]
    return main([*words, "--workers", str(workers)])


def tables(output):
    content = {}
    for path in (output / "results").glob("*.csv"):
        with path.open() as file:
            content[path.stem] = list(csv.DictReader(file))
    return content


def assert_equal(one, two):
    """Numbers to rounding: other processes have other numbers of threads."""
    assert one.keys() == two.keys()
    for name in one:
        assert len(one[name]) == len(two[name]), name
        for a, b in zip(one[name], two[name], strict=True):
            for column in a:
                try:
                    assert float(a[column]) == pytest.approx(float(b[column]), rel=1e-3, abs=1e-3), (name, column)
                except ValueError:
                    assert a[column] == b[column], (name, column)


@pytest.mark.slow
@pytest.mark.parametrize(("experiment", "workers"), [("e02", 3), ("e04", 2)])
def test_workers_give_what_one_process_gives(world, experiment, workers, capfd, monkeypatch):
    """Those of e04 are started twice, for the learning rates and for the runs that need them."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    outputs = [world / f"{experiment}-{number}" for number in (1, workers)]
    for output, number in zip(outputs, (1, workers), strict=True):
        assert run(world, experiment, output, number) == 0, capfd.readouterr().err[-3000:]
    assert "worker 1: " in capfd.readouterr().err
    assert_equal(*map(tables, outputs))
    entry = json.loads((outputs[1] / "provenance.json").read_text())["experiments"][experiment]
    assert entry["workers"] == workers and entry["attempts"] == 1
    alone = json.loads((outputs[0] / "provenance.json").read_text())["experiments"][experiment]
    assert entry["units"].keys() == alone["units"].keys()
    assert entry["models"] == alone["models"]


def test_a_worker_that_fails_is_told(tmp_path):
    failing = [sys.executable, "-c", "import os, sys; print('reason'); sys.exit(os.environ['CATS_WORKER'] == '1')"]
    config = Config("e02", "tiny", tmp_path, workers=2, command=failing)
    with pytest.raises(RunError, match="e02: 1 of 2 workers failed, see the log above; finished units are kept"):
        config.compute_ahead({"a": list, "b": list, "c": list}, ())


def test_a_unit_that_failed_in_a_worker_can_be_taken_again(tmp_path, monkeypatch):
    monkeypatch.setenv(WORKER, "0")
    config, tries = Config("e02", "tiny", tmp_path), []
    Claims(config.store.folder / "claims").clear()

    def fails_once():
        tries.append(None)
        if len(tries) == 1:
            raise MemoryError
        return []

    with pytest.raises(MemoryError):
        config.compute_ahead({"a": fails_once}, ())
    with pytest.raises(WorkerFinished):
        config.compute_ahead({"a": fails_once}, ())
    assert len(tries) == 2 and config.units.keys() == {"a"}


def test_a_number_of_workers_below_one_is_refused(world, tmp_path, capsys):
    assert run(world, "e02", tmp_path, 0) == 2
    assert "--workers must be a whole number, 1 or more, not 0" in capsys.readouterr().err


def test_a_unit_is_taken_once(tmp_path):
    claims = Claims(tmp_path / "claims")
    claims.clear()
    assert claims.take("a.json") and not claims.take("a.json") and claims.take("b.json")
    claims.clear()
    assert claims.take("a.json")


@pytest.mark.parametrize(
    ("workers", "gpus", "share"), [(3, 1, 0.3), (4, 4, None), (2, 4, None), (5, 2, 0.3), (3, 0, None)]
)
def test_workers_on_one_gpu_share_its_memory(workers, gpus, share, monkeypatch):
    given = [workers_module._environment(number, workers, gpus).get(SHARE) for number in range(workers)]
    assert given == [given[0]] * workers and (None if given[0] is None else float(given[0])) == pytest.approx(share)
    taken = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *arguments: taken.append(arguments))
    monkeypatch.setenv(SHARE, given[0]) if given[0] else monkeypatch.delenv(SHARE, raising=False)
    keep_to_share("cuda:1")
    assert taken == ([(pytest.approx(share), 1)] if share else [])


def test_this_process_is_no_worker():
    assert WORKER not in os.environ
