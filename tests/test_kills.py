"""Experiments killed by SIGKILL where it hurts: the same command goes on, and ends in equal numbers."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.framework.provenance import read_provenance
from tests.accuracy_world import build_world, profile

DRIVER = """
import gc, importlib, json, os, signal, sys
from pathlib import Path
from transformers import TrainerState
from cats import finetuning
from experiments.__main__ import main
from experiments.framework.profiles import EXPERIMENTS
from experiments.framework.units import UnitStore

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def set_trap(where):
    if where == "in training":  # after a checkpoint at step 2, before the one at step 5
        step_end = finetuning._Recorder.on_step_end
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                die()
            return step_end(self, args, state, control, **kwargs)
        finetuning._Recorder.on_step_end = on_step_end

    if where == "in a checkpoint":  # its last file is half written
        save = TrainerState.save_to_json
        def save_to_json(self, path):
            save(self, path)
            if self.global_step == 5:
                text = Path(path).read_text()
                Path(path).write_text(text[: len(text) // 2])
                die()
        TrainerState.save_to_json = save_to_json

    if where == "between units":
        write, written = UnitStore.write, []
        def write_unit(self, unit):
            write(self, unit)
            written.append(unit)
            if len(written) == 2:
                die()
        UnitStore.write = write_unit

for name in ("e03", "e04"):
    importlib.import_module(EXPERIMENTS[name])
gc.freeze()  # each child collects several times, and none of this can go
for line in sys.stdin:
    where, log, *words = json.loads(line)
    child = os.fork()
    if child == 0:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(file, stream)
        sys.argv = ["experiments", *words]
        set_trap(where)
        sys.exit(main(words))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = build_world(tmp_path_factory.mktemp("world"))
    (root / "tiny.toml").write_text(profile(root))
    return root


class Driver:
    """A process that has imported what takes long, and runs each command in a child of its own."""

    def __init__(self, world: Path) -> None:
        self.world = world
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", DRIVER], env=environment, **pipes)

    def run(self, output: Path, where: str, experiment: str) -> tuple[int, str]:
        """The command's exit status, negative where a signal ended it, and what it said."""
        assert self.process.stdin is not None and self.process.stdout is not None
        log = output.with_suffix(".log")
        words = ["run", experiment, "--profile", str(self.world / "tiny.toml"), "--output", str(output)]
        self.process.stdin.write(json.dumps([where, str(log), *words]) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        return status, log.read_text()


@pytest.fixture(scope="module")
def driver(world: Path) -> Iterator[Driver]:
    driver = Driver(world)
    yield driver
    driver.process.communicate(timeout=60)


def tables(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "results").rglob("*.csv*")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "kills"),
    [("e03", ["in training", "in a checkpoint", "between units"]), ("e04", ["between units", "in training"])],
)
def test_killed_anywhere_it_goes_on_with_equal_numbers(
    experiment: str, kills: list[str], driver: Driver, tmp_path: Path
) -> None:
    status, said = driver.run(tmp_path / "whole", "nowhere", experiment)
    assert status == 0, said[-2000:]
    for where in kills:
        status, said = driver.run(tmp_path / "killed", where, experiment)
        assert status == -signal.SIGKILL, said[-2000:]
        assert not (tmp_path / "killed" / "results").exists()
    status, said = driver.run(tmp_path / "killed", "nowhere", experiment)
    assert status == 0, said[-2000:]
    assert "finished units kept from before" in said
    assert tables(tmp_path / "killed") == tables(tmp_path / "whole")
    entry = read_provenance(tmp_path / "killed")["experiments"][experiment]
    assert entry["attempts"] == len(kills) + 1
    assert not (tmp_path / "killed" / "state" / experiment).exists()
