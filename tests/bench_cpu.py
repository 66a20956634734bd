"""Speed of the CPU kernel, as ratios within one run: against what is expected of it on any machine, and against the
ratios committed for this kind of machine.

Run: ``python -m pytest tests/bench_cpu.py --benchmark-only``. After a change that is meant to alter the speed, or on a
new kind of machine: ``python -m tests.bench_cpu`` measures three times and writes the medians to the baseline.
"""

import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cats_kernels.cpu.launch import sparse_gated_mlp_cpu
from cats_kernels.problem import inputs, weights
from torch import Tensor

from experiments.framework.provenance import machine_name
from experiments.framework.timing import last_level_cache_bytes, measure
from tests.mlp_cases import gate_threshold
from tests.speed_guard import SPARSITIES, Measure, Ratios, best_of, floors, left_at, measured_ratios, too_slow

BASELINE = Path(__file__).with_name("bench_baseline.json")
BAND = 0.25
"""A ratio may fall this far below its baseline. Repeated runs on two shared cores stayed within the band; a kernel that
does its work twice is twice as far out."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
D = 2048
ROUNDS = 15

Kernel = Callable[..., Tensor]


def width(dtype: torch.dtype) -> int:
    """Neurons of a block whose weights are at least 100 MB and four times the last-level cache."""
    wanted = max(100 * 2**20, 4 * last_level_cache_bytes())
    return -(-wanted // (3 * D * dtype.itemsize * 256)) * 256


def ratios(
    dtype_name: str,
    kernel: Kernel = sparse_gated_mlp_cpu,
    rounds: int = ROUNDS,
    m: int | None = None,
    measure: Measure = measure,
) -> Ratios:
    """What `measured_ratios` says of the kernel on a block of ``m`` neurons, by default `width`."""
    dtype = DTYPES[dtype_name]
    x, (gate, up, down_t) = inputs(1, D, dtype), weights(D, m or width(dtype), dtype)
    down = down_t.T.contiguous()
    calls = {}
    for sparsity in SPARSITIES:
        threshold = gate_threshold(x, gate, sparsity) if sparsity else 0.0
        calls[sparsity] = lambda threshold=threshold: kernel(x, gate, up, down_t, threshold)

    def dense() -> Tensor:
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    left = partial(left_at, backend="cpu", dtype=dtype_name)
    return measured_ratios([(gate, up, down)], dense, calls, measure, left, warmups=3, rounds=rounds)


def allowed(dtype_name: str) -> Ratios:
    """Floors of all ratios: what any machine must reach, and what this one did reach, less `BAND`."""
    return floors("cpu", dtype_name) | {name: (1 - BAND) * value for name, value in baseline_for(dtype_name).items()}


def baseline_for(dtype_name: str) -> Ratios:
    """The committed ratios of this kind of machine; empty if there are none."""
    machines = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    return machines.get(machine_name("cpu"), {}).get(dtype_name, {})


@pytest.mark.parametrize("dtype_name", DTYPES)
def test_as_fast_as_expected(benchmark, dtype_name):
    wanted = allowed(dtype_name)
    measured = benchmark.pedantic(best_of, args=(lambda: ratios(dtype_name), wanted), rounds=1)
    benchmark.extra_info.update(measured)
    print(dtype_name, {name: round(value, 2) for name, value in measured.items()})
    assert too_slow(measured, wanted) == []


def test_a_kernel_that_works_twice_is_caught(benchmark):
    def twice(*arguments: object) -> Tensor:
        sparse_gated_mlp_cpu(*arguments)
        return sparse_gated_mlp_cpu(*arguments)

    measured = benchmark.pedantic(ratios, args=("float32", twice, 9), rounds=1)
    assert len(too_slow(measured, floors("cpu", "float32"))) == len(SPARSITIES)


def test_a_kernel_that_skips_nothing_is_caught(benchmark):
    def dense(x: Tensor, gate: Tensor, up: Tensor, down_t: Tensor, _threshold: float) -> Tensor:
        return sparse_gated_mlp_cpu(x, gate, up, down_t, 0.0)

    measured = benchmark.pedantic(ratios, args=("float32", dense, 9), rounds=1)
    caught = too_slow(measured, floors("cpu", "float32"))
    assert {f"bound/{s}" for s in SPARSITIES[1:]} <= {line.split()[0] for line in caught}


def write_baseline(runs: int = 3) -> None:
    """Measure and store the medians of several runs for this kind of machine."""
    machines = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    entry = {}
    for dtype_name in DTYPES:
        measured = [ratios(dtype_name) for _ in range(runs)]
        entry[dtype_name] = {name: round(statistics.median(run[name] for run in measured), 2) for name in measured[0]}
        for run in measured:
            print(dtype_name, {name: round(value, 2) for name, value in run.items()})
    machines[machine_name("cpu")] = entry
    BASELINE.write_text(json.dumps(machines, indent=2) + "\n")


if __name__ == "__main__":
    write_baseline()
