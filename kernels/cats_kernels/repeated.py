"""Calls of `sparse_gated_mlp` that repeat an earlier one with another x: what is the same is not looked at again.

Decoding a large model in eager mode is bound by its host, and checking the arguments of a call takes more of it than
enqueueing the kernels does. A caller whose weights stay where they are, as a patched MLP's do, makes one call as usual,
keeps the `facts` of its tensors and what `repeat` returns, and calls that as long as the facts are the same and
`ordinary` holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_unary

from cats_kernels.calls import recording
from cats_kernels.dispatch import (
    QUANTIZED_ROWS,
    SPARSE_ROWS,
    asked_for,
    kernels_take,
    repeat_by,
    repeat_dense_by,
    repeat_quantized_by,
    resolve,
)
from cats_kernels.quantized import QuantizedWeight
from cats_kernels.thresholds import Threshold
from cats_kernels.weights import MAX_ROWS, Weight

Facts = tuple[Any, ...]
Repeat = Callable[..., Tensor | None]
"""y for x of the shape, dtype and device it was made for; None where this call is not like the earlier ones. It takes
x, and also gate, up and transposed down weight where `takes_weights` says so."""


def facts(tensor: Any) -> Facts:
    """All that a kernel knows of a tensor: two that agree in it are one to a kernel, and no tensor is kept alive to
    compare them. Addresses tell devices apart too."""
    return type(tensor), tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def ordinary(x: Any) -> bool:
    """Whether ``x`` is a plain tensor and nothing records, transforms, times or casts calls: then the operator goes
    straight to its kernel."""
    return (
        type(x) is Tensor
        and not has_torch_function_unary(x)  # by a function mode
        and not recording()
        and not torch._C._is_any_autocast_enabled()
        and not torch.autograd._profiler_enabled()
    )


def takes_weights(call: Repeat) -> bool:
    """Whether ``call`` must be given the weights after x: torch's own products take tensors, not addresses."""
    return getattr(call, "takes_weights", False)


def repeat(
    x: Tensor,
    gate_weight: Weight,
    up_weight: Weight,
    down_weight_t: Weight,
    threshold: Threshold,
    activation: str = "silu",
    backend: str = "auto",
    decider: str = "gate",
) -> Repeat | None:
    """A short way to repeat a call that `sparse_gated_mlp` has just served, with another x of this shape.

    Returns:
        What computes y from such an x, which must be contiguous, while `ordinary` holds, gradients are disabled and the
        `facts` of weights and threshold stay the same. It keeps no tensor alive. None where there is no short way. An
        "auto" backend is decided now.
    """
    chosen, rows = resolve(backend, x), x.numel() // x.shape[-1]
    weights: Any = (gate_weight, up_weight, down_weight_t)
    quantized = isinstance(gate_weight, QuantizedWeight)
    few = (QUANTIZED_ROWS if quantized else SPARSE_ROWS).get((chosen, x.dtype), 0)
    if not x.is_contiguous() or not 1 <= rows <= max(few, MAX_ROWS):
        return None
    if quantized:
        by = repeat_quantized_by(chosen if rows <= few and kernels_take(chosen, *weights) else "reference")
    else:
        by = repeat_by(chosen) if rows <= few else repeat_dense_by(chosen)
    return by(x, *weights, threshold, activation, decider)


KEPT: dict[tuple[Any, ...], Repeat | None] = {}
"""What repeats the operator's own calls, by the facts of all tensors and the options of a call. No tensor is kept
alive: a new one at the old address, of the same shape and dtype, is served as rightly."""
MOST_KEPT = 4096


def compute_kept(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: Tensor,
    activation: str,
    backend: str,
    decider: str,
    compute: Callable[..., Tensor],
) -> Tensor:
    """A call of valid arguments as ``compute`` serves it, or by what repeats an earlier one: compiled code calls the
    operator with the same weights for every token."""
    tensors = gate_weight, up_weight, down_weight_t, threshold
    options = activation, backend, decider
    if x.numel() > MAX_ROWS * x.shape[-1] or not x.is_contiguous():
        return compute(x, *tensors, *options)
    key = x.shape, x.dtype, x.device, *map(facts, tensors), *options, asked_for(backend)
    known = KEPT.get(key)
    y = None
    if known is not None:
        y = known(x, *tensors[:3]) if takes_weights(known) else known(x)
    if y is None:
        y = compute(x, *tensors, *options)
        if key not in KEPT:
            if len(KEPT) >= MOST_KEPT:
                KEPT.clear()
            KEPT[key] = repeat(x, *tensors, *options)
    return y
