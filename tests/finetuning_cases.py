"""What the tests of fine-tuning share: data, a tiny patched model with adapters, settings."""

import torch

import cats
from cats.finetuning import TrainSettings
from cats.lora import PRESETS, LoraSettings, add_lora
from tests.conftest import tiny_model

SETTINGS = TrainSettings(steps=12, batch_size=8, learning_rate=1e-2, warmup_steps=2)
ALL = LoraSettings(("query", "key", "value", "gate", "up", "down"), 3, 0.01, 2.0, 0.0)


def data(count=40, seed=3):
    ids = torch.randint(0, 64, (count, 24), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def patched(family="Llama", sparsity=0.5, settings=PRESETS["paper"], seed=0):
    """A tiny model with thresholds and adapters."""
    model = tiny_model(family)
    cats.apply(model, cats.calibrate(model, [row["input_ids"] for row in data(8)], sparsity), kernel="reference")
    return add_lora(model, settings, seed)


def adapters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
