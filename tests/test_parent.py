"""A child ends with the run that started it, directly or through a launcher, though that was killed by SIGKILL."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORKER = """
import os, time
from experiments.framework.parent import follow_parent
follow_parent()
print(os.getpid(), flush=True)
time.sleep(120)
"""
LAUNCHER = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WORKER!r}])"
RUN = """
import os, subprocess, sys
environment = {**os.environ, "CATS_PARENT": str(os.getpid())}
subprocess.run([sys.executable, "-c", sys.argv[1]], env=environment)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("code", [WORKER, LAUNCHER], ids=["child", "grandchild"])
def test_a_child_ends_with_the_run(code: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, "-c", RUN, code], stdout=subprocess.PIPE, text=True, env=environment)
    assert run.stdout is not None
    worker = int(run.stdout.readline())
    run.send_signal(signal.SIGKILL)
    run.wait()
    for _ in range(150):
        if not _runs(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    raise AssertionError("the worker outlived the run")


def _runs(process: int) -> bool:
    """Whether a process exists and is no zombie, which nobody here may collect."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_process_of_its_own_follows_nobody() -> None:
    code = "from experiments.framework.parent import follow_parent; follow_parent(); print('here')"
    environment = {key: value for key, value in os.environ.items() if key != "CATS_PARENT"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**environment, "PYTHONPATH": str(ROOT)}
    )
    assert done.stdout == "here\n"
