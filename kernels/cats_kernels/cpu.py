"""The sparse gated MLP on the CPU: one fused, multithreaded kernel compiled by numba, and the ablations of Figure 6.

Threads: as many as torch uses (``torch.get_num_threads()``), in numba's default layer. Where torch brings libgomp (its
wheels for Linux do) numba's OpenMP layer shares torch's pool, so the two do not compete for the cores; else numba
falls back to its own work queue. That one must not be entered twice at once, and is not: the kernels hold the
interpreter lock.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import torch
from torch import Tensor

from cats_kernels.cpu_kernels import cats_kernel
from cats_kernels.reference import gate_activation

WEIGHTS_PER_THREAD = 2**18
"""Fewer weights than this are not worth waking another thread."""


def _array(tensor: Tensor) -> np.ndarray:
    """A view of the tensor as numpy; bfloat16, which numpy lacks, as its bits."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _set_threads(weights: int) -> int:
    """Tell numba how many threads to use for so many weights, and return it: torch's number, fewer for little work."""
    threads = max(1, min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS, weights // WEIGHTS_PER_THREAD))  # type: ignore[attr-defined]
    numba.set_num_threads(threads)
    return threads


def sparse_gated_mlp_cpu(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight_t: Tensor, threshold: float, activation: str = "silu"
) -> Tensor:
    """The sparse gated MLP (eq. 1, 4, 5) in one parallel region; bit-identical from run to run at any thread count.

    Args:
        x: (rows, d), float32 or bfloat16, contiguous, on the CPU. Rows share every load of a weight row, and a neuron
            is skipped where no row keeps it; meant for 1 to 8 rows.
        gate_weight, up_weight, down_weight_t: (m, d), contiguous, dtype of ``x``.
        threshold: compared in float32 with the float32 activation.
        activation: "silu" or "gelu_tanh".

    Returns:
        (rows, d), dtype of ``x``; accumulated in float32 and rounded once.
    """
    gate_activation(activation)
    threads = _set_threads(3 * gate_weight.numel())
    y = torch.empty(x.shape)
    weights = (_array(gate_weight), _array(up_weight), _array(down_weight_t))
    gelu = activation == "gelu_tanh"
    cats_kernel(_array(x.float()), *weights, np.float32(threshold), gelu, _array(y), threads)
    return y.to(x.dtype)


VARIANTS: dict[str, Callable[..., Tensor]] = {"cats": sparse_gated_mlp_cpu}
