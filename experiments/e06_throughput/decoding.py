"""Greedy decoding, timed from the first to the last token without disturbing it.

Four loops. ``eager`` and ``compiled`` are those of ``model.generate``. ``eager`` is the one the paper timed: a growing
cache, every kernel launched from Python. ``compiled`` is what transformers does with a static cache on a GPU: the
decode step goes through torch.compile in mode reduce-overhead, that is, it is replayed as a CUDA graph, between which
Python chooses the token and waits for it; prefill stays eager. ``graph`` and ``graph-tuned`` are those of
`cats.generate`, what an inference engine does: the compiled step with the choice of the token is one CUDA graph, whose
replays follow each other without Python. ``graph-tuned`` has inductor's coordinate descent tuning, which turns one-row
products into kernels of inductor's own and fuses their neighbours into them: the strongest loop here for the dense
model. CATS is one opaque operator in all graphs.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from cats_kernels import MAX_ROWS
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import (
    CompileConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
)

from cats.generation import LOOPS as GENERATION_LOOPS
from cats.generation import Decoder as GraphDecoder
from cats.generation import Loop, Settings
from cats.generation.loops import compile_options
from cats.text_config import text_config
from experiments.e06_throughput.memory import peak_memory, reset_peak_memory

LOOPS = {
    "eager": Loop(),
    "compiled": Loop(compiled=True),
    **{name: GENERATION_LOOPS[name] for name in ("graph", "graph-tuned")},
}
ATTENTION = "cats"
"""The attention of `cats.generate`'s steps, where it serves the model; the other names are those of transformers."""
WARM_TOKENS = 6
"""New tokens of a warm-up: prefill, then steps to compile, to warm the graph's memory, to record and to replay."""
WARM_PROMPT = MAX_ROWS + 1
"""Prompt tokens of a warm-up: the fewest that take the dense masked path, as every longer prompt does."""
ATTEMPTS = 3


class Clock(LogitsProcessor):
    """Notes when chosen tokens were decided, from inside generate's loop.

    On a GPU it records an event into the stream and never waits, so the loop runs as it would without it.
    """

    def __init__(self, prompt_tokens: int, marks: Sequence[int], device: torch.device) -> None:
        self.prompt_tokens, self.marks, self.device = prompt_tokens, frozenset(marks), device
        self.times: dict[int, Any] = {}

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = input_ids.shape[1] - self.prompt_tokens + 1
        if token in self.marks:
            self.times[token] = self.now()
        return scores

    def start(self) -> Any:
        """`now`, after all that is under way on the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.now()

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two results of `now`; on a GPU the caller has synchronised."""
        return float(begin.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - begin)


@dataclass(frozen=True)
class Generation:
    """One timed call of generate.

    Attributes:
        tokens: int64 (batch, prompt + new), on the host.
        prefill_s: seconds from the call to the first token's logits.
        decode_s: generated tokens n to seconds from the first token to token n: n - 1 decode steps.
        peak_memory_bytes: largest resident set (CPU) or allocation (GPU) meanwhile; None where it cannot be read.
    """

    tokens: Tensor
    prefill_s: float
    decode_s: dict[int, float]
    peak_memory_bytes: int | None


def make_greedy(model: PreTrainedModel, context: int) -> None:
    """Let ``model`` generate greedily up to the length asked for, whatever its own generation settings say.

    A sliding window that no token of ``context`` reaches is switched off: it changes no value, but transformers' static
    cache counts tokens of a windowed layer in a Python int, on which torch.compile specialises.
    """
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=None)
    config = text_config(model)
    window = getattr(config, "sliding_window", None)
    if window is not None and window >= context and getattr(config, "layer_types", None) is None:
        config.sliding_window = None


@dataclass
class Decoder:
    """One of the loops, at a fixed batch and context, for a model that may be patched and unpatched in between.

    Attributes:
        model: made ready by `make_greedy`.
        loop: one of `LOOPS`.
        context: prompt and generated tokens together, at most; the size of the static cache.
        dependent_launch: as in `compile_step`.
        attention: of the loops of one graph, `ATTENTION` or the model's own.
    """

    model: PreTrainedModel
    loop: str
    context: int
    dependent_launch: bool = True
    attention: str = ATTENTION
    options: dict[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.loop not in LOOPS:
            raise ValueError(f"unknown loop {self.loop!r}: allowed are {', '.join(LOOPS)}")
        loop = LOOPS[self.loop]
        if not loop.compiled:
            return
        # 8 compiled variants of one forward are allowed before dynamo goes back to eager, and shapes seen before
        # would make it try dynamic ones: every decoder starts afresh
        torch._dynamo.reset()
        config = _compile_config(self.model.device)
        if loop.graph:
            self.graphs = GraphDecoder()
            self.settings = Settings(
                self.loop,
                room=self.context,
                own_attention=self.attention != ATTENTION,
                dependent_launch=self.dependent_launch,
                backend="inductor" if config is None else config.backend,
            )
        else:
            # The cache that cache_implementation="static" builds for every call, but kept: CUDA graphs are recorded
            # again when its address moves
            cache = StaticCache(config=self.model.config, max_cache_len=self.context)
            self.options = {"past_key_values": cache, "compile_config": config}

    @property
    def attention_in_effect(self) -> str:
        """What computed attention in the decode steps so far."""
        ours = LOOPS[self.loop].graph and self.graphs.blocks and self.attention == ATTENTION
        return ATTENTION if ours else str(self.model.config._attn_implementation)

    def generate(self, ids: Tensor, new_tokens: int, marks: Sequence[int] = ()) -> Generation:
        """Continue ``ids`` (batch, prompt) by ``new_tokens`` and time tokens 1 and ``marks``.

        Raises:
            RuntimeError: generate stopped early, or dynamo gave up on compiling.
        """
        device = self.model.device
        clock = Clock(ids.shape[1], [1, *marks], device)
        ids = ids.to(device)
        resettable = reset_peak_memory(device)
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), torch.no_grad():
            loop = self._replay if LOOPS[self.loop].graph else self._generate
            begin, tokens = loop(ids, new_tokens, clock)
        if tokens.shape[1] != ids.shape[1] + new_tokens:
            raise RuntimeError(f"generate stopped after {tokens.shape[1] - ids.shape[1]} of {new_tokens} tokens")
        first = clock.times[1]
        decode_s = {mark: clock.seconds(first, clock.times[mark]) for mark in marks}
        peak = peak_memory(device) if resettable else None
        return Generation(tokens, clock.seconds(begin, first), decode_s, peak)

    def _generate(self, ids: Tensor, new_tokens: int, clock: Clock) -> tuple[Any, Tensor]:
        """The loops of transformers: when they began, and all tokens."""
        if "past_key_values" in self.options:
            self.options["past_key_values"].reset()
        generate: Any = self.model.generate
        mask = torch.ones_like(ids)
        begin = clock.start()
        tokens = generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            logits_processor=LogitsProcessorList([clock]),
            **self.options,
        )
        return begin, tokens.cpu()

    def _replay(self, ids: Tensor, new_tokens: int, clock: Clock) -> tuple[Any, Tensor]:
        """The loops of `cats.generate`: when they began, and all tokens. The warm-up has captured the graph."""
        marks = {1, *clock.marks}

        def mark(token: int) -> None:
            if token in marks:
                clock.times[token] = clock.now()

        begin = clock.start()
        tokens = self.graphs.run(self.model, ids, None, new_tokens, self.settings, on_step=mark)
        if self.graphs.refused:
            raise RuntimeError(f'the loop "{self.loop}" cannot serve this model')
        return begin, tokens.cpu()

    def timed(self, ids: Tensor, marks: Sequence[int]) -> Generation:
        """`generate` up to the last of ``marks``, repeated if anything was compiled or recorded meanwhile.

        Raises:
            RuntimeError: it was, in every attempt.
        """
        for _ in range(ATTEMPTS):
            before = compilations(), self._captures()
            generation = self.generate(ids, max(marks), marks)
            if (compilations(), self._captures()) == before:
                return generation
        raise RuntimeError(f"torch.compile compiled again in each of {ATTEMPTS} generations after the warm-up")

    def _captures(self) -> int:
        return self.graphs.captures if LOOPS[self.loop].graph else 0

    def warm_up(self, ids: Tensor) -> float:
        """Generate a few tokens: whatever is compiled, recorded or paged in is now. Returns seconds taken."""
        begin = time.perf_counter()
        self.generate(ids[:, :WARM_PROMPT], WARM_TOKENS if LOOPS[self.loop].compiled else 2)
        return time.perf_counter() - begin


def compile_step(module: torch.nn.Module, loop: str, dependent_launch: bool = True) -> Any:
    """The module as the loop compiles it, without CUDA graphs of its own, which could not be part of another; see
    `cats.generation.loops.compile_options`."""
    if not LOOPS[loop].compiled:
        return module
    device = next(module.parameters()).device
    if device.type == "cuda":
        able = dependent_launch and LOOPS[loop].graph
        return torch.compile(module, options=compile_options(device, LOOPS[loop].tuned, able))
    config = _compile_config(device)
    return torch.compile(module, backend="inductor" if config is None else config.backend)


def _compile_config(device: torch.device) -> CompileConfig | None:
    if device.type == "cuda":
        return None  # transformers' default: inductor, mode reduce-overhead
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        raise ValueError('compiling on a CPU needs a C++ compiler (c++, g++ or clang++): use the loop "eager"')
    config = CompileConfig(mode="default")
    config._compile_all_devices = True  # type: ignore[assignment]  # transformers compiles on a CPU only so
    return config


def compilations() -> int:
    """How many graphs dynamo has compiled and how many inputs CUDA graphs were recorded with, so far, in one number."""
    return int(counters["stats"]["unique_graphs"] + counters["inductor"]["cudagraph_recorded_non_static_inputs"])
