"""Models by name: a hub id, a local directory, a GGUF file, ``pocket`` (shipped here), or ``shape:NAME`` (random).

Weights are read from safetensors or GGUF only, and no code from a model repository is ever run. Each kind of name has a
loader in a file ``from_*.py`` of this package.
"""

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cats.models.from_pocket import pocket_path
from cats.models.from_shape import SHAPES, Shape
from cats.models.identity import identity
from cats.models.loader import DTYPES, Loader, Origin, Request, loader_of, loaders
from cats.quantization import GROUP_SIZE, check_linears, is_quantized, quantize
from cats.structure import gated_mlps

__all__ = [
    "DTYPES", "SHAPES", "Loader", "Origin", "Request", "Shape", "identity", "load_config", "load_model",
    "load_tokenizer", "loader_of", "loaders", "pocket_path", "resolve",
]  # fmt: skip


def resolve(spec: str) -> str:
    """The hub id, directory or GGUF file that ``spec`` stands for; a ``shape:`` spec comes back as it is.

    Raises:
        ValueError: an unknown shape, or a path that does not hold a model.
    """
    return loader_of(spec).resolve(spec)


def load_config(spec: str, layers: int | None = None) -> PretrainedConfig:
    """Configuration of a model, without its weights. Raises as `resolve`, and OSError when the hub cannot serve it."""
    return loader_of(spec).config(spec, layers)


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase | None:
    """Tokenizer of a model, without its weights (None for a ``shape:`` model). Raises as `load_config`."""
    return loader_of(spec).tokenizer(spec)


def load_model(
    spec: str,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    layers: int | None = None,
    seed: int = 0,
    packed: bool = False,
    bits: int | None = None,
    group_size: int | None = GROUP_SIZE,
    linears: str = "mlp",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a causal language model in evaluation mode, and its tokenizer (None for a ``shape:`` model).

    Args:
        spec: hub id, local directory, GGUF file, ``pocket``, or ``shape:mistral-7b`` and the like.
        dtype: ``float32``, ``float16``, ``bfloat16``, torch's dtype of such a name, or ``auto`` (as stored; bfloat16
            for a shape and for a GGUF file, whose weights are dequantised, whatever they are quantised to).
        device: where to put it, ``cpu``, ``cuda``, ``cuda:1``; a shape's random weights are made there directly.
            ``sharded`` spreads the layers over all GPUs, for a model that one cannot hold (accelerate's device_map).
        layers: keep only the first so many decoder layers.
        seed: seed of a shape's random weights.
        packed: of a GGUF file: keep the gated MLPs quantised as they are in it (Q8_0 or Q4_0), as `cats.quantize` would
            have made them, see docs/QUANTIZATION.md. Only the rest is dequantised.
        bits, group_size, linears: quantise as `cats.quantize` does, while the weights are read where that can be:
            memory then never holds the unquantised model.

    Raises:
        ValueError: unknown dtype, shape or path; more layers than there are, or none; a GGUF file of a kind that is not
            supported; ``packed`` for another kind of model, or other types of weights.
        OSError: the hub is out of reach or refuses access; the weights are not safetensors, damaged or incomplete; a
            GGUF file where the gguf package is not installed.
    """
    dtype = str(dtype).removeprefix("torch.")
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: allowed are auto, {', '.join(DTYPES)}")
    loader = loader_of(spec)
    if packed and bits is not None:
        raise ValueError("packed keeps the bits of a file and bits rounds to others: give one of them")
    if packed and not loader.packs:
        raise ValueError(f"{spec} has no quantised weights to keep packed: only GGUF files have; use cats.quantize")
    check_linears(linears)
    if linears != "mlp" and bits is None:
        raise ValueError(f'linears="{linears}" says what is quantised: give bits too')
    if layers is not None:
        there = loader.config(spec).get_text_config(decoder=True).num_hidden_layers
        if not 1 <= layers <= there:
            raise ValueError(f"{spec} has {there} decoder layers: its first {layers} cannot be taken")
    request = Request(DTYPES.get(dtype), device, layers, seed, packed, bits, group_size, linears)
    model, tokenizer = loader.load(spec, request)
    if bits is not None and not any(is_quantized(mlp) for mlp in gated_mlps(model).values()):
        quantize(model, bits, group_size, linears=linears)
    return model, tokenizer
