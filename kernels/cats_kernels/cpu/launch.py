"""Launch of the fused CPU kernel: tensors in, numpy views to numba, a tensor out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cats_kernels.cpu.kernels import parallel_kernel, serial_kernel
from cats_kernels.cpu.threads import parallel_region, threads_for
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
    y = torch.empty(x.shape)
    deciding, other = (gate_weight, up_weight) if decider == "gate" else (up_weight, gate_weight)
    weights = as_array(deciding), as_array(other), as_array(down_weight_t)
    options = as_thresholds(threshold), activation == "gelu_tanh", decider == "up"
    inputs, output = as_array(x.float()), as_array(y)
    threads = threads_for(3 * gate_weight.numel())
    for i in range(0, x.shape[0], MAX_ROWS):
        launch(threads, inputs[i : i + MAX_ROWS], *weights, *options, output[i : i + MAX_ROWS])
    return y.to(x.dtype)


def launch(threads: int, *arguments: Any) -> None:
    """One call of the kernel for up to MAX_ROWS rows, on so many threads."""
    if threads == 1:
        serial_kernel(*arguments)
    else:
        with parallel_region(threads):
            parallel_kernel(*arguments, threads)
