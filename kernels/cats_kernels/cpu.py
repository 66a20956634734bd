"""The sparse gated MLP on the CPU: one fused, multithreaded kernel compiled by numba.

Threads: as many as torch uses (``torch.get_num_threads()``), in numba's default layer. Where torch brings libgomp (its
wheels for Linux do) numba's OpenMP layer shares torch's pool, so the two do not compete for the cores; else numba
falls back to its own work queue. That one must not be entered twice at once, and is not: the kernels hold the
interpreter lock.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from cats_kernels.cpu_kernels import cats_kernel
from cats_kernels.reference import gate_activation, sparse_gated_mlp_reference

WEIGHTS_PER_THREAD = 2**18
"""Fewer weights than this are not worth waking another thread."""

ROWS = 8
"""Rows of x that share each load of a weight row."""

DENSE_ROWS = {torch.float32: 64}
"""Rows above which torch's three dense products and a mask are faster, by dtype. On two AVX2 cores (d=4096, m=14336,
about 50 % sparsity) float32 takes 360 ms here and 388 ms dense at 64 rows, 100 and 234 at 16, 55 and 215 at 8. bfloat16
has no such number: without bfloat16 arithmetic the dense path takes 2.3 to 2.7 times as long at 8 to 32 rows alike."""


def as_array(tensor: Tensor) -> np.ndarray:
    """A view of the tensor as numpy; bfloat16, which numpy lacks, as its bits."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def set_threads(weights: int) -> int:
    """Tell numba how many threads to use for so many weights, and return it: torch's number, fewer for little work."""
    most = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    threads = max(1, min(most, weights // WEIGHTS_PER_THREAD))
    numba.set_num_threads(threads)
    return threads


def sparse_gated_mlp_cpu(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight_t: Tensor, threshold: float, activation: str = "silu"
) -> Tensor:
    """The sparse gated MLP (eq. 1, 4, 5) in one parallel region; bit-identical from run to run at any thread count.

    Args:
        x: (rows, d), float32 or bfloat16, contiguous, on the CPU. Eight rows at a time share the loads of a weight row,
            and a neuron is skipped where none of them keeps it. Beyond ``DENSE_ROWS`` the dense masked path runs.
        gate_weight, up_weight, down_weight_t: (m, d), contiguous, dtype of ``x``.
        threshold: compared in float32 with the float32 activation.
        activation: "silu" or "gelu_tanh".

    Returns:
        (rows, d), dtype of ``x``; accumulated in float32 and rounded once.
    """
    gate_activation(activation)
    if x.shape[0] > DENSE_ROWS.get(x.dtype, x.shape[0]):
        return sparse_gated_mlp_reference(x, gate_weight, up_weight, down_weight_t, threshold, activation)
    threads = set_threads(3 * gate_weight.numel())
    y = torch.empty(x.shape)
    weights = (as_array(gate_weight), as_array(up_weight), as_array(down_weight_t))
    inputs, output, gelu = as_array(x.float()), as_array(y), activation == "gelu_tanh"
    for i in range(0, x.shape[0], ROWS):
        cats_kernel(inputs[i : i + ROWS], *weights, np.float32(threshold), gelu, output[i : i + ROWS], threads)
    return y.to(x.dtype)
