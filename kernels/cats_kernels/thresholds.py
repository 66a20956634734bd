"""The threshold of the sparse gated MLP, as the kernels take it: a number, or float32 tensor of shape () or (m,)."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

Threshold = float | Tensor
"""In units of the deciding product: a number or a float32 tensor () for all neurons, or (m,) with one per neuron."""

FLOAT32_MAX = torch.finfo(torch.float32).max
NUMBER, ONE, VECTOR = "number", "one", "vector"
"""The three kinds: a Python number, a tensor (), a tensor (m,)."""


def kind_of(threshold: Threshold) -> str:
    """Which of the three kinds a threshold is."""
    if not isinstance(threshold, Tensor):
        return NUMBER
    return VECTOR if threshold.dim() else ONE


def check_kind(threshold: object) -> None:
    """Raise TypeError in one sentence unless it is a number or a float32 tensor."""
    if isinstance(threshold, Tensor):
        if threshold.dtype != torch.float32:
            raise TypeError(f"threshold is a tensor of {threshold.dtype}; a tensor must be torch.float32.")
    elif isinstance(threshold, bool) or not isinstance(threshold, Real | torch.SymFloat | torch.SymInt):
        raise TypeError(f"threshold is a {type(threshold).__name__}; it must be a number or a float32 tensor.")


def check_shape(threshold: Threshold, m: int, device: torch.device) -> None:
    """Raise ValueError in one sentence unless a tensor is () or (m,) on ``device``; its values are not looked at, since
    that would make a GPU's host wait."""
    if not isinstance(threshold, Tensor):
        return
    if threshold.dim() != 0 and tuple(threshold.shape) != (m,):
        raise ValueError(f"threshold is {tuple(threshold.shape)}; a tensor must be (m,) = ({m},) or ().")
    if threshold.device != device:
        raise ValueError(f"threshold is on {threshold.device}; a tensor must be on {device} as x is.")


def as_tensor(threshold: Threshold, device: torch.device) -> Tensor:
    """A number as a float32 tensor (), by a fill rather than a copy, so that no GPU's host waits; tensors as they are.
    What float32 cannot hold becomes infinite."""
    if isinstance(threshold, Tensor):
        return threshold
    if not torch.compiler.is_compiling() and abs(threshold) > FLOAT32_MAX:
        threshold = math.copysign(math.inf, threshold)
    return torch.full((), threshold, dtype=torch.float32, device=device)
