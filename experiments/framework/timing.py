"""How time is taken: cold cache, warm-ups, many rounds, every implementation in every round.

The paper's protocol (Figures 3 and 6) is 20 warm-ups, 80 timed rounds, a 256 MB buffer touched between rounds so that
no weight is still in a cache, and the geometric mean. Here the implementations of one comparison are also interleaved
round by round, so that a drift of the machine (clock, neighbours) hits all of them alike and cancels in their ratio.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

FLUSH_BYTES = 256 * 2**20

Calls = dict[str, Callable[[], object]]
CudaCalls = Mapping[str, Callable[[], object] | Sequence[Callable[[], object]]]


@dataclass(frozen=True)
class Timing:
    """Wall-clock time of one call, in milliseconds, over ``rounds`` rounds."""

    geomean_ms: float
    p20_ms: float
    p50_ms: float
    p80_ms: float
    rounds: int
    times_ms: tuple[float, ...] = ()

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Timing:
        """Summarise raw times, which it keeps: round i of all calls of one `measure` ran side by side."""
        times = np.asarray(milliseconds, dtype=np.float64)
        p20, p50, p80 = np.percentile(times, [20, 50, 80])
        geomean = float(np.exp(np.log(times).mean()))
        return cls(geomean, float(p20), float(p50), float(p80), len(times), tuple(times.tolist()))


def last_level_cache_bytes() -> int:
    """Size of the largest cache of the first CPU as Linux reports it; 0 where it cannot be read."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1], 1))
    return max(sizes)


def flush_bytes() -> int:
    """Bytes that `cpu_flush` reads: 256 MB, or four last-level caches where those are more."""
    return max(FLUSH_BYTES, 4 * last_level_cache_bytes())


def cpu_flush() -> Callable[[], object]:
    """A call that evicts the CPU's caches by reading a buffer of `flush_bytes`.

    It reads because large fills use non-temporal stores, which leave the caches as they were; and the buffer is filled
    with ones because untouched zero pages are all backed by one physical page.
    """
    buffer = torch.ones(flush_bytes() // 4)
    return buffer.sum


def _cpu_times(calls: Calls, warmups: int, rounds: int, flush: bool) -> dict[str, list[float]]:
    evict = cpu_flush() if flush else None
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warmups + rounds):
        # the order rotates, so that no call always follows the same other one
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


def _single(calls: CudaCalls) -> Calls:
    several = [name for name, call in calls.items() if isinstance(call, Sequence)]
    if several:
        raise ValueError(f"{', '.join(several)}: a sequence of calls is for device 'cuda' only.")
    return {name: call for name, call in calls.items() if not isinstance(call, Sequence)}


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of the calls, one after another. Each runs once first, so that compilation stays outside."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _cuda_times(calls: CudaCalls, warmups: int, rounds: int, flush: bool) -> dict[str, list[float]]:
    """Milliseconds per call, from events around replays of one graph per implementation.

    An implementation given as a sequence does the same work on different copies of the weights. The copies follow each
    other in one graph, as the layers of a model do while it decodes, so the start of the graph counts once for all.
    The flush reads, since written lines would still be on their way out of L2 while the timed call runs.
    """
    works = {name: list(call) if isinstance(call, Sequence) else [call] for name, call in calls.items()}
    graphs = {name: capture(work) for name, work in works.items()}
    buffer = torch.ones(FLUSH_BYTES // 4, device="cuda")
    names = list(graphs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warmups + rounds):
        start = index % len(names)
        events = {}
        for name in names[start:] + names[:start]:
            if flush:
                buffer.sum()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graphs[name].replay()
            end.record()
            events[name] = begin, end
        torch.cuda.synchronize()
        if index >= warmups:
            for name, (begin, end) in events.items():
                times[name].append(begin.elapsed_time(end) / len(works[name]))
    return times


def eager_times(calls: Mapping[str, Callable[[], object]], warmups: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds per call launched from Python on a GPU, as the paper's authors time: events around the launches,
    after 256 MB were written, which the call waits for. Where the host is slower than that, its time counts too, and
    so does a call's wait for the GPU."""
    buffer = torch.empty(FLUSH_BYTES // 4, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    with torch.inference_mode():
        for index in range(warmups + rounds):
            start = index % len(names)
            for name in names[start:] + names[:start]:
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                buffer.fill_(0.0)
                begin.record()
                calls[name]()
                end.record()
                torch.cuda.synchronize()
                if index >= warmups:
                    times[name].append(begin.elapsed_time(end))
    return times


def measure(
    calls: CudaCalls, warmups: int = 20, rounds: int = 80, flush: bool = True, device: str = "cpu"
) -> dict[str, Timing]:
    """Time several implementations against each other, interleaved round by round.

    Args:
        calls: name -> a call without arguments; all of them do the work to be compared. On "cuda" also name -> a
            sequence of calls on different copies of the weights, timed together and averaged; together they should
            exceed the L2 cache several times. They are captured in a CUDA graph, so they must not synchronise.
        warmups: rounds run and thrown away first (compilation, page faults, thread pools).
        rounds: rounds timed, at least 1.
        flush: evict the caches before every call.
        device: where the calls run, "cpu" (wall clock) or "cuda" (events around CUDA graph replays).

    Returns:
        name -> Timing in milliseconds.

    Raises:
        ValueError: for no calls, fewer than one round, or an unknown device.
    """
    if not calls or rounds < 1 or warmups < 0:
        raise ValueError(f"measure needs at least one call and one round, got {len(calls)} calls, {rounds} rounds.")
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; allowed: 'cpu', 'cuda'.")
    gc_was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            if kind == "cuda":
                times = _cuda_times(calls, warmups, rounds, flush)
            else:
                times = _cpu_times(_single(calls), warmups, rounds, flush)
    finally:
        if gc_was_enabled:
            gc.enable()
    return {name: Timing.of(values) for name, values in times.items()}
