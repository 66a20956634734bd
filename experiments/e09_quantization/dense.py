"""The dense MLP on quantised weights as torch computes it: its own int8 and int4 kernels, and inductor's int8."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from cats_kernels.quantized import QuantizedWeight, dequantize, quantize, unpack
from torch import Tensor

from experiments.e05_mlp_latency.compiled import MODE

INNER_TILES = 8
"""Of `_convert_weight_to_int4pack` on CUDA: the most that it takes, and the fastest."""
Linear = Callable[[Tensor], Tensor]


class DenseWeights:
    """What a dense MLP of torch's kernels needs: gate and up (m, d) as one weight, and down (d, m), quantised along
    their inputs.

    Attributes:
        gate_up, down: quantised weights.
        values: what all three dequantise to, float32.
        nbytes: that one call reads.
    """

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, bits: int, group_size: int | None) -> None:
        self.m = gate.shape[0]
        self.gate_up = quantize(torch.cat([gate, up]), bits, group_size)
        self.down = quantize(down, bits, group_size)
        self.nbytes = self.gate_up.nbytes + self.down.nbytes

    def expected(self, x: Tensor) -> Tensor:
        """The MLP with SiLU in float64, (rows, d)."""
        gate, up = F.linear(x.double(), dequantize(self.gate_up).double()).split(self.m, -1)
        return F.linear(F.silu(gate) * up, dequantize(self.down).double())


def torch_kernels_mlp(weights: DenseWeights, x: Tensor) -> Callable[[], Tensor]:
    """The MLP by `_weight_int8pack_mm` or `_weight_int4pack_mm`: two products and the activation between them."""
    gate_up, down = (torch_linear(weight, x.device.type) for weight in (weights.gate_up, weights.down))

    def mlp() -> Tensor:
        gate, up = gate_up(x).split(weights.m, -1)
        return down(F.silu(gate) * up)

    return mlp


def torch_linear(weight: QuantizedWeight, device: str) -> Linear:
    """A product with a symmetric quantised weight by torch's own kernel.

    Raises:
        ValueError: int8 in groups, which torch's kernel does not take.
    """
    if weight.bits == 8:
        if weight.groups != 1:
            raise ValueError("torch's int8 kernel takes one scale per row")
        scales = weight.scales.flatten()
        return lambda x: torch.ops.aten._weight_int8pack_mm(x, weight.data, scales)
    nibbles = unpack(weight.data, weight.group_size)
    # (groups, m, 2): scale and zero point; the value is (nibble - 8) * scale + zero, as here
    scales_zeros = torch.stack([weight.scales, torch.zeros_like(weight.scales)], -1).transpose(0, 1).contiguous()
    if device == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles.int(), 1)
        product: Any = torch.ops.aten._weight_int4pack_mm_for_cpu
    else:
        pairs = (nibbles[:, ::2] << 4) | nibbles[:, 1::2]
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), INNER_TILES)
        product = torch.ops.aten._weight_int4pack_mm
    return lambda x: product(x, packed, weight.group_size, scales_zeros)


def int8_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, *scales: Tensor) -> Tensor:
    """Weight-only int8, one scale per row: every weight is cast, and the product scaled."""
    of_gate, of_up, of_down = scales
    hidden = F.silu(F.linear(x, gate.to(x.dtype)) * of_gate) * (F.linear(x, up.to(x.dtype)) * of_up)
    return F.linear(hidden, down.to(x.dtype)) * of_down


def compiled_int8_mlp() -> Callable[..., Tensor]:
    """`int8_mlp` compiled by inductor with all of its tuning, which reads int8 and casts in registers."""
    compiled: Callable[..., Tensor] = torch.compile(int8_mlp, mode=MODE, dynamic=False, fullgraph=True)
    return compiled


def int8_call(compiled: Callable[..., Tensor], weights: DenseWeights, x: Tensor) -> Callable[[], Tensor]:
    """A call of `compiled_int8_mlp` on these weights."""
    m = weights.m
    data, scales = weights.gate_up.data, weights.gate_up.scales.flatten()
    halves = (data[:m], data[m:], weights.down.data, scales[:m], scales[m:], weights.down.scales.flatten())
    return partial(compiled, x, *(tensor.contiguous() for tensor in halves))
