"""Formats of quantised weights by name: ``none``, ``int8-row``, ``int8-128``, ``int4-32`` and so on; of whole models
also ``int4-128-all``, in which attention projections and the output matrix are quantised, too."""

from dataclasses import dataclass
from typing import Any

import torch
from cats_kernels.quantized import GROUP_SIZES, QuantizedWeight, dequantize, quantize
from torch import Tensor, nn

from cats.structure import mlp_linears, parts_of

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
    """The linear layers of a model's gated MLPs, whose weights can be rounded to a format and given back.

    Weights are replaced by what they dequantise to, in the model's own dtype: what the kernels compute with, but for
    that rounding. Groups lie along a neuron's row: of the down projection along its outputs.

    Attributes:
        stored: bytes of the MLPs' weights in the format in force, scales included, by linear layer.
    """

    def __init__(self, model: nn.Module) -> None:
        linears = mlp_linears(model)
        self._linears: dict[str, Any] = {path: mlp._modules[name] for path, (mlp, name) in linears.items()}
        self._downs = {path for path, (mlp, name) in linears.items() if name == parts_of(mlp).down}
        self._originals: dict[str, Tensor] = {}
        self.plain_bytes = {path: linear.weight.nbytes for path, linear in self._linears.items()}
        self.stored = dict(self.plain_bytes)

    @torch.no_grad()
    def round_to(self, form: Format) -> None:
        """Replace every weight by its value in ``form``; `PLAIN` gives back the originals."""
        for path, linear in self._linears.items():
            weight = linear.weight
            if path in self._originals:
                weight.copy_(self._originals[path])
            if form.bits is None:
                self.stored[path] = self.plain_bytes[path]
                continue
            self._originals.setdefault(path, weight.detach().to("cpu", copy=True))
            down = path in self._downs
            quantized = form.quantize(weight.T.contiguous() if down else weight)
            value = dequantize(quantized, weight.dtype)
            weight.copy_(value.T if down else value)
            self.stored[path] = quantized.nbytes
