"""Threads of the CPU kernel: how many, and what makes it safe to call from several threads and after a fork.

As many as torch uses (``torch.get_num_threads()``), on torch's own OpenMP threads (see `cats_kernels.cpu.team`). Where
torch has none that can be called, or NUMBA_THREADING_LAYER is set, in numba's threading layer: TBB or OpenMP where it
finds a runtime, else its own work queue. Two calls at once in the work queue abort the process, and everywhere they
would compete for the same cores, so a call on several threads holds a lock. A call on one thread enters no layer and
holds neither the lock nor the interpreter's: a server with a worker per core and ``torch.set_num_threads(1)`` runs them
side by side.

Where other programs share the cores, OpenMP threads that spin while they wait still cost the most, ours and torch's
alike: ``OMP_WAIT_POLICY=passive``, set before torch is imported, is worth trying there.

No layer's threads survive a fork. A child whose parent had started them would hang (OpenMP) or abort (numba notices),
so it computes on one thread, and says so once.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numba
import torch

WEIGHTS_PER_THREAD = 2**18
"""Fewer weights than this are not worth waking another thread."""


class _Process:
    """What this process may do with threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.started = False  # threads of numba's layer
        self.lost = False  # them, in a fork
        self.warned = False

    def after_fork(self) -> None:
        self.lock = threading.Lock()  # another thread of the parent may have held it
        self.lost = self.lost or self.started


_process = _Process()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_process.after_fork)


def threads_for(weights: int) -> int:
    """Threads to use for a product with so many weights: torch's number, fewer for little work, one after a fork."""
    most = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    threads = max(1, min(most, weights // WEIGHTS_PER_THREAD))
    if threads > 1 and _process.lost:
        if not _process.warned:
            _process.warned = True
            warnings.warn(
                "This process was forked after its parent had started the CPU kernel's threads, which do not survive "
                "a fork, so the kernel uses one thread here; start processes with spawn to use all.",
                stacklevel=2,
            )
        return 1
    return threads


@contextmanager
def torch_region() -> Iterator[None]:
    """Holds the lock that a call on several of torch's threads needs; do not nest."""
    with _process.lock:
        _process.started = True
        yield


@contextmanager
def parallel_region(threads: int) -> Iterator[None]:
    """Holds the lock that a call on several threads needs, with numba set to so many; do not nest."""
    with _process.lock:
        _process.started = True
        numba.set_num_threads(threads)
        yield
