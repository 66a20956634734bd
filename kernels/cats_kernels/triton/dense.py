"""The dense masked path made again for a block whose weights stay where they are: three products and one kernel.

A call through `cats_kernels.triton.mlp.dense_masked` looks at every argument and goes through Triton's launcher, which
takes the host longer than the block's own dense forward takes it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cats_kernels.thresholds import VECTOR, Threshold, kind_of
from cats_kernels.triton.kernels import masked_product_kernel
from cats_kernels.triton.launch import INTERPRETED, cdiv, on
from cats_kernels.triton.recorded import current_stream, enqueue_by

BLOCK = 256


class RepeatedDense:
    """`dense_masked` for x (..., d) of one shape, with one block's threshold where it is now.

    Attributes:
        takes_weights: that calls give the weights, which are not kept alive here.
    """

    takes_weights = True

    def __init__(self, x: Tensor, m: int, threshold: Threshold, activation: str, decider: str) -> None:
        """Launches the kernel once on products of its own, so that it is compiled."""
        self.index, self.d = x.device.index, x.shape[-1]
        gate = torch.zeros(x.numel() // self.d, m, dtype=x.dtype, device=x.device)
        kind, n = kind_of(threshold), gate.numel()
        constants: dict[str, Any] = {
            "M": m if kind == VECTOR else 1,
            "THRESHOLD": kind,
            "UP_DECIDES": decider == "up",
            "ACTIVATION": activation,
            "BLOCK": BLOCK,
        }
        grid = (cdiv(n, BLOCK), 1, 1)
        with on(x.device):
            kernel = masked_product_kernel[grid](gate, gate, gate, threshold, n, **constants, num_warps=4)
        address = threshold.data_ptr() if isinstance(threshold, Tensor) else threshold
        fixed = {"threshold": address, "n": n, **constants}
        self.enqueue = enqueue_by(kernel, grid)
        self.values = [fixed.get(name) for name in masked_product_kernel.arg_names]
        self.first = masked_product_kernel.arg_names.index("gate_ptr")  # then up_ptr and h_ptr

    def __call__(self, x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight_t: Tensor) -> Tensor | None:
        """y; None where the current device is not that of x."""
        if self.index is not None and torch._C._cuda_getDevice() != self.index:
            return None
        rows = x.view(-1, self.d)
        gate, up = F.linear(rows, gate_weight), F.linear(rows, up_weight)
        address, filled = gate.data_ptr(), self.values.copy()
        filled[self.first : self.first + 3] = address, up.data_ptr(), address  # h replaces the gate's product
        self.enqueue(current_stream(self.index), filled)
        return torch.mm(gate, down_weight_t).view(x.shape)


def repeated_dense(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: Threshold,
    activation: str,
    decider: str,
) -> RepeatedDense | None:
    """`dense_masked` for contiguous x (..., d) of this shape while the threshold keeps its address; None in Triton's
    interpreter, and for a threshold that is not in memory as the kernel reads it."""
    if INTERPRETED or (isinstance(threshold, Tensor) and not threshold.is_contiguous()):
        return None
    return RepeatedDense(x, gate_weight.shape[0], threshold, activation, decider)
