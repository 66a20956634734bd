"""What the tests of `cats.generate` share: small models, prompts, and what transformers makes of them."""

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from .conftest import tiny_model

NEW = 14
LOOPS = ("eager", "captured")
DRAW = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}


def made(family: str = "Llama", **overrides: object) -> nn.Module:
    model = tiny_model(family, **overrides)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    return model


def prompts(batch: int = 2, length: int = 10) -> tuple[Tensor, Tensor]:
    """Sequences of different lengths, padded on the left."""
    ids = torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    for row in range(batch - 1):
        mask[row, : row + 3] = 0
    return ids, mask


def theirs(model: nn.Module, ids: Tensor, mask: Tensor | None = None, new: int = NEW, **options: object) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, **options)
