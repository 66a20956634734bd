"""Runs experiments: each in a process of its own with its log, one after the other, resumable, under a lock.

A process an experiment keeps one experiment's crash, memory or CUDA error from the next; timings are undisturbed
because nothing runs beside them. With several GPUs the same command is started through accelerate's launcher.
"""

import gc
import importlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import PartialState
from filelock import FileLock, Timeout

from experiments.framework.config import EXPERIMENTS, Config, RunError, is_main_process
from experiments.framework.results import (
    Row,
    git_state,
    hardware,
    now,
    read_provenance,
    versions,
    write_provenance,
    write_tables,
)

_LOCK_HELD = "CATS_LOCK_HELD_FOR"  # tells the children that the run directory is already held for them
DISTRIBUTED = ("e02", "e03", "e04", "e07")  # experiments that spread over processes; the timed ones must not

# what cuBLAS, the driver and Triton say, whose allocations are not torch's own
_OUT_OF_MEMORY = re.compile(r"CUBLAS_STATUS_ALLOC_FAILED|CUDA.*: out of memory")


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the run directory for this process and its children.

    Raises:
        RunError: another run holds it, or it cannot be written to.
    """
    if os.environ.get(_LOCK_HELD) == str(output.resolve()):
        yield
        return
    lock = FileLock(output / ".lock")
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunError(f"another run is writing to {output}: wait for it, or choose another --output") from error
    except OSError as error:
        raise RunError(f"cannot write to {output} ({error.strerror}): choose another --output") from error
    os.environ[_LOCK_HELD] = str(output.resolve())
    try:
        yield
    finally:
        os.environ.pop(_LOCK_HELD, None)
        lock.release()


def run_experiment(config: Config, force: bool = False) -> list[Path]:
    """Run one experiment in this process; write its CSVs and its provenance.

    A finished experiment with the same settings is left alone unless ``force``; an interrupted one goes on.

    Returns:
        The CSV files (none when it was already done, or in a process beside the first).
    """
    if force:
        if is_main_process():
            config.clear_state()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            PartialState().wait_for_everyone()  # else the others read units that the first is about to remove
    elif is_done(config):
        return []
    if config.device.startswith("cuda:"):
        torch.cuda.set_device(config.device)  # events, graphs and streams of the timings are the current device's
    started, begin = now(), time.monotonic()
    module = importlib.import_module(EXPERIMENTS[config.experiment])
    rows = _run_within_memory(module, config)
    if not is_main_process():
        return []
    paths = write_tables(rows, config.output / "results")
    entry: dict[str, Any] = {
        **git_state(),
        "settings": config.settings(),
        "versions": versions(),
        "hardware": hardware(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "started": started,
        "seconds": round(time.monotonic() - begin, 1),
        "tables": [path.name for path in paths],
        **config.notes,
    }
    write_provenance(config.output, config.experiment, entry)
    config.clear_state()
    return paths


def _run_within_memory(module: ModuleType, config: Config) -> list[Row]:
    """The experiment's rows; when the GPU's memory runs out, again with smaller batches (finished units are kept).

    Raises:
        RunError: the batches cannot be smaller, or several processes would have to agree on it.
    """
    while True:
        try:
            return list(module.run(config))
        except RuntimeError as error:
            reason = str(error).split("\n")[0]
            if not isinstance(error, torch.OutOfMemoryError) and not _OUT_OF_MEMORY.search(reason):
                raise
            lowered = config.halve_batches() if int(os.environ.get("WORLD_SIZE", "1")) == 1 else {}
            if not lowered:
                advice = "choose a smaller model or dtype, or lower its batches with --set"
                needs = f"{config.experiment} needs more memory than the GPU has"
                raise RunError(f"{needs} ({reason}): {advice}") from error
        words = " and ".join(f"{key} = {value}" for key, value in lowered.items())
        print(f"{config.experiment}: out of GPU memory ({reason}); trying again with {words}", file=sys.stderr)
        gc.collect()  # outside of the except clause, whose traceback keeps the failed attempt's tensors alive
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_done(config: Config) -> bool:
    """Whether the run directory holds this experiment's tables, measured with the same settings."""
    entry = read_provenance(config.output)["experiments"].get(config.experiment)
    if entry is None or entry.get("settings") != config.settings():
        return False
    return all((config.output / "results" / table).exists() for table in entry["tables"])


def run_all(configs: Sequence[Config], arguments: Sequence[str], force: bool = False, processes: int = 1) -> list[str]:
    """Run each experiment in a child process (``python -m experiments run eNN ...``) with its log under logs/.

    Returns:
        One sentence for each experiment that failed, naming its log; the others have finished.
    """
    failures = []
    for number, config in enumerate(configs, 1):
        title = f"[{number}/{len(configs)}] {config.experiment}"
        if not force and is_done(config):
            print(f"{title} is done already (--force measures it again)", flush=True)
            continue
        print(f"{title} {_purpose(config.experiment)}", flush=True)
        log = config.output / "logs" / f"{config.experiment}.log"
        begin = time.monotonic()
        code = _run_child(_command(config, arguments, force, processes), log)
        seconds = time.monotonic() - begin
        if code:
            failures.append(f"{config.experiment} failed with {_ending(code)} after {seconds:.0f} s; its log is {log}")
            print(f"{title} FAILED, see {log}", flush=True)
        else:
            print(f"{title} took {seconds:.0f} s", flush=True)
    return failures


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return "SIGKILL, which the system sends when the machine's memory runs out,"
    return f"exit status {code}" if code > 0 else signal.Signals(-code).name


def _purpose(experiment: str) -> str:
    spec = importlib.util.find_spec(EXPERIMENTS[experiment])  # does not import it
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text().split('"""')[1].split("\n")[0]


def _command(config: Config, arguments: Sequence[str], force: bool, processes: int) -> list[str]:
    launcher = [sys.executable, "-m"]
    if processes > 1 and config.experiment in DISTRIBUTED:
        launcher += ["accelerate.commands.launch", "--num_processes", str(processes), "-m"]
        if config.device == "cpu":
            launcher.insert(-1, "--cpu")
    command = [*launcher, "experiments", "run", config.experiment, *arguments]
    return [*command, "--force"] if force else command


def _run_child(command: Sequence[str], log: Path) -> int:
    """Run ``command``, its output going both to the terminal and to ``log``; its exit status."""
    log.parent.mkdir(parents=True, exist_ok=True)
    columns = str(shutil.get_terminal_size().columns)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": columns, "TOKENIZERS_PARALLELISM": "false"}
    with log.open("ab") as file:
        file.write(f"\n--- {now()} {' '.join(command)}\n".encode())
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
        assert child.stdout is not None
        try:
            while chunk := os.read(child.stdout.fileno(), 65536):
                file.write(chunk)
                file.flush()
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
            return child.wait()
        except BaseException:
            _stop(child)
            raise


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End a child: Ctrl-C in a terminal has reached it too, but a signal to this process alone has not."""
    # SIGTERM, which ends a run as Ctrl-C does: a job started in the background ignores SIGINT, and so do its children
    for patience, then in ((3, signal.SIGTERM), (20, signal.SIGKILL)):
        try:
            child.communicate(timeout=patience)  # reads on, so that it cannot hang in its last words
            return
        except subprocess.TimeoutExpired:
            child.send_signal(then)
    child.wait()
