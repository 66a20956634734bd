"""Perplexity of a causal language model on blocks of tokens.

Under `accelerate launch` the blocks are split among the processes, and every process returns the whole result.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from cats.devices import eval_mode, execution_device
from cats.extras import missing
from cats.text_config import text_config

try:
    import accelerate
    from accelerate.utils import reduce
except ImportError as error:
    raise missing(__name__, "experiments", error) from error

LOGITS_BYTES = 2**31
"""Of logits in float32 at once: 64 x 1024 tokens can take 64 GB."""


def perplexity(model: nn.Module, blocks: Iterable[Tensor]) -> float:
    """exp of the mean negative log-likelihood, in nats, of every token of ``blocks`` but the first of each sequence;
    infinite where that is beyond a float.

    Args:
        model, blocks: as `block_losses`.

    Raises:
        ValueError: no block of at least two tokens.
    """
    blocks = list(blocks)
    tokens = [block.shape[-1] - 1 for block in blocks for _ in range(len(block)) if block.shape[-1] > 1]
    losses = block_losses(model, blocks)
    try:
        return math.exp(sum(loss * n for loss, n in zip(losses, tokens, strict=True)) / sum(tokens))
    except OverflowError:
        return math.inf


def sequences_at_once(model: nn.Module, length: int) -> int:
    """How many sequences a forward pass may take so that their logits in float32 stay below `LOGITS_BYTES`."""
    return int(max(1, LOGITS_BYTES // (4 * length * vocabulary_size(model))))


def vocabulary_size(model: nn.Module) -> int:
    return getattr(text_config(model), "vocab_size", None) or 2**18


def _losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean over each sequence of ids (batch, length), float64 on the CPU."""
    logits = model(ids, use_cache=False).logits[:, :-1].float()
    nats = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return nats.view(len(ids), -1).double().mean(1).cpu()


@torch.no_grad()
def block_losses(model: nn.Module, blocks: Iterable[Tensor]) -> list[float]:
    """Mean negative log-likelihood of each sequence, in nats per token, of every token but its first.

    Args:
        model: a causal language model; its mode is restored.
        blocks: token ids (batch, length) without padding, the same on every process; processes share the work.

    Returns:
        One number for each sequence of at least two tokens, in order.

    Raises:
        ValueError: there is none.
    """
    state, device = accelerate.PartialState(), execution_device(model)
    losses: list[Tensor] = []
    with eval_mode(model):
        for index, block in enumerate(block for block in blocks if block.shape[-1] > 1):
            if index % state.num_processes != state.process_index:
                losses.append(torch.zeros(len(block), dtype=torch.float64))
                continue
            losses += [_losses(model, ids) for ids in block.to(device).split(sequences_at_once(model, block.shape[1]))]
    if not losses:
        raise ValueError("no text to measure perplexity on: give at least one block of two tokens")
    total = torch.cat(losses)
    if state.num_processes > 1:
        total = reduce(total.to(state.device), reduction="sum").cpu()
    return [float(loss) for loss in total]
