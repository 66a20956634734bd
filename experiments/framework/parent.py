"""A child process ends with the run that started it, however that was ended. Imports in no time."""

import ctypes
import os
import signal
import sys
import threading
import time

PARENT = "CATS_PARENT"
"""Variable that says to a child which process it must not outlive."""
_PR_SET_PDEATHSIG = 1


def follow_parent() -> None:
    """End this process (as SIGTERM does) when the run that started it ends, however that was ended.

    Linux tells a child of the run itself; a worker of accelerate's launcher, or one elsewhere, looks once a second.
    """
    parent = int(os.environ.get(PARENT, 0))
    if not parent:
        return
    if sys.platform == "linux" and os.getppid() == parent:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before this process could ask
            os.kill(os.getpid(), signal.SIGTERM)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while _alive(parent):
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
