"""What the operators on plain and on quantised weights share: which calls are recorded, and what all calls must be."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from cats_kernels.dispatch import BACKENDS
from cats_kernels.reference import ACTIVATIONS, check_decider
from cats_kernels.thresholds import Threshold, check_kind

GRADIENT = (
    "sparse_gated_mlp is for inference and has no gradient; call it under torch.no_grad(), "
    "or train with the dense masked path."
)


def recording() -> bool:
    """Whether torch.jit.trace, a dispatch mode, torch.func or forward-mode differentiation watches what is called."""
    return (
        torch._C._get_tracing_state() is not None
        or is_in_torch_dispatch_mode()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def check_options(threshold: Threshold, activation: str, backend: str, decider: str) -> None:
    """Raise TypeError or ValueError in one sentence naming the option that is wrong and what is allowed."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; allowed: {', '.join(map(repr, ACTIVATIONS))}.")
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(map(repr, BACKENDS))}.")
    check_decider(decider)
    check_kind(threshold)


def check_number(threshold: Threshold) -> None:
    """Raise ValueError if it is a number and NaN."""
    if not isinstance(threshold, Tensor) and math.isnan(threshold):
        raise ValueError("threshold is NaN; it must be a number.")


def refuse_gradient(*arguments: object) -> None:
    """Raise RuntimeError if a gradient of an argument is wanted."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(GRADIENT)
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(GRADIENT)
