"""Models that transformers reads itself: a directory of `save_pretrained`, or a hub repository of the same files."""

from contextlib import suppress
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cats.hub import loading, source
from cats.models.loader import Request
from cats.models.streaming import Checkpoint, quantized_model, rounded


def load_config(spec: str, where: str, layers: int | None = None) -> PretrainedConfig:
    """Configuration of the directory or hub id ``where``, which the user calls ``spec``."""
    with loading(spec):
        config = AutoConfig.from_pretrained(source(where), trust_remote_code=False)
    if layers is not None:
        config.get_text_config(decoder=True).num_hidden_layers = layers
    return config


def load(spec: str, where: str, request: Request) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model at ``where`` and its tokenizer, the weights from safetensors only; no code of the repository runs.

    Raises:
        OSError: the hub is out of reach or refuses access, or weights are not safetensors, damaged or incomplete.
    """
    options: dict[str, Any] = {"dtype": request.dtype or "auto", "use_safetensors": True, "trust_remote_code": False}
    if request.layers is not None:
        options["config"] = load_config(spec, where, request.layers)
    if request.device == "sharded":
        options["device_map"] = "auto"
    with loading(spec):
        where = source(where)
        if request.bits is not None and (streamed := _load_quantized(where, request)) is not None:
            return streamed, AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(where, output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    model, report = loaded
    check_complete(spec, report)
    return (model if request.device == "sharded" else model.to(request.device)).eval(), tokenizer


def _load_quantized(where: str, request: Request) -> PreTrainedModel | None:
    """The model at ``where``, its gated MLPs quantised while they are read; None where that cannot be: its layers are
    to be spread over several devices, or transformers must convert its weights."""
    if request.device == "sharded" or request.bits is None:
        return None
    config = AutoConfig.from_pretrained(where, trust_remote_code=False)
    if request.layers is not None:
        config.get_text_config(decoder=True).num_hidden_layers = request.layers
    checkpoint = Checkpoint(where, torch.device(request.device))
    if getattr(config, "quantization_config", None) is not None or not checkpoint.holds(config):
        return None
    dtype = request.dtype or checkpoint.dtype(config)
    packed = rounded(checkpoint.plain, dtype, request.bits, request.group_size)
    device, names = checkpoint.device, checkpoint.files.keys()
    model = quantized_model(config, dtype, device, names, checkpoint.plain, packed, request.others)
    with suppress(OSError):  # it has none
        model.generation_config = GenerationConfig.from_pretrained(where)
    return model.eval()


def check_complete(spec: str, report: dict[str, Any]) -> None:
    """Refuse a model with tensors missing: transformers would go on with random numbers in their place."""
    if missing := sorted(report["missing_keys"]):
        raise OSError(f"the weights of {spec} are incomplete: {len(missing)} tensors are missing, such as {missing[0]}")


def load_tokenizer(spec: str, where: str) -> PreTrainedTokenizerBase:
    """The tokenizer at ``where``."""
    with loading(spec):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source(where), trust_remote_code=False)
    return tokenizer
