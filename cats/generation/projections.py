"""The query, key and value projections of an attention block as one product, and separate again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cats.packed_linear import BLOCK, PackedLinear, packed_product

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Names of an attention block's linear layers."""


def floats_of(linear: Any) -> Tensor:
    """A tensor with the device and the dtype in which a linear layer computes."""
    tensor: Tensor = linear.scales if isinstance(linear, PackedLinear) else linear.weight
    return tensor


def make_dense(attention: Any) -> Any:
    """``attention`` itself, its quantised layers replaced by plain ones of the same values."""
    for name, linear in list(attention.named_children()):
        if isinstance(linear, PackedLinear):
            setattr(attention, name, linear.dense())
    return attention


@dataclass(frozen=True, eq=False)
class Joined:
    """Three projections as one product.

    Attributes:
        weight, bias: of all three, one below the other; for quantised layers weight and scales are as those of a
            `PackedLinear`.
        scales, bits: None where the weight is not quantised.
    """

    weight: Tensor
    bias: Tensor | None
    scales: Tensor | None = None
    bits: int | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.scales is None or self.bits is None:
            return F.linear(x, self.weight, self.bias)
        return packed_product(x, self.weight, self.scales, self.bits, self.bias)


def _unwatched(linear: Any, kind: type[nn.Module]) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return type(linear) is kind and not any(getattr(linear, n) for n in hooks) and "forward" not in linear.__dict__


def _plain_linear(linear: Any) -> bool:
    return _unwatched(linear, nn.Linear) and type(linear.weight) is nn.Parameter


def _packed_alike(linears: Sequence[Any]) -> bool:
    """Whether all are `PackedLinear` of one format, the rows of which can be joined as they are packed."""
    if not all(_unwatched(linear, PackedLinear) for linear in linears):
        return False
    blocks = linears[0].bits == 8 or not any(linear.out_features % BLOCK for linear in linears[:-1])
    return blocks and len({(linear.bits, linear.group_size, linear.compute_dtype) for linear in linears}) == 1


def joinable(attention: Any) -> bool:
    """Whether the block's query, key and value projections are plain linear layers, or such that are quantised alike;
    all with a bias or all without."""
    linears = [attention._modules[name] for name in PROJECTIONS[:3]]
    alike = all(map(_plain_linear, linears)) or _packed_alike(linears)
    return alike and len({linear.bias is None for linear in linears}) == 1


@torch.inference_mode(False)
@torch.no_grad()
def join(attention: Any) -> Joined:
    """One product of which the three projections' own weights and biases become views: the same values, no more memory
    (but for int4's scales, of which there is a second copy)."""
    linears = [attention._modules[name] for name in PROJECTIONS[:3]]
    bias = None if linears[0].bias is None else _join([linear.bias for linear in linears])
    if type(linears[0]) is nn.Linear:
        return Joined(_join([linear.weight for linear in linears]), bias)
    packed, bits = _join([linear.packed for linear in linears]), linears[0].bits
    scales = [linear.scales for linear in linears]
    return Joined(packed, bias, _join(scales) if bits == 8 else torch.cat(scales, 1), bits)


def _join(parts: list[Tensor]) -> Tensor:
    """One tensor of which ``parts`` are consecutive views, made so where they are not."""
    whole = _already_joined(parts)
    if whole is None:
        whole = torch.cat([part.data for part in parts])
        for part, view in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.data = view
    return whole


def _already_joined(parts: list[Tensor]) -> Tensor | None:
    """The tensor of which ``parts`` are consecutive views, if they are."""
    base, start = parts[0], parts[0].storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != base.untyped_storage().data_ptr() or not part.is_contiguous():
            return None
        if part.storage_offset() != start:
            return None
        start += part.numel()
    rows = sum(len(part) for part in parts)
    return base.data.as_strided((rows, *base.shape[1:]), base.stride(), base.storage_offset())


@torch.inference_mode(False)
@torch.no_grad()
def separate(model: nn.Module) -> None:
    """Give each projection that is a view of a joined one storage of its own again."""
    for module in model.modules():
        if all(name in module._modules for name in PROJECTIONS[:3]):
            for name in PROJECTIONS[:3]:
                linear: Any = module._modules[name]
                for tensor in (*linear.parameters(recurse=False), *linear.buffers(recurse=False)):
                    if tensor.untyped_storage().nbytes() > tensor.nbytes:
                        tensor.data = tensor.data.clone()
