"""Speed of the Triton kernel on this machine's GPU, as ratios within one run, against what is expected of it.

Run: ``python -m pytest tests/bench_triton.py --benchmark-only``; without a CUDA device it is skipped, and
``tests/test_bench.py`` judges made-up times.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cats_kernels.problem import inputs, weights
from torch import Tensor

from experiments.framework.timing import measure
from tests.mlp_cases import gate_threshold
from tests.speed_guard import SPARSITIES, Measure, Ratios, best_of, floors, measured_ratios, too_slow

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHAPE = 4096, 14336  # Mistral-7B
COPIES = 3  # of the weights, each larger than the L2 cache

Kernel = Callable[..., Tensor]


def ours(x: Tensor, gate: Tensor, up: Tensor, down_t: Tensor, threshold: float) -> Tensor:
    """The kernel; imported at the call, since without a GPU Triton need not be there."""
    from cats_kernels.triton.mlp import sparse_gated_mlp_triton

    return sparse_gated_mlp_triton(x, gate, up, down_t, threshold)


def twice(*arguments: object) -> Tensor:
    """A kernel slowed down: its work is done two times."""
    ours(*arguments)
    return ours(*arguments)


def ratios(
    dtype_name: str,
    kernel: Kernel = ours,
    rounds: int = 40,
    shape: tuple[int, int] = SHAPE,
    measure: Measure = measure,
    device: str = "cuda",
) -> Ratios:
    """What `measured_ratios` says of the kernel for one row of x, launched by CUDA graphs."""
    dtype = DTYPES[dtype_name]
    d, m = shape
    x = inputs(1, d, dtype, device=device)
    copies = [weights(d, m, dtype, seed, device) for seed in range(COPIES)]
    downs = [down_t.T.contiguous() for _, _, down_t in copies]
    calls = {}
    for sparsity in SPARSITIES:
        thresholds = [gate_threshold(x, gate, sparsity) if sparsity else 0.0 for gate, _, _ in copies]
        calls[sparsity] = [partial(kernel, x, *copy, t) for copy, t in zip(copies, thresholds, strict=True)]
    dense = [partial(dense_mlp, x, gate, up, down) for (gate, up, _), down in zip(copies, downs, strict=True)]
    return measured_ratios(copies, dense, calls, measure, warmups=10, rounds=rounds, device=device)


def dense_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Torch's own gated MLP."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype_name", DTYPES)
class TestOnTheCard:
    def test_as_fast_as_expected(self, benchmark, dtype_name):
        wanted = floors("triton", dtype_name)
        measured = benchmark.pedantic(best_of, args=(lambda: ratios(dtype_name), wanted), rounds=1)
        benchmark.extra_info.update(measured)
        print(dtype_name, {name: round(value, 2) for name, value in measured.items()})
        assert too_slow(measured, wanted) == []

    def test_a_kernel_that_works_twice_is_caught(self, benchmark, dtype_name):
        measured = benchmark.pedantic(ratios, args=(dtype_name, twice), rounds=1)
        assert len(too_slow(measured, floors("triton", dtype_name))) == len(SPARSITIES)
