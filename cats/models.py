"""Models by name: a hub id, a local directory, ``pocket`` (shipped here), or ``shape:NAME`` (random weights).

Weights are read from safetensors only and no code from a model repository is ever run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cats.hub import loading, source

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """Sizes of a published model, for timing without its weights: d, m, and what else attention and head need."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int = 4096
    family: Callable[..., PretrainedConfig] = LlamaConfig

    def config(self, layers: int | None = None) -> PretrainedConfig:
        """transformers configuration of this shape with ``layers`` decoder layers (default: all)."""
        return self.family(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=layers or self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_position_embeddings,
            tie_word_embeddings=False,
            eos_token_id=None,
        )


SHAPES = {
    "mistral-7b": Shape(4096, 14336, 32, 32, 8, 32000, 32768, MistralConfig),
    "llama2-7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "llama2-13b": Shape(5120, 13824, 40, 40, 40, 32000),
    "llama3-8b": Shape(4096, 14336, 32, 32, 8, 128256, 8192),
    "small": Shape(64, 176, 2, 4, 2, 256),
}


def pocket_path() -> Path:
    """Directory of the shipped pocket model."""
    return Path(str(files("cats") / "pocket_model"))


def resolve(spec: str) -> str:
    """The hub id or directory that ``spec`` stands for; a ``shape:`` spec comes back as it is.

    Raises:
        ValueError: an unknown shape, or a path that is not a model directory.
    """
    if spec == "pocket":
        return str(pocket_path())
    if spec.startswith("shape:"):
        if spec.removeprefix("shape:") not in SHAPES:
            raise ValueError(f"unknown shape {spec!r}: allowed are {', '.join('shape:' + name for name in SHAPES)}")
        return spec
    path = Path(spec).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{spec} is a directory without config.json: give a directory written by save_pretrained")
        return str(path)
    if path.is_file():
        raise ValueError(f"{spec} is a file: give the directory that it is in, as written by save_pretrained")
    if path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") > 1:
        raise ValueError(f"{spec} does not exist: give a hub id (owner/name), a model directory, pocket, or shape:NAME")
    return spec


def load_config(spec: str, layers: int | None = None) -> PretrainedConfig:
    """Configuration of a model, without its weights. Raises as `resolve`, and OSError when the hub cannot serve it."""
    where = resolve(spec)
    if where.startswith("shape:"):
        return SHAPES[where.removeprefix("shape:")].config(layers)
    with loading(spec):
        config = AutoConfig.from_pretrained(source(where), trust_remote_code=False)
    if layers is not None:
        config.num_hidden_layers = layers
    return config


def load_model(
    spec: str,
    dtype: str = "auto",
    device: str = "cpu",
    layers: int | None = None,
    seed: int = 0,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a causal language model in evaluation mode, and its tokenizer (None for a ``shape:`` model).

    Args:
        spec: hub id, local directory, ``pocket``, or ``shape:mistral-7b`` and the like.
        dtype: ``float32``, ``float16``, ``bfloat16`` or ``auto`` (as stored; bfloat16 for a shape).
        device: where to put it, ``cpu``, ``cuda``, ``cuda:1``; a shape's random weights are made there directly.
            ``sharded`` spreads the layers over all GPUs, for a model that one cannot hold (accelerate's device_map).
        layers: keep only the first so many decoder layers.
        seed: seed of a shape's random weights.

    Raises:
        ValueError: unknown dtype, shape or path.
        OSError: the hub is out of reach or refuses access, or the weights are not safetensors, damaged or incomplete.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: allowed are auto, {', '.join(DTYPES)}")
    where = resolve(spec)
    if where.startswith("shape:") and device == "sharded":
        raise ValueError(f"{spec} has random weights, which cannot be sharded: give one device")
    if where.startswith("shape:"):
        torch.manual_seed(seed)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(load_config(spec, layers), dtype=DTYPES.get(dtype, torch.bfloat16))
        return model.to(device).eval(), None  # buffers that transformers makes on the host follow
    options: dict[str, Any] = {"dtype": DTYPES.get(dtype, "auto"), "use_safetensors": True, "trust_remote_code": False}
    if layers is not None:
        options["config"] = load_config(spec, layers)
    if device == "sharded":
        options["device_map"] = "auto"
    with loading(spec):
        where = source(where)
        loaded: Any = AutoModelForCausalLM.from_pretrained(where, output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    model, report = loaded
    if report["missing_keys"]:  # transformers would go on with random numbers in their place
        missing = sorted(report["missing_keys"])
        raise OSError(f"the weights of {spec} are incomplete: {len(missing)} tensors are missing, such as {missing[0]}")
    if device != "sharded":
        model = model.to(device)
    return model.eval(), tokenizer
