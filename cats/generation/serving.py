"""Which models the loops here serve; transformers' own `generate` serves the others."""

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from cats.generation.settings import Settings
from cats.structure import unwrapped

LAYER_TYPES = ("full_attention", "sliding_attention")
NEEDED = ("input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep")
"""Arguments that the loops give to a model's forward."""


def inner(model: nn.Module) -> Any:
    """The model itself, inside what torch.compile and the like put around it."""
    return unwrapped(model)


def obstacle(model: Any) -> str | None:
    """Why the loops here cannot serve ``model`` (as `inner` gives it); None where they can."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        return f"{name} is no causal language model of transformers"
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        return f"{name} has an encoder"
    if getattr(model, "_is_stateful", False):
        return f"{name} keeps a state, not a cache of keys and values"
    others = sorted({kind for kind in getattr(config, "layer_types", None) or () if kind not in LAYER_TYPES})
    if others:
        return f"{name} has layers of type {', '.join(others)}"
    if getattr(config, "num_kv_shared_layers", 0):
        return f"{name} shares keys and values among its layers"
    prepare = "prepare_inputs_for_generation"
    if getattr(type(model), prepare) is not getattr(GenerationMixin, prepare):
        return f"{name} prepares its inputs in a way of its own"
    missing = [argument for argument in NEEDED if argument not in inspect.signature(model.forward).parameters]
    if missing:
        return f"the forward of {name} takes no {missing[0]}"
    if model.training:
        return f"{name} is in training mode"
    devices = {tensor.device for tensor in model.parameters()}
    if len(devices) != 1 or devices == {torch.device("meta")} or hasattr(model, "_hf_hook"):
        return f"{name} is spread over several devices"
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        return f"{name} is sharded"
    return None


def wrapper_obstacle(model: Any) -> str | None:
    """Why what is around the model cannot be left out, see `inner`."""
    for wrapper in model.modules():
        kinds = getattr(wrapper, "peft_config", None)
        if isinstance(kinds, dict) and any(getattr(kind, "is_prompt_learning", False) for kind in kinds.values()):
            return f"{type(model).__name__} puts prompts of its own before the input"
        break
    return None


def transformers_generate(
    model: Any, ids: Tensor, mask: Tensor | None, new_tokens: int, settings: Settings, on_tokens: Any = None
) -> Tensor:
    """The same call by transformers' `generate`, whatever the model's own generation settings are."""
    sampling = settings.sampling
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=not sampling.greedy,
        temperature=1.0 if sampling.greedy else sampling.temperature,
        top_k=None if sampling.greedy else sampling.top_k or 0,  # 0: all; where nothing is drawn it would be warned of
        top_p=1.0 if sampling.top_p is None else sampling.top_p,
        eos_token_id=sorted(settings.stop) or None,
        pad_token_id=settings.pad,
        repetition_penalty=1.0,
        num_beams=1,
    )
    own = model.generation_config
    for name in ("bos_token_id", "decoder_start_token_id"):  # with which a decoder beside an encoder starts
        setattr(config, name, getattr(own, name, None))
    model.generation_config = config  # generate fills in what is not set from the model's own
    devices = [ids.device] if ids.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices, enabled=settings.generator is not None), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="transformers")
            if settings.generator is not None:
                torch.manual_seed(settings.generator.initial_seed())
            mask = torch.ones_like(ids) if mask is None else mask
            streamer = _Streamer(on_tokens) if on_tokens else None
            tokens: Tensor = model.generate(ids, attention_mask=mask, generation_config=config, streamer=streamer)
    finally:
        model.generation_config = own
    return tokens


class _Streamer:
    """transformers' streamer for a function of tokens."""

    def __init__(self, on_tokens: Any) -> None:
        self.on_tokens, self.prompt = on_tokens, True

    def put(self, tokens: Tensor) -> None:
        """Called with the prompt, then with each new token."""
        if not self.prompt:
            self.on_tokens(tokens.reshape(-1))
        self.prompt = False

    def end(self) -> None:
        """Called after the last token."""
