"""The sparse gated MLP in plain PyTorch: the oracle of every kernel, and the path for many rows.

    v = act(x Wg^T);  v_j = 0 unless |v_j| >= threshold (eq. 4, 5);  y = (v * (x Wu^T)) Wd^T (eq. 1)

Special values. A neuron is dropped when ``|v_j| < threshold`` and kept otherwise, so a NaN activation is kept: NaN in
``x`` reaches ``y`` and never vanishes as a "small" activation. A dropped neuron contributes exactly nothing, even where
its up projection is infinite or NaN, because a kernel that skips the row cannot know. The down projection must be
finite: with a matrix product, unlike with a skipped row, 0 * inf is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def gate_activation(name: str) -> Callable[[Tensor], Tensor]:
    """The gate's activation function by name, "silu" (eq. 2) or "gelu_tanh"; ValueError for any other."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}; allowed: {', '.join(map(repr, ACTIVATIONS))}.")
    return ACTIVATIONS[name]


def sparse_gated_mlp_reference(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: float,
    activation: str = "silu",
) -> Tensor:
    """``((v * keep) * (x Wu^T)) @ down_weight_t`` by three dense products, in the inputs' own dtype.

    Args:
        x: (..., d), any floating dtype.
        gate_weight, up_weight: (m, d), as ``nn.Linear`` stores them.
        down_weight_t: (m, d), the down projection transposed; row j belongs to neuron j. Finite.
        threshold: the magnitude at which an activation is kept; compared in float32 (float64 for float64).
        activation: "silu" or "gelu_tanh".

    Returns:
        (..., d), contiguous, in the dtype of ``x``.
    """
    gate = gate_activation(activation)(F.linear(x, gate_weight))
    # compare in float32: a bfloat16 tensor would round a Python threshold to bfloat16 first
    magnitude = gate.abs().float() if gate.dtype in (torch.bfloat16, torch.float16) else gate.abs()
    hidden = torch.where(magnitude < threshold, 0, gate * F.linear(x, up_weight))
    if hidden.dtype in (torch.bfloat16, torch.float16) and hidden.device.type == "cpu":
        # on a CPU without bfloat16 arithmetic torch 2.13 takes 1.00 s for the product in this layout and 0.16 s by way
        # of float32 (2 rows, d=4096, m=14336, two AVX2 cores)
        return (hidden.float() @ down_weight_t.float()).to(hidden.dtype)
    return hidden @ down_weight_t
