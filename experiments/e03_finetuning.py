"""Figures 2 and 5: general fine-tuning with LoRA of the dense model, CATS and ReLUfication; accuracy and sparsity.

Purpose: how fast fine-tuning restores what sparsity has cost, and whether sparsity stays. All variants start alike and
see the same data in the same order; thresholds are fixed before training. The learning rate of each of the three, dense
included, is chosen by short runs and the loss on held-out text that nothing else is measured on. Beyond the paper: each
layer's thresholds calibrated again after training. Every item is kept.
Cost: for each variant and seed one training run and an evaluation at each step of `steps`; seven minutes for the pocket
model on two cores. An interrupted run goes on from its last evaluated step.

    nox -s experiment -- e03 --model PATH_OR_HUB_ID
    accelerate launch --num_processes 8 -m experiments run e03 --profile paper      # the same batch, split over 8 GPUs
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch

import cats
from cats.evaluation import perplexity
from cats.finetuning import finetune, recalibrate
from experiments.framework.common_options import EvaluationOptions, SweepOptions, TrainingOptions, check_tokens
from experiments.framework.config import Config
from experiments.framework.cost import Cost, evaluation, memory_per_parameter, text, training
from experiments.framework.options import Count, Rising
from experiments.framework.subject import SWEEP_SEED, Subject, check, check_length, mean
from experiments.framework.tables import FinetuningRow, FinetuningSample, Row, SparsityRow, SweepRow, pack_flags
from experiments.framework.training import FinetuningSubject, adapted, loss_of_short_run, lowest_loss
from experiments.framework.variants import DENSE, RELUFICATION, Variant, make, variant

Start = dict[str, Any]  # the columns model, criterion, variant, seed, step
ROWS = (FinetuningRow, FinetuningSample, SparsityRow)


@dataclass(frozen=True, kw_only=True)
class Options(EvaluationOptions, TrainingOptions, SweepOptions):
    """Options of e03.

    Attributes:
        steps: after how many steps accuracy is measured; before training it always is.
        sweep_steps: of each short run; as many as the measured runs have, since over fewer a larger rate wins.
        sweep_blocks: of text, that chooses the rate.
    """

    steps: Annotated[tuple[Count, ...], Rising()]
    sweep_steps: Count
    sweep_blocks: Count

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tokens(steps=self.longest() * self.train_batch_size, length=self.length)
        check_tokens(sweep_blocks=self.sweep_blocks, length=self.length)

    def sweeps(self) -> int:
        """Short runs: of dense, CATS and ReLUfication at each rate; none for a single rate."""
        return 3 * len(self.learning_rates) if len(self.learning_rates) > 1 else 0

    def longest(self) -> int:
        """Steps of the longest run."""
        return max(self.steps[-1], self.sweep_steps)

    def levels_of_cats(self) -> list[Variant]:
        """CATS at each level."""
        return [variant("cats", level) for level in self.levels]


def text_blocks(config: Config[Options]) -> dict[str, int]:
    """Blocks of text that it needs of each purpose: to calibrate and train on; to measure and choose the rate on."""
    options = config.options
    trained = options.longest() * options.train_batch_size
    swept = options.sweep_blocks if options.sweeps() else 0
    return {"train": options.calibration_blocks + trained, "heldout": options.heldout_blocks + swept}


def run(config: Config[Options]) -> Iterable[Row]:
    """Sweep, train and measure."""
    options = config.options
    check(config)
    check_length(config, text_blocks(config))
    for name in config.models:
        yield from measure_model(FinetuningSubject(config, name, options.longest(), options.sweep_blocks))


def cost(config: Config[Options]) -> Cost:
    """Training runs of every variant and seed with their evaluations, and the sweep of three variants."""
    options, batch = config.options, config.options.batch_size
    variants, levels, seeds = len(options.levels) + 2, len(options.levels), len(options.seeds)
    steps = variants * seeds * options.steps[-1] + options.sweeps() * options.sweep_steps
    # before training all seeds share one evaluation; CATS is measured once more, calibrated again
    evaluations = variants * (1 + seeds * len(options.steps)) + levels * seeds
    heldout = text(options.heldout_blocks, options.length, batch)
    each = evaluation(options.tasks, options.limit, batch) + heldout
    sparsities = heldout * ((variants - 1) * (1 + seeds) + levels * seeds)
    calibrations = text(options.calibration_blocks, options.length, batch) * (1 + levels * seeds)
    swept = text(options.sweep_blocks, options.length, batch) * options.sweeps()
    trained = training(steps, options.train_batch_size, options.length, options.micro_batch_size)
    work = trained + each * evaluations + sparsities + calibrations + swept
    logits = options.length * (options.micro_batch_size or options.train_batch_size)
    return Cost(work, memory=memory_per_parameter([config.dtype], trains=True), logits=logits)


def measure_model(subject: FinetuningSubject) -> Iterator[Row]:
    """All rows of one model."""
    options: Options = subject.config.options
    levels = options.levels_of_cats()
    config, swept = subject.config, [DENSE, variant("cats", options.sweep_level), RELUFICATION]
    rates = dict.fromkeys((v.criterion for v in swept), options.learning_rates[0])
    if len(options.learning_rates) == 1:
        swept = []
    config.compute_ahead(
        dict(sweep_job(subject, v, rate) for v in swept for rate in options.learning_rates), (SweepRow,)
    )
    for v in swept:
        for row in sweep(subject, v):
            if row.chosen:
                rates[v.criterion] = row.learning_rate
            yield row
    variants = [DENSE, *levels, RELUFICATION]
    runs = [(v, config.seed + seed) for v in variants for seed in options.seeds]
    starts = {
        v: (f"{subject.name}/{v.name}/start", partial(start, subject, v, levels, rates[v.criterion])) for v in variants
    }
    trained = {
        (v, seed): (f"{subject.name}/{v.name}/{seed}", partial(train, subject, v, levels, rates[v.criterion], seed))
        for v, seed in runs
    }
    config.compute_ahead(dict([*trained.values(), *starts.values()]), ROWS)
    for v, seed in config.progress(runs, subject.name, len(runs)):
        # before training the adapters change nothing: one measurement serves all seeds
        for before in config.unit(*starts[v], ROWS):
            yield replace(before, seed=seed)  # type: ignore[call-arg]
        yield from config.unit(*trained[v, seed], ROWS)


def sweep(subject: FinetuningSubject, v: Variant) -> list[SweepRow]:
    """Short runs at each learning rate; the lowest loss on `FinetuningSubject.sweep_text` is chosen, once
    all rates have been run."""
    options = subject.config.options
    rows: list[Any] = []
    for rate in subject.config.progress(options.learning_rates, f"{subject.name} rates for {v.name}"):
        rows += subject.config.unit(*sweep_job(subject, v, rate), (SweepRow,))
    best = lowest_loss(rows, len(options.learning_rates))
    return [replace(row, chosen=row is best) for row in rows]


def sweep_job(subject: FinetuningSubject, v: Variant, rate: float) -> tuple[str, Callable[[], list[Row]]]:
    """Key and work of one short run."""
    return f"{subject.name}/{v.name}/rate {rate:g}", partial(_sweep_one, subject, v, rate)


def _sweep_one(subject: FinetuningSubject, v: Variant, rate: float) -> list[Row]:
    steps = subject.config.options.sweep_steps
    with adapted(subject, v, subject.thresholds([v]).get(v), SWEEP_SEED) as model:
        workdir = subject.config.workdir(f"{subject.name}/{v.name}/rate {rate:g}")
        settings = subject.settings(steps, rate, SWEEP_SEED)
        loss = loss_of_short_run(
            lambda: finetune(model, subject.training_data, settings, workdir),
            lambda: math.log(perplexity(model, subject.sweep_text)),
        )
    return [SweepRow(**subject.columns(v), learning_rate=rate, step=steps, eval_loss=loss, chosen=False)]


def measure(subject: Subject, model: torch.nn.Module) -> dict[str, Any]:
    """Accuracy, items and loss of the model as it is, as JSON can hold them."""
    results = subject.evaluate(model)
    loss = math.log(perplexity(model, subject.heldout))
    columns = [{"task": r.task, "accuracy": r.accuracy, "stderr": r.stderr, "items": r.items} for r in results]
    return {"results": columns, "correct": {r.task: pack_flags(r.correct) for r in results}, "eval_loss": loss}


def finetuning_rows(begin: Start, rate: float, record: dict[str, Any]) -> list[Row]:
    """Rows and samples of one evaluated step."""
    shared = {
        "learning_rate": rate,
        "train_loss": record.get("train_loss"),
        "eval_loss": record["eval_loss"],
    }
    rows: list[Row] = [FinetuningRow(**begin, **shared, **result) for result in record["results"]]
    return [*rows, *(FinetuningSample(**begin, task=task, correct=c) for task, c in record["correct"].items())]


def sparsity_rows(
    subject: Subject, model: torch.nn.Module, v: Variant, begin: Start, recalibrated: bool, record: dict[str, Any]
) -> list[Row]:
    """Rows of Figure 5 for the model as it is; none for the dense model."""
    if v == DENSE:
        return []
    accuracy = mean(result["accuracy"] for result in record["results"])
    return [
        SparsityRow(
            **begin,
            layer=layer,
            layer_index=index,
            sparsity_target=v.sparsity,
            sparsity_measured=measured,
            recalibrated=recalibrated,
            accuracy_mean=accuracy,
        )
        for index, (layer, measured) in enumerate(cats.measure_sparsity(model, subject.heldout).items())
    ]


def start(subject: FinetuningSubject, v: Variant, levels: list[Variant], rate: float) -> list[Row]:
    """Rows before training."""
    make(subject.model, v, subject.thresholds(levels).get(v))
    record, begin = measure(subject, subject.model), beginning(subject, v, 0, 0)
    return finetuning_rows(begin, rate, record) + sparsity_rows(subject, subject.model, v, begin, False, record)


def train(subject: FinetuningSubject, v: Variant, levels: list[Variant], rate: float, seed: int) -> list[Row]:
    """Rows of one training run, and after it those with thresholds calibrated again."""
    steps = subject.config.options.steps
    settings = subject.settings(steps[-1], rate, seed)
    workdir = subject.config.workdir(f"{subject.name}/{v.name}/{seed}")
    rows: list[Row] = []
    with adapted(subject, v, subject.thresholds(levels).get(v), seed) as model:
        records = finetune(model, subject.training_data, settings, workdir, steps, lambda: measure(subject, model))
        for record in records:
            rows += finetuning_rows(beginning(subject, v, seed, record["step"]), rate, record)
        end = beginning(subject, v, seed, steps[-1])
        rows += sparsity_rows(subject, model, v, end, False, records[-1])
        if v.sparsity is not None:
            recalibrate(model, subject.calibration, v.sparsity)
            rows += sparsity_rows(subject, model, v, end, True, measure(subject, model))
    return rows


def beginning(subject: Subject, v: Variant, seed: int, step: int) -> Start:
    """The columns that all rows of one step share."""
    return {**subject.columns(v), "seed": seed, "step": step}
