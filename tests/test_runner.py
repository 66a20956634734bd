"""The runner in this process, over made-up experiments: memory, disks, signals and locks."""

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from experiments.__main__ import main
from experiments.framework import children, runner
from experiments.framework.config import Config, RunError
from experiments.framework.locks import locked
from experiments.framework.memory import let_segments_grow
from experiments.framework.provenance import read_provenance
from experiments.framework.runner import is_done, run_experiment
from experiments.framework.tables import Row
from tests.toy_experiments import Measured, config_in, rows_of


@pytest.fixture(autouse=True)
def _sigterm() -> Iterable[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


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
        tried.append(config.options.batch_size)
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


def test_with_smaller_batches_checkpoints_begin_anew(tmp_path: Path) -> None:
    config = config_in(tmp_path, batch_size=16, train_batch_size=8)
    whole = config.workdir("a")
    assert config.workdir("a") == whole
    config.halve_batches()
    halved = config.workdir("a")
    again = config_in(tmp_path, batch_size=16, train_batch_size=8)
    again.halve_batches()
    assert again.workdir("a") == halved != whole and again.stamp("a") == config.stamp("a")


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


def test_experiments_that_train_on_a_gpu_ask_for_segments_that_grow(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    let_segments_grow(config_in(tmp_path, train_batch_size=8))  # on a CPU
    let_segments_grow(SimpleNamespace(device="cuda", options=object()))
    assert not os.environ
    training = SimpleNamespace(device="cuda:1", options=SimpleNamespace(train_batch_size=8))
    let_segments_grow(training)
    assert os.environ == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    monkeypatch.setattr(os, "environ", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"})
    let_segments_grow(training)
    assert list(os.environ) == ["PYTORCH_CUDA_ALLOC_CONF"], "what the user has set stays"


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
    profile = tmp_path / "toy.toml"
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
    profile = tmp_path / "toy.toml"
    profile.write_text("[e90]\n")
    words = ["run", "e90", "--profile", str(profile), "--output", str(tmp_path / "out"), "--device", "cpu"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        assert main(words) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err.splitlines()[-1]
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
    monkeypatch.setattr(runner, "command", lambda *_arguments: words)
    (failure,) = runner.run_all([Config("e01", "toy", tmp_path)], [])
    assert failure.startswith(
        "e01 was killed (SIGKILL), which the system does when memory runs out, among other reasons, after "
    )
    assert children.ending(2) == "failed with exit status 2" and children.ending(-15) == "was ended by SIGTERM"


def test_two_runs_in_one_directory_are_refused(tmp_path: Path, toy: Callable, capsys, monkeypatch) -> None:
    toy(lambda config: [Measured("a", 1.0, 1)])
    profile = tmp_path / "toy.toml"
    profile.write_text("[e90]\n")
    output = tmp_path / "out"
    words = ["run", "e90", "--profile", str(profile), "--output", str(output), "--device", "cpu"]
    with locked(output, works=False):
        monkeypatch.delenv("CATS_LOCK_HELD_FOR")  # as in a process that this one did not start
        assert main(words) == 2
        assert f"another run is writing to {output}" in capsys.readouterr().err
        monkeypatch.setenv("CATS_LOCK_HELD_FOR", str(output.resolve()))
        assert main(words) == 0  # a child of the run that holds it
    assert main(words) == 0


def test_the_child_of_a_run_that_was_killed_keeps_others_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATS_LOCK_HELD_FOR", str(tmp_path.resolve()))  # the child: it holds the work alone
    with locked(tmp_path):
        monkeypatch.delenv("CATS_LOCK_HELD_FOR")
        for works in (True, False):
            with pytest.raises(RunError, match="another run is writing to"), locked(tmp_path, works):
                pass
    with locked(tmp_path):
        pass


def test_an_output_that_cannot_be_written_to_is_named(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main(["run", "e01", "--output", str(tmp_path / "file" / "out")]) == 2
    said = capsys.readouterr().err
    assert f"error: cannot write to {tmp_path / 'file' / 'out'} (Not a directory): choose another --output\n" == said
