"""Worker processes that compute a run's units side by side give what one process gives."""

import csv
import json
import os
import subprocess
import sys

import pytest

from experiments.framework.workers import WORKER, Claims
from tests.accuracy_world import build_world, profile


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = build_world(tmp_path_factory.mktemp("world"))
    (root / "tiny.toml").write_text(profile(root))
    return root


def start(world, experiment, output, *options):
    """Run an experiment as a user would."""
    command = [sys.executable, "-m", "experiments", "run", experiment, "--output", str(output)]
    command += ["--profile", str(world / "tiny.toml"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


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
@pytest.mark.parametrize("experiment", ["e02", "e04"])
def test_three_workers_give_what_one_process_gives(world, experiment):
    outputs = [world / f"{experiment}-{workers}" for workers in (1, 3)]
    for output, workers in zip(outputs, (1, 3), strict=True):
        done = start(world, experiment, output, "--workers", str(workers))
        assert done.returncode == 0, done.stderr[-3000:]
    assert "worker 1: " in done.stderr
    assert_equal(*map(tables, outputs))
    entry = json.loads((outputs[1] / "provenance.json").read_text())["experiments"][experiment]
    assert entry["workers"] == 3 and entry["attempts"] == 1
    alone = json.loads((outputs[0] / "provenance.json").read_text())["experiments"][experiment]
    assert entry["units"].keys() == alone["units"].keys()
    assert entry["models"] == alone["models"]


@pytest.mark.slow
def test_a_worker_that_fails_is_told_and_what_others_finished_is_kept(world, tmp_path):
    output = tmp_path / "run"
    broken = start(world, "e02", output, "--workers", "2", "--set", "e02.include_path=/nowhere")
    assert broken.returncode == 2 and "/nowhere" in broken.stderr


def test_a_number_of_workers_below_one_is_refused(world, tmp_path):
    done = start(world, "e02", tmp_path, "--workers", "0")
    assert done.returncode == 2
    assert "--workers must be a whole number, 1 or more, not 0" in done.stderr


def test_a_unit_is_taken_once(tmp_path):
    claims = Claims(tmp_path / "claims")
    claims.clear()
    assert claims.take("a.json") and not claims.take("a.json") and claims.take("b.json")
    claims.clear()
    assert claims.take("a.json")


def test_this_process_is_no_worker():
    assert WORKER not in os.environ
