"""Accuracy through lm-eval as a library (its own requests, `acc` and standard errors), and perplexity.

    tasks = load_tasks(["arc_easy", "piqa"])
    results = evaluate(model, tokenizer, tasks, limit=100)

Under `accelerate launch` the items are split among the processes, and every process returns the whole result.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from torch import nn

from cats.devices import eval_mode
from cats.extras import missing
from cats.language_model import LanguageModel
from cats.perplexity import block_losses, perplexity, sequences_at_once
from cats.quiet import quiet, templates_compiled_once
from cats.task_data import check_answer, local_sets
from cats.task_index import own_tasks

try:
    import lm_eval
    from accelerate.utils import broadcast_object_list
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise missing(__name__, "experiments", error) from error

__all__ = [
    "METRIC",
    "TaskResult",
    "Tasks",
    "block_losses",
    "check_tasks",
    "check_tokenizer",
    "evaluate",
    "load_tasks",
    "paired_difference",
    "perplexity",
    "run_tasks",
    "sequences_at_once",
]

METRIC = "acc"
KINDS = {METRIC: "multiple-choice", "exact_match": "generated-answer"}
"""What tasks with a metric are called."""
T = TypeVar("T")
SEED = 1234  # lm-eval's own default for its few-shot sampler


@dataclass(frozen=True)
class TaskResult:
    """Accuracy on one task.

    Attributes:
        accuracy, stderr: lm-eval's ``acc`` and its standard error, as fractions.
        items: how many items were scored.
        chance: accuracy of a uniform guess, from the number of choices of each item.
        correct: 1.0 or 0.0 for each item in the task's order; two models' vectors are paired item by item.
    """

    task: str
    accuracy: float
    stderr: float
    items: int
    chance: float
    correct: tuple[float, ...]


class Tasks(dict[str, Task]):
    """lm-eval task objects by name, built once and evaluated often; ``encodings`` holds a tokenizer's work on them."""

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        super().__init__(tasks)
        self.encodings: WeakKeyDictionary[Any, dict[str, list[int]]] = WeakKeyDictionary()


def check_tasks(names: Sequence[str], include_path: str | Path | None = None) -> dict[str, TaskManager]:
    """For each of ``names`` the index that has it, local ones first; nothing is downloaded.

    Raises:
        ValueError: no name, a duplicate, or a task that neither lm-eval nor ``include_path`` has.
    """
    if not names or len(set(names)) != len(names):
        raise ValueError(f"tasks must be one or more different names, not {list(names)}")
    with quiet():
        local = TaskManager(include_path=str(include_path), include_defaults=False) if include_path else None
        found = {name: local for name in names if local is not None and name in local.all_subtasks}
        if len(found) < len(names):
            found |= own_tasks([name for name in names if name not in found])
    unknown = [name for name in names if name not in found]
    if unknown:
        place = include_path or "a local folder"
        raise ValueError(f"unknown task {', '.join(unknown)}: neither in lm-eval nor in {place}")
    return {name: found[name] for name in names}


def check_tokenizer(tokenizer: Any, model: str) -> None:
    """Refuse a tokenizer without any token to put before a text: lm-eval cannot score the first one without.

    Raises:
        ValueError: it has neither a bos nor an eos.
    """
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {model} has neither a bos nor an eos token: lm-eval needs one of them")


def load_tasks(
    names: Sequence[str],
    include_path: str | Path | None = None,
    data_folder: str | Path | None = None,
    metric: str = METRIC,
) -> Tasks:
    """Task objects, with their data, of lm-eval's own tasks or of YAML files under ``include_path``.

    They are 0-shot unless they say themselves how many examples a prompt has.

    Args:
        names: of the tasks.
        include_path: folder of YAML tasks.
        data_folder: data sets of the hub are read from there and nothing is downloaded (see `cats.task_data`).
        metric: that every task must have: ``acc``, or ``exact_match`` for `cats.generated_answers`.

    Raises:
        ValueError: an unknown task, or one without that metric.
        OSError: a task's data cannot be loaded (hub out of reach, missing file or set) or do not fit it.
    """
    tasks: dict[str, Task] = {}
    for name, manager in check_tasks(names, include_path).items():
        with local_sets(Path(data_folder) if data_folder is not None else None) as sets:
            try:
                with quiet():
                    loaded = manager.load([name])["tasks"]
                for task in loaded.values():
                    check_answer(task)
            except Exception as error:
                raise OSError(f"task {name} cannot be loaded: {sets.explain(error)}") from error
        tasks |= loaded
    for name, task in tasks.items():
        if metric not in task.aggregation():
            raise ValueError(f"task {name} has no metric {metric}: only {KINDS[metric]} tasks can be used")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return Tasks(tasks)


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    tasks: Tasks | Sequence[str],
    limit: int | None = None,
    batch_size: int = 16,
    include_path: str | Path | None = None,
) -> list[TaskResult]:
    """Accuracy of ``model``, patched or not, on every task.

    Calls `lm_eval.evaluate` rather than `simple_evaluate`, which adds a description of the machine to every result and
    needs seconds for that alone. The model's mode and the global random states are as before afterwards.

    Args:
        model: a causal language model, perhaps inside peft.
        tokenizer: its Hugging Face tokenizer.
        tasks: names, or what `load_tasks` made of them (quicker when evaluating again).
        limit: only the first so many items of each task.
        batch_size: sequences of the longest item a forward pass; of shorter ones as many more as have its tokens.
        include_path: folder of YAML tasks, when ``tasks`` are names.

    Raises:
        ValueError, OSError: as `load_tasks`; ``limit`` below 2 (a standard error needs two items).
    """
    if not isinstance(tasks, Tasks):
        tasks = load_tasks(tasks, include_path)
    return run_tasks(model, tokenizer, tasks, limit, batch_size, _results)


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Tasks,
    limit: int | None,
    batch_size: int,
    read: Callable[[Sequence[str], Any], list[T]],
) -> list[T]:
    """What ``read(names, found)`` makes of what `lm_eval.evaluate` returns, the same on every process.

    Raises:
        ValueError: ``limit`` below 2.
    """
    if limit is not None and limit < 2:
        raise ValueError(f"limit must be at least 2 items, not {limit}")
    states = random.getstate(), np.random.get_state()
    try:
        with quiet(), templates_compiled_once(), eval_mode(model):
            cache = tasks.encodings.setdefault(tokenizer, {})
            language_model = LanguageModel(model, tokenizer, batch_size, cache)
            for task in tasks.values():
                task.set_fewshot_seed(SEED)
            found = lm_eval.evaluate(language_model, {"tasks": dict(tasks)}, limit=limit, bootstrap_iters=100)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    # lm-eval returns a result on the first process only
    results = [read(list(tasks), found) if found else None]
    if language_model.world_size > 1:
        broadcast_object_list(results)
    assert results[0] is not None
    return results[0]


def _results(names: Sequence[str], found: Any) -> list[TaskResult]:
    return [_result(name, found) for name in names]


def _result(name: str, found: Any) -> TaskResult:
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    correct = tuple(float(sample[METRIC]) for sample in samples)
    scores = found["results"][name]
    chance = fmean(1 / len(sample["filtered_resps"]) for sample in samples)
    accuracy, stderr = float(scores[f"{METRIC},none"]), float(scores[f"{METRIC}_stderr,none"])
    return TaskResult(name, accuracy, stderr, len(correct), chance, correct)


def paired_difference(result: TaskResult, base: TaskResult) -> tuple[float, float]:
    """Accuracy of ``result`` minus that of ``base`` on the same items, and its standard error (paired, n - 1).

    Raises:
        ValueError: the two are not of the same items.
    """
    if (result.task, result.items) != (base.task, base.items):
        raise ValueError(
            f"{result.items} items of {result.task} cannot be paired with {base.items} items of {base.task}"
        )
    differences = [a - b for a, b in zip(result.correct, base.correct, strict=True)]
    return fmean(differences), stdev(differences) / math.sqrt(len(differences))
