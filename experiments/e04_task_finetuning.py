"""Tables 2 and 3: LoRA fine-tuning on three yes/no tasks; accuracy of each variant and the sparsity left.

CoLA, SST-2 and BoolQ as instructions answered by yes or no (`instructions/*.yaml`); in pocket three tasks of the same
forms over the standard library. Thresholds are calibrated on samples of the task itself, then fixed. Only the answer is
trained on. Accuracy is lm-eval's, over the task's test split.
Cost: variants x seeds x tasks short runs; under three minutes for the pocket model on two cores.

    nox -s experiment -- e04 --model PATH_OR_HUB_ID
    accelerate launch --num_processes 8 -m experiments run e04 --profile paper      # the same batch, split over 8 GPUs
"""

import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from lm_eval.api.task import Task
from torch import Tensor

import cats
from cats.calibration import Thresholds
from cats.evaluation import Tasks, evaluate
from cats.finetuning import TrainSettings, add_lora, finetune, preset, remove_lora
from experiments.config import Config
from experiments.results import Row
from experiments.variants import (
    DENSE,
    RELUFICATION,
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


class TaskSubject(Subject):
    """A `Subject` whose tasks have a training split.

    Options read besides tasks, limit and batch_size: calibration_items, train_items, length.
    """

    def __init__(self, config: Config, name: str) -> None:
        super().__init__(config, name)
        self._task_thresholds: dict[str, dict[float, Thresholds]] = {}

    def folder(self) -> Path:
        return instruction_folder(self.config)

    def items(self, task: Task, split: str, count: int) -> list[Item]:
        """Up to ``count`` examples of ``train`` (shuffled by the seed) or ``test`` as token ids."""
        if split == "test":
            documents = list(task.eval_docs)
        else:
            documents = self._training_documents(task)
            random.Random(self.config.seed).shuffle(documents)
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
        if name not in self._task_thresholds:
            put(self.model, DENSE)
            text = self.task_batches(self.tasks[name], "train", self.config.options["calibration_items"])
            targets = [level.sparsity for level in levels if level.sparsity is not None]
            self._task_thresholds[name] = cats.calibrate(self.model, text, targets)
        return self._task_thresholds[name]


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
    """Fine-tune and measure every variant on every task of each model."""
    options = config.options
    preset(options.get("lora", "paper"))
    check(config, options["levels"], instruction_folder)
    for key in ("calibration_items", "train_items"):
        if options[key] < 1:
            raise ValueError(f"e04.{key} must be at least 1, not {options[key]}")
    levels = [cats_variant(level) for level in options["levels"]]
    variants = [DENSE, *levels, RELUFICATION]
    for name in config.models:
        subject = TaskSubject(config, name)
        runs = [(task, v, seed) for task in options["tasks"] for v in variants for seed in options["seeds"]]
        for task, variant, seed in config.progress(runs, name, len(runs)):
            compute = partial(train, subject, task, variant, levels, seed)
            yield from config.unit(f"{name}/{task}/{variant.name}/{seed}", compute, (TaskFinetuningRow,))


def train(subject: TaskSubject, name: str, variant: Variant, levels: Sequence[Variant], seed: int) -> list[Row]:
    """Fine-tune one variant on one task and measure it."""
    options, task = subject.config.options, subject.tasks[name]
    thresholds = None
    if variant.sparsity is not None:
        thresholds = subject.task_thresholds(name, levels)[variant.sparsity]
    put(subject.model, variant, thresholds)
    data = subject.items(task, "train", options["train_items"])
    settings = TrainSettings(
        math.ceil(options["epochs"] * len(data) / options["train_batch_size"]),
        options["train_batch_size"],
        options["learning_rate"],
        options["weight_decay"],
        options["warmup_steps"],
        options.get("micro_batch_size"),
        seed,
    )
    model = add_lora(subject.model, preset(options.get("lora", "paper")), seed)
    try:
        workdir = subject.config.workdir(f"{subject.name}/{name}/{variant.name}/{seed}")
        saved = range(options["save_steps"], settings.steps, options["save_steps"])
        finetune(model, data, settings, workdir, saved, collator=subject.collate)
        only = Tasks({name: task})
        (result,) = evaluate(model, subject.tokenizer, only, options.get("limit"), options["batch_size"])
        test = subject.task_batches(task, "test", options["calibration_items"])
        measured = mean(list(cats.measure_sparsity(model, test).values()))
    finally:
        remove_lora(model)
    scores = (result.accuracy, result.stderr, result.items, variant.sparsity, measured, result.chance)
    return [TaskFinetuningRow(subject.name, name, variant.name, seed, *scores)]
