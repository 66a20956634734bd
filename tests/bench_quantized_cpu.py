"""Speed of the CPU kernel on quantised weights, as ratios within one run: over our kernel in bfloat16 at the same
sparsity, and over torch's own weight-only kernels, dense, at the same bits.

Run: ``python -m pytest tests/bench_quantized_cpu.py --benchmark-only``; on an idle machine, where nothing else reads
memory. ``python -m tests.bench_quantized_cpu`` prints the ratios at the shapes of Mistral-7B and Llama2-7B.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cats_kernels import quantize
from cats_kernels.cpu.launch import sparse_gated_mlp_cpu
from cats_kernels.cpu.quantized_launch import sparse_gated_mlp_quantized_cpu
from cats_kernels.problem import inputs, weights

from experiments.e09_quantization.dense import DenseWeights, torch_kernels_mlp
from experiments.framework.timing import measure
from tests.mlp_cases import gate_threshold
from tests.speed_guard import KEPT, Measure, Ratios, best_of, too_slow

FORMATS = {8: None, 4: 128}
SPARSITIES = (0.0, 0.5, 0.9)
SHAPES = {"mistral-7b": (4096, 14336), "llama2-7b": (4096, 11008)}
GOALS = {
    8: {"bfloat16/0.5": 1.7, "torch/0.0": 1.0, "torch/0.5": 1.35, "torch/0.9": 1.9},
    4: {"bfloat16/0.5": 2.6, "torch/0.0": 1.0, "torch/0.5": 1.35, "torch/0.9": 1.9},
}
"""What the kernels shall reach, at 7B shapes on two cores. Where the processor multiplies bfloat16, int8 is at 1.6 over
our kernel of that, which became 5 to 10 % faster."""
FLOORS = {bits: {name: KEPT * goal for name, goal in goals.items()} for bits, goals in GOALS.items()}
"""What they must reach in any moment: int4 over torch moves by a tenth with the machine's memory."""


def ratios(d: int, m: int, bits: int, rounds: int = 25, measure: Measure = measure) -> Ratios:
    """Speed over our bfloat16 kernel ("bfloat16/0.5") and over torch's dense kernel ("torch/0.5"), one row of x."""
    x, (gate, up, down_t) = inputs(1, d, torch.bfloat16), weights(d, m, torch.bfloat16)
    packed = [quantize(weight, bits, FORMATS[bits]) for weight in (gate, up, down_t)]
    dense = DenseWeights(gate, up, down_t.T.contiguous(), bits, FORMATS[bits])
    calls: dict[str, Callable[[], Any]] = {"torch": torch_kernels_mlp(dense, x)}
    for s in SPARSITIES:
        threshold = gate_threshold(x, gate, s) if s else 0.0
        calls[f"bfloat16/{s}"] = lambda t=threshold: sparse_gated_mlp_cpu(x, gate, up, down_t, t)
        calls[f"ours/{s}"] = lambda t=threshold: sparse_gated_mlp_quantized_cpu(x, *packed, t)
    times = {name: timing.p50_ms for name, timing in measure(calls, warmups=3, rounds=rounds).items()}
    over_torch = {f"torch/{s}": times["torch"] / times[f"ours/{s}"] for s in SPARSITIES}
    return over_torch | {f"bfloat16/{s}": times[f"bfloat16/{s}"] / times[f"ours/{s}"] for s in SPARSITIES}


@pytest.mark.parametrize("bits", FORMATS)
def test_as_fast_as_promised(benchmark, bits):
    measure_once = partial(ratios, *SHAPES["mistral-7b"], bits)
    measured = benchmark.pedantic(best_of, args=(measure_once, FLOORS[bits]), rounds=1)
    benchmark.extra_info.update(measured)
    print(f"int{bits}", {name: round(value, 2) for name, value in measured.items()})
    assert too_slow(measured, FLOORS[bits]) == []


if __name__ == "__main__":
    for shape, (d, m) in SHAPES.items():
        for bits in FORMATS:
            print(shape, bits, {name: round(value, 2) for name, value in ratios(d, m, bits).items()}, flush=True)
