"""A block's calls of the operator, repeated without its checks: what an earlier call looked at is compared instead.

The host needs half the time for it, and less where the weights of a token push all that it looks at out of the caches.
An eager loop is bound by the host on a GPU, and on a CPU this is time in which no weight is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import cats_kernels
import torch
from cats_kernels import repeated
from cats_kernels.dispatch import asked_for
from torch import Tensor, nn

from cats.quantized_linear import QuantizedLinear

OPERATOR = cats_kernels.sparse_gated_mlp
Arguments = tuple[Tensor, Any, Any, Any, float | Tensor, str, str, str]
"""Of the operator: x; gate, up and transposed down weight; threshold, activation, backend, decider."""


@dataclass(frozen=True)
class Known:
    """What the last calls of the operator by one block looked at, so that the next one only compares.

    Attributes:
        operator: that was called; whoever replaces it wants to see the calls.
        layers: facts of the tensors of each linear layer, see `weights_in`.
        threshold: facts of the deciding product's threshold, None where it is a number that never changes.
        dtype, device: of x.
        chosen: what `cats_kernels.dispatch.asked_for` said of the kernel.
        calls: shape of x to what repeats the call, None where nothing does.
    """

    operator: Any
    layers: tuple[tuple[repeated.Facts, ...], ...]
    threshold: repeated.Facts | None
    dtype: torch.dtype
    device: torch.device
    chosen: str
    calls: dict[torch.Size, repeated.Repeat | None] = field(default_factory=dict, compare=False)

    def repeat(
        self, x: Any, layers: Sequence[Any], activation: Any, threshold: Tensor | None, kernel: str
    ) -> Tensor | None:
        """y by what repeats an earlier call, if all that it looked at is as it was; None to look at everything anew.

        Args:
            x: of the block's forward.
            layers: the block's linear layers, as they are now.
            activation: its activation module, or None.
            threshold: of the deciding product, None where it is a number that never changes.
            kernel: the backend asked for.
        """
        if torch.is_grad_enabled() or not repeated.ordinary(x):
            return None
        call = self.calls.get(x.shape)
        if call is None or x.dtype is not self.dtype or x.device != self.device or not x.is_contiguous():
            return None
        if activation is not None and _watched(activation):
            return None
        if threshold is not None and repeated.facts(threshold) != self.threshold:
            return None
        held: list[Tensor] = []  # until the call is over, as the threshold is, whatever other threads replace
        for layer, facts in zip(layers, self.layers, strict=True):
            weights = weights_in(layer)
            if weights is None or _facts(weights) != facts:
                return None
            held += weights
        if cats_kernels.sparse_gated_mlp is not self.operator or asked_for(kernel) != self.chosen:
            return None
        return call(x, *as_given(held)) if repeated.takes_weights(call) else call(x)


@dataclass
class Repeats:
    """What has calls to repeat.

    Attributes:
        known: what they can be repeated with, and None once anything else that a call depends on changes.
    """

    known: Known | None = field(default=None, kw_only=True)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is known of this process's memory, for copies and pickles."""
        return {**self.__dict__, "known": None}


def know(known: Known | None, layers: Sequence[Any], arguments: Arguments) -> Known | None:
    """What is known after the operator has served a call of these ``arguments``, whose weights are those of ``layers``;
    ``known`` as it was where such a call cannot be repeated."""
    x, *_, threshold, _activation, kernel, _decider = arguments
    each = [weights_in(layer) for layer in layers]
    if (
        not repeated.ordinary(x)
        or cats_kernels.sparse_gated_mlp is not OPERATOR
        or x.numel() > cats_kernels.MAX_ROWS * x.shape[-1]
        or any(weights is None for weights in each)
    ):
        return known
    facts = tuple(_facts(weights) for weights in each if weights is not None)
    limit = repeated.facts(threshold) if isinstance(threshold, Tensor) else None
    now = Known(OPERATOR, facts, limit, x.dtype, x.device, asked_for(kernel))
    if known == now:
        now = known
    if x.shape not in now.calls:
        now.calls[x.shape] = repeated.repeat(*arguments)
    return now


def weights_in(layer: Any) -> list[Tensor] | None:
    """The tensors of a linear layer that kernels read in its place, quantised ones too; None where they must not: for
    another kind of layer, one that is watched by a hook, or another kind of tensor."""
    if _watched(layer):
        return None
    if type(layer) is nn.Linear:
        weight = layer._parameters.get("weight")
        return [weight] if type(weight) is nn.Parameter else None
    if type(layer) is not QuantizedLinear or layer._parameters["bias"] is not None:
        return None
    buffers = layer._buffers
    data, scales, zeros = buffers["data"], buffers["scales"], buffers["zeros"]
    if type(data) is not Tensor or type(scales) is not Tensor:
        return None
    return [data, scales] if zeros is None else [data, scales, zeros]


def as_given(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and transposed down weight, as the operator takes them, of a block's two or three linear layers."""
    *first, down = weights
    gate, up = first if len(first) == 2 else first[0].chunk(2)
    return gate, up, down.t()


def _watched(module: Any) -> bool:
    """Whether a hook must see what the module computes."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _facts(weights: list[Tensor]) -> tuple[repeated.Facts, ...]:
    return tuple(map(repeated.facts, weights))
