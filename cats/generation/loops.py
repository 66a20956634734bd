"""The loops that generate: how a decode step is made, compiled and captured."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from cats_kernels.dispatch import asked_for
from torch import Tensor, nn

from cats.generation.cache import DecodeCache


@dataclass(frozen=True)
class Loop:
    """What distinguishes a loop.

    Attributes:
        compiled: the step goes through torch.compile.
        graph: on a GPU the step is one CUDA graph, replayed.
        tuned: compiled with inductor's coordinate descent tuning, which turns one-row products into kernels of its own
            and fuses their neighbours into them.
    """

    compiled: bool = False
    graph: bool = False
    tuned: bool = False


LOOPS = {
    "eager": Loop(),
    "captured": Loop(graph=True),
    "graph": Loop(compiled=True, graph=True),
    "graph-tuned": Loop(compiled=True, graph=True, tuned=True),
}


def default_loop(device: torch.device, batch: int) -> str:
    """The fastest loop once it is compiled; a CPU is as fast without compiling.

    Tuning takes twice as long to compile and serves products of one row. On an H100 (the shapes of Llama2-7B and
    Mistral-7B, bfloat16, one sequence, 256 tokens) it made the dense model 7 and 8 % faster, and CATS at 50 %, whose
    MLPs are kernels already, 5 % (e06, results/h100).

    Args:
        device: of the model.
        batch: sequences.
    """
    if device.type != "cuda":
        return "eager"
    return "graph-tuned" if batch == 1 else "graph"


def check_loop(name: str, device: torch.device) -> None:
    """Raises ValueError for an unknown loop, or one that needs a compiler that is missing."""
    if name not in LOOPS:
        raise ValueError(f"unknown loop {name!r}: allowed are auto, transformers, {', '.join(LOOPS)}")
    if device.type == "cpu" and LOOPS[name].compiled and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise ValueError('compiling on a CPU needs a C++ compiler (c++, g++ or clang++): use the loop "eager"')


def compile_options(device: torch.device, tuned: bool, dependent_launch: bool = True) -> dict[str, Any]:
    """Inductor's options for a step that is captured as one graph.

    With ``dependent_launch`` its kernels start before their predecessors have ended and then wait, on a GPU that can
    (from compute capability 9.0): at batch 1 there are hundreds of them per token, of one or two microseconds each.
    """
    if device.type != "cuda":
        return {}
    able = dependent_launch and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"triton.enable_pdl": able, "coordinate_descent_tuning": tuned}


def logits_of(model: Any, cache: DecodeCache, token: Tensor, mask: Tensor | None) -> Tensor:
    """Logits (batch, vocabulary) of one token (batch, 1) per sequence, which enters the cache."""
    logits: Tensor = model(
        input_ids=token,
        attention_mask=mask,
        position_ids=(cache.position - cache.first)[:, None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    cache.position.add_(1)
    return logits


def greedy_step(model: Any, cache: DecodeCache, token: Tensor, tokens: Tensor, mask: Tensor | None) -> None:
    """Replace ``token`` (batch, 1) by its likeliest successor, written to its place in ``tokens`` (batch, capacity)."""
    token.copy_(logits_of(model, cache, token, mask).argmax(-1, keepdim=True))
    tokens.index_copy_(1, cache.position, token)


def logits_step(model: Any, cache: DecodeCache, token: Tensor, mask: Tensor | None) -> Tensor:
    """The float32 logits of the token that follows ``token``."""
    return logits_of(model, cache, token, mask).float()


def compile_function(function: Any, options: dict[str, Any], backend: str = "inductor") -> Callable[..., Any]:
    """``function`` compiled, in a code object of its own: torch keeps and counts what it compiled by code object."""
    own: Any = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    compiled: Callable[..., Any] = torch.compile(own, backend=backend, options=options or None)
    return compiled


def capture(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``step``, which runs once before, so that what is compiled at a first call stays outside."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def fingerprint(model: nn.Module) -> list[Any]:
    """All that a captured step depends on: modules, where their tensors lie, hooks, simple attributes, thresholds."""
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    marks: list[Any] = [attention, hooks_of(model), asked_for("auto")]
    for module in model.modules():
        attributes = module.__dict__
        tensors = (*module._parameters.values(), *module._buffers.values())
        marks.append(
            (
                id(module),
                type(module),
                [(t.data_ptr(), t.dtype, t.shape, t.stride(), t.device) for t in tensors if t is not None],
                {key: value for key, value in attributes.items() if isinstance(value, bool | int | float | str)},
                id(attributes.get("forward")),
            )
        )
        state = attributes.get("cats_state")
        if state is not None:
            marks.append((state.kernel, state.sparse, state.criterion, state.decider, state.written_out))
    return marks


def hooks_of(model: nn.Module) -> tuple[Any, ...]:
    """The hooks of all modules, of which compiled code does not notice that they have come or gone."""
    return tuple(
        (index, *module._forward_hooks, *module._forward_pre_hooks)
        for index, module in enumerate(model.modules())
        if module._forward_hooks or module._forward_pre_hooks
    )
