"""Formats of quantised weights by name: ``none``, ``int8-row``, ``int8-128``, ``int4-32`` and so on; of whole models
also ``int4-128-all``, in which attention projections and the output matrix are quantised, too."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from cats_kernels.quantized import GROUP_SIZES, QuantizedWeight, dequantize, quantize
from torch import Tensor, nn

from cats.packed_linear import unsuited
from cats.structure import mlp_linears, other_linears, parts_of

NAMES = ("int8-row", *(f"int{bits}-{size}" for bits in (8, 4) for size in GROUP_SIZES))
PLAIN = "none"
ALL = "-all"
NAMES_OF_MODELS = (*NAMES, *(f"{name}{ALL}" for name in NAMES))


@dataclass(frozen=True)
class Format:
    """Bits and group size; both None: unquantised. A group size of None: one group per row, for 8 bits.

    ``linears``: of a model, as in `cats.quantize`.
    """

    name: str
    bits: int | None = None
    group_size: int | None = None
    linears: str = "mlp"

    @property
    def columns(self) -> dict[str, Any]:
        """Those of a row of a table."""
        return {"format": self.name, "bits": self.bits, "group_size": self.group_size}

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """A weight in this format."""
        assert self.bits is not None
        return quantize(weight, self.bits, self.group_size)


def format_of(name: str) -> Format:
    """The format of a name in `NAMES_OF_MODELS`, or `PLAIN`."""
    if name == PLAIN:
        return Format(name)
    bits, _, size = name.removeprefix("int").removesuffix(ALL).partition("-")
    return Format(name, int(bits), None if size == "row" else int(size), "all" if name.endswith(ALL) else "mlp")


class QuantizedLinears:
    """The linear layers of a model, whose weights can be rounded to a format and given back.

    Weights are replaced by what they dequantise to, in the model's own dtype: what the kernels compute with, but for
    that rounding. Groups of the MLPs lie along a neuron's row: of the down projection along its outputs. Where a format
    takes all layers, the others are rounded as `cats.quantize` does, which leaves those that torch's kernels do not
    take, and an output matrix that is the embedding, too, becomes one of its own.

    Attributes:
        stored: bytes of the MLPs' weights in the format in force, scales included, by linear layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self._mlps = linears_at(mlp_linears(model))
        self._others = linears_at(other_linears(model))
        self._downs = {path for path, (mlp, name) in mlp_linears(model).items() if name == parts_of(mlp).down}
        self._originals: dict[str, nn.Parameter] = {}
        self.plain_bytes = {path: linear.weight.nbytes for path, linear in self._mlps.items()}
        self.stored = dict(self.plain_bytes)

    @torch.no_grad()
    def round_to(self, form: Format) -> None:
        """Replace every weight by its value in ``form``; `PLAIN` gives back the originals."""
        for path, original in self._originals.items():
            {**self._mlps, **self._others}[path].weight = original
        self._originals.clear()
        self.stored = dict(self.plain_bytes)
        if form.bits is None:
            return
        for path, linear in self._mlps.items():
            weight = linear.weight
            down = path in self._downs
            quantized = form.quantize(weight.T.contiguous() if down else weight)
            value = dequantize(quantized, weight.dtype)
            self._replace(path, linear, value.T.contiguous() if down else value)
            self.stored[path] = quantized.nbytes
        for path, linear in self._others.items() if form.linears == "all" else ():
            if unsuited(linear.out_features, linear.in_features, form.bits, form.group_size) is None:
                quantized = quantize(linear.weight, form.bits, None if form.bits == 8 else form.group_size)
                self._replace(path, linear, dequantize(quantized, linear.weight.dtype))

    def _replace(self, path: str, linear: Any, value: Tensor) -> None:
        self._originals[path] = linear.weight
        linear.weight = nn.Parameter(value, requires_grad=False)


def linears_at(places: Mapping[str, tuple[nn.Module, str]]) -> dict[str, Any]:
    """Each linear layer by its path."""
    return {path: holder._modules[name] for path, (holder, name) in places.items()}
