"""Tables 2 and 3: LoRA fine-tuning on three yes/no tasks; accuracy of each variant and the sparsity left.

CoLA, SST-2 and BoolQ as instructions answered by yes or no (`instructions/*.yaml`); in pocket three tasks of the same
forms over the standard library. Thresholds are calibrated on samples of the task itself, then fixed. Only the answer is
trained on. Accuracy is lm-eval's, over the task's test split. The learning rate of CATS and of ReLUfication is chosen
for each task by short runs and the loss on training items set aside; the dense model takes CATS's.
Cost: variants x seeds x tasks short runs, and shorter ones for each learning rate; under seven minutes for the pocket
model on two cores.

    nox -s experiment -- e04 --model PATH_OR_HUB_ID
    accelerate launch --num_processes 8 -m experiments run e04 --profile paper      # the same batch, split over 8 GPUs
"""

import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from lm_eval.api.task import Task
from peft import PeftModel
from torch import Tensor

import cats
from cats.calibration import Thresholds
from cats.evaluation import Tasks, evaluate
from cats.finetuning import add_lora, finetune, preset, remove_lora
from experiments.framework.config import Config
from experiments.framework.results import Row
from experiments.framework.subject import (
    DENSE,
    RELUFICATION,
    SWEEP_SEED,
    Subject,
    Variant,
    build_once,
    cats_variant,
    check,
    is_pocket,
    mean,
    put,
)

IGNORED = -100  # label of tokens that are not trained on
Item = dict[str, list[int]]


@dataclass(frozen=True)
class TaskFinetuningRow(Row):
    """Accuracy of one variant fine-tuned on one task (Table 2), and its sparsity on the test prompts (Table 3)."""

    table: ClassVar[str] = "e04_task_finetuning"
    model: str
    task: str
    variant: str
    seed: int
    accuracy: float
    stderr: float
    items: int
    sparsity_target: float | None
    sparsity_measured: float
    chance: float


@dataclass(frozen=True)
class TaskSweepRow(Row):
    """One short run of the learning-rate sweep; eval_loss in nats a token of the answer, on items set aside for it."""

    table: ClassVar[str] = "e04_sweep"
    model: str
    task: str
    variant: str
    learning_rate: float
    step: int
    eval_loss: float
    chosen: bool


class TaskSubject(Subject):
    """A `Subject` whose tasks have a training split.

    Options read besides tasks, limit and batch_size: calibration_items, train_items, sweep_items, length.
    """

    def __init__(self, config: Config, name: str) -> None:
        super().__init__(config, name)
        self._task_thresholds: dict[str, dict[float, Thresholds]] = {}

    def folder(self) -> Path:
        return instruction_folder(self.config)

    def items(self, task: Task, split: str, count: int) -> list[Item]:
        """Up to ``count`` examples as token ids: of ``test``, or of the training split, shuffled by the seed, whose
        first sweep_items are ``sweep`` and the others ``train``."""
        if split == "test":
            documents = list(task.eval_docs)
        else:
            documents = self._training_documents(task)
            random.Random(self.config.seed).shuffle(documents)
            aside = self.config.options["sweep_items"]
            documents = documents[:aside] if split == "sweep" else documents[aside:]
        return [self._item(task, document) for document in documents[:count]]

    def _training_documents(self, task: Task) -> list[Any]:
        """The task's training split; the pocket tasks keep theirs in ``NAME_train.jsonl`` beside the test items."""
        if task.has_training_docs():
            return list(task.training_docs())
        lines = (self.folder() / f"{task.config.task}_train.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def _item(self, task: Task, document: Any) -> Item:
        context = task.fewshot_context(document, 0)
        answer = task.doc_to_choice(document)[task.doc_to_target(document)]
        ids, labels = encode(self.tokenizer, context, task.config.target_delimiter + answer)
        length = self.config.options["length"]
        return {"input_ids": ids[-length:], "labels": labels[-length:]}

    def collate(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Pad on the right; padding is neither attended to nor trained on."""
        width = max(len(item["input_ids"]) for item in items)

        def padded(lists: Iterable[list[int]], filling: int) -> Tensor:
            return torch.tensor([values + [filling] * (width - len(values)) for values in lists])

        return {
            "input_ids": padded((item["input_ids"] for item in items), self.tokenizer.pad_token_id or 0),
            "attention_mask": padded(([1] * len(item["input_ids"]) for item in items), 0),
            "labels": padded((item["labels"] for item in items), IGNORED),
        }

    def task_batches(self, task: Task, split: str, count: int) -> list[dict[str, Tensor]]:
        """Padded batches of a split."""
        items, size = self.items(task, split, count), self.config.options["batch_size"]
        return [self.collate(items[start : start + size]) for start in range(0, len(items), size)]

    def task_thresholds(self, name: str, levels: Sequence[Variant]) -> dict[float, Thresholds]:
        """Thresholds of the dense model for all ``levels``, in one pass over samples of the task."""
        known = self._task_thresholds.setdefault(name, {})
        missing = [level.sparsity for level in levels if level.sparsity is not None and level.sparsity not in known]
        if missing:
            put(self.model, DENSE)
            text = self.task_batches(self.tasks[name], "train", self.config.options["calibration_items"])
            known.update(cats.calibrate(self.model, text, missing))
        return known


def encode(tokenizer: Any, context: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of ``context + answer`` split as lm-eval splits them, and labels that ignore the context."""
    ids, prompt = tokenizer.encode(context + answer), tokenizer.encode(context)
    return ids, [IGNORED] * len(prompt) + ids[len(prompt) :]


def instruction_folder(config: Config) -> Path:
    """Folder of the tasks' YAML files: option include_path, or built for pocket, else `instructions`."""
    if "include_path" in config.options:
        return Path(config.options["include_path"])
    if not is_pocket(config):
        return Path(__file__).parent / "instructions"
    from experiments.pocket.finetuning_tasks import build_finetuning_tasks

    return build_once(build_finetuning_tasks, config.output / "finetuning_tasks")


def run(config: Config) -> Iterable[Row]:
    """Sweep if there are several learning rates, then fine-tune and measure every variant on every task and model."""
    options = config.options
    preset(options.get("lora", "paper"))
    check(config, [*options["levels"], options["sweep_level"]], instruction_folder)
    if not options["learning_rates"] or not options["seeds"]:
        raise ValueError("e04.learning_rates and e04.seeds must each have at least one entry")
    swept = len(options["learning_rates"]) > 1
    for key in ("calibration_items", "train_items", *(["sweep_items"] if swept else [])):
        if options[key] < 1:
            raise ValueError(f"e04.{key} must be at least 1, not {options[key]}")
    levels = [cats_variant(level) for level in options["levels"]]
    variants = [DENSE, *levels, RELUFICATION]
    for name in config.models:
        subject = TaskSubject(config, name)
        for task in config.progress(options["tasks"], f"{name} tasks"):
            rates = dict.fromkeys(("cats", "relufication"), options["learning_rates"][0])
            for variant in (cats_variant(options["sweep_level"]), RELUFICATION) if swept else ():
                for row in sweep(subject, task, variant):
                    if row.chosen:
                        rates[variant.family] = row.learning_rate
                    yield row
            rates[DENSE.family] = rates["cats"]
            runs = [(variant, config.seed + seed) for variant in variants for seed in options["seeds"]]
            for variant, seed in config.progress(runs, f"{name} {task}", len(runs)):
                compute = partial(measure, subject, task, variant, levels, rates[variant.family], seed)
                yield from config.unit(f"{name}/{task}/{variant.name}/{seed}", compute, (TaskFinetuningRow,))


def sweep(subject: TaskSubject, task: str, variant: Variant) -> list[TaskSweepRow]:
    """Short runs at each learning rate, over as many items as are set aside; the lowest loss on these is chosen."""
    rows = []
    for rate in subject.config.options["learning_rates"]:
        key = f"{subject.name}/{task}/{variant.name}/rate {rate:g}"
        rows += subject.config.unit(key, partial(_sweep_one, subject, task, variant, rate, key), (TaskSweepRow,))
    found = [row for row in rows if isinstance(row, TaskSweepRow)]
    best = min(found, key=lambda row: row.eval_loss)
    return [replace(row, chosen=row is best) for row in found]


def _sweep_one(subject: TaskSubject, name: str, variant: Variant, rate: float, key: str) -> list[Row]:
    task, count = subject.tasks[name], subject.config.options["sweep_items"]
    data = subject.items(task, "train", count)
    settings = subject.settings(math.ceil(len(data) / subject.config.options["train_batch_size"]), rate, SWEEP_SEED)
    with tuned(subject, name, variant, [variant], SWEEP_SEED) as model:
        finetune(model, data, settings, subject.config.workdir(key), collator=subject.collate)
        loss = answer_loss(model, subject.task_batches(task, "sweep", count))
    return [TaskSweepRow(subject.name, name, variant.name, rate, settings.steps, loss, False)]


@torch.no_grad()
def answer_loss(model: Any, batches: Iterable[dict[str, Tensor]]) -> float:
    """Mean loss over the tokens of the answers, in nats."""
    total, count = 0.0, 0
    for batch in batches:
        tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += tokens * float(model(**{key: value.to(model.device) for key, value in batch.items()}).loss)
        count += tokens
    return total / count


@contextmanager
def tuned(
    subject: TaskSubject, task: str, variant: Variant, levels: Sequence[Variant], seed: int
) -> Iterator[PeftModel]:
    """The model as ``variant``, calibrated on the task, with fresh adapters; taken off again at the end."""
    thresholds = None
    if variant.sparsity is not None:
        thresholds = subject.task_thresholds(task, levels)[variant.sparsity]
    put(subject.model, variant, thresholds)
    model = add_lora(subject.model, preset(subject.config.options.get("lora", "paper")), seed)
    try:
        yield model
    finally:
        remove_lora(model)


def measure(
    subject: TaskSubject, name: str, variant: Variant, levels: Sequence[Variant], rate: float, seed: int
) -> list[Row]:
    """Fine-tune one variant on one task and measure it."""
    options, task = subject.config.options, subject.tasks[name]
    data = subject.items(task, "train", options["train_items"])
    steps = math.ceil(options["epochs"] * len(data) / options["train_batch_size"])
    with tuned(subject, name, variant, levels, seed) as model:
        workdir = subject.config.workdir(f"{subject.name}/{name}/{variant.name}/{seed}")
        saved = range(options["save_steps"], steps, options["save_steps"])
        finetune(model, data, subject.settings(steps, rate, seed), workdir, saved, collator=subject.collate)
        only = Tasks({name: task})
        (result,) = evaluate(model, subject.tokenizer, only, options.get("limit"), options["batch_size"])
        test = subject.task_batches(task, "test", options["calibration_items"])
        measured = mean(list(cats.measure_sparsity(model, test).values()))
    scores = (result.accuracy, result.stderr, result.items, variant.sparsity, measured, result.chance)
    return [TaskFinetuningRow(subject.name, name, variant.name, seed, *scores)]
