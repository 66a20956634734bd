"""A model with quantised linear layers in one safetensors file: `save_quantized` and `load_quantized`.

The file holds every weight of the model once, and in its metadata a format tag, the model's configuration, and the
format of each quantised layer. Loading makes the model's modules without their weights and fills them from the file
tensor by tensor, so that memory holds nothing but the model.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from cats_kernels.quantized import QuantizedWeight
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from cats.files import check_output
from cats.not_serializable import refuse_save_pretrained
from cats.other_linears import packed_linears
from cats.packed_linear import PackedLinear
from cats.quantization import is_quantized, mark_quantized
from cats.quantized_linear import TENSORS, QuantizedLinear
from cats.skeleton import empty_model, fill
from cats.structure import check_module, gated_mlps, mlp_linears, parts_of

FORMAT = "cats-quantized-1"
"""Of a file in which the linear layers of the gated MLPs are quantised, and no others."""
FORMAT_OF_ALL = "cats-quantized-2"
"""Of one in which others are, too."""
QUANTIZED = "quantized.safetensors"
"""Name of the file in a directory that `cats quantize` writes."""
FAR = 4
"""times as many numbers as the file has for a tensor are more than any packing explains."""
KEYS = {"bits": int, "group_size": int, "symmetric": bool, "transposed": bool}


def save_quantized(model: PreTrainedModel, path: str | Path) -> None:
    """Write a model that `cats.quantize` has quantised, whole or not at all; thresholds are not part of it.

    Raises:
        TypeError: it is no module.
        ValueError: it is not quantised, it is a part of a model, or its other weights are of several dtypes, which a
            file could not be read to.
        OSError: ``path`` cannot be written.
    """
    check_module(model)
    _check_readable(model)
    layers = {}
    for name, mlp in gated_mlps(model).items():
        if not is_quantized(mlp):
            raise ValueError(f"{name} is not quantised: call cats.quantize(model) first")
        for part in parts_of(mlp).linears:
            linear: Any = mlp._modules[part]
            values = (linear.bits, linear.group_size, linear.zeros is None, linear.transposed)
            layers[f"{name}.{part}"] = dict(zip(KEYS, values, strict=True))
    tensors = _without_ties(model)
    others = packed_linears(model)
    for place, (holder, part) in others.items():
        layers[place] = _unpack(place, holder._modules[part], tensors)
    metadata = {
        "format": FORMAT_OF_ALL if others else FORMAT,
        "config": model.config.to_json_string(use_diff=False),
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": json.dumps(layers),
    }
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        metadata["generation"] = generation.to_json_string()
    _save_atomically(tensors, Path(path), metadata)


def _unpack(path: str, linear: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Put the tensors of a `PackedLinear` among ``tensors`` as files have them; its format."""
    weight = linear.quantized
    del tensors[f"{path}.packed"]
    tensors |= {f"{path}.{n}": t.contiguous() for n, t in zip(TENSORS, weight.tensors, strict=True) if t is not None}
    return dict(zip(KEYS, (weight.bits, weight.group_size, weight.zeros is None, False), strict=True))


def load_quantized(path: str | Path, device: str | torch.device = "cpu") -> PreTrainedModel:
    """Read what `save_quantized` wrote: the model in evaluation mode, not patched.

    Raises:
        ValueError: it is not such a file, or says of its tensors what does not fit them or the model.
        OSError: it is truncated, damaged or not there.
    """
    with _reading(path) as file:
        return _load(_File(file, torch.device(device)))


def read_config(path: str | Path) -> PretrainedConfig:
    """The configuration of the model in such a file, with its dtype. Raises as `load_quantized`."""
    with _reading(path) as checked:
        file = _File(checked, torch.device("cpu"))
        _check_format(file)
        config = _config(json.loads(file.metadata["config"]), file)
        config.dtype = _dtype(file.metadata["dtype"])
        return config


def has_format(path: str | Path) -> bool:
    """Whether a safetensors file says that `save_quantized` wrote it. Raises OSError where it cannot be read."""
    with _reading(path) as checked, safe_open(checked, "pt") as file:
        return (file.metadata() or {}).get("format") in (FORMAT, FORMAT_OF_ALL)


@contextmanager
def _reading(path: str | Path) -> Iterator[Path]:
    """Say what is wrong with a file in one sentence."""
    path = Path(path)
    if not path.is_file():
        raise OSError(f"{path} does not exist: give the file that cats.save_quantized wrote")
    try:
        yield path
    except SafetensorError as error:
        raise OSError(f"{path} is truncated or damaged: {error}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a quantised model of CATS: {_text(error)}") from error


class _File:
    """A safetensors file of which tensors are copied, one after another: what has been read of a file that stays open
    counts as memory of the process, and a tensor that is part of the file would change with it."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device = path, device
        with safe_open(path, "pt") as file:
            self.metadata: dict[str, str] = file.metadata() or {}
            self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        self.unread = set(self.shapes)

    def take(self, name: str) -> Tensor:
        """A tensor, which is struck off `unread`. Raises ValueError where there is none."""
        if name not in self.unread:
            raise ValueError(f"it lacks {name}")
        self.unread.discard(name)
        with safe_open(self.path, "pt", device=str(self.device)) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor.clone() if tensor.device.type == "cpu" else tensor


def _text(error: Exception) -> str:
    return f"its metadata lack {error.args[0]}" if isinstance(error, KeyError) else str(error)


def _check_readable(model: PreTrainedModel) -> None:
    """Refuse a part of a model or what holds one, and weights of another dtype than the model of this configuration has
    in the dtype of this one."""
    if not isinstance(getattr(model, "config", None), PretrainedConfig):
        kind = type(model).__name__
        raise ValueError(f"a {kind} has no configuration to be read back by: save the model in it or around it")
    with torch.device("meta"):
        whole = empty_model(model.config, model.dtype)
    expected, held = whole.state_dict(), model.state_dict()
    if not expected.keys() & held.keys():
        kinds = type(model).__name__, type(whole).__name__
        raise ValueError(f"a {kinds[0]} alone could not be read back: save the {kinds[1]} that it is a part of")
    for name, tensor in held.items():
        if name in expected and tensor.dtype != expected[name].dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} in a model of {model.dtype}; only weights of one dtype can be saved: cast "
                f"them first, as model.to({model.dtype}) does"
            )


def _without_ties(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with each tensor once: the output matrix of many models is their embedding."""
    result, seen = {}, set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if place not in seen or not tensor.numel():
            seen.add(place)
            result[name] = tensor.contiguous()
    return result


def _save_atomically(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    target = check_output(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:32]}.")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError | SafetensorError):
            raise OSError(f"{path} cannot be written: {error}") from error
        raise


def _check_format(file: _File) -> None:
    if file.metadata.get("format") not in (FORMAT, FORMAT_OF_ALL):
        raise ValueError(f'its metadata have no "format" of "{FORMAT}" or "{FORMAT_OF_ALL}"')


def _load(file: _File) -> PreTrainedModel:
    metadata = file.metadata
    _check_format(file)
    config, dtype = _config(json.loads(metadata["config"]), file), _dtype(metadata["dtype"])
    layers = _layers(json.loads(metadata["layers"]))
    _check_sizes(config, layers, file)
    model = empty_model(config, dtype)
    of_mlps = set(mlp_linears(model))
    for path, form in layers.items():
        _fill_layer(model, path, form, file, path in of_mlps)
    _fill(model, file)
    for name in {path.rpartition(".")[0]: None for path in layers if path in of_mlps}:
        mark_quantized(model.get_submodule(name))
    refuse_save_pretrained(model)
    if "generation" in metadata:
        model.generation_config = GenerationConfig.from_dict(json.loads(metadata["generation"]))
    return model.eval()


def _dtype(name: str) -> torch.dtype:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ValueError(f"its dtype is {name!r}, where {', '.join(dtypes)} are allowed")
    return dtypes[name]


def _layers(data: Any) -> dict[str, dict[str, Any]]:
    """The formats of the quantised layers, checked as far as they can be without tensors."""
    if not isinstance(data, dict):
        raise ValueError("its layers must map module paths to formats")
    for path, form in data.items():
        if not isinstance(form, dict) or {key: type(value) for key, value in form.items()} != KEYS:
            raise ValueError(f"the format of {path} must have {', '.join(KEYS)}, not {str(form)[:80]}")
    return data


def _config(data: Any, file: _File) -> PretrainedConfig:
    """The model's configuration."""
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise ValueError("its config must be a model's configuration with a model_type")
    config: PretrainedConfig = AutoConfig.for_model(data.pop("model_type"), **data)
    count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    if not isinstance(count, int) or count > len(file.shapes):
        raise ValueError(f"its config has {count!r} layers, of which its {len(file.shapes)} tensors cannot be")
    return config


def _check_sizes(config: PretrainedConfig, layers: dict[str, dict[str, Any]], file: _File) -> None:
    """Refuse a configuration of far larger tensors than the file has, before memory is asked for."""
    with torch.device("meta"):
        weights = empty_model(config, torch.float32).state_dict()
    for name, weight in weights.items():
        path = name.removesuffix(".weight")
        packed = path in layers and f"{path}.data" in file.shapes
        shape = file.shapes.get(f"{path}.data" if packed else name, tuple(weight.shape))
        if weight.numel() > FAR * prod(shape):
            needed = tuple(weight.shape)
            raise ValueError(f"{name} is {shape} in it, too small for the {needed} of the model's configuration")


def _fill_layer(model: nn.Module, path: str, form: dict[str, Any], file: _File, of_mlp: bool) -> None:
    """Put a quantised layer of the file's tensors in the place of an empty linear layer."""
    block, _, part = path.rpartition(".")
    try:
        holder: Any = model.get_submodule(block)
        linear: Any = holder._modules[part]
    except (AttributeError, KeyError):
        raise ValueError(f"the model of its configuration has no {path}") from None
    if type(linear) is not nn.Linear:
        raise ValueError(f"{path} is a {type(linear).__name__} by its configuration, not a linear layer")
    m, d = reversed(linear.weight.shape) if form["transposed"] else linear.weight.shape
    data, scales = file.take(f"{path}.data"), file.take(f"{path}.scales")
    zeros = None if form["symmetric"] else file.take(f"{path}.zeros")
    try:
        weight = QuantizedWeight(data, scales, zeros, form["bits"], form["group_size"], d)
        if weight.shape[0] != m:
            raise ValueError(f"data has {weight.shape[0]} rows; the model's configuration gives {m}.")
        if not all(bool(tensor.isfinite().all()) for tensor in (scales, zeros) if tensor is not None):
            raise ValueError("scales and zeros must be finite.")
        if of_mlp:
            made: nn.Module = QuantizedLinear(weight, form["transposed"], linear.weight.dtype, linear.bias)
        elif form["transposed"]:
            raise ValueError("only the down projection of a gated MLP may be transposed.")
        else:
            made = PackedLinear(weight, linear.weight.dtype, linear.bias)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    setattr(holder, part, made)


def _fill(model: Any, file: _File) -> None:
    """All other parameters and saved buffers."""

    def take(name: str, held: Tensor) -> Tensor:
        value = file.take(name)
        if value.shape != held.shape or value.dtype != held.dtype:
            actual, needed = (f"{t.dtype} {tuple(t.shape)}" for t in (value, held))
            raise ValueError(f"{name} is {actual}, where the model's configuration gives {needed}")
        return value

    fill(model, take, frozenset(file.unread), file.device)
    if file.unread:
        raise ValueError(f"it has tensors that the model has not, such as {sorted(file.unread)[0]}")
