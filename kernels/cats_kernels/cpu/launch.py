"""Launch of the fused CPU kernel: tensors in, their addresses to numba, a tensor out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cats_kernels.cpu.addressed import addressed_kernels
from cats_kernels.cpu.team import team_kernel
from cats_kernels.cpu.threads import parallel_region, threads_for, torch_region
from cats_kernels.reference import check_decider, gate_activation
from cats_kernels.thresholds import Threshold
from cats_kernels.weights import MAX_ROWS


def as_array(tensor: Tensor) -> np.ndarray:
    """A view of the tensor as numpy; bfloat16, which numpy lacks, as its bits."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def as_thresholds(threshold: Threshold) -> np.ndarray:
    """A threshold as float32 (1,) for all neurons, or (m,)."""
    if isinstance(threshold, Tensor):
        return as_array(threshold.reshape(-1).contiguous())
    with np.errstate(over="ignore"):  # beyond float32's range it is infinite, as in a tensor
        return np.array([threshold], np.float32)


def sparse_gated_mlp_cpu(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: Threshold,
    activation: str = "silu",
    decider: str = "gate",
) -> Tensor:
    """The sparse gated MLP (eq. 1, 4, 5) in one parallel region; bit-identical from run to run at any thread count.

    Args:
        x: (rows, d), float32 or bfloat16, contiguous, on the CPU. Eight rows at a time share the loads of a weight row,
            and a neuron is skipped where none of them keeps it.
        gate_weight, up_weight, down_weight_t: (m, d), contiguous, dtype of ``x``.
        threshold: a number, or a float32 tensor () or (m,); compared in float32 with the float32 deciding product.
        activation: "silu" or "gelu_tanh".
        decider: "gate" or "up": whose weight is read whole.

    Returns:
        (rows, d), dtype of ``x``; accumulated in float32 and rounded once.
    """
    gate_activation(activation)
    check_decider(decider)
    thresholds = as_thresholds(threshold)
    weights = gate_weight, up_weight, down_weight_t
    return by_address(x, weights, thresholds.ctypes.data, thresholds.size, activation, decider)(x)


def by_address(
    x: Tensor, weights: tuple[Tensor, Tensor, Tensor], thresholds: int, count: int, activation: str, decider: str
) -> Callable[[Tensor], Tensor]:
    """The kernel for x (..., d) of this shape and dtype, weights (gate, up, transposed down) and ``count`` thresholds
    where they are now. It keeps none of them alive."""
    m, d = weights[0].shape
    gate, up, down = (weight.data_ptr() for weight in weights)
    deciding, other = (gate, up) if decider == "gate" else (up, gate)
    fixed = deciding, other, down, thresholds
    options = d, m, count, activation == "gelu_tanh", decider == "up"
    rows, dtype, row_bytes = x.numel() // d, x.dtype, 4 * d
    chunks = [(i * row_bytes, min(MAX_ROWS, rows - i)) for i in range(0, rows, MAX_ROWS)]
    serial, parallel = addressed_kernels(dtype)
    team = team_kernel(dtype)

    def call(x: Tensor) -> Tensor:
        inputs = x if dtype == torch.float32 else x.float()
        y = torch.empty_like(inputs)
        first_x, first_y = inputs.data_ptr(), y.data_ptr()
        threads = threads_for(3 * m * d)
        for offset, n in chunks:
            if threads == 1:
                serial(first_x + offset, *fixed, first_y + offset, n, *options, threads)
            elif team is not None:
                with torch_region():
                    team(first_x + offset, *fixed, first_y + offset, n, *options, threads)
            else:
                with parallel_region(threads):
                    parallel(first_x + offset, *fixed, first_y + offset, n, *options, threads)
        return y if dtype == torch.float32 else y.to(dtype)

    return call


def repeated(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: Threshold,
    activation: str,
    decider: str,
) -> Callable[[Tensor], Tensor] | None:
    """`sparse_gated_mlp_cpu` for contiguous x (..., d) of this shape, while weights and threshold keep their addresses;
    None where the threshold is not in memory as the kernel reads it."""
    if not isinstance(threshold, Tensor) or not threshold.is_contiguous():
        return None
    weights = gate_weight, up_weight, down_weight_t
    return by_address(x, weights, threshold.data_ptr(), threshold.numel(), activation, decider)
