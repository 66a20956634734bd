"""A linear layer of a gated MLP with a quantised weight, and what the operator needs of a block of such layers."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cats_kernels.cpu_products import multiply, suits_cpu
from cats_kernels.quantized import QuantizedWeight, dequantize, row_chunks
from torch import Tensor, nn

from cats.equation import Parts

TENSORS = ("data", "scales", "zeros")


class QuantizedLinear(nn.Module):
    """``x W^T + b`` with W quantised, in place of `nn.Linear`.

    In a call by itself W is dequantised piece by piece, so that no whole copy of it exists; the sparse kernels read it
    packed. Casts (``model.to(torch.bfloat16)``) change neither its bits nor its scales, moves move them.

    Attributes:
        data, scales, zeros: buffers of the `QuantizedWeight`; row j of it is neuron j, so that it is W for gate and up
            and W transposed for down.
        bits, group_size: of it.
        transposed: whether it is W transposed.
        in_features, out_features: as in `nn.Linear`.
        bias: as in `nn.Linear`, or None.
        trained: whether the weight that was quantised required gradients, as that of `dense` then does.
        original: the layer that was quantised, where it is kept; not part of the module tree, neither moved nor saved.
    """

    data: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: nn.Parameter | None
    original: nn.Linear | None

    def __init__(
        self, weight: QuantizedWeight, transposed: bool, dtype: torch.dtype, bias: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.bits, self.group_size, self.transposed = weight.bits, weight.group_size, transposed
        self.out_features, self.in_features = reversed(weight.shape) if transposed else weight.shape
        for name, tensor in zip(TENSORS, weight.tensors, strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=weight.device), persistent=False)
        self.register_parameter("bias", bias)
        self.__dict__["original"] = None
        self.trained = False
        self._cached: tuple[tuple[Any, ...], dict[int, tuple[QuantizedWeight, ...]]] | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of x and of the output, which casts change."""
        like: Tensor = self._buffers["like"]  # type: ignore[assignment]
        return like.dtype

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight, row j being neuron j."""
        return self.parts(1)[0]

    def parts(self, count: int) -> tuple[QuantizedWeight, ...]:
        """The weight's rows in ``count`` equal parts: 2 for the gate and up of a fused layer. Made once for the buffers
        as they are."""
        buffers = self._buffers
        if torch.compiler.is_compiling():
            return self._make_parts(count)
        now = (buffers["data"], buffers["scales"], buffers["zeros"])
        cached = self._cached
        if cached is None or any(a is not b for a, b in zip(cached[0], now, strict=True)):
            cached = self._cached = (now, {})
        if count not in cached[1]:
            cached[1][count] = self._make_parts(count)
        return cached[1][count]

    def _make_parts(self, count: int) -> tuple[QuantizedWeight, ...]:
        d = self.out_features if self.transposed else self.in_features
        whole = QuantizedWeight(self.data, self.scales, self.zeros, self.bits, self.group_size, d)
        if count == 1:
            return (whole,)
        m = whole.shape[0] // count
        return tuple(whole.rows(i * m, (i + 1) * m) for i in range(count))

    def forward(self, x: Tensor) -> Tensor:
        if suits_cpu(x, self.data.device):
            y = multiply(x, self.quantized, self.transposed)
        else:
            y = self._multiply_by_torch(x)
        return y if self.bias is None else y + self.bias

    def _multiply_by_torch(self, x: Tensor) -> Tensor:
        """``x W^T`` on any device and of any dtype, for which gradients reach x and torch.compile sees what is done."""
        weight = self._make_parts(1)[0]
        pieces = []
        for first, last in row_chunks(*weight.shape, weight.device):
            part = dequantize(weight.rows(first, last), x.dtype)
            pieces.append(x[..., first:last] @ part if self.transposed else F.linear(x, part))
        return sum(pieces[1:], pieces[0]) if self.transposed else torch.cat(pieces, -1)

    def dense(self) -> nn.Linear:
        """The layer that was quantised, on this device, or one of the dequantised weight where it was not kept."""
        device = self.data.device
        if self.original is not None:
            return self.original.to(device)
        weight = dequantize(self.quantized, self.compute_dtype)
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.t().contiguous() if self.transposed else weight, self.trained)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {name: self._buffers.pop(name) for name in TENSORS}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(kept)
        for name, tensor in kept.items():
            if tensor is not None:  # scales as integers: casts of floating tensors pass them by, moves do not
                self._buffers[name] = fn(tensor.view(torch.uint8)).view(tensor.dtype)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}

    def extra_repr(self) -> str:
        kind = "symmetric" if self.zeros is None else "with zero points"
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bits={self.bits}, group_size={self.group_size}, {kind}"


def quantized_weights(modules: dict[str, Any], of: Parts, device: torch.device) -> Any:
    """Gate, up and transposed down weight of a block of `QuantizedLinear` if the operator can compute it, else None:
    another kind of layer among them, a bias, a hook that must see what a layer computes, or another device."""
    for name in of.linears:
        linear = modules[name]
        if (
            type(linear) is not QuantizedLinear
            or linear._forward_hooks
            or linear._forward_pre_hooks
            or linear._parameters["bias"] is not None
            or linear._buffers["data"].device != device  # type: ignore[union-attr]
        ):
            return None
    first = modules[of.gate].parts(2) if of.up is None else (modules[of.gate].quantized, modules[of.up].quantized)
    return *first, modules[of.down].quantized
