"""A model with fine-tuning tasks: training items as token ids, and thresholds calibrated on the task."""

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.task import Task
from torch import Tensor

import cats
from cats.calibration import Thresholds
from experiments.framework.config import Config
from experiments.framework.subject import Subject, build_once, is_pocket
from experiments.framework.variants import DENSE, Variant, make

IGNORED = -100  # label of tokens that are not trained on
INSTRUCTIONS = Path(__file__).parents[1] / "instructions"
Item = dict[str, list[int]]


class TaskSubject(Subject):
    """A `Subject` whose tasks have a training split."""

    def __init__(self, config: Config[Any], name: str) -> None:
        super().__init__(config, name)
        self._task_thresholds: dict[str, dict[Variant, Thresholds]] = {}

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
            aside = self.config.options.sweep_items
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
        length = self.config.options.length
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
        items, size = self.items(task, split, count), self.config.options.batch_size
        return [self.collate(items[start : start + size]) for start in range(0, len(items), size)]

    def task_thresholds(self, name: str, levels: Sequence[Variant]) -> dict[Variant, Thresholds]:
        """Thresholds of the dense model for those of ``levels`` that have one, in one pass over samples of the task."""
        known = self._task_thresholds.setdefault(name, {})
        missing = {level.sparsity: level for level in levels if level.sparsity is not None and level not in known}
        if missing:
            make(self.model, DENSE)
            text = self.task_batches(self.tasks[name], "train", self.config.options.calibration_items)
            made = cats.calibrate(self.model, text, list(missing))
            known |= {missing[sparsity]: thresholds for sparsity, thresholds in made.items()}
        return known


def encode(tokenizer: Any, context: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of ``context + answer`` split as lm-eval splits them, and labels that ignore the context."""
    ids, prompt = tokenizer.encode(context + answer), tokenizer.encode(context)
    return ids, [IGNORED] * len(prompt) + ids[len(prompt) :]


def instruction_folder(config: Config[Any]) -> Path:
    """Folder of the tasks' YAML files: option include_path, or built for pocket, else `instructions`."""
    if config.options.include_path is not None:
        return Path(config.options.include_path)
    if not is_pocket(config):
        return INSTRUCTIONS
    from experiments.pocket.finetuning_tasks import build_finetuning_tasks

    return build_once(build_finetuning_tasks, config.output / "finetuning_tasks")
