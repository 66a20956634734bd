"""How time is taken: cold cache, warm-ups, many rounds, every implementation in every round.

The paper's protocol (Figures 3 and 6) is 20 warm-ups, 80 timed rounds, a 256 MB buffer touched between rounds so that
no weight is still in a cache, and the geometric mean. Here the implementations of one comparison are also interleaved
round by round, so that a drift of the machine (clock, neighbours) hits all of them alike and cancels in their ratio.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

FLUSH_BYTES = 256 * 2**20

Calls = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Timing:
    """Wall-clock time of one call, in milliseconds, over ``rounds`` rounds."""

    geomean_ms: float
    p20_ms: float
    p50_ms: float
    p80_ms: float
    rounds: int

    @classmethod
    def of(cls, milliseconds: list[float]) -> Timing:
        """Summarise raw times."""
        times = np.asarray(milliseconds, dtype=np.float64)
        p20, p50, p80 = np.percentile(times, [20, 50, 80])
        return cls(float(np.exp(np.log(times).mean())), float(p20), float(p50), float(p80), len(times))


def last_level_cache_bytes() -> int:
    """Size of the largest cache of the first CPU as Linux reports it; 0 where it cannot be read."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1], 1))
    return max(sizes)


def cpu_flush() -> Callable[[], object]:
    """A call that evicts the CPU's caches by reading a buffer of at least 256 MB and of four last-level caches.

    It reads because large fills use non-temporal stores, which leave the caches as they were; and the buffer is filled
    with ones because untouched zero pages are all backed by one physical page.
    """
    buffer = torch.ones(max(FLUSH_BYTES, 4 * last_level_cache_bytes()) // 4)
    return buffer.sum


def _cpu_times(calls: Calls, warmups: int, rounds: int, flush: bool) -> dict[str, list[float]]:
    evict = cpu_flush() if flush else None
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warmups + rounds):
        # rotate the order: nobody always runs after the same neighbour
        start = index % len(names)
        for name in names[start:] + names[:start]:
            if evict is not None:
                evict()
            begin = time.perf_counter_ns()
            calls[name]()
            elapsed = time.perf_counter_ns() - begin
            if index >= warmups:
                times[name].append(elapsed / 1e6)
    return times


def measure(
    calls: Calls, warmups: int = 20, rounds: int = 80, flush: bool = True, device: str = "cpu"
) -> dict[str, Timing]:
    """Time several implementations against each other, interleaved round by round.

    Args:
        calls: name -> a call without arguments; all of them do the work to be compared.
        warmups: rounds run and thrown away first (compilation, page faults, thread pools).
        rounds: rounds timed, at least 1.
        flush: evict the caches before every call.
        device: where the calls run, "cpu".

    Returns:
        name -> Timing in milliseconds.

    Raises:
        ValueError: for no calls, fewer than one round, or an unknown device.
    """
    if not calls or rounds < 1 or warmups < 0:
        raise ValueError(f"measure needs at least one call and one round, got {len(calls)} calls, {rounds} rounds.")
    if torch.device(device).type != "cpu":
        raise ValueError(f"device is {device!r}; allowed: 'cpu'.")
    gc_was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            times = _cpu_times(calls, warmups, rounds, flush)
    finally:
        if gc_was_enabled:
            gc.enable()
    return {name: Timing.of(values) for name, values in times.items()}
