"""One run per run directory: a lock that the run holds, and one that the process which works for it holds.

The second is what keeps others out when the run was killed and its child still lives.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from experiments.framework.config import RunError

HELD = "CATS_LOCK_HELD_FOR"
"""Variable that says to a child which run directory its parent holds."""


@contextmanager
def locked(output: Path, works: bool = True) -> Iterator[None]:
    """Hold the run directory for this process and its children.

    Args:
        output: the run directory, which is made.
        works: whether this process itself measures, rather than its children.

    Raises:
        RunError: another run holds it, or it cannot be written to.
    """
    held = os.environ.get(HELD) == str(output.resolve())
    run, work = FileLock(output / ".lock"), FileLock(output / ".lock-work")
    try:
        if not held:
            output.mkdir(parents=True, exist_ok=True)
            run.acquire(timeout=0)
        work.acquire(timeout=0)  # held by the orphan of a run that was killed
        if not works:
            work.release()
    except Timeout as error:
        run.release()
        raise RunError(f"another run is writing to {output}: wait for it, or choose another --output") from error
    except OSError as error:
        raise RunError(f"cannot write to {output} ({error.strerror}): choose another --output") from error
    if not held:
        os.environ[HELD] = str(output.resolve())
    try:
        yield
    finally:
        if not held:
            os.environ.pop(HELD, None)
        work.release()
        run.release()
