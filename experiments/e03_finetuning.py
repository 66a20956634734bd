"""Figures 2 and 5: general fine-tuning with LoRA of the dense model, CATS and ReLUfication; accuracy and sparsity.

All variants start alike and see the same data in the same order; thresholds are fixed before training. The learning
rate of CATS and of ReLUfication is chosen by short runs and the loss on held-out text that nothing else is measured on;
the dense model takes CATS's. Beyond the paper: each layer's thresholds calibrated again after training.
Cost: for each variant and seed one training run and an evaluation at each step of `steps`; under six minutes for the
pocket model on two cores. An interrupted run goes on from its last evaluated step.

    nox -s experiment -- e03 --model PATH_OR_HUB_ID
    accelerate launch --num_processes 8 -m experiments run e03 --profile paper      # the same batch, split over 8 GPUs
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor

import cats
from cats.evaluation import perplexity
from cats.finetuning import add_lora, finetune, preset, recalibrate, remove_lora
from experiments.framework.config import Config
from experiments.framework.results import Row
from experiments.framework.subject import (
    DENSE,
    RELUFICATION,
    SWEEP_SEED,
    Subject,
    Variant,
    cats_variant,
    check,
    mean,
    put,
)

Start = tuple[str, str, int, int]  # the columns model, variant, seed, step


@dataclass(frozen=True)
class FinetuningRow(Row):
    """Accuracy on one task after ``step`` steps; losses in nats a token, eval_loss on held-out text."""

    table: ClassVar[str] = "e03_finetuning"
    model: str
    variant: str
    seed: int
    step: int
    learning_rate: float
    task: str
    accuracy: float
    stderr: float
    items: int
    train_loss: float | None
    eval_loss: float


@dataclass(frozen=True)
class SparsityRow(Row):
    """Sparsity of one layer on held-out text, and the mean accuracy of the model it was measured in (Figure 5)."""

    table: ClassVar[str] = "e03_sparsity"
    model: str
    variant: str
    seed: int
    step: int
    layer: str
    layer_index: int
    sparsity_target: float | None
    sparsity_measured: float
    recalibrated: bool
    accuracy_mean: float


@dataclass(frozen=True)
class SweepRow(Row):
    """One short run of the learning-rate sweep; eval_loss on text set aside for it."""

    table: ClassVar[str] = "e03_sweep"
    model: str
    variant: str
    learning_rate: float
    step: int
    eval_loss: float
    chosen: bool


class FinetuningSubject(Subject):
    """A `Subject` with text for a run of ``steps``, and ``sweep_blocks`` set aside.

    Options read besides its own: those of `Subject.settings`.
    """

    def __init__(self, config: Config, name: str, steps: int, sweep_blocks: int = 0) -> None:
        super().__init__(config, name)
        self._blocks = steps and steps * config.options["train_batch_size"]  # no training, no such option
        self._sweep_blocks = sweep_blocks

    @cached_property
    def training_data(self) -> list[dict[str, Tensor]]:
        """Blocks to train on: after those of calibration in the stream."""
        first = self.config.options["calibration_blocks"]
        text = torch.cat(self.text("train", first + self._blocks))[first:]
        return [{"input_ids": block, "labels": block} for block in text]

    @cached_property
    def sweep_text(self) -> list[Tensor]:
        """Blocks after those of `heldout` in their stream: neither calibrated, trained (nor was the pocket model on
        them) nor measured on."""
        first = self.config.options["heldout_blocks"]
        text = torch.cat(self.text("heldout", first + self._sweep_blocks))[first:]
        return list(text.split(self.config.options["batch_size"]))


@contextmanager
def tuned(subject: Subject, variant: Variant, calibrated: Sequence[Variant], seed: int) -> Iterator[PeftModel]:
    """The model as ``variant`` with fresh adapters; taken off again at the end."""
    put(subject.model, variant, subject.thresholds(calibrated).get(variant))
    model = add_lora(subject.model, preset(subject.config.options.get("lora", "paper")), seed)
    try:
        yield model
    finally:
        remove_lora(model)


def run(config: Config) -> Iterable[Row]:
    """Sweep, train and measure. Options: levels, lora, learning_rates, sweep_level, ..., and those of `Subject`."""
    options = config.options
    preset(options.get("lora", "paper"))
    check(config, [*options["levels"], options["sweep_level"]])
    if options["steps"] != sorted(set(options["steps"])) or options["steps"][0] < 1:
        raise ValueError(f"e03.steps must be rising and positive, not {options['steps']}: step 0 is always measured")
    if not options["learning_rates"] or not options["seeds"]:
        raise ValueError("e03.learning_rates and e03.seeds must each have at least one entry")
    levels = [cats_variant(level) for level in options["levels"]]
    for name in config.models:
        longest = max(options["steps"][-1], options["sweep_steps"])
        yield from measure_model(FinetuningSubject(config, name, longest, options["sweep_blocks"]), levels)


def measure_model(subject: FinetuningSubject, levels: list[Variant]) -> Iterator[Row]:
    """All rows of one model."""
    options = subject.config.options
    rates: dict[str, float] = {}
    for variant in (cats_variant(options["sweep_level"]), RELUFICATION):
        for row in sweep(subject, variant):
            if row.chosen:
                rates[variant.family] = row.learning_rate
            yield row
    rates[DENSE.family] = rates["cats"]
    variants = [DENSE, *levels, RELUFICATION]
    runs = [(variant, subject.config.seed + seed) for variant in variants for seed in options["seeds"]]
    for variant, seed in subject.config.progress(runs, subject.name, len(runs)):
        types = (FinetuningRow, SparsityRow)
        rate = rates[variant.family]
        # before training the adapters change nothing: one measurement serves all seeds
        for before in subject.config.unit(
            f"{subject.name}/{variant.name}/start", partial(start, subject, variant, levels, rate), types
        ):
            yield replace(before, seed=seed)  # type: ignore[call-arg]
        key = f"{subject.name}/{variant.name}/{seed}"
        yield from subject.config.unit(key, partial(train, subject, variant, levels, rate, seed), types)


def sweep(subject: FinetuningSubject, variant: Variant) -> list[SweepRow]:
    """Short runs at each learning rate; the lowest loss on `sweep_text` is chosen."""
    options = subject.config.options
    rows = []
    for rate in subject.config.progress(options["learning_rates"], f"{subject.name} rates for {variant.name}"):
        key = f"{subject.name}/{variant.name}/rate {rate:g}"
        rows += subject.config.unit(key, partial(_sweep_one, subject, variant, rate), (SweepRow,))
    found = [row for row in rows if isinstance(row, SweepRow)]
    best = min(found, key=lambda row: row.eval_loss)
    return [replace(row, chosen=row is best) for row in found]


def _sweep_one(subject: FinetuningSubject, variant: Variant, rate: float) -> list[Row]:
    steps = subject.config.options["sweep_steps"]
    with tuned(subject, variant, [variant], SWEEP_SEED) as model:
        workdir = subject.config.workdir(f"{subject.name}/{variant.name}/rate {rate:g}")
        finetune(model, subject.training_data, subject.settings(steps, rate, SWEEP_SEED), workdir)
        loss = math.log(perplexity(model, subject.sweep_text))
    return [SweepRow(subject.name, variant.name, rate, steps, loss, False)]


def measure(subject: Subject, model: torch.nn.Module) -> dict[str, Any]:
    """Accuracy and loss of the model as it is, as JSON can hold it."""
    results = subject.evaluate(model)
    loss = math.log(perplexity(model, subject.heldout))
    return {"results": [[r.task, r.accuracy, r.stderr, r.items] for r in results], "eval_loss": loss}


def finetuning_rows(start: Start, rate: float, record: dict[str, Any]) -> list[Row]:
    """Rows of one evaluated step."""
    losses = (record.get("train_loss"), record["eval_loss"])
    results = record["results"]
    return [FinetuningRow(*start, rate, task, acc, stderr, items, *losses) for task, acc, stderr, items in results]


def sparsity_rows(
    subject: Subject,
    model: torch.nn.Module,
    variant: Variant,
    start: Start,
    recalibrated: bool,
    record: dict[str, Any],
) -> list[Row]:
    """Rows of Figure 5 for the model as it is; none for the dense model."""
    if variant == DENSE:
        return []
    accuracy = mean([result[1] for result in record["results"]])
    measured = enumerate(cats.measure_sparsity(model, subject.heldout).items())
    return [SparsityRow(*start, layer, i, variant.sparsity, s, recalibrated, accuracy) for i, (layer, s) in measured]


def start(subject: FinetuningSubject, variant: Variant, levels: list[Variant], rate: float) -> list[Row]:
    """Rows before training."""
    put(subject.model, variant, subject.thresholds(levels).get(variant))
    record, begin = measure(subject, subject.model), (subject.name, variant.name, 0, 0)
    return finetuning_rows(begin, rate, record) + sparsity_rows(subject, subject.model, variant, begin, False, record)


def train(subject: FinetuningSubject, variant: Variant, levels: list[Variant], rate: float, seed: int) -> list[Row]:
    """Rows of one training run, and after it those with thresholds calibrated again."""
    steps = subject.config.options["steps"]
    settings = subject.settings(steps[-1], rate, seed)
    workdir = subject.config.workdir(f"{subject.name}/{variant.name}/{seed}")
    rows: list[Row] = []
    with tuned(subject, variant, levels, seed) as model:
        records = finetune(model, subject.training_data, settings, workdir, steps, lambda: measure(subject, model))
        for record in records:
            rows += finetuning_rows((subject.name, variant.name, seed, record["step"]), rate, record)
        end = (subject.name, variant.name, seed, steps[-1])
        rows += sparsity_rows(subject, model, variant, end, False, records[-1])
        if variant.sparsity is not None:
            recalibrate(model, subject.calibration, variant.sparsity)
            rows += sparsity_rows(subject, model, variant, end, True, measure(subject, model))
    return rows
