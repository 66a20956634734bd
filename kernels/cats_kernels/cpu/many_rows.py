"""Many rows of x on quantised weights, a prompt for instance: some neurons at a time are dequantised, and multiplied by
torch in the dtype that the processor multiplies fast.

That is float32, and bfloat16 for bfloat16 x where there are instructions for it. The mask is that of float32 all the
same, see `cats_kernels.cpu.neurons`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cats_kernels.cpu.dequantise import dequantise_into
from cats_kernels.cpu.neurons import neurons
from cats_kernels.cpu.pieces import WEIGHTS, piece_memory, product_dtype
from cats_kernels.quantized import QuantizedWeight
from cats_kernels.reference import dropped, gate_activation
from cats_kernels.thresholds import Threshold, as_tensor

ROWS = 1024
"""Of x at a time, so that what is between the products is bounded."""


def quantized_mlp_many_rows(
    x: Tensor,
    gate_weight: QuantizedWeight,
    up_weight: QuantizedWeight,
    down_weight_t: QuantizedWeight,
    threshold: Threshold,
    activation: str = "silu",
    decider: str = "gate",
) -> Tensor:
    """`cats_kernels.reference.quantized_mlp_reference` of x (rows, d) on the CPU, float32 or bfloat16, contiguous."""
    m, d = gate_weight.shape
    y = torch.empty_like(x)
    thresholds = as_tensor(threshold, x.device).expand(m).contiguous()
    multiply = _InBfloat16 if product_dtype(x.dtype) == torch.bfloat16 else _InFloat32
    step = min(m, max(1, WEIGHTS // d))
    for rows, out in zip(x.split(ROWS), y.split(ROWS), strict=True):
        piece = multiply(rows, activation, decider)
        sums = torch.zeros(rows.shape, dtype=torch.float32, device=x.device)
        for first in range(0, m, step):
            last = min(m, first + step)
            gate, up, down_t = (weight.rows(first, last) for weight in (gate_weight, up_weight, down_weight_t))
            sums += piece(gate, up, down_t, thresholds[first:last])
        out.copy_(sums)
    return y


class _InFloat32:
    """The MLP of some neurons at a time, with products in float32."""

    dtype = torch.float32

    def __init__(self, x: Tensor, activation: str, decider: str) -> None:
        self.x, self.act, self.gates_decide = x.to(self.dtype), gate_activation(activation), decider == "gate"

    def plain(self, weight: QuantizedWeight) -> Tensor:
        """The weight dequantised, until the next one is."""
        out = piece_memory(*weight.shape, self.dtype)
        dequantise_into(weight, out)
        return out

    def __call__(
        self, gate_weight: QuantizedWeight, up_weight: QuantizedWeight, down_weight_t: QuantizedWeight, limits: Tensor
    ) -> Tensor:
        gate = self.act(F.linear(self.x, self.plain(gate_weight)))
        up = F.linear(self.x, self.plain(up_weight))
        hidden = torch.where(dropped(gate if self.gates_decide else up, limits), 0, gate * up)
        return hidden @ self.plain(down_weight_t)


class _InBfloat16(_InFloat32):
    """The same in bfloat16."""

    dtype = torch.bfloat16

    def __init__(self, x: Tensor, activation: str, decider: str) -> None:
        super().__init__(x, activation, decider)
        self.gelu, self.wide = activation == "gelu_tanh", x.float()
        self.norms = self.wide.norm(dim=1)

    def __call__(
        self, gate_weight: QuantizedWeight, up_weight: QuantizedWeight, down_weight_t: QuantizedWeight, limits: Tensor
    ) -> Tensor:
        product = F.linear(self.x, self.plain(gate_weight))
        gate, up = self.act(product), F.linear(self.x, self.plain(up_weight))
        if self.gates_decide:
            deciding = gate_weight, self.wide, self.norms, product, gate, up
        else:
            deciding = up_weight, self.wide, self.norms, up, up, gate
        hidden = neurons(*deciding, limits, self.gelu, not self.gates_decide)
        return hidden @ self.plain(down_weight_t)
