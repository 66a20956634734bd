"""Many rows of x on quantised weights, a prompt for instance: some neurons at a time are dequantised, and multiplied by
torch in the dtype that the processor multiplies fast.

That is float32, and bfloat16 for bfloat16 x where there are instructions for it. The mask is still that of float32: where
a product in bfloat16 is so close to its threshold that rounding may have moved it across, it is computed anew in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cats_kernels.cpu.dequantise import dequantise_into, multiply_again
from cats_kernels.quantized import QuantizedWeight
from cats_kernels.reference import dropped, gate_activation, multiplies_bfloat16, sparse_gated_mlp_reference
from cats_kernels.thresholds import Threshold, as_tensor

WEIGHTS = 2**20
"""Of each of the three that are dequantised at a time."""
ROWS = 2048
"""Of x at a time: what is between the products is in float32."""
STEEPEST = 1.13
"""Of the slopes of the activations (tanh-GELU's)."""
ROUNDED = 2.0**-9
"""Largest relative error of a number rounded to bfloat16."""
SIX_SIGMA = 6 / 3**0.5
"""Times the largest error of one of many is the sum of errors, in the root of the sum of squares, that is not exceeded."""


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
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 and multiplies_bfloat16() else torch.float32
    m, d = gate_weight.shape
    step = min(m, max(1, WEIGHTS // d))
    pieces = torch.empty(3, step, d, dtype=dtype)
    multiply = _in_bfloat16 if dtype == torch.bfloat16 else _in_float32
    y = torch.empty_like(x)
    for rows, out in zip(x.split(ROWS), y.split(ROWS), strict=True):
        sums, inner = torch.zeros(rows.shape, dtype=torch.float32), rows.to(dtype)
        for first in range(0, m, step):
            last = min(m, first + step)
            own = [weight.rows(first, last) for weight in (gate_weight, up_weight, down_weight_t)]
            plain = pieces[:, : last - first].unbind(0)
            dequantise_into(own, 0, last - first, plain)
            limit = threshold[first:last] if isinstance(threshold, Tensor) and threshold.dim() else threshold
            sums += multiply(inner, own, plain, limit, activation, decider)
        out.copy_(sums)
    return y


def _in_float32(
    x: Tensor,
    _weights: list[QuantizedWeight],
    plain: tuple[Tensor, ...],
    threshold: Threshold,
    activation: str,
    decider: str,
) -> Tensor:
    gate, up, down_t = plain
    return sparse_gated_mlp_reference(x, gate, up, down_t, threshold, activation, decider)


def _in_bfloat16(
    x: Tensor,
    weights: list[QuantizedWeight],
    plain: tuple[Tensor, ...],
    threshold: Threshold,
    activation: str,
    decider: str,
) -> Tensor:
    act, limit = gate_activation(activation), as_tensor(threshold, x.device)
    gate, up = F.linear(x, plain[0]).float(), F.linear(x, plain[1]).float()
    gates_decide = decider == "gate"
    deciding, weight = (gate, weights[0]) if gates_decide else (up, weights[1])
    near = _errors(deciding, x, weight)
    magnitude = (act(deciding) if gates_decide else deciding).abs()
    if gates_decide:
        near *= STEEPEST
    multiply_again(weight, x, deciding, (magnitude - limit).abs() <= near)
    gate = act(gate)
    hidden = torch.where(dropped(gate if gates_decide else up, threshold), 0, gate * up)
    return hidden.to(x.dtype) @ plain[2]


def _errors(products: Tensor, x: Tensor, weight: QuantizedWeight) -> Tensor:
    """How far rounding may have moved products (rows, n) of x with a weight (n, d) in bfloat16.

    Rounding the weights adds errors of either sign, whose squares are added up group by group; rounding the product
    adds one.
    """
    groups, missing = weight.groups, weight.groups * weight.group_size - weight.d
    squares = F.pad(x.float().square(), (0, missing)).view(len(x), groups, -1).sum(2)
    largest = weight.scales.float().abs() * 2 ** (weight.bits - 1)
    if weight.zeros is not None:
        largest += weight.zeros.float().abs()
    spread = (squares @ largest.square().t()).sqrt_()
    return spread.mul_(SIX_SIGMA * ROUNDED).add_(products.abs(), alpha=2 * ROUNDED)
