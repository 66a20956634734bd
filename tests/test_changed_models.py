"""A finished experiment is measured again when the files of its model have changed."""

import os
import shutil
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cats.models import identity
from experiments.framework.config import Config
from experiments.framework.identity import changed_models
from experiments.framework.runner import is_done, run_experiment
from experiments.framework.tables import Row
from tests.conftest import tiny_model
from tests.toy_experiments import Measured, config_in


def test_a_finished_run_counts_no_more_when_its_models_files_have_changed(
    tmp_path: Path, toy: Callable, capsys
) -> None:
    folder, output = tmp_path / "model", tmp_path / "run"
    tiny_model().save_pretrained(folder)
    os.utime(folder / "model.safetensors", (0, 0))

    def run(config: Config) -> Iterable[Row]:
        config.identify(str(folder))
        yield Measured("a", 1.0, 1)

    toy(run)
    assert run_experiment(config_in(output)) and is_done(config_in(output))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights)
    assert is_done(config_in(output))  # younger, and the same
    (folder / "model.safetensors").write_bytes(weights[:-4] + b"1234")
    os.utime(folder / "model.safetensors", (1, 1))  # as a copy that keeps its times
    assert not is_done(config_in(output))
    assert run_experiment(config_in(output)) and is_done(config_in(output))
    assert f"e90 is measured again: the files of {folder} have changed" in capsys.readouterr().err
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("nowhere")
    assert not is_done(config_in(output))
    shutil.rmtree(folder)
    assert is_done(config_in(output))


def test_a_models_name_that_leads_elsewhere_is_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for layers, name in enumerate("ab", 1):
        tiny_model(num_hidden_layers=layers).save_pretrained(tmp_path / name)
    link = tmp_path / "current"
    link.symlink_to("a")
    monkeypatch.setenv("HOME", str(tmp_path))
    known = {name: identity(name) for name in (str(link), "~/a", "~/b")}
    time.sleep(0.05)  # the clock of files ticks more coarsely
    since = datetime.now(UTC).isoformat()
    time.sleep(0.05)
    assert changed_models(known, since) == changed_models(known, None) == []
    link.unlink()
    link.symlink_to("b")
    assert changed_models(known, since) == [str(link)]
    (tmp_path / "a" / "config.json").write_text("{}")
    assert changed_models(known, since) == [str(link), "~/a"]
    assert changed_models({"owner/name": known["~/b"]}, None) == []
