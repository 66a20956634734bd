"""Scores of lm-eval's requests, in batches of as many tokens each and with the logits of the continuations alone.

lm-eval gives every batch the same number of sequences and computes the logits of every token, in a vocabulary of up to
262144 entries, where a continuation has a handful. Here an input that several requests share is run once, short inputs
are batched in larger numbers, and the output matrix sees the positions that are scored. Scores are lm-eval's, in its
order of operations, up to the rounding of other batch shapes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cats.structure import unwrapped

Score = tuple[float, bool]
"""Log-probability of a continuation, and whether it is what the model would generate."""


@dataclass(frozen=True)
class Input:
    """Token ids that go through the model once.

    Attributes:
        ids: context and continuation without its last token, cut on the left to the model's positions.
        requests: number of each request that it serves, and that request's continuation.
    """

    ids: tuple[int, ...]
    requests: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def scored(self) -> int:
        """How many of its last positions are needed."""
        return max(len(continuation) for _, continuation in self.requests)


def inputs_of(requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], positions: int) -> list[Input]:
    """The different inputs of requests (texts, context ids, continuation ids), longest first.

    Raises:
        ValueError: a continuation is empty, or longer than the model's positions.
    """
    shared: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    for number, (_, context, continuation) in enumerate(requests):
        if not 1 <= len(continuation) <= positions:
            raise ValueError(f"a continuation has {len(continuation)} tokens, and the model {positions} positions")
        ids = tuple([*context, *continuation][-(positions + 1) :][:-1])
        shared.setdefault(ids, []).append((number, tuple(continuation)))
    made = [Input(ids, tuple(served)) for ids, served in shared.items()]
    return sorted(made, key=lambda one: (-len(one.ids), one.ids))


def batches_of(inputs: Sequence[Input], sequences: int, most_scored: int) -> Iterator[list[Input]]:
    """Inputs, longest first, in batches with no more tokens, padding included, than ``sequences`` of the longest have.

    Args:
        inputs: from `inputs_of`.
        sequences: of the longest input in a batch.
        most_scored: positions whose logits are held at once; a single input may have more.
    """
    batch: list[Input] = []
    scored, most_tokens = 0, sequences * len(inputs[0].ids) if inputs else 0
    for one in inputs:
        full = batch and (len(batch) + 1) * len(batch[0].ids) > most_tokens
        if full or (batch and scored + one.scored > most_scored):
            yield batch
            batch, scored = [], 0
        batch.append(one)
        scored += one.scored
    if batch:
        yield batch


def output_matrix(model: nn.Module) -> nn.Module | None:
    """The module that makes logits, if the positions it sees may be chosen: not in a compiled model."""
    inner: Any = unwrapped(model)
    if "_orig_mod" in model._modules or not hasattr(inner, "get_output_embeddings"):
        return None
    head: nn.Module | None = inner.get_output_embeddings()
    return head


@contextmanager
def only_positions(head: nn.Module, rows: Tensor, columns: Tensor, length: int) -> Iterator[None]:
    """Let ``head`` see hidden states (sequences, tokens, width) as (positions, width), at these rows and columns of
    ``length`` tokens; peft's virtual tokens come before them."""

    def choose(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *others = arguments
        virtual = hidden.shape[1] - length
        return (hidden[rows.to(hidden.device), columns.to(hidden.device) + virtual], *others)

    handle = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


def score_batch(call: Callable[[Tensor], Tensor], head: nn.Module, batch: Sequence[Input], device: Any) -> list[Score]:
    """Scores of a batch's requests, input by input.

    Args:
        call: logits of token ids (sequences, tokens), without gradient.
        head: see `output_matrix`.
        batch: inputs, longest first; they are padded on the right, which no earlier token attends to.
        device: of the token ids.
    """
    width = len(batch[0].ids)
    ids = torch.tensor([[*one.ids, *[0] * (width - len(one.ids))] for one in batch], device=device)
    places = [(row, column) for row, one in enumerate(batch) for column in _scored_columns(one)]
    rows, columns = torch.tensor(places, device=device).unbind(1)
    with only_positions(head, rows, columns, width):
        logits = torch.log_softmax(call(ids), dim=-1)  # (positions, vocabulary), in the model's dtype as lm-eval's
    first, wanted, lengths = 0, [], []  # position and token of each continuation's tokens
    for one in batch:
        end = first + one.scored
        for _, continuation in one.requests:
            wanted += list(zip(range(end - len(continuation), end), continuation, strict=True))
            lengths.append(len(continuation))
        first = end
    positions, tokens = torch.tensor(wanted, device=logits.device).unbind(1)
    values = logits[positions, tokens]
    equal = (logits.argmax(-1)[positions] == tokens).cpu()
    sums = [float(own.sum().to(values.dtype)) for own in values.float().cpu().split(lengths)]
    return list(zip(sums, [bool(own.all()) for own in equal.split(lengths)], strict=True))


def _scored_columns(one: Input) -> range:
    return range(len(one.ids) - one.scored, len(one.ids))
