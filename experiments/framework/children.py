"""Experiments in processes of their own: started, listened to, ended, and what their end means in words."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.framework.config import Config
from experiments.framework.parent import PARENT
from experiments.framework.profiles import EXPERIMENTS
from experiments.framework.provenance import now
from experiments.framework.workers import DISTRIBUTED

COMMAND = "CATS_COMMAND"
"""Variable with the command line that the user typed, for the provenance of the children."""
PATIENCE = 3, 20
"""Seconds in which a child may end by itself after Ctrl-C, and after SIGTERM."""


def command(config: Config, arguments: Sequence[str], processes: int) -> list[str]:
    """The command line that runs one experiment, through accelerate's launcher where several processes share it."""
    launcher = [sys.executable, "-m"]
    if processes > 1 and config.experiment in DISTRIBUTED:
        launcher += ["accelerate.commands.launch", "--num_processes", str(processes), "-m"]
        if config.device == "cpu":
            launcher.insert(-1, "--cpu")
    return [*launcher, "experiments", "run", config.experiment, *arguments]


def run_child(words: Sequence[str], log: Path, typed: str = "") -> int:
    """Run a command, its output going both to the terminal and to ``log``; its exit status.

    ``typed`` is the command line that led to it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": str(shutil.get_terminal_size().columns),
        "TOKENIZERS_PARALLELISM": "true",  # said, else tokenizers warns at every fork
        PARENT: str(os.getpid()),
        COMMAND: typed,
    }
    with log.open("ab") as file:
        file.write(f"\n--- {now()} {' '.join(words)}\n".encode())
        child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
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
    for patience, then in zip(PATIENCE, (signal.SIGTERM, signal.SIGKILL), strict=True):
        try:
            child.communicate(timeout=patience)  # reads on, so that it cannot hang writing to a full pipe
            return
        except subprocess.TimeoutExpired:
            child.send_signal(then)
    child.wait()


def ending(code: int) -> str:
    """What a child's exit status other than 0 means."""
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL), which the system does when memory runs out, among other reasons,"
    return f"failed with exit status {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"


def purpose(experiment: str) -> str:
    """First line of an experiment's docstring, without importing it."""
    spec = importlib.util.find_spec(EXPERIMENTS[experiment])
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8").split('"""')[1].strip().split("\n")[0]
