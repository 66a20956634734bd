"""What the experiments that fine-tune share: text to train on, and a variant with adapters."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from cats.calibration import Thresholds
from cats.finetuning import DivergedError
from cats.lora import add_lora, preset, remove_lora
from experiments.framework.config import Config
from experiments.framework.subject import Subject
from experiments.framework.variants import Variant, make


class FinetuningSubject(Subject):
    """A `Subject` with text for a run of ``steps``, and ``sweep_blocks`` set aside.

    Its options are ``TrainingOptions`` too (`experiments.framework.common_options`).
    """

    def __init__(self, config: Config[Any], name: str, steps: int, sweep_blocks: int = 0) -> None:
        super().__init__(config, name)
        self._blocks = steps * config.options.train_batch_size
        self._sweep_blocks = sweep_blocks

    @cached_property
    def training_data(self) -> list[dict[str, Tensor]]:
        """Blocks to train on: after those of calibration in the stream."""
        first = self.config.options.calibration_blocks
        text = torch.cat(self.text("train", first + self._blocks))[first:]
        return [{"input_ids": block, "labels": block} for block in text]

    @cached_property
    def sweep_text(self) -> list[Tensor]:
        """Blocks after those of `heldout` in their stream: neither calibrated, trained (nor was the pocket model on
        them) nor measured on."""
        first = self.config.options.heldout_blocks
        text = torch.cat(self.text("heldout", first + self._sweep_blocks))[first:]
        return list(text.split(self.config.options.batch_size))


@contextmanager
def adapted(subject: Subject, v: Variant, thresholds: Thresholds | None, seed: int) -> Iterator[PeftModel]:
    """The model as ``v`` with fresh adapters; taken off again at the end."""
    make(subject.model, v, thresholds)
    model = add_lora(subject.model, preset(subject.config.options.lora), seed)
    try:
        yield model
    finally:
        remove_lora(model)


def loss_of_short_run(train: Callable[[], object], loss: Callable[[], float]) -> float:
    """What ``loss`` gives after ``train``; NaN where that diverged."""
    try:
        train()
    except DivergedError:
        return math.nan
    return loss()


def lowest_loss(rows: Sequence[Any], rates: int) -> Any:
    """The row of the learning rate to take, of short runs at so many ``rates``; None before all have been run.

    Raises:
        ValueError: all have diverged.
    """
    if len(rows) < rates:
        return None
    finite = [row for row in rows if math.isfinite(row.eval_loss)]
    if not finite:
        rates_tried = ", ".join(f"{row.learning_rate:g}" for row in rows)
        raise ValueError(f"{rows[0].variant} diverged at every learning rate ({rates_tried}): give lower ones")
    return min(finite, key=lambda row: row.eval_loss)
