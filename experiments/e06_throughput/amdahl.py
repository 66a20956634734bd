"""Where the time of a decoded token goes, and the speed-up that Amdahl's law allows CATS from that.

MLP, attention and head are timed alone, on the inputs they get while the model decodes, compiled and with a static
cache where the loop is: cold caches, interleaved rounds, on a GPU as CUDA graph replays (see
`experiments.framework.timing`).
"other" is what remains of a token's measured time: norms, residuals, embedding, launches, and generate's own Python.
With f the MLP's share of the dense token and g the gain of CATS over dense on the MLP alone, the law allows
1 / ((1 - f) + f / g).
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

import cats
from cats.generation.attention import decode_blocks, decoding
from cats.generation.cache import DecodeCache
from cats.structure import attention_blocks
from experiments.framework.tables import AmdahlRow, Row, ShareRow
from experiments.framework.timing import Timing
from experiments.framework.timing import measure as measure_calls

Compile = Callable[[Any], Any]
STEPS = 4
"""Decode steps whose inputs the MLP is timed on."""


def amdahl(share: float, gain: float) -> float:
    """Speed-up of the whole when a part of ``share`` gets faster by ``gain``."""
    return 1 / ((1 - share) + share / gain)


def shares_and_amdahl(
    model: PreTrainedModel,
    switch: Callable[[float | None], None],
    sparsity: float,
    ids: Tensor,
    token_ms: dict[float | None, float],
    common: dict[str, Any],
    rounds: int,
    compile_module: Compile | None = None,
    decode_attention: bool = False,
) -> list[Row]:
    """Rows of both tables for one model.

    Args:
        model: dense when called, and after.
        switch: makes the model CATS at a sparsity, or dense (None).
        sparsity: the CATS variant that the law is applied to.
        ids: (1, context) tokens; the inputs of the components are taken from decode steps that follow them.
        token_ms: measured milliseconds per token of the dense model (None) and of CATS (``sparsity``) in the loop.
        common: the columns that all rows share.
        rounds: timed rounds.
        compile_module: how the loop compiles a module; None for a loop that does not.
        decode_attention: whether attention is that of `cats.generate`'s steps, where it serves the model.
    """
    timings = time_components(model, switch, sparsity, ids, rounds, compile_module, decode_attention)
    layers = len(cats.gated_mlps(model))
    dense = token_ms[None]
    milliseconds = {
        "mlp": layers * timings["mlp"].geomean_ms,
        "attention": layers * timings["attention"].geomean_ms,
        "head": timings["head"].geomean_ms,
    }
    milliseconds["other"] = dense - sum(milliseconds.values())
    rows: list[Row] = [
        ShareRow(**common, component=name, milliseconds=ms, share=ms / dense) for name, ms in milliseconds.items()
    ]
    gain = timings["mlp"].geomean_ms / timings["cats"].geomean_ms
    share = milliseconds["mlp"] / dense
    predicted, measured = amdahl(share, gain), dense / token_ms[sparsity]
    row = AmdahlRow(
        **common,
        criterion="cats",
        variant=f"cats-{100 * sparsity:g}",
        sparsity_target=sparsity,
        kernel_speedup=gain,
        mlp_share=share,
        predicted_speedup=predicted,
        measured_speedup=measured,
        fraction_of_predicted=measured / predicted,
    )
    return [*rows, row]


def time_components(
    model: PreTrainedModel,
    switch: Callable[[float | None], None],
    sparsity: float,
    ids: Tensor,
    rounds: int,
    compile_module: Compile | None = None,
    decode_attention: bool = False,
) -> dict[str, Timing]:
    """Time one call of the middle layer's MLP (dense: ``mlp``, sparse: ``cats``), its attention block and the head.

    Attention and head are one call per graph on a GPU, and bear its start and the copy of the cache's counter: each of
    them is overstated by a few microseconds, the MLP by a `STEPS`-th of that.
    """
    name, mlp = list(cats.gated_mlps(model).items())[len(cats.gated_mlps(model)) // 2]
    attention = attention_blocks(model)[f"{name.rpartition('.')[0]}.self_attn"]
    head = model.get_output_embeddings()
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 2 * STEPS) if compile_module else None
    inputs = decode_inputs(model, ids, {"mlp": mlp, "attention": attention, "head": head}, cache)
    switch(sparsity)
    sparse = copy.deepcopy(mlp)
    switch(None)
    modules: Any = (mlp, sparse, attention, head)
    dense, sparse, attend, head = map(compile_module, modules) if compile_module else modules
    index: Any = attention.layer_idx
    block = decode_blocks(model).get(attention) if decode_attention else None
    if block is not None:
        past = filled_cache(model, ids)
        inputs["attention"] = [(args, {**kwargs, "past_key_values": past}) for args, kwargs in inputs["attention"]]
    calls = {
        "mlp": [partial(dense, *args, **kwargs) for args, kwargs in inputs["mlp"]],
        "cats": [partial(sparse, *args, **kwargs) for args, kwargs in inputs["mlp"]],
        "attention": [partial(_attend, attend, index, args, kwargs) for args, kwargs in inputs["attention"][-1:]],
        "head": [partial(head, *args, **kwargs) for args, kwargs in inputs["head"][-1:]],
    }
    device = model.device.type
    with decoding({} if block is None else {attention: block}):
        if device == "cuda":
            return measure_calls(calls, warmups=3, rounds=rounds, device=device)
        return measure_calls({key: _in_turn(group) for key, group in calls.items()}, warmups=2, rounds=rounds)


@torch.no_grad()
def filled_cache(model: PreTrainedModel, ids: Tensor) -> DecodeCache:
    """The cache of `cats.generate` after the prompt ``ids``, with room for a token more."""
    cache = DecodeCache(model.config, ids.shape[1] + 2 * STEPS, len(ids), model.device)
    model(ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.start(ids.shape[1])
    return cache


def _attend(attention: Any, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    """Call the attention block of layer ``index`` with its cache as it was.

    A dynamic cache drops its tensors for longer ones in every call: a captured CUDA graph would read freed memory. A
    static cache counts its tokens in a tensor, which would run over the end.
    """
    cache = copy.copy(kwargs["past_key_values"])
    if isinstance(cache, DecodeCache):  # the step counts, not the layer
        return attention(*args, **kwargs)
    cache.layers = [copy.copy(layer) if i == index else layer for i, layer in enumerate(cache.layers)]
    if isinstance(cache, StaticCache):
        cache.layers[index].cumulative_length = cache.layers[index].cumulative_length.clone()
    return attention(*args, **{**kwargs, "past_key_values": cache})


def _in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    turns = cycle(calls)
    return lambda: next(turns)()


def decode_inputs(
    model: PreTrainedModel, ids: Tensor, modules: dict[str, nn.Module], cache: StaticCache | None = None
) -> dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Arguments that ``modules`` get in `STEPS` greedy decode steps after ``ids``, over ``cache`` or a growing one."""
    seen: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {name: [] for name in modules}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[name].append((args, dict(kwargs)))

        return hook

    handles = [module.register_forward_pre_hook(keep(name), with_kwargs=True) for name, module in modules.items()]
    generate: Any = model.generate
    try:
        ids = ids.to(model.device)
        options = {} if cache is None else {"past_key_values": cache, "disable_compile": True}
        with torch.no_grad():
            generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS + 1, **options)
    finally:
        for handle in handles:
            handle.remove()
    return {name: calls[1:] for name, calls in seen.items()}  # without prefill
