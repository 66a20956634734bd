"""What generation keeps per model between calls, and one call: the prompt, then a step per token.

Kept are the cache, what torch.compile made, and the CUDA graph. A graph points at weights, so every call compares the
model's `fingerprint` with that of the capture, and captures again where anything has moved or changed; compiled code
has guards of its own.
"""

import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._inductor.runtime.cache_dir_utils import cache_dir

from cats.generation.attention import DecodeBlock, decode_blocks, decoding
from cats.generation.cache import DecodeCache, capacity_for
from cats.generation.loops import (
    LOOPS,
    capture,
    compile_function,
    compile_options,
    fingerprint,
    greedy_step,
    hooks_of,
    logits_of,
    logits_step,
)
from cats.generation.progress import progress
from cats.generation.reader import TokenReader
from cats.generation.settings import Settings

EAGER_ROOM = 1024
"""New tokens that a cache has room for from the start; one for more grows when they come."""
MASKED = ("eager", "sdpa")
"""Implementations of attention that take a mask over a cache of which only a part is filled."""
VARIANTS = 64
"""Compiled variants of one step that are kept: dense and sparse, of every batch size."""


class Decoder:
    """Generates with one model; see `decoder_of`."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.compiled: dict[Any, Callable[..., Any]] = {}
        self.refused: set[str] = set()  # loops that torch.compile could not serve
        self.blocks: dict[nn.Module, DecodeBlock] = {}
        self.cache: Any = None
        self.shape: Any = None  # what the cache was made for
        self.blocks_for: Any = None  # what the blocks were made for
        self.ready_for: Any = None  # what was compiled or captured last
        self.graph: Any = None
        self.mask: Any = None  # bool (batch, capacity), where a step needs one
        self.token: Any = None  # int64 (batch, 1): the last one
        self.tokens: Any = None  # int64 (batch, capacity)
        self.noise: Any = None  # float32 (batch, vocabulary), for draws
        self.captures = 0

    def run(
        self,
        model: Any,
        ids: Tensor,
        mask: Tensor | None,
        new_tokens: int,
        settings: Settings,
        on_tokens: Callable[[Tensor], None] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """``ids`` (batch, prompt) continued by up to ``new_tokens``.

        Args:
            model: the model, not wrapped.
            ids: int64, on the model's device.
            mask: (batch, prompt), 0 for padding on the left; None where there is none.
            new_tokens: at least 1.
            settings: how.
            on_tokens: called with every token (batch,) on the host.
            on_step: called with n when the n-th token has been enqueued; on a GPU it may not be there yet.
        """
        limit = torch._dynamo.config.patch(recompile_limit=VARIANTS, fail_on_recompile_limit_hit=True)
        # streams and graphs are those of the current device
        there = torch.cuda.device(ids.device) if ids.is_cuda else nullcontext()
        # tensors made in inference mode could never be written or trained outside of it
        with torch.inference_mode(False), self.lock, torch.no_grad(), limit, there:
            ids = ids.clone() if ids.is_inference() else ids
            mask = mask.clone() if mask is not None and mask.is_inference() else mask
            return _Call(self, model, ids, mask, new_tokens, settings).run(on_tokens, on_step)

    def release(self) -> None:
        """Free the cache and the graph; what was compiled stays."""
        with self.lock:
            self.refused.clear()
            self.cache = self.shape = self.blocks_for = self.ready_for = self.graph = self.mask = None
            self.token = self.tokens = self.noise = None
            self.blocks = {}


_DECODERS: "WeakKeyDictionary[nn.Module, Decoder]" = WeakKeyDictionary()
_MAKING = threading.Lock()


def decoder_of(model: nn.Module) -> Decoder:
    """The decoder that goes with ``model``, which lives as long as the model does."""
    with _MAKING:
        if model not in _DECODERS:
            _DECODERS[model] = Decoder()
        return _DECODERS[model]


class _Call:
    """One call of `Decoder.run`."""

    def __init__(
        self, decoder: Decoder, model: Any, ids: Tensor, mask: Tensor | None, new_tokens: int, settings: Settings
    ) -> None:
        self.decoder, self.model, self.ids, self.settings, self.new_tokens = decoder, model, ids, settings, new_tokens
        self.sampling, self.device = settings.sampling, ids.device
        self.batch, self.prompt = ids.shape
        self.loop = "eager" if settings.loop in decoder.refused else settings.loop
        self.on_gpu = ids.device.type == "cuda"
        self.prompt_mask = mask if mask is not None and not bool(mask.all()) else None
        self.noise: Tensor | None = None

    def run(self, on_tokens: Callable[[Tensor], None] | None, on_step: Callable[[int], None] | None) -> Tensor:
        self._make_room()
        self._make_blocks()
        self.cache.decoding, self.cache.exact = False, not self._static
        self._choose(self._prefill())
        self.cache.start(self.prompt)
        self.tokens[:, self.prompt : self.prompt + 1] = self.token
        if on_step:
            on_step(1)
        reader = TokenReader(self.batch, self.settings, on_tokens) if on_tokens or self.settings.stop else None
        count = self._steps(reader, on_step)
        tokens = self.tokens[:, : self.prompt + count].clone()
        if reader and self.settings.stop:
            reader.pad(tokens[:, self.prompt :])
        return tokens

    def _steps(self, reader: TokenReader | None, on_step: Callable[[int], None] | None) -> int:
        """All tokens after the first; returns how many there are with it."""
        if reader and reader.push(self.token):
            return 1
        if self.new_tokens == 1:
            return reader.finish() if reader else 1
        with decoding(self.blocks):
            step = self._prepare()
            for n in range(2, self.new_tokens + 1):
                if self.cache.filled + 1 >= self.cache.capacity:
                    self._grow()
                    step = self._prepare()
                if self.noise is not None:
                    self.noise.exponential_(generator=self.settings.generator)
                step()
                self.cache.filled += 1
                if on_step:
                    on_step(n)
                if reader and reader.push(self.token):
                    break
        return reader.finish() if reader else self.new_tokens

    @property
    def _static(self) -> bool:
        """Whether a step works on a cache of fixed size."""
        return self.loop != "eager"

    def _make_blocks(self) -> None:
        """The attention of `cats.generation.attention` for the steps of a static cache, of the weights as they are."""
        decoder, settings = self.decoder, self.settings
        self.mark = fingerprint(self.model) if self._static else None
        self.blocks: dict[nn.Module, DecodeBlock] = {}
        if self._static and not settings.own_attention:
            how = settings.fused, settings.kernel
            if decoder.blocks_for != (how, self.mark):
                decoder.blocks = decode_blocks(self.model, *how)
                self.mark = fingerprint(self.model)  # joined weights have moved
                decoder.blocks_for = how, self.mark
            self.blocks = decoder.blocks
        own = self.model.config._attn_implementation
        if self._static and not self.blocks and own not in MASKED:
            self._fall_back(f'its attention "{own}" takes no mask over a cache of fixed size')

    def _make_room(self) -> None:
        """A cache for this batch that holds the prompt and what is likely to come."""
        decoder, dtype = self.decoder, next(self.model.parameters()).dtype
        room = max(self.settings.room, self.prompt + min(self.new_tokens, EAGER_ROOM))
        shape = (self.batch, self.device, dtype, self.model.config._attn_implementation)
        if decoder.shape != shape or decoder.cache.capacity < room:
            decoder.release()
            capacity = self.settings.room if self.settings.room >= room else capacity_for(room)
            decoder.cache = DecodeCache(self.model.config, capacity, self.batch, self.device)
            decoder.shape = shape
            decoder.token = torch.zeros(self.batch, 1, dtype=torch.int64, device=self.device)
            decoder.tokens = torch.zeros(self.batch, capacity, dtype=torch.int64, device=self.device)
        self.cache, self.token, self.tokens = decoder.cache, decoder.token, decoder.tokens
        self.cache.first.zero_()
        if self.prompt_mask is not None:
            self.cache.first.copy_((self.prompt_mask == 0).sum(-1))
        self.tokens[:, : self.prompt] = self.ids

    def _grow(self) -> None:
        """Twice the room."""
        capacity = capacity_for(2 * self.cache.capacity)
        self.cache.grow(capacity)
        tokens = self.tokens.new_zeros(self.batch, capacity)
        tokens[:, : self.tokens.shape[1]] = self.tokens
        self.decoder.tokens = self.tokens = tokens
        self.decoder.graph = None

    def _prefill(self) -> Tensor:
        """Float32 logits (batch, vocabulary) after the prompt, whose keys and values enter the cache."""
        positions = None
        if self.prompt_mask is not None:
            positions = (self.prompt_mask.long().cumsum(-1) - 1).clamp(min=0)
        outputs = self.model(
            input_ids=self.ids,
            attention_mask=self.prompt_mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = outputs.logits[:, -1].float()
        return logits

    def _choose(self, logits: Tensor) -> None:
        if not self.sampling.greedy:
            if self.decoder.noise is None or self.decoder.noise.shape != logits.shape:
                self.decoder.noise = torch.empty_like(logits)
                self.decoder.graph = None
            self.noise = self.decoder.noise
            self.noise.exponential_(generator=self.settings.generator)
        self.token.copy_(self.sampling(logits, self.noise))

    def _mask(self) -> Tensor | None:
        """The padding of a static cache; None where there is none, or where the step's own attention knows it."""
        if self.prompt_mask is None or self.blocks:
            return None
        mask = torch.arange(self.cache.capacity, device=self.device) >= self.cache.first[:, None]
        kept = self.decoder.mask
        if kept is None or kept.shape != mask.shape:
            kept, self.decoder.graph = mask, None
        self.decoder.mask = kept.copy_(mask)  # a graph of an earlier call reads it
        return self.decoder.mask

    def _prepare(self) -> Callable[[], object]:
        """The step from one token to the next: compiled, captured."""
        if not self._static:
            return self._eager_step
        try:
            return self._static_step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch's exceptions of dynamo, inductor and capture
            self._fall_back((str(error).strip().splitlines() or [type(error).__name__])[0])
            self.cache.exact = True
            return self._eager_step

    def _fall_back(self, reason: str) -> None:
        """Go on in the loop that needs nothing, now and in later calls."""
        warnings.warn(f'the loop "{self.loop}" cannot serve this model, so "eager" does: {reason}', stacklevel=7)
        self.decoder.refused.add(self.loop)
        self.loop = "eager"

    def _eager_step(self) -> None:
        cache = self.cache
        mask = None
        if self.prompt_mask is not None:
            mask = torch.arange(cache.filled + 1, device=self.device) >= cache.first[:, None]
        self._advance(logits_of(self.model, cache, self.token, mask).float())

    def _advance(self, logits: Tensor) -> None:
        self.token.copy_(self.sampling(logits, self.noise))
        self.tokens.index_copy_(1, self.cache.position, self.token)

    def _static_step(self) -> Callable[[], object]:
        cache, token, tokens, mask = self.cache, self.token, self.tokens, self._mask()
        function = self._function()

        def step() -> None:
            if self.sampling.greedy:
                function(self.model, cache, token, tokens, mask)
            else:
                self._advance(function(self.model, cache, token, mask))

        compiled = LOOPS[self.loop].compiled
        if compiled:
            for layer in cache.layers:
                torch._dynamo.maybe_mark_dynamic(layer.keys, 2)
                torch._dynamo.maybe_mark_dynamic(layer.values, 2)
            torch._dynamo.maybe_mark_dynamic(tokens, 1)
            if mask is not None:
                torch._dynamo.maybe_mark_dynamic(mask, 1)
        decoder, graph = self.decoder, self.on_gpu and LOOPS[self.loop].graph
        ready_for = (self.settings.of_step, mask is not None, cache.capacity, self.mark)
        if decoder.ready_for != ready_for or (graph and decoder.graph is None):
            decoder.ready_for = decoder.graph = None
            self._rehearse((lambda: setattr(decoder, "graph", capture(step))) if graph else step)
            decoder.ready_for = ready_for
            decoder.captures += 1
        return decoder.graph.replay if graph else step

    def _rehearse(self, step: Callable[[], object]) -> None:
        """Make a step for what it compiles or captures, and take it back."""
        cache = self.cache
        kept = [tensor.clone() for tensor in (self.token, cache.position)]
        doing, done = "cats.generate: capturing the decode step", "cats.generate: captured the decode step"
        if LOOPS[self.loop].compiled:
            doing = "cats.generate: compiling the decode step"
            done = f"cats.generate: compiled the decode step (kept in {cache_dir()} for later processes)"
        try:
            with progress(doing, done):
                step()
        finally:
            for tensor, value in zip((self.token, cache.position), kept, strict=True):
                tensor.copy_(value)

    def _function(self) -> Callable[..., Any]:
        plain: Callable[..., Any] = greedy_step if self.sampling.greedy else logits_step
        loop = LOOPS[self.loop]
        if not loop.compiled:
            return plain
        options = compile_options(self.device, loop.tuned, self.settings.dependent_launch) | self.settings.options
        key = (plain, tuple(sorted(options.items())), self.settings.backend, self.device, hooks_of(self.model))
        if key not in self.decoder.compiled:
            self.decoder.compiled[key] = compile_function(plain, options, self.settings.backend)
        return self.decoder.compiled[key]
