"""What a prompt must be; ids that lie on a GPU are looked at without a wait."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cats.devices import execution_device
from cats.observe import vocabulary_of


class Outside:
    """Whether ids lie outside of a vocabulary: known to the host later, when it is there anyway.

    On a GPU the answer is on its way before the prompt is computed, of ids that are `clamped`: one outside would be a
    device assert, after which the process can use its GPU no more. `check` then finds it there.
    """

    def __init__(self, ids: Tensor, vocabulary: int | None) -> None:
        self.vocabulary = vocabulary
        self.event: torch.cuda.Event | None = None
        self.answer: Tensor | None = None
        if vocabulary is None:
            return
        low, high = ids.aminmax()
        answer = (low < 0) | (high >= vocabulary)
        if ids.is_cuda:
            self.answer = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
            self.answer.copy_(answer, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(ids.device))
        else:
            self.answer = answer

    def clamped(self, ids: Tensor) -> Tensor:
        """``ids``, those outside replaced by some inside."""
        return ids if self.vocabulary is None else ids.clamp(0, self.vocabulary - 1)

    def check(self) -> None:
        """Raise ValueError if any lies outside."""
        if self.event is not None:
            self.event.synchronize()
        if self.answer is not None and bool(self.answer):
            assert self.vocabulary is not None
            raise ValueError(f"input_ids must lie in 0 to {self.vocabulary - 1}, this model's vocabulary")

    def checking(self, on_tokens: Callable[[Tensor], None] | None) -> Callable[[Tensor], None] | None:
        """``on_tokens``, which is not called before `check`."""
        if on_tokens is None:
            return None

        def checked(tokens: Tensor) -> None:
            self.check()
            on_tokens(tokens)

        return checked


def on_host(ids: Tensor) -> bool:
    """Whether looking at ``ids`` makes nobody wait."""
    return not ids.is_cuda


def check_prompt(model: Any, ids: Any, mask: Any) -> tuple[Tensor, Tensor | None, Outside]:
    """Ids (batch, prompt) and mask where the model computes, and what remains to be checked before tokens are shown.

    Raises:
        TypeError, ValueError: one sentence naming what is wrong.
    """
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32) or ids.dim() not in (1, 2):
        given = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"input_ids must be an int64 tensor (batch, prompt), not {given}")
    if not ids.numel():
        raise ValueError("input_ids has no tokens: a prompt needs at least one")
    outside = Outside(ids, vocabulary_of(model))
    if on_host(ids):
        outside.check()
    else:
        ids = outside.clamped(ids)
    device = execution_device(model)
    if ids.is_cuda and device.type != "cuda":  # the host waits for them
        outside.check()
    ids = ids.long().to(device)
    ids = ids[None] if ids.dim() == 1 else ids
    if mask is None:
        return ids, None, outside
    if not isinstance(mask, Tensor) or mask.shape not in (ids.shape, ids.shape[ids.shape[0] == 1 :]):
        raise ValueError(f"attention_mask must be a tensor of the shape of input_ids, {tuple(ids.shape)}")
    mask = (mask.reshape(ids.shape) != 0).long().to(device)
    if bool((mask[:, 1:] < mask[:, :-1]).any()) or not bool(mask[:, -1].all()):
        raise ValueError("attention_mask has padding after a token: pad on the left (tokenizer.padding_side = 'left')")
    outside.check()  # the host has waited for the mask
    return ids, mask, outside
