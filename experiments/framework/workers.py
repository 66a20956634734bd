"""Units that do not depend on each other, side by side: worker processes that share a run directory's units.

A worker runs the same experiment with the same settings. What is stored it reads; where the experiment has units that
can be computed in any order (`Config.compute_ahead`), each worker takes the next that nobody has taken, and ends when
none is left. The run that started them waits, and then reads all of them. With several GPUs the workers take turns on
which one they see; its memory and the processor's cores are shared evenly. Workers are for several GPUs: three on one
H100 were no faster than one (docs/LOG.md, 2026-11-27).
"""

import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from experiments.framework.parent import PARENT

WORKER = "CATS_WORKER"
"""Variable that says to a process that it is a worker, and which."""
SHARE = "CATS_GPU_SHARE"
"""Variable with the part of its GPU's memory that a worker may take."""
SHARED = ("e02", "e03", "e04", "e07", "e08")
"""Experiments whose units may run side by side (`--workers`); those that time anything must not."""
DISTRIBUTED = tuple(name for name in SHARED if name != "e08")
"""Experiments of which each unit may spread over processes (`--processes`): not e08, which times MLPs as well."""


ALL = 0.9
"""Of a GPU's memory, for the workers on it: the rest is for what is not torch's, and for the run that started them."""


class WorkerFinished(Exception):
    """A worker has nothing left to do."""


def is_worker() -> bool:
    """Whether this process is one of several that compute a run's units."""
    return WORKER in os.environ


class Claims:
    """Which units somebody has taken, as files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def clear(self) -> None:
        """Give all back: nobody works."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            path.unlink()

    def take(self, name: str) -> bool:
        """Whether ``name`` was free, and is this process's now."""
        try:
            (self.folder / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def give_back(self, name: str) -> None:
        """Let somebody else, or this process later, take it."""
        (self.folder / name).unlink(missing_ok=True)


def run_workers(words: list[str], workers: int, gpus: int) -> list[int]:
    """Run a command in so many worker processes at once, their output passed on; their exit statuses."""
    children = [
        subprocess.Popen(
            words, env=_environment(number, workers, gpus), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for number in range(workers)
    ]
    readers = [threading.Thread(target=_pass_on, args=(child, number)) for number, child in enumerate(children)]
    for reader in readers:
        reader.start()
    try:
        return [child.wait() for child in children]
    except BaseException:
        for child in children:
            child.terminate()
        raise
    finally:
        for reader in readers:
            reader.join(timeout=30)


def keep_to_share(device: str) -> None:
    """In a worker that is not alone on its GPU: let torch take no more of its memory than is this worker's, so that it
    runs out of its own (and lowers its batches) and not of what others happen to leave.
    """
    if share := os.environ.get(SHARE):
        import torch

        torch.cuda.set_per_process_memory_fraction(float(share), torch.device(device).index)


def _environment(number: int, workers: int, gpus: int) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // workers)
    environment = {**os.environ, WORKER: str(number), PARENT: str(os.getpid()), "TOKENIZERS_PARALLELISM": "true"}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads))
    if 1 <= gpus < workers:
        environment[SHARE] = str(ALL / math.ceil(workers / gpus))
    if gpus > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        environment["CUDA_VISIBLE_DEVICES"] = visible[number % len(visible)]
    return environment


def _pass_on(child: subprocess.Popen[bytes], number: int) -> None:
    """A worker's lines to this process's stderr, with its number; of a progress bar only the last state of a line."""
    for line in _lines(child):
        sys.stderr.write(f"worker {number}: {line}\n")
        sys.stderr.flush()


def _lines(child: subprocess.Popen[bytes]) -> Iterator[str]:
    assert child.stdout is not None
    for raw in child.stdout:
        if line := raw.decode(errors="replace").rstrip("\n").split("\r")[-1].strip():
            yield line
