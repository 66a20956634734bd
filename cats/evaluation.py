"""Accuracy through lm-eval as a library (its own requests, `acc` and standard errors), and perplexity.

    tasks = load_tasks(["arc_easy", "piqa"])
    results = evaluate(model, tokenizer, tasks, limit=100)

Under `accelerate launch` the items are split among the processes, and every process returns the whole result.
"""

import contextlib
import logging
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cats.devices import execution_device
from cats.extras import missing
from cats.progress import ItemsDone
from cats.request_scores import Score, batches_of, inputs_of, output_matrix, score_batch
from cats.task_data import check_answer, local_sets

try:
    import accelerate
    import datasets
    import lm_eval
    import lm_eval.utils
    from accelerate.utils import broadcast_object_list, gather, reduce
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise missing(__name__, "experiments", error) from error

LOG = logging.getLogger(__name__)
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


LOGITS_BYTES = 2**31
"""Of logits in float32 at once: 64 x 1024 tokens can take 64 GB."""


class _LanguageModel(HFLM):
    """HFLM around a model object that also splits items among accelerate's processes (HFLM does so only for hub ids).

    Encodings are remembered in ``cache``: fine-tuning asks for the same items at every evaluated step.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int, cache: dict[str, list[int]]) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.state = accelerate.PartialState()
        self.cache = cache

    @property
    def rank(self) -> int:
        return self.state.process_index

    @property
    def world_size(self) -> int:
        return self.state.num_processes

    def all_gather(self, tensor: Tensor) -> Tensor:
        return gather(tensor.reshape(1)).reshape(-1)

    def barrier(self) -> None:
        self.state.wait_for_everyone()

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self._show_progress(requests)
        return super().loglikelihood(requests, disable_tqdm)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self._show_progress(requests)
        return super().generate_until(requests, disable_tqdm)

    def _show_progress(self, requests: Any) -> None:
        if self.rank == 0:
            self.set_cache_hook(ItemsDone(requests))

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        head = output_matrix(self.model)
        if head is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        longer = sum(len(context) + len(end) > self.max_length + 1 for _, context, end in requests)
        if longer:
            LOG.warning(
                f"{longer} of {len(requests)} requests are longer than the model's {self.max_length} positions: "
                "their beginning is cut off"
            )
        scores: list[Score] = [(0.0, False)] * len(requests)
        most_scored = max(1, LOGITS_BYTES // (4 * _vocabulary(self.model)))
        for batch in batches_of(inputs_of(requests, self.max_length), self.batch_size, most_scored):
            numbers = [number for one in batch for number, _ in one.requests]
            for number, score in zip(numbers, score_batch(self._model_call, head, batch, self.device), strict=True):
                scores[number] = score
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], score)
        return scores

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        if args or kwargs:
            return super().tok_encode(string, *args, **kwargs)
        if string not in self.cache:
            self.cache[string] = super().tok_encode(string)
        return self.cache[string]


class Tasks(dict[str, Task]):
    """lm-eval task objects by name, built once and evaluated often; ``encodings`` holds a tokenizer's work on them."""

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        super().__init__(tasks)
        self.encodings: WeakKeyDictionary[Any, dict[str, list[int]]] = WeakKeyDictionary()


NOISE = ("`pretrained` model kwarg is not of type `str`", "Passed an already-initialized model")
"""Beginnings of warnings of lm-eval's about every model that is given as an object, as all are here."""


def _no_noise(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NOISE)


def _without_bar(*args: Any, **kwargs: Any) -> Any:
    return tqdm(*args, **{**kwargs, "disable": True})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of lm-eval and datasets, no announcements of lm-eval: all other warnings are shown."""
    logger, noisy = logging.getLogger("lm_eval"), logging.getLogger("lm_eval.models.huggingface")
    level, bars = logger.level, not datasets.are_progress_bars_disabled()
    modules: Any = [m for name, m in sys.modules.items() if name.startswith("lm_eval.") and hasattr(m, "tqdm")]
    names = [(module, module.tqdm) for module in modules if module.tqdm is tqdm]
    logger.setLevel(logging.WARNING)
    noisy.addFilter(_no_noise)
    datasets.disable_progress_bars()
    for module, _ in names:
        module.tqdm = _without_bar
    try:
        yield
    finally:
        for module, original in names:
            module.tqdm = original
        if bars:
            datasets.enable_progress_bars()
        noisy.removeFilter(_no_noise)
        logger.setLevel(level)


@contextlib.contextmanager
def _templates_compiled_once() -> Iterator[None]:
    """Let lm-eval compile each template of a task once, where it does so three times an item: most of its own time."""
    environment: Any = lm_eval.utils.env
    environment.from_string = lru_cache(maxsize=None)(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string


@lru_cache(maxsize=1)
def _own_tasks() -> TaskManager:
    """lm-eval's index of its own tasks: thousands of YAML files, about ten seconds."""
    return TaskManager()


def check_tasks(names: Sequence[str], include_path: str | Path | None = None) -> dict[str, TaskManager]:
    """For each of ``names`` the index that has it, local ones first; nothing is downloaded.

    Raises:
        ValueError: no name, a duplicate, or a task that neither lm-eval nor ``include_path`` has.
    """
    if not names or len(set(names)) != len(names):
        raise ValueError(f"tasks must be one or more different names, not {list(names)}")
    with _quiet():
        local = TaskManager(include_path=str(include_path), include_defaults=False) if include_path else None
        found = {name: local for name in names if local is not None and name in local.all_subtasks}
        if len(found) < len(names):
            found |= {name: _own_tasks() for name in names if name not in found and name in _own_tasks().all_subtasks}
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
                with _quiet():
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
    training = model.training
    states = random.getstate(), np.random.get_state()
    try:
        with _quiet(), _templates_compiled_once():
            cache = tasks.encodings.setdefault(tokenizer, {})
            language_model = _LanguageModel(model, tokenizer, batch_size, cache)
            for task in tasks.values():
                task.set_fewshot_seed(SEED)
            found = lm_eval.evaluate(language_model, {"tasks": dict(tasks)}, limit=limit, bootstrap_iters=100)
    finally:
        model.train(training)
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


def perplexity(model: nn.Module, blocks: Iterable[Tensor]) -> float:
    """exp of the mean negative log-likelihood, in nats, of every token of ``blocks`` but the first of each sequence.

    Args:
        model, blocks: as `block_losses`.

    Raises:
        ValueError: no block of at least two tokens.
    """
    blocks = list(blocks)
    tokens = [block.shape[-1] - 1 for block in blocks for _ in range(len(block)) if block.shape[-1] > 1]
    losses = block_losses(model, blocks)
    return math.exp(sum(loss * n for loss, n in zip(losses, tokens, strict=True)) / sum(tokens))


def sequences_at_once(model: nn.Module, length: int) -> int:
    """How many sequences a forward pass may take so that their logits in float32 stay below `LOGITS_BYTES`."""
    return int(max(1, LOGITS_BYTES // (4 * length * _vocabulary(model))))


def _vocabulary(model: nn.Module) -> int:
    return getattr(getattr(model, "config", None), "vocab_size", None) or 2**18


def _losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean over each sequence of ids (batch, length), float64 on the CPU."""
    logits = model(ids, use_cache=False).logits[:, :-1].float()
    nats = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return nats.view(len(ids), -1).double().mean(1).cpu()


@torch.no_grad()
def block_losses(model: nn.Module, blocks: Iterable[Tensor]) -> list[float]:
    """Mean negative log-likelihood of each sequence, in nats per token, of every token but its first.

    Args:
        model: a causal language model; its mode is restored.
        blocks: token ids (batch, length) without padding, the same on every process; processes share the work.

    Returns:
        One number for each sequence of at least two tokens, in order.

    Raises:
        ValueError: there is none.
    """
    state, training, device = accelerate.PartialState(), model.training, execution_device(model)
    losses: list[Tensor] = []
    model.eval()
    try:
        for index, block in enumerate(block for block in blocks if block.shape[-1] > 1):
            if index % state.num_processes != state.process_index:
                losses.append(torch.zeros(len(block), dtype=torch.float64))
                continue
            losses += [_losses(model, ids) for ids in block.to(device).split(sequences_at_once(model, block.shape[1]))]
    finally:
        model.train(training)
    if not losses:
        raise ValueError("no text to measure perplexity on: give at least one block of two tokens")
    total = torch.cat(losses)
    if state.num_processes > 1:
        total = reduce(total.to(state.device), reduction="sum").cpu()
    return [float(loss) for loss in total]
