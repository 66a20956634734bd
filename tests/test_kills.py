"""Experiments killed by SIGKILL where it hurts: the same command goes on, and ends in equal numbers."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.framework.provenance import read_provenance
from tests.accuracy_world import build_world, profile

DRIVER = """
import os, signal, sys
from pathlib import Path
from transformers import TrainerState
from cats import finetuning
from experiments.__main__ import main
from experiments.framework.units import UnitStore

where = sys.argv[1]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

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

sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = build_world(tmp_path_factory.mktemp("world"))
    (root / "tiny.toml").write_text(profile(root))
    return root


def drive(world: Path, output: Path, where: str, experiment: str) -> subprocess.CompletedProcess[str]:
    words = ["run", experiment, "--profile", str(world / "tiny.toml"), "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-c", DRIVER, where, *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def tables(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "results").rglob("*.csv*")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "kills"),
    [("e03", ["in training", "in a checkpoint", "between units"]), ("e04", ["between units", "in training"])],
)
def test_killed_anywhere_it_goes_on_with_equal_numbers(
    experiment: str, kills: list[str], world: Path, tmp_path: Path
) -> None:
    assert drive(world, tmp_path / "whole", "nowhere", experiment).returncode == 0
    for where in kills:
        done = drive(world, tmp_path / "killed", where, experiment)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        assert not (tmp_path / "killed" / "results").exists()
    done = drive(world, tmp_path / "killed", "nowhere", experiment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "finished units kept from before" in done.stderr
    assert tables(tmp_path / "killed") == tables(tmp_path / "whole")
    entry = read_provenance(tmp_path / "killed")["experiments"][experiment]
    assert entry["attempts"] == len(kills) + 1
    assert not (tmp_path / "killed" / "state" / experiment).exists()
