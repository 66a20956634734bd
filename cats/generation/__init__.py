"""Generation as an inference engine does it: one fixed cache, one compiled step with the choice of the token inside.

tokens = cats.generate(model, input_ids, max_new_tokens=256)

The model may be dense or patched by `cats.apply`, and may be switched between calls. On a GPU a token is the replay of
one CUDA graph; on a CPU the step runs as it is, over a cache that is written in place.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cats.generation.cache import capacity_for
from cats.generation.decoder import Decoder, decoder_of
from cats.generation.loops import LOOPS, Loop, check_loop, default_loop
from cats.generation.projections import separate
from cats.generation.prompt import check_prompt
from cats.generation.sampling import Sampling, whole_number
from cats.generation.serving import inner, obstacle, transformers_generate, wrapper_obstacle
from cats.generation.settings import Settings

__all__ = ["LOOPS", "Decoder", "Loop", "Sampling", "Settings", "capacity_for", "decoder_of", "generate", "release"]

MODELS_OWN = "model"


def generate(
    model: nn.Module,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    eos_token_id: int | Iterable[int] | str | None = MODELS_OWN,
    pad_token_id: int | None = None,
    streamer: Any = None,
    loop: str = "auto",
    cache_tokens: int = 0,
) -> Tensor:
    """Continue ``input_ids``; greedily unless a temperature is given.

    The same tokens as ``model.generate`` with the same settings, up to rounding: on a GPU sums are taken in another
    order. Of the model's ``generation_config`` only the end and padding tokens count.

    Args:
        model: a causal language model of transformers on one device, dense or patched.
        input_ids: int64 (batch, prompt), or (prompt,) for one sequence; shorter sequences are padded on the left.
        max_new_tokens: tokens to generate, at least 1.
        attention_mask: (batch, prompt), 0 for padding; None where there is none.
        temperature: 0 takes the likeliest token; else one is drawn from the logits divided by it.
        top_k: draw among the so many likeliest tokens.
        top_p: draw among the likeliest tokens whose probabilities add up to this.
        seed: of the draws; None for torch's default generator.
        eos_token_id: a token, or several, that end a sequence; "model" for those of the model's generation_config,
            None for none.
        pad_token_id: what follows the end of a sequence that others outlast; by default the model's, or its first end
            token.
        streamer: one of transformers' streamers, or a function that is called with every token, int64 (batch,) on the
            host.
        loop: "auto" (on a GPU "graph-tuned" for one sequence and "graph" for several; on a CPU "eager"), "eager"
            (nothing is compiled), "captured" (a CUDA graph of what runs uncompiled), "graph" (compiled, then captured),
            "graph-tuned" (compiled with tuning: a minute more for a 7B model), or "transformers" (``model.generate``).
        cache_tokens: tokens that the cache holds from the start, at least; a cache that is full is replaced by one of
            twice the size.

    Returns:
        int64 (batch, prompt + new tokens), on the device where the model computes.

    Raises:
        TypeError, ValueError: one sentence naming the argument that is wrong and what is allowed.
    """
    itself = inner(model)
    with decoder_of(itself).lock:  # on a GPU nothing may be enqueued while another thread captures a graph
        ids, mask, outside = check_prompt(model, input_ids, attention_mask)
    max_new_tokens = _check_whole("max_new_tokens", max_new_tokens, 1)
    sampling = Sampling(temperature, top_k, top_p)
    reason = obstacle(itself) or wrapper_obstacle(model)
    if reason is not None and not hasattr(itself, "generate"):
        raise ValueError(f"{reason}, and has no generate of its own")
    if loop == "auto" and reason is None:
        loop = default_loop(ids.device, len(ids))
    elif loop not in ("auto", "transformers"):
        check_loop(loop, ids.device)
    stop, pad = _special_tokens(itself, eos_token_id, pad_token_id)
    generator = None if seed is None else torch.Generator(ids.device).manual_seed(_check_seed(seed))
    settings = Settings(loop, sampling, generator, stop, pad, room=_check_whole("cache_tokens", cache_tokens, 0))
    if hasattr(streamer, "put"):  # it gets the prompt, for which the host waits
        outside.check()
    on_tokens = outside.checking(_on_tokens(streamer, ids))
    if reason is not None or loop == "transformers":
        if reason is not None and loop != "transformers":
            warnings.warn(f"transformers' generate is used, since {reason}", stacklevel=2)
        tokens = transformers_generate(model, ids, mask, max_new_tokens, settings, on_tokens)
    else:
        tokens = decoder_of(itself).run(itself, ids, mask, max_new_tokens, settings, on_tokens)
    outside.check()
    if hasattr(streamer, "end"):
        streamer.end()
    return tokens


def release(model: nn.Module) -> None:
    """Free what `generate` keeps for ``model``: the cache, the captured graph, and the joined storage of weights."""
    itself = inner(model)
    decoder_of(itself).release()
    separate(itself)


def _check_whole(name: str, value: Any, least: int) -> int:
    number = whole_number(value)
    if number is None or number < least:
        raise ValueError(f"{name} must be a whole number, {least} or more, not {value!r}")
    return number


def _check_seed(seed: Any) -> int:
    number = whole_number(seed)
    if number is None or not 0 <= number < 2**63:
        raise ValueError(f"seed must be a whole number from 0 to 2^63, not {seed!r}")
    return number


def _special_tokens(model: Any, eos: Any, pad: Any) -> tuple[frozenset[int], int]:
    """The tokens that end a sequence, and the one that follows."""
    own = getattr(model, "generation_config", None)
    if isinstance(eos, str):
        if eos != MODELS_OWN:
            raise ValueError(f'eos_token_id must be a token, several, None or "model", not {eos!r}')
        eos = getattr(own, "eos_token_id", None)
    if eos is None or whole_number(eos) is not None:
        eos = [] if eos is None else [eos]
    stop = [whole_number(token) for token in eos] if isinstance(eos, Iterable) else [None]
    if None in stop:
        raise ValueError(f"eos_token_id must be whole numbers, not {eos!r}")
    if pad is None:
        pad = getattr(own, "pad_token_id", None)
    if pad is None:
        pad = stop[0] if stop else 0
    padding = whole_number(pad)
    if padding is None:
        raise ValueError(f"pad_token_id must be a whole number, not {pad!r}")
    return frozenset(token for token in stop if token is not None), padding


def _on_tokens(streamer: Any, ids: Tensor) -> Callable[[Tensor], None] | None:
    """What to call with each new token."""
    if streamer is None:
        return None
    if hasattr(streamer, "put"):
        streamer.put(ids.cpu())
        put: Callable[[Tensor], None] = streamer.put
        return put
    if not callable(streamer):
        raise TypeError(f"streamer must have put and end, or be a function, not a {type(streamer).__name__}")
    function: Callable[[Tensor], None] = streamer
    return function
