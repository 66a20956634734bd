"""Whether a kernel is as fast as it must be, on machines never measured before: the judge of ``nox -s bench``.

``tests/bench_expected.toml`` holds the fraction of the byte bound that each backend reaches. The bound is taken in the
same process and rounds, so that a slow machine lowers both; `KEPT` of the fraction must be there, or where memory is
fast of what a kernel's own time leaves of it (`left_at`). A kernel that loses half of its gain over dense, or does its
work twice, is below that.
"""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from experiments.framework.bandwidth import plain_reads
from experiments.framework.timing import Timing

EXPECTED = Path(__file__).with_name("bench_expected.toml")
KEPT = 0.9
"""Share of the expected fraction that must be measured, in the best of `ATTEMPTS`."""
ATTEMPTS = 3
SPARSITIES = (0.0, 0.5, 0.7, 0.9)

Ratios = dict[str, float]
Measure = Callable[..., dict[str, Timing]]


def bytes_needed(matrix_bytes: float, sparsity: float) -> float:
    """Bytes of weights that one row of x needs: the deciding matrix whole, the two others in kept rows only."""
    return matrix_bytes * (1 + 2 * (1 - sparsity))


def measured_ratios(
    copies: Sequence[Sequence[Tensor]],
    dense: Any,
    kernels: Mapping[float, Any],
    measure: Measure,
    left: Callable[[float], float] = lambda rate: 1.0,
    **options: Any,
) -> Ratios:
    """Speed of a kernel in one run: "bound/0.5", the fraction of the byte bound over what is ``left`` of it,
    "dense/0.5", over the dense MLP, and "self/0.5", over itself where it skips nothing.

    Args:
        copies: gate, up and down of each copy of the weights, of one size.
        dense: the call, or on a GPU one call per copy, of torch's dense MLP.
        kernels: sparsity -> the same of the kernel; one of them 0, which reads all weights and counts among the plain
            reads: where it is the fastest, a kernel that skips nothing would seem to be near the bound.
        measure: times named calls against each other, as `experiments.framework.timing.measure` does.
        left: share of the expected fractions at a rate of memory in GB/s.
        **options: passed on to ``measure``.
    """
    reads = plain_reads(copies)
    calls = {"dense": dense} | {name: read.calls if len(copies) > 1 else read.calls[0] for name, read in reads.items()}
    timings = measure(calls | {str(s): call for s, call in kernels.items()}, **options)
    times = {name: timing.p50_ms for name, timing in timings.items()}
    matrix = copies[0][0].nbytes
    moved = {name: read.bytes_moved for name, read in reads.items()} | {"dense": 3 * matrix, "0.0": 3 * matrix}
    rate = max(size / times[name] for name, size in moved.items())
    share = left(rate / 1e6)
    ratios = {f"bound/{s}": bytes_needed(matrix, s) / rate / times[str(s)] / share for s in kernels}
    ratios |= {f"dense/{s}": times["dense"] / times[str(s)] for s in kernels}
    return ratios | {f"self/{s}": times["0.0"] / times[str(s)] for s in kernels if s}


def floors(backend: str, dtype: str) -> Ratios:
    """The fractions of the byte bound that must be reached on any machine, by "bound/SPARSITY"."""
    expected = tomllib.loads(EXPECTED.read_text())[backend][dtype]
    return {f"bound/{s}": KEPT * expected[str(s)] for s in SPARSITIES}


def left_at(rate: float, backend: str, dtype: str) -> float:
    """What a kernel's time beside memory's leaves of the expected fractions at a rate in GB/s: at most 1."""
    expected = tomllib.loads(EXPECTED.read_text())[backend][dtype]
    return min(1.0, 1 / (1 + rate * expected.get("beside_memory", 0.0)) / expected["0.0"])


def too_slow(measured: Ratios, allowed: Ratios) -> list[str]:
    """What lies below its floor, in words."""
    return [
        f"{name} is {measured[name]:.2f}, allowed {floor:.2f}"
        for name, floor in allowed.items()
        if not measured[name] >= floor
    ]


def best_of(measure_once: Callable[[], Ratios], allowed: Ratios, attempts: int = ATTEMPTS) -> Ratios:
    """The best of several measurements, each made only while something is too slow: a neighbour on the machine can only
    slow a call down, and a slow kernel is slow each time."""
    best = measure_once()
    for _ in range(attempts - 1):
        if not too_slow(best, allowed):
            break
        again = measure_once()
        best = {name: max(value, again[name]) for name, value in best.items()}
    return best
