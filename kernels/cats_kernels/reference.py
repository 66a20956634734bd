"""The sparse gated MLP in plain PyTorch: the backend for every device and dtype, and the dense masked path of the CPU.

    decider "gate":  v = act(x Wg^T), w = x Wu^T        (eq. 4, 5)
    decider "up":    v = x Wu^T,      w = act(x Wg^T)
    h_j = 0 where |v_j| < t_j, else v_j w_j;  y = h Wd^T (eq. 1)

Special values. A neuron is dropped when ``|v_j| < t_j`` and kept otherwise, so a NaN is kept: NaN in ``x`` reaches
``y`` and never vanishes as a "small" activation. A dropped neuron contributes exactly nothing, even where its other
product is infinite or NaN, because a kernel that skips the row cannot know. The down projection must be finite: with a
matrix product, unlike with a skipped row, 0 * inf is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cats_kernels.quantized import QuantizedWeight, dequantize
from cats_kernels.thresholds import Threshold, as_tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
DECIDERS = ("gate", "up")
HALF_PRECISION = (torch.bfloat16, torch.float16)


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16, which torch uses (AVX512-BF16, AMX)."""
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def gate_activation(name: str) -> Callable[[Tensor], Tensor]:
    """The gate's activation function by name, "silu" (eq. 2) or "gelu_tanh"; ValueError for any other."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}; allowed: {', '.join(map(repr, ACTIVATIONS))}.")
    return ACTIVATIONS[name]


def check_decider(decider: str) -> None:
    """Raise ValueError in one sentence unless it is "gate" or "up"."""
    if decider not in DECIDERS:
        raise ValueError(f"decider is {decider!r}; allowed: {', '.join(map(repr, DECIDERS))}.")


def sparse_gated_mlp_reference(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: Threshold,
    activation: str = "silu",
    decider: str = "gate",
) -> Tensor:
    """The sparse gated MLP by three dense products and a mask, in the inputs' own dtype.

    Args:
        x: (..., d), any floating dtype.
        gate_weight, up_weight: (m, d), as ``nn.Linear`` stores them.
        down_weight_t: (m, d), the down projection transposed; row j belongs to neuron j. Finite.
        threshold: the magnitude from which the deciding product is kept: a number, or a float32 tensor () or (m,);
            compared in float32 (with float64 products, as the float64 value of that float32).
        activation: "silu" or "gelu_tanh".
        decider: which product decides: "gate" (after the activation) or "up".

    Returns:
        (..., d), contiguous, in the dtype of ``x``.
    """
    check_decider(decider)
    gate, up = gate_activation(activation)(F.linear(x, gate_weight)), F.linear(x, up_weight)
    hidden = torch.where(dropped(gate if decider == "gate" else up, threshold), 0, gate * up)
    if hidden.dtype in HALF_PRECISION and hidden.device.type == "cpu":
        if hidden.dtype == torch.bfloat16 and multiplies_bfloat16():
            return hidden @ down_weight_t
        # on a CPU without bfloat16 arithmetic torch 2.13 takes 1.00 s for the product in this layout and 0.16 s by way
        # of float32 (2 rows, d=4096, m=14336, two AVX2 cores)
        return (hidden.float() @ down_weight_t.float()).to(hidden.dtype)
    return hidden @ down_weight_t


QUANTIZED_CHUNK = {"cpu": 2**18}
"""Weights of each of the three at a time, by device type, so that no large one exists dequantised whole."""
QUANTIZED_CHUNK_ELSEWHERE = 2**24
"""On a GPU, where each piece is several launches."""


def quantized_mlp_reference(
    x: Tensor,
    gate_weight: QuantizedWeight,
    up_weight: QuantizedWeight,
    down_weight_t: QuantizedWeight,
    threshold: Threshold,
    activation: str = "silu",
    decider: str = "gate",
) -> Tensor:
    """`sparse_gated_mlp_reference` on what the weights (m, d) dequantise to, in the dtype of ``x`` (half precision on
    the CPU: in float32, rounded once). Some neurons are taken at a time, whose sums are added in float32."""
    dtype = torch.float32 if x.dtype in HALF_PRECISION and x.device.type == "cpu" else x.dtype
    sums = torch.promote_types(dtype, torch.float32)
    y, inner = torch.zeros(x.shape, dtype=sums, device=x.device), x.to(dtype)
    m, d = gate_weight.shape
    step = max(1, QUANTIZED_CHUNK.get(x.device.type, QUANTIZED_CHUNK_ELSEWHERE) // d)
    for first in range(0, m, step):
        last = min(m, first + step)
        gate, up, down_t = (dequantize(w.rows(first, last), dtype) for w in (gate_weight, up_weight, down_weight_t))
        own = threshold[first:last] if isinstance(threshold, Tensor) and threshold.dim() else threshold
        y += sparse_gated_mlp_reference(inner, gate, up, down_t, own, activation, decider)
    return y.to(x.dtype)


def dropped(deciding: Tensor, threshold: Threshold) -> Tensor:
    """Where ``|deciding|`` (..., m) is below the threshold. A number is rounded to float32, and bfloat16 and float16
    products are widened to it: in their own precision they would round the threshold."""
    magnitude = deciding.abs()
    if magnitude.dtype in HALF_PRECISION:
        magnitude = magnitude.float()
    return magnitude < as_tensor(threshold, deciding.device)
