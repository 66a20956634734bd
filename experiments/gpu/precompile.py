"""Fill Triton's cache from several processes: compiling is what a first run on a GPU spends most of its time on.

Processes, not threads: Python 3.11 parses wrongly in several threads at once.
"""

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Task:
    """A variant of the sparse gated MLP to compile for the current CUDA device."""

    variant: str
    d: int
    m: int
    dtype: torch.dtype
    rows: int
    config: object = None  # a cats_kernels.triton.configs.Config, or None for the chosen one
    decider: str = "gate"
    vector: bool = False  # a threshold for each neuron


def precompile(tasks: Sequence[Task], workers: int | None = None) -> list[str]:
    """Compile every kernel of the tasks into Triton's cache.

    Args:
        tasks: what to compile.
        workers: processes; by default one per CPU, at most 16.

    Returns:
        One message for each task that does not compile or fit the chip: a result, not a failure.
    """
    workers = workers or min(16, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return [message for message in pool.map(_compile, tasks, chunksize=4) if message]


def _compile(task: Task) -> str:
    from cats_kernels.ablation.triton import plan
    from cats_kernels.triton.configs import Config
    from cats_kernels.triton.launch import Call, target_of

    x, weight = (torch.empty(n, task.d, dtype=task.dtype, device="meta") for n in (task.rows, task.m))
    config = task.config if isinstance(task.config, Config) else None
    try:
        threshold = torch.empty(task.m, device="meta") if task.vector else 0.5
        target = target_of(torch.device("cuda", 0))
        call = Call(x, weight, weight, weight, threshold, "silu", x, target, task.decider)
        for launch in plan(task.variant, call, config):
            launch.compile()
    except Exception as error:
        return f"{task}: {type(error).__name__}: {error}"
    return ""
