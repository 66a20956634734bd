"""The cache of keys and values that a compiled or captured decode step works on."""

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

SMALLEST = 256
"""Tokens of the smallest cache that grows; the next ones hold twice as many each."""


def capacity_for(tokens: int) -> int:
    """The size of a cache that holds ``tokens``: 256, 512, 1024, ..."""
    return max(SMALLEST, 1 << (tokens - 1).bit_length())


class DecodeLayer(CacheLayerMixin):
    """Keys and values of one layer, (batch, heads, capacity, head size), of which the cache knows how many are filled.

    A prompt goes in at once and is attended to as it comes. Then one token per sequence and step: its place is a
    tensor that all layers share, so that one compiled step serves all places; a step that is not compiled asks for the
    filled part alone (``exact``). A window is left to the mask: such a layer keeps all tokens, too.
    """

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, cache: "DecodeCache") -> None:
        super().__init__()
        self.cache = cache

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """What transformers asks before it leaves a mask out, which it may for a step over the filled part alone."""
        return not self.cache.exact

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        capacity = self.cache.capacity
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], capacity, states.shape[3]) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        cache, length = self.cache, key_states.shape[2]
        if not cache.decoding:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self.keys[:, :, :length].copy_(key_states)
            self.values[:, :, :length].copy_(value_states)
            return key_states, value_states
        if cache.exact:
            filled = cache.filled
            self.keys[:, :, filled : filled + 1].copy_(key_states)
            self.values[:, :, filled : filled + 1].copy_(value_states)
            return self.keys[:, :, : filled + 1], self.values[:, :, : filled + 1]
        self.keys.index_copy_(2, cache.position, key_states)
        self.values.index_copy_(2, cache.position, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if not self.cache.decoding:
            return query_length, 0
        return (self.cache.filled + 1 if self.cache.exact else self.keys.shape[2]), 0

    def get_seq_length(self) -> Any:
        cache = self.cache
        if not cache.decoding:
            return 0
        return cache.filled if cache.exact else cache.position

    def get_max_length(self) -> int:
        return self.cache.capacity

    def reset(self) -> None:
        """Nothing is cleared: what is not filled is masked."""


class DecodeCache(Cache):
    """A cache of fixed addresses until it is told to grow, with one counter for all layers.

    Attributes:
        capacity: tokens that fit.
        decoding: whether one token per sequence comes (else a prompt).
        exact: whether a step reads the filled part alone, known to the host, rather than all of it under a mask.
        filled: tokens in it before the step, where the host counts them (``exact``).
        position: int64 (1,), the same on the device.
        first: int64 (batch,), the first place in each sequence that is not padding.
        arrived: int32 zeros, the counters of `cats.generation.triton_attention`.
    """

    def __init__(self, config: PretrainedConfig, capacity: int, batch: int, device: torch.device) -> None:
        layers = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[DecodeLayer(self) for _ in range(layers)])
        self.capacity, self.decoding, self.exact, self.filled = capacity, False, False, 0
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.first = torch.zeros(batch, dtype=torch.int64, device=device)
        heads = getattr(config.get_text_config(decoder=True), "num_attention_heads", 1)
        self.arrived = torch.zeros(batch * heads, dtype=torch.int32, device=device)

    def start(self, prompt_tokens: int) -> None:
        """A prompt of so many tokens is in: what follows are steps of one token."""
        self.decoding, self.filled = True, prompt_tokens
        self.position.fill_(prompt_tokens)

    def grow(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens; contents stay, addresses change."""
        for layer in self.layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
                new[:, :, : self.capacity].copy_(old)
                setattr(layer, name, new)
        self.capacity = capacity
