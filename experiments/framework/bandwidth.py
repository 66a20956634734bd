"""What a machine reads per second: plain reads of the very weights whose use is timed, in the same rounds.

A bound on latency is bytes over bandwidth, and no bound if something is faster. So `best_rate` takes the highest rate
that anything reached in the rounds of one comparison: reads of one weight matrix, of all three, on a GPU of a buffer
many times its L2 cache, and every implementation's own bytes over its own time, each the geometric mean of its rounds.
A fraction of the bound is that bound over a geometric mean too (e05 and e09), so that none can exceed 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments.framework.timing import Timing, measure

BUFFER_BYTES = 2 * 10**9
"""Of the large read on a GPU: forty times an H200's L2 cache."""


@dataclass(frozen=True)
class Read:
    """A read to be timed: ``bytes_moved`` by each of ``calls``."""

    calls: Sequence[Callable[[], object]]
    bytes_moved: int


def plain_reads(copies: Sequence[Sequence[Tensor]]) -> dict[str, Read]:
    """Reads of the first matrix and of all of them.

    Args:
        copies: for each copy of the weights its matrices, contiguous, of one size, on one device.

    Returns:
        name -> Read with one call per copy.
    """
    first = copies[0][0]
    reads = {
        "read of one matrix": Read([partial(_read, copy[:1]) for copy in copies], first.nbytes),
        "read of all matrices": Read([partial(_read, copy) for copy in copies], first.nbytes * len(copies[0])),
    }
    return {**reads, **large_reads()} if first.device.type == "cuda" else reads


def large_reads() -> dict[str, Read]:
    """Reductions over `BUFFER_BYTES` of a GPU, in three forms, since none is the fastest on every card."""
    buffer = torch.ones(BUFFER_BYTES // 4, device="cuda")
    rows = buffer.view(-1, 4000)
    forms: dict[str, Callable[[], object]] = {"sum": buffer.sum, "max": buffer.max, "rows": partial(torch.sum, rows, 1)}
    return {f"read of 2 GB, {name}": Read([form], buffer.nbytes) for name, form in forms.items()}


def _read(weights: Sequence[Tensor]) -> None:
    for weight in weights:
        weight.view(torch.float32).sum()  # as float32: torch's sum over bfloat16 on a CPU computes more than it reads


def best_rate(timings: Mapping[str, Timing], bytes_moved: Mapping[str, int]) -> tuple[str, float]:
    """Name and rate, in GB/s (1e9 bytes), of what read fastest by its geometric mean.

    Raises:
        ValueError: nothing was timed.
    """
    rates = {name: bytes_moved[name] / timing.geomean_ms / 1e6 for name, timing in timings.items()}
    if not rates:
        raise ValueError("no bandwidth without a timed call")
    name = max(rates, key=lambda key: rates[key])
    assert math.isfinite(rates[name])
    return name, rates[name]


def read_bandwidth(rounds: int = 20) -> float:
    """The card's own read bandwidth in GB/s (1e9 bytes), from `large_reads` alone."""
    reads = large_reads()
    calls: dict[str, Any] = {name: read.calls for name, read in reads.items()}
    timings = measure(calls, warmups=5, rounds=rounds, flush=False, device="cuda")
    return best_rate(timings, {name: read.bytes_moved for name, read in reads.items()})[1]
