"""Models and layers of shapes that torch's int4 products take: what the tests of `PackedLinear` share."""

from typing import Any

import torch
from cats_kernels import QuantizedWeight, dequantize, quantize
from torch import Tensor, nn

from cats.packed_linear import PackedLinear
from tests.conftest import tiny_model

WIDE = {"hidden_size": 128, "vocab_size": 320, "eos_token_id": None}
PROMPT = torch.arange(3, 20)[None]


def wide_model(family: str = "Llama", **overrides: Any) -> Any:
    """A tiny model of shapes that torch's int4 products take."""
    heads = {"head_dim": 32} if family.startswith(("Gemma", "Qwen3")) else {}
    return tiny_model(family, **{**WIDE, **heads, **overrides})


def packed_of(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def layer(m: int, d: int, bits: int, group: int | None, symmetric: bool, dtype: torch.dtype) -> Any:
    generator = torch.Generator().manual_seed(m + d)
    weight = quantize(torch.randn(m, d, generator=generator).to(dtype), bits, group, symmetric)
    bias = nn.Parameter(torch.randn(m, generator=generator).to(dtype))
    return weight, PackedLinear(weight, dtype, bias)


def exact(x: Tensor, weight: QuantizedWeight, bias: Tensor) -> Tensor:
    return (x.double() @ dequantize(weight).double().T + bias.double()).detach()
