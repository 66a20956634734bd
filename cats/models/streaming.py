"""Models whose gated MLPs are quantised while their weights are read: memory holds the result and one matrix."""

from collections.abc import Callable, Set
from typing import Any

import torch
from cats_kernels.quantized import QuantizedWeight, quantize
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from cats.not_serializable import refuse_save_pretrained
from cats.other_linears import pack_linear, quantize_others
from cats.packed_linear import check_dtype, unsuited
from cats.quantization import mark_quantized
from cats.quantized_linear import QuantizedLinear
from cats.skeleton import empty_model, fill
from cats.structure import gated_mlps, other_linears, parts_of

Plain = Callable[[str, torch.dtype], Tensor]
"""(name in the state dict, dtype) to the tensor on the model's device."""


def rounded(
    plain: Plain, dtype: torch.dtype, bits: int, group_size: int | None
) -> Callable[[str, bool], QuantizedWeight]:
    """What makes (name, whether it is transposed) a weight as `cats.quantize` would, of its value in ``dtype``."""

    def make(name: str, transposed: bool) -> QuantizedWeight:
        weight = plain(name, dtype)
        try:
            return quantize(weight.t() if transposed else weight, bits, group_size)
        except ValueError as error:
            raise ValueError(f"{name} cannot be quantised: {error}") from error

    return make


def quantized_model(
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    names: Set[str],
    plain: Plain,
    packed: Callable[[str, bool], QuantizedWeight],
    others: tuple[int, int | None] | None = None,
) -> PreTrainedModel:
    """The model of a configuration, the linear layers of its gated MLPs quantised, filled tensor by tensor.

    Args:
        config: of the model.
        dtype: of all other weights, and of the activations.
        device: where to put it.
        names: of the tensors that there are.
        plain: reads one of them.
        packed: (name of a linear layer's weight, whether row j must be column j of it) to the quantised weight.
        others: bits and group size to which the other linear layers are quantised; None: they are not.
    """
    model = empty_model(config, dtype)
    if others is not None:
        _quantize_others(model, dtype, device, names, plain, others)
    for path, mlp in gated_mlps(model).items():
        of = parts_of(mlp)
        for part in of.linears:
            linear: Any = mlp._modules[part]
            weight = packed(f"{path}.{part}.weight", part == of.down)
            made = QuantizedLinear(weight, part == of.down, dtype, None)
            if linear.bias is not None:
                made.bias = nn.Parameter(plain(f"{path}.{part}.bias", dtype), requires_grad=False)
            setattr(mlp, part, made)
        mark_quantized(mlp)
    fill(model, lambda name, held: plain(name, held.dtype), names, device)
    if others is not None:  # an output matrix that is the embedding, and what stays as it is
        quantize_others(model, *others, symmetric=True, keep=False)
    refuse_save_pretrained(model)
    return model


def _quantize_others(
    model: Any, dtype: torch.dtype, device: torch.device, names: Set[str], plain: Plain, others: tuple[int, int | None]
) -> None:
    """Quantise the linear layers outside of the gated MLPs of an empty model that have weights of their own."""
    check_dtype(others[0], dtype, device)
    for path, (holder, part) in other_linears(model).items():
        linear: Any = holder._modules[part]
        name = f"{path}.weight"
        tied = name not in names or name in model.all_tied_weights_keys
        if tied or unsuited(linear.out_features, linear.in_features, *others):
            continue
        linear.weight = nn.Parameter(plain(name, dtype), requires_grad=False)
        if linear.bias is not None:
            linear.bias = nn.Parameter(plain(f"{path}.bias", dtype), requires_grad=False)
        setattr(holder, part, pack_linear(path, linear, *others, symmetric=True))


class Checkpoint:
    """The safetensors files of a directory or of a hub repository (fetched, where they are not here).

    Attributes:
        files: name of a tensor to the file that has it.
        shapes: name of a tensor to its shape.
    """

    def __init__(self, where: str, device: torch.device) -> None:
        self.device = device
        whole = cached_file(where, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)  # as transformers
        if whole is None:
            paths = get_checkpoint_shard_files(where, cached_file(where, SAFE_WEIGHTS_INDEX_NAME))[0]
        else:
            paths = [whole]
        self.files: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            with safe_open(path, "pt") as file:
                self.files |= dict.fromkeys(file.keys(), path)
                self.shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def plain(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor. Files are opened anew for each: what was read of an open one counts as memory of the process."""
        with safe_open(self.files[name], "pt", device=str(self.device)) as file:
            tensor: Tensor = file.get_tensor(name)
            copied = tensor.to(dtype)
            return tensor.clone() if copied is tensor and tensor.device.type == "cpu" else copied

    def holds(self, config: PretrainedConfig) -> bool:
        """Whether the state dict of the configuration's model is that of the files, name by name and shape by shape;
        transformers knows how to convert other checkpoints."""
        with torch.device("meta"):
            model: Any = empty_model(config, torch.bfloat16)
        model.tie_weights()
        if getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None):
            return False
        state = model.state_dict(keep_vars=True)
        if any(name in self.shapes and self.shapes[name] != tuple(tensor.shape) for name, tensor in state.items()):
            return False
        known = {id(tensor) for name, tensor in state.items() if name in self.files}
        return known == {id(tensor) for tensor in state.values()}

    def dtype(self, config: PretrainedConfig) -> torch.dtype:
        """As stored: what the configuration says, else that of the first tensor."""
        said = getattr(config, "dtype", None)
        if isinstance(said, torch.dtype):
            return said
        name, path = next(iter(self.files.items()))
        with safe_open(path, "pt") as file:
            dtype: torch.dtype = file.get_tensor(name).dtype
        return dtype
