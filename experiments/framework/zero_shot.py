"""What e02 and e07 measure of a model as it is: tasks, held-out text, and differences from the dense model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import cats
from cats.evaluation import TaskResult, block_losses
from cats.sparsity import overall_sparsity
from experiments.framework.samples import flags, numbers, paired
from experiments.framework.subject import Subject, mean
from experiments.framework.tables import Row, pack_flags, pack_numbers

HELDOUT = "heldout_text"
"""In the column ``task``, where something is measured on held-out text."""


@dataclass(frozen=True)
class Samples:
    """Raw samples of one model: task to the flags of its items, and the losses of its blocks of text, both packed."""

    correct: dict[str, str]
    nats: str

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Samples | None":
        """Those among the rows of one variant; None without rows, where it has not been measured (`Config.missing`)."""
        if not rows:
            return None
        everything: list[Any] = [row for row in rows if row.samples]
        correct = {row.task: row.correct for row in everything if hasattr(row, "correct")}
        (nats,) = (row.nats for row in everything if hasattr(row, "nats"))
        return cls(correct, nats)


@dataclass(frozen=True)
class Measurement:
    """One model on all tasks and on held-out text.

    Attributes:
        sparsity: what all layers together skip on held-out text.
        results: of each task.
        losses: of each block of text, nats per token.
        tokens_per_block: how many tokens a block has.
    """

    sparsity: float
    results: Sequence[TaskResult]
    losses: Sequence[float]
    tokens_per_block: int

    def samples(self) -> Samples:
        """To be kept, and to pair others with."""
        return Samples({r.task: pack_flags(r.correct) for r in self.results}, pack_numbers(self.losses))

    def scores(self, dense: Samples) -> list[dict[str, Any]]:
        """The columns task to chance of a row for each task and of one for perplexity; differences are from ``dense``.

        For perplexity the difference is the logarithm of the ratio, and items are blocks.
        """
        own, rows = self.samples(), []
        for result in self.results:
            difference, error = paired(flags(own.correct[result.task]), flags(dense.correct[result.task]))
            rows.append(
                {
                    **{"task": result.task, "metric": "acc", "value": result.accuracy, "stderr": result.stderr},
                    **{"difference": difference, "difference_stderr": error},
                    **{"items": result.items, "chance": result.chance},
                }
            )
        difference, error = paired(numbers(own.nats), numbers(dense.nats))
        text = {"task": HELDOUT, "metric": "perplexity", "value": math.exp(mean(self.losses))}
        return [
            *rows,
            {**text, "difference": difference, "difference_stderr": error, "items": len(self.losses)},
        ]


def measure_as_is(subject: Subject, model: torch.nn.Module | None = None) -> Measurement:
    """Measure the subject's model, or ``model``, which may be inside peft.

    Raises:
        ValueError: its perplexity is infinite or NaN.
    """
    model = model or subject.model
    torch.manual_seed(subject.config.seed)  # of criteria that draw at random
    sparsity = overall_sparsity(model, cats.measure_sparsity(model, subject.heldout))
    results = subject.evaluate(model)
    losses = block_losses(model, subject.heldout)
    if not math.isfinite(mean(losses)):
        raise ValueError(f"the loss on held-out text is {mean(losses)}: the model is broken in this dtype")
    return Measurement(sparsity, results, losses, subject.config.options.length)
