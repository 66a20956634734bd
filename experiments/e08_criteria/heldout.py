"""Losses on held-out text and what is skipped there, in passes that wait for the device once, at their end."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from cats_kernels import MAX_ROWS
from torch import Tensor, nn

import cats
from cats.devices import eval_mode
from cats.evaluation import sequences_at_once
from cats.observe import input_mask, masks_of
from cats.sparse_forward import INPUT
from cats.structure import activation_name, named_modules


def deciders(model: nn.Module) -> dict[str, nn.Module]:
    """Modules whose output is zero where the criterion in force skips.

    Keyed by the module path of the MLP, or of the linear layer where its inputs are skipped; empty for a model that is
    not patched.
    """
    made: dict[str, nn.Module] = {}
    for path, mlp in cats.gated_mlps(model).items():
        if "cats_state" not in mlp.__dict__:
            continue
        masks: dict[str, Any] = dict(masks_of(mlp))
        for place, mask in masks.items():
            made[f"{path}.{place.removeprefix(INPUT)}" if place.startswith(INPUT) else path] = mask
        if not masks:
            made[path] = mlp._modules[activation_name(mlp)]
    for path, module in named_modules(model):
        mask_of_input = input_mask(module)
        if mask_of_input is not None:
            made[path] = mask_of_input
    return made


def few_at_once(model: Any, text: Sequence[Tensor]) -> Iterator[Tensor]:
    """The batches, split where their logits would take too much memory."""
    for ids in text:
        yield from ids.split(sequences_at_once(model, ids.shape[1]))


@torch.no_grad()
def losses_and_skipped(model: Any, text: Sequence[Tensor]) -> tuple[list[float], dict[str, float]]:
    """Measure a model as it is.

    Args:
        model: a causal language model, patched or not; its mode is restored.
        text: batches of token ids (batch, length) on the model's device, of two tokens or more, without padding.

    Returns:
        Mean negative log-likelihood of each block in nats per token, of every token but its first; and the fraction of
        values skipped, by path as `deciders` gives it.
    """
    zeros: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    handles = []
    for path, module in deciders(model).items():

        def count(_module: nn.Module, _args: Any, output: Tensor, path: str = path) -> None:
            skipped = (output == 0).sum()
            zeros[path] = zeros[path] + skipped if path in zeros else skipped
            counts[path] = counts.get(path, 0) + output.numel()

        handles.append(module.register_forward_hook(count))
    losses = []
    try:
        with eval_mode(model):
            for ids in few_at_once(model, text):
                logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
                nats = nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
                losses.append(nats.view(len(ids), -1).double().mean(1))
                del logits
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(losses).tolist(), {path: float(total) / counts[path] for path, total in zeros.items()}


SHORTEST = 2 * (MAX_ROWS + 1)
"""Tokens of a block whose first half counts as a prompt, see `cats.sparse_forward.is_prompt`."""


@torch.no_grad()
def continuation_losses(model: Any, text: Sequence[Tensor], dense_prompt: bool) -> list[float]:
    """Losses of the second half of each block after the first, as decoding token by token would have them.

    The prompt goes through the model in one call that fills the cache, what follows in another over that cache: each of
    its positions sees what one decode step sees.

    Args:
        model: a causal language model, patched (on the dense masked path) or not; its mode is restored.
        text: batches of token ids (batch, length) on the model's device, without padding.
        dense_prompt: run the prompt unmasked.

    Returns:
        Mean negative log-likelihood of each block's second half in nats per token.

    Raises:
        ValueError: a block is shorter than `SHORTEST`.
    """
    losses = []
    with eval_mode(model):
        for ids in few_at_once(model, text):
            half = ids.shape[1] // 2
            if ids.shape[1] < SHORTEST:
                raise ValueError(f"continuations need blocks of at least {SHORTEST} tokens, not {ids.shape[1]}")
            with unmasked_prompts(model, dense_prompt):
                prompt = model(ids[:, :half], use_cache=True, logits_to_keep=1)
            with unmasked_prompts(model, False):
                rest = model(ids[:, half:-1], past_key_values=prompt.past_key_values, use_cache=True)
            logits = torch.cat([prompt.logits[:, -1:], rest.logits], 1).flatten(0, 1).float()
            nats = nn.functional.cross_entropy(logits, ids[:, half:].flatten(), reduction="none")
            losses.append(nats.view(len(ids), -1).double().mean(1))
            del prompt, rest, logits
    return torch.cat(losses).tolist()


@contextmanager
def unmasked_prompts(model: nn.Module, unmasked: bool) -> Iterator[None]:
    """While it is in force prompts run unmasked, as with ``cats.apply(..., prefill="dense")``, or masked."""
    states: list[Any] = [mlp.cats_state for mlp in cats.gated_mlps(model).values() if "cats_state" in mlp.__dict__]
    states += [mask for module in model.modules() if (mask := input_mask(module)) is not None]
    before = [state.dense_prompts for state in states]
    for state in states:
        state.dense_prompts = unmasked
    try:
        yield
    finally:
        for state, value in zip(states, before, strict=True):
            state.dense_prompts = value
