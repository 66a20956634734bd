"""Quantise the gated MLPs of a model in place, weight-only, and undo it.

    cats.quantize(model, bits=4, group_size=128)    # before or after cats.apply; linears="all" for every linear layer
    thresholds = cats.calibrate(model, batches, 0.5)    # what the quantised model needs
    cats.dequantize(model)

Layer by layer: what is replaced is freed before the next one is read, unless it is kept. The linear layers of the gated
MLPs are read by this project's kernels; the others (attention, the output matrix), which stay as they are unless they
are asked for, by torch's.
"""

from typing import Any

import torch
from cats_kernels.quantized import check_format
from cats_kernels.quantized import quantize as quantize_weight
from torch import nn

from cats.equation import activation_of
from cats.kernel_choice import kernel_activation, refresh_kernels, suspend_kernels
from cats.not_serializable import allow_save_pretrained, refuse_save_pretrained
from cats.other_linears import check_others, dequantize_others, quantize_others
from cats.quantized_linear import QuantizedLinear
from cats.sparse_forward import QuantizedState, original_class, set_class, sparse_class
from cats.structure import GatedMLP, gated_mlps, parts_of

LINEARS = ("mlp", "all")
"""Which linear layers are quantised: those of the gated MLPs, or every one."""
GROUP_SIZE = 128
"""Columns that share a scale unless another number is asked for. A few weights of a row are often twenty times as large
as the others: one scale for the whole row cost gemma-3-270m 0.9 % of perplexity in int8, groups of 128 cost 0.1 %."""


@torch.no_grad()
def quantize(
    model: nn.Module,
    bits: int = 4,
    group_size: int | None = GROUP_SIZE,
    symmetric: bool = True,
    keep: bool = False,
    scale_dtype: torch.dtype | None = None,
    linears: str = "mlp",
) -> None:
    """Quantise the linear layers of ``model`` in place, rounding to nearest.

    Thresholds should be calibrated on the quantised model. It is for inference: no gradient reaches quantised weights.
    `cats.save_quantized` saves it; transformers' `save_pretrained` refuses, since it could not be read back.

    Args:
        model: a causal language model, patched by `cats.apply` or not, on the CPU or a GPU.
        bits: 8 or 4.
        group_size: columns of a neuron's row that share a scale: 32, 64, 128 or 256; None: the whole row (8 bits only).
            (Rows are those of gate and up, and of the transposed down projection: along d.)
        symmetric: without zero points.
        keep: keep the original layers in memory, so that `dequantize` restores them bit for bit.
        scale_dtype: of scales and zero points; None: the dtype of the weights.
        linears: "mlp": those of the gated MLPs alone; "all": attention projections and the output matrix too, which
            torch's own kernels multiply. In int8 those have one symmetric scale per row whatever the group size, their
            scales have the dtype of the weights, and on a GPU int4 needs a bfloat16 model. A layer of a shape that
            torch's kernels do not take stays as it is, with a warning. Where the output matrix is the embedding, the
            embedding stays unquantised and the output matrix becomes a matrix of its own: memory grows by that.

    Raises:
        ValueError: no gated MLP, a format that does not exist, or a linear layer that is not torch's own `nn.Linear`
            (adapters, other quantisation) or whose weight is not there (offloaded) or not finite. The layers before it
            are then quantised already; `dequantize` takes them back.
    """
    check_linears(linears)
    mlps = gated_mlps(model)
    if linears == "all":
        check_others(model, bits, group_size)
    for name, mlp in mlps.items():
        for part in parts_of(mlp).linears:
            _check_linear(f"{name}.{part}", mlp, part, bits, group_size)
    try:
        for name, mlp in mlps.items():
            suspend_kernels(mlp)
            try:
                for part in parts_of(mlp).linears:
                    _quantize_linear(f"{name}.{part}", mlp, part, bits, group_size, symmetric, keep, scale_dtype)
                mark_quantized(mlp)
            finally:
                refresh_kernels(mlp)
        if linears == "all":
            quantize_others(model, bits, group_size, symmetric, keep)
    finally:
        refuse_save_pretrained(model)


def check_linears(linears: str) -> None:
    """Raise ValueError unless it is one of `LINEARS`."""
    if linears not in LINEARS:
        raise ValueError(f'linears is {linears!r}; allowed: "mlp" or "all"')


@torch.no_grad()
def dequantize(model: nn.Module) -> None:
    """Undo `quantize`: the original layers bit for bit where they were kept, else layers of the dequantised weights, in
    the dtype in which the model computes.

    Raises:
        ValueError: no linear layer of ``model`` is quantised.
    """
    others = dequantize_others(model)
    mlps = {name: mlp for name, mlp in gated_mlps(model).items() if is_quantized(mlp)}
    if not mlps and not others:
        raise ValueError(f"{type(model).__name__} has no quantised MLP: cats.quantize makes them")
    for mlp in mlps.values():
        suspend_kernels(mlp)
        for part in parts_of(mlp).linears:
            linear = mlp._modules[part]
            if isinstance(linear, QuantizedLinear):
                setattr(mlp, part, linear.dense())
        unmark_quantized(mlp)
        refresh_kernels(mlp)
    allow_save_pretrained(model)


def is_quantized(mlp: GatedMLP) -> bool:
    """Whether any linear layer of a block is quantised by `quantize`."""
    return any(isinstance(mlp._modules[part], QuantizedLinear) for part in parts_of(mlp).linears)


def mark_quantized(mlp: Any) -> None:
    """Give a block, whose layers are quantised, the forward that hands few rows to the operator."""
    if "cats_quantized" not in mlp.__dict__:
        of = parts_of(mlp)
        if "cats_state" in mlp.__dict__:
            activation, name = mlp.cats_state.original, mlp.cats_state.activation
        else:
            activation = mlp._modules[of.activation] if of.activation else None
            name = kernel_activation(activation_of(mlp, of))
        mlp.__dict__["cats_quantized"] = QuantizedState(of, activation, name)
    if "cats_state" not in mlp.__dict__:
        cls: Any = type(mlp)
        set_class(mlp, sparse_class(cls))


def unmark_quantized(mlp: Any) -> None:
    """Take it away again."""
    if mlp.__dict__.pop("cats_quantized", None) is not None and "cats_state" not in mlp.__dict__:
        set_class(mlp, original_class(type(mlp)))


def _check_linear(path: str, mlp: GatedMLP, part: str, bits: int, group_size: int | None) -> None:
    linear: Any = mlp._modules[part]
    if isinstance(linear, QuantizedLinear):
        raise ValueError(f"{path} is quantised already: call cats.dequantize(model) first")
    weight = linear._parameters.get("weight")
    if type(linear) is not nn.Linear or type(weight) is not nn.Parameter:
        kind = type(linear if type(linear) is not nn.Linear else weight)
        raise ValueError(f"{path} is a {kind.__module__}.{kind.__qualname__}: only torch's own nn.Linear is quantised")
    if weight.is_meta:
        raise ValueError(f"{path} has no weight here (it is offloaded, or on the meta device)")
    d = linear.out_features if part == parts_of(mlp).down else linear.in_features
    check_format(bits, d if group_size is None else group_size, d)


def _quantize_linear(
    path: str,
    mlp: Any,
    part: str,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    keep: bool,
    scale_dtype: torch.dtype | None,
) -> None:
    linear: nn.Linear = mlp._modules[part]
    transposed = part == parts_of(mlp).down
    weight = linear.weight.t() if transposed else linear.weight
    try:
        made = quantize_weight(weight, bits, group_size, symmetric, scale_dtype)
    except ValueError as error:
        raise ValueError(f"{path} cannot be quantised: {error}") from error
    quantized = QuantizedLinear(made, transposed, weight.dtype, linear.bias).train(linear.training)
    quantized.trained = linear.weight.requires_grad
    if keep:
        quantized.__dict__["original"] = linear
    setattr(mlp, part, quantized)
