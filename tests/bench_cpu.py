"""Speed of the CPU kernel, as ratios within one run, against the ratios committed for this kind of machine.

Run: ``python -m pytest tests/bench_cpu.py --benchmark-only``. After a change that is meant to alter the speed, or on a
new kind of machine: ``python -m tests.bench_cpu`` measures three times and writes the medians to the baseline.
"""

import json
import statistics
from collections.abc import Callable
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

BASELINE = Path(__file__).with_name("bench_baseline.json")
BAND = 0.25
"""A ratio may fall this far below its baseline. Repeated runs on two shared cores stayed within the band; a kernel that
does its work twice is twice as far out."""
SPARSITIES = (0.0, 0.5, 0.7, 0.9)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
D = 2048

Kernel = Callable[..., Tensor]


def width(dtype: torch.dtype) -> int:
    """Neurons of a block whose weights are at least 100 MB and four times the last-level cache."""
    wanted = max(100 * 2**20, 4 * last_level_cache_bytes())
    return -(-wanted // (3 * D * dtype.itemsize * 256)) * 256


def ratios(dtype_name: str, kernel: Kernel = sparse_gated_mlp_cpu, rounds: int = 25) -> dict[str, float]:
    """Speed over torch's dense MLP ("dense/0.5") and over the kernel itself at 0 % ("self/0.5"), medians of one run."""
    dtype = DTYPES[dtype_name]
    x, (gate, up, down_t) = inputs(1, D, dtype), weights(D, width(dtype), dtype)
    down = down_t.T.contiguous()
    calls: dict[str, Callable[[], object]] = {
        "dense": lambda: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    }
    for sparsity in SPARSITIES:
        threshold = gate_threshold(x, gate, sparsity) if sparsity else 0.0
        calls[str(sparsity)] = lambda threshold=threshold: kernel(x, gate, up, down_t, threshold)
    times = {name: timing.p50_ms for name, timing in measure(calls, warmups=3, rounds=rounds).items()}
    over_dense = {f"dense/{s}": times["dense"] / times[str(s)] for s in SPARSITIES}
    return over_dense | {f"self/{s}": times["0.0"] / times[str(s)] for s in SPARSITIES[1:]}


def gain_by_bytes(sparsity: float) -> float:
    """Speed over a dense call if time is bytes read: one weight is read whole, two in kept rows only."""
    return 3 / (1 + 2 * (1 - sparsity))


def floors_by_bytes() -> dict[str, float]:
    """What a machine without a baseline must reach: half of the gain that the bytes promise, over torch's dense MLP and
    over the kernel itself at 0 %; where nothing is skipped, at most 3 % slower than dense."""
    floors = {"dense/0.0": 0.97}
    for sparsity in SPARSITIES[1:]:
        floor = 1 + (gain_by_bytes(sparsity) - 1) / 2
        floors |= {f"dense/{sparsity}": floor, f"self/{sparsity}": floor}
    return floors


def regressions(measured: dict[str, float], baseline: dict[str, float]) -> list[str]:
    """What is too slow, in words: out of the band around the machine's baseline, or below `floors_by_bytes` if it has
    none."""
    floors = {name: value * (1 - BAND) for name, value in baseline.items()} or floors_by_bytes()
    return [
        f"{name} is {measured[name]:.2f}, allowed {floor:.2f}"
        for name, floor in floors.items()
        if measured[name] < floor
    ]


def baseline_for(dtype_name: str) -> dict[str, float]:
    """The committed ratios of this kind of machine; empty if there are none."""
    machines = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    return machines.get(machine_name("cpu"), {}).get(dtype_name, {})


@pytest.mark.parametrize("dtype_name", DTYPES)
def test_as_fast_as_the_baseline(benchmark, dtype_name):
    measured = benchmark.pedantic(ratios, args=(dtype_name,), rounds=1)
    benchmark.extra_info.update(measured)
    assert regressions(measured, baseline_for(dtype_name)) == []


def test_a_slowed_kernel_is_caught(benchmark):
    def twice(*arguments: object) -> Tensor:
        sparse_gated_mlp_cpu(*arguments)
        return sparse_gated_mlp_cpu(*arguments)

    measured = benchmark.pedantic(ratios, args=("float32", twice, 9), rounds=1)
    baseline = baseline_for("float32") or ratios("float32", rounds=9)
    caught = regressions(measured, baseline)
    assert {f"dense/{s}" for s in SPARSITIES} <= {line.split()[0] for line in caught}


def test_a_kernel_that_skips_nothing_is_caught_without_a_baseline(benchmark):
    def dense(x: Tensor, gate: Tensor, up: Tensor, down_t: Tensor, _threshold: float) -> Tensor:
        return sparse_gated_mlp_cpu(x, gate, up, down_t, 0.0)

    measured = benchmark.pedantic(ratios, args=("float32", dense, 9), rounds=1)
    caught = regressions(measured, {})
    assert {f"self/{s}" for s in SPARSITIES[1:]} <= {line.split()[0] for line in caught}


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
