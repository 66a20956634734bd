"""Quantise the linear layers outside of the gated MLPs (attention projections, the output matrix), and undo it."""

import warnings
from typing import Any

import torch
from cats_kernels.quantized import check_format, quantize
from torch import nn

from cats.packed_linear import PackedLinear, unsuited
from cats.structure import named_modules, other_linears

GPU_DTYPE = torch.bfloat16
"""Of x, for torch's int4 product on a GPU."""


def check_others(model: nn.Module, bits: int, group_size: int | None) -> None:
    """Raise ValueError in one sentence unless `quantize_others` can begin."""
    for path, module in named_modules(model):
        if isinstance(module, PackedLinear):
            raise ValueError(f"{path} is quantised already: call cats.dequantize(model) first")
        if type(module).__module__.startswith("peft."):
            raise ValueError(f"{path} is an adapter of peft: merge adapters before the layers beneath are quantised")
    for path, (holder, name) in other_linears(model).items():
        linear: Any = holder._modules[name]
        weight = linear.weight
        if weight.is_meta:
            raise ValueError(f"{path} has no weight here (it is offloaded, or on the meta device)")
        check_format(bits, linear.in_features if group_size is None else group_size, linear.in_features)
        if bits == 4 and weight.device.type != "cpu" and weight.dtype != GPU_DTYPE:
            raise ValueError(
                f"{path} is {weight.dtype}: torch's int4 product on a GPU takes {GPU_DTYPE} alone, "
                'so use it, or linears="mlp"'
            )


@torch.no_grad()
def quantize_others(model: nn.Module, bits: int, group_size: int | None, symmetric: bool, keep: bool) -> None:
    """Quantise them in place one after another, see `cats.quantize`; `check_others` comes first. Layers of a shape that
    torch's kernels do not take stay as they are, with a warning.

    Raises:
        ValueError: a weight is not finite. The layers before it are then quantised already.
    """
    left = []
    for path, (holder, name) in other_linears(model).items():
        linear: Any = holder._modules[name]
        if reason := unsuited(linear.out_features, linear.in_features, bits, group_size):
            left.append(f"{path}: {reason}")
            continue
        made = pack_linear(path, linear, bits, group_size, symmetric)
        if keep:
            made.__dict__["original"] = linear
        setattr(holder, name, made)
    if left:
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        warnings.warn(f"linear layers that stay unquantised{more}: {left[0]}", stacklevel=3)


def pack_linear(path: str, linear: nn.Linear, bits: int, group_size: int | None, symmetric: bool) -> PackedLinear:
    """The quantised layer of an `nn.Linear`."""
    weight = linear.weight
    try:
        made = quantize(weight, bits, None if bits == 8 else group_size, symmetric or bits == 8)
    except ValueError as error:
        raise ValueError(f"{path} cannot be quantised: {error}") from error
    return PackedLinear(made, weight.dtype, linear.bias).train(linear.training)


def dequantize_others(model: nn.Module) -> int:
    """Plain layers in their place again, see `cats.dequantize`; how many."""
    packed = [(h, name) for _, h in named_modules(model) for name, c in h.named_children() if type(c) is PackedLinear]
    for holder, name in packed:
        linear: Any = holder._modules[name]
        setattr(holder, name, linear.dense())
    return len(packed)
