"""Tables 2 and 3: LoRA fine-tuning on three yes/no tasks; accuracy of each variant and the sparsity left.

Purpose: what sparsity costs after fine-tuning on the task itself. CoLA, SST-2 and BoolQ as instructions answered by yes
or no (`instructions/*.yaml`); in pocket three tasks of the same forms over the standard library. Thresholds are
calibrated on samples of the task itself, then fixed. Only the answer is trained on. Accuracy is lm-eval's, over the
task's test split; every item is kept. The learning rate of the dense model, of CATS and of ReLUfication is chosen for
each task by short runs and the loss on training items set aside.
Cost: variants x seeds x tasks short runs, and shorter ones for each learning rate; seven minutes for the pocket model
on two cores.

    nox -s experiment -- e04 --model PATH_OR_HUB_ID
    accelerate launch --num_processes 8 -m experiments run e04 --profile paper      # the same batch, split over 8 GPUs
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor

import cats
from cats.evaluation import Tasks, evaluate
from cats.finetuning import finetune
from experiments.e04_task_finetuning.subject import IGNORED, TaskSubject, instruction_folder
from experiments.framework.common_options import SweepOptions, TrainingOptions
from experiments.framework.config import Config
from experiments.framework.cost import (
    OTHER_TASK,
    TASKS,
    TRAINING_ITEMS,
    Cost,
    Work,
    evaluation,
    memory_per_parameter,
    text,
    training,
)
from experiments.framework.options import Count, Range, Sparsity, Whole
from experiments.framework.subject import SWEEP_SEED, check, mean
from experiments.framework.tables import Row, TaskFinetuningRow, TaskFinetuningSample, TaskSweepRow, pack_flags
from experiments.framework.training import adapted, lowest_loss
from experiments.framework.variants import DENSE, RELUFICATION, Variant, variant

ROWS = (TaskFinetuningRow, TaskFinetuningSample)


@dataclass(frozen=True, kw_only=True)
class Options(TrainingOptions, SweepOptions):
    """Options of e04.

    Attributes:
        tasks: names of lm-eval tasks with a training split, or of YAML files in ``include_path``.
        levels: target sparsities of CATS.
        limit: test items per task at most; all when None.
        batch_size: items at once; lowered when memory runs out.
        length: tokens of an item at most; its end is kept.
        calibration_items: training items that thresholds are calibrated on, and test items that give the sparsity.
        train_items: training items per epoch at most.
        epochs: of training.
        sweep_items: of the training split, set aside to choose the rate on; each short run has as many others.
        save_steps: steps between checkpoints.
        include_path: folder of the user's own lm-eval tasks.
    """

    tasks: tuple[str, ...]
    levels: tuple[Sparsity, ...]
    limit: Annotated[int, Range(2)] | None = None
    batch_size: Count = 8
    length: Annotated[int, Range(2)] = 512
    calibration_items: Count = 200
    train_items: Count = 1000
    epochs: Count = 1
    sweep_items: Whole = 256
    save_steps: Count = 100
    include_path: str | None = None

    def __post_init__(self) -> None:
        if len(self.learning_rates) > 1 and not self.sweep_items:
            raise ValueError("sweep_items must be at least 1 with several learning_rates, not 0")


def run(config: Config[Options]) -> Iterable[Row]:
    """Sweep if there are several learning rates, then fine-tune and measure every variant on every task and model."""
    check(config, instruction_folder)
    for name in config.models:
        subject = TaskSubject(config, name)
        swept = sweeps(config.options)
        ahead = dict(
            sweep_job(subject, task, v, rate)
            for task in config.options.tasks
            for v in swept
            for rate in config.options.learning_rates
        )
        config.compute_ahead(ahead, (TaskSweepRow,))
        for task in config.progress(config.options.tasks, f"{name} tasks"):
            yield from measure_task(subject, task)


def cost(config: Config[Options]) -> Cost:
    """Training and evaluation of every variant, seed and task; in the sweep as many items again for the loss."""
    options, work = config.options, Work()
    runs = (len(options.levels) + 2) * len(options.seeds)
    sweeps_of_a_task = len(sweeps(options)) * len(options.learning_rates)
    for task in options.tasks:
        length = TASKS.get(task, OTHER_TASK)[3]
        batch, micro = options.train_batch_size, options.micro_batch_size
        items = min(options.train_items, TRAINING_ITEMS.get(task, options.train_items))
        trained = training(math.ceil(options.epochs * items / batch), batch, length, micro)
        measured = evaluation([task], options.limit, options.batch_size)
        measured += text(options.calibration_items, length, options.batch_size)
        short = training(math.ceil(options.sweep_items / batch), batch, length, micro)
        short += text(options.sweep_items, length, options.batch_size)
        work += (trained + measured) * runs + short * sweeps_of_a_task
    longest = max(TASKS.get(task, OTHER_TASK)[3] for task in options.tasks)
    logits = longest * (options.micro_batch_size or options.train_batch_size)
    return Cost(work, memory=memory_per_parameter([config.dtype], trains=True), logits=logits)


def measure_task(subject: TaskSubject, task: str) -> Iterator[Row]:
    """All rows of one task."""
    config, options = subject.config, subject.config.options
    rates = dict.fromkeys((v.criterion for v in swept_variants(options)), options.learning_rates[0])
    for v in sweeps(options):
        for row in sweep(subject, task, v):
            if row.chosen:
                rates[v.criterion] = row.learning_rate
            yield row
    levels = [variant("cats", level) for level in options.levels]
    runs = [(v, config.seed + seed) for v in (DENSE, *levels, RELUFICATION) for seed in options.seeds]
    jobs = {
        f"{subject.name}/{task}/{v.name}/{seed}": partial(measure, subject, task, v, levels, rates[v.criterion], seed)
        for v, seed in runs
    }
    config.compute_ahead(jobs, ROWS)
    for key, compute in config.progress(jobs.items(), f"{subject.name} {task}", len(jobs)):
        yield from config.unit(key, compute, ROWS)


def swept_variants(options: Options) -> tuple[Variant, ...]:
    """Each stands for its criterion where a learning rate is chosen."""
    return DENSE, variant("cats", options.sweep_level), RELUFICATION


def sweeps(options: Options) -> tuple[Variant, ...]:
    """Variants that short runs are made for; none for a single rate."""
    return swept_variants(options) if len(options.learning_rates) > 1 else ()


def sweep(subject: TaskSubject, task: str, v: Variant) -> list[TaskSweepRow]:
    """Short runs at each learning rate, over as many items as are set aside; the lowest loss on these is chosen,
    once all rates have been run."""
    rows: list[Any] = []
    rates = subject.config.options.learning_rates
    for rate in rates:
        rows += subject.config.unit(*sweep_job(subject, task, v, rate), (TaskSweepRow,))
    best = lowest_loss(rows) if len(rows) == len(rates) else None
    return [replace(row, chosen=row is best) for row in rows]


def sweep_job(subject: TaskSubject, task: str, v: Variant, rate: float) -> tuple[str, Callable[[], list[Row]]]:
    """Key and work of one short run."""
    key = f"{subject.name}/{task}/{v.name}/rate {rate:g}"
    return key, partial(_sweep_one, subject, task, v, rate, key)


def _sweep_one(subject: TaskSubject, name: str, v: Variant, rate: float, key: str) -> list[Row]:
    task, count = subject.tasks[name], subject.config.options.sweep_items
    data = subject.items(task, "train", count)
    settings = subject.settings(math.ceil(len(data) / subject.config.options.train_batch_size), rate, SWEEP_SEED)
    with adapted(subject, v, subject.task_thresholds(name, [v]).get(v), SWEEP_SEED) as model:
        finetune(model, data, settings, subject.config.workdir(key), collator=subject.collate)
        loss = answer_loss(model, subject.task_batches(task, "sweep", count))
    outcome: dict[str, Any] = {"learning_rate": rate, "step": settings.steps, "eval_loss": loss, "chosen": False}
    return [TaskSweepRow(**subject.columns(v), task=name, **outcome)]


@torch.no_grad()
def answer_loss(model: Any, batches: Iterable[dict[str, Tensor]]) -> float:
    """Mean loss over the tokens of the answers, in nats."""
    total, count = 0.0, 0
    for batch in batches:
        tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += tokens * float(model(**{key: value.to(model.device) for key, value in batch.items()}).loss)
        count += tokens
    return total / count


def measure(
    subject: TaskSubject, name: str, v: Variant, levels: Sequence[Variant], rate: float, seed: int
) -> list[Row]:
    """Fine-tune one variant on one task and measure it."""
    options, task = subject.config.options, subject.tasks[name]
    data = subject.items(task, "train", options.train_items)
    steps = math.ceil(options.epochs * len(data) / options.train_batch_size)
    with adapted(subject, v, subject.task_thresholds(name, levels).get(v), seed) as model:
        workdir = subject.config.workdir(f"{subject.name}/{name}/{v.name}/{seed}")
        saved = range(options.save_steps, steps, options.save_steps)
        finetune(model, data, subject.settings(steps, rate, seed), workdir, saved, collator=subject.collate)
        (result,) = evaluate(model, subject.tokenizer, Tasks({name: task}), options.limit, options.batch_size)
        test = subject.task_batches(task, "test", options.calibration_items)
        measured = mean(cats.measure_sparsity(model, test).values())
    who = {**subject.columns(v), "task": name, "seed": seed}
    row = TaskFinetuningRow(
        **who,
        accuracy=result.accuracy,
        stderr=result.stderr,
        items=result.items,
        sparsity_target=v.sparsity,
        sparsity_measured=measured,
        chance=result.chance,
    )
    return [row, TaskFinetuningSample(**who, correct=pack_flags(result.correct))]
