"""The query, key and value projections of an attention block as one product, and separate again."""

from typing import Any

import torch
from torch import Tensor, nn

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Names of an attention block's linear layers."""


def _plain_linear(linear: Any) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return (
        type(linear) is nn.Linear
        and type(linear.weight) is nn.Parameter
        and not any(getattr(linear, name) for name in hooks)
        and "forward" not in linear.__dict__
    )


def joinable(attention: Any) -> bool:
    """Whether the block's query, key and value projections are plain linear layers, all with a bias or all without."""
    linears = [attention._modules[name] for name in PROJECTIONS[:3]]
    return all(map(_plain_linear, linears)) and len({linear.bias is None for linear in linears}) == 1


@torch.inference_mode(False)
@torch.no_grad()
def join(attention: Any) -> tuple[Tensor, Tensor | None]:
    """One weight and one bias of which the three projections' own become views: the same values, no more memory."""
    linears = [attention._modules[name] for name in PROJECTIONS[:3]]
    joined: list[Tensor | None] = []
    for name in ("weight", "bias"):
        parts = [getattr(linear, name) for linear in linears]
        if parts[0] is None:
            joined.append(None)
            continue
        whole = _already_joined(parts)
        if whole is None:
            whole = torch.cat([part.data for part in parts])
            for part, view in zip(parts, whole.split([len(part) for part in parts]), strict=True):
                part.data = view
        joined.append(whole)
    assert joined[0] is not None
    return joined[0], joined[1]


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
                for parameter in module._modules[name].parameters(recurse=False):  # type: ignore[union-attr]
                    if parameter.untyped_storage().nbytes() > parameter.nbytes:
                        parameter.data = parameter.data.clone()
