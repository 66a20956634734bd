"""Quantise the linear layers outside of the gated MLPs (attention projections, the output matrix), and undo it."""

import warnings
from typing import Any

import torch
from cats_kernels.quantized import check_format, quantize
from torch import nn

from cats.packed_linear import PackedLinear, check_dtype, unsuited
from cats.structure import named_modules, other_linears, unwrapped


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
        _check_unwatched(path, linear)
        if weight.is_meta:
            raise ValueError(f"{path} has no weight here (it is offloaded, or on the meta device)")
        check_format(bits, linear.in_features if group_size is None else group_size, linear.in_features)
        check_dtype(bits, weight.dtype, weight.device)


def _check_unwatched(path: str, linear: Any) -> None:
    if linear._forward_hooks or linear._forward_pre_hooks or linear._modules or "forward" in linear.__dict__:
        raise ValueError(
            f"{path} has a hook or a mask, which would go with the layer that is replaced: remove it first (masks on "
            "the inputs of attention: cats.remove)"
        )


@torch.no_grad()
def quantize_others(model: nn.Module, bits: int, group_size: int | None, symmetric: bool, keep: bool) -> None:
    """Quantise them in place one after another, see `cats.quantize`; `check_others` comes first. Layers of a shape that
    torch's kernels do not take stay as they are, with a warning.

    Raises:
        ValueError: a weight is not finite. The layers before it are then quantised already.
    """
    left, tied = [], _embedding_is_output(model)
    for path, (holder, name) in other_linears(model).items():
        linear: Any = holder._modules[name]
        if reason := unsuited(linear.out_features, linear.in_features, bits, group_size):
            left.append(f"{path}: {reason}")
            continue
        made = pack_linear(path, linear, bits, group_size, symmetric)
        if keep:
            made.__dict__["original"] = linear
        setattr(holder, name, made)
    if tied and not _embedding_is_output(model):
        _set_tied(model, False)
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
    packed = PackedLinear(made, weight.dtype, linear.bias).train(linear.training)
    packed.trained = weight.requires_grad
    return packed


def dequantize_others(model: nn.Module) -> int:
    """Plain layers in their place again, see `cats.dequantize`; how many. Raises ValueError for one with a hook."""
    packed = packed_linears(model)
    for path, (holder, name) in packed.items():
        _check_unwatched(path, holder._modules[name])
    for holder, name in packed.values():
        linear: Any = holder._modules[name]
        setattr(holder, name, linear.dense())
    if packed and _embedding_is_output(model):
        _set_tied(model, True)
    return len(packed)


def _embedding_is_output(model: nn.Module) -> bool:
    """Whether the output matrix is the embedding."""
    inner: Any = unwrapped(model)
    if not hasattr(inner, "get_output_embeddings"):
        return False
    ends = inner.get_input_embeddings(), inner.get_output_embeddings()
    embedding, output = (getattr(end, "weight", None) for end in ends)
    return embedding is not None and embedding is output


def _set_tied(model: nn.Module, tied: bool) -> None:
    """Say in the model's configuration whether they are one: transformers ties them wherever it says so."""
    inner: Any = unwrapped(model)
    for config in (inner.config, inner.config.get_text_config(decoder=True)):
        config.tie_word_embeddings = tied
    inner.all_tied_weights_keys = inner.get_expanded_tied_weights_keys(all_submodels=False)


def packed_linears(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Path of each `PackedLinear` to the module that holds it and its name in it."""
    return {
        f"{path}.{name}".removeprefix("."): (holder, name)
        for path, holder in named_modules(model)
        for name, child in holder.named_children()
        if type(child) is PackedLinear
    }
