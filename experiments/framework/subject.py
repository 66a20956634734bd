"""What the accuracy experiments share: a model with its tasks and texts, and checks before any long work."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import cats
from cats.calibration import Thresholds
from cats.evaluation import TaskResult, Tasks, check_tasks, check_tokenizer, evaluate, load_tasks
from cats.finetuning import TrainSettings
from cats.models import load_config, load_model, load_tokenizer
from cats.observe import observe
from experiments import data
from experiments.data import batches, check_text
from experiments.framework.config import Config
from experiments.framework.identity import task_identity, text_identity
from experiments.framework.parent import PARENT
from experiments.framework.variants import ALL_SITES, DENSE, RELUFICATION, Variant, make
from experiments.framework.workers import is_worker

SWEEP_SEED = 1000  # of short runs that choose a learning rate; the measured runs' seeds are others


class Subject:
    """One model with its tasks and texts, each loaded when it is first needed: resuming a finished unit needs none.

    The options are `experiments.framework.common_options.EvaluationOptions`, for `settings` also ``TrainingOptions``.
    """

    def __init__(self, config: Config[Any], name: str) -> None:
        self.config, self.name = config, name
        self._thresholds: dict[Variant, Thresholds] = {}

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        state = accelerate.PartialState()
        device = str(state.device) if state.num_processes > 1 else self.config.device
        model, tokenizer = load_model(self.name, self.config.dtype, device)
        assert tokenizer is not None  # check() refuses models without one
        self.config.identify(self.name)
        self.config.identify_data("text", text_identity(self.config.data))
        return model, tokenizer

    @property
    def model(self) -> PreTrainedModel:
        return self._loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._loaded[1]

    def columns(self, v: Variant) -> dict[str, Any]:
        """Those that every row about a variant of this model has: model, criterion, variant."""
        return {"model": self.name, "criterion": v.criterion, "variant": v.name}

    def folder(self) -> Path | None:
        """Where local YAML tasks are."""
        return task_folder(self.config)

    @cached_property
    def tasks(self) -> Tasks:
        folder = self.config.data.get("folder")
        tasks = load_tasks(self.config.options.tasks, self.folder(), folder)
        for name, task in tasks.items():
            self.config.identify_data(f"task {name}", task_identity(task, folder))
        return tasks

    def text(self, purpose: str, blocks: int) -> list[Tensor]:
        """Batches of token ids for ``train`` or ``heldout``."""
        options = self.config.options
        return batches(self.config, self.tokenizer, purpose, blocks, options.length, options.batch_size)

    @cached_property
    def calibration(self) -> list[Tensor]:
        return self.text("train", self.config.options.calibration_blocks)

    @cached_property
    def heldout(self) -> list[Tensor]:
        return self.text("heldout", self.config.options.heldout_blocks)

    def thresholds(self, variants: Sequence[Variant]) -> dict[Variant, Thresholds]:
        """Thresholds of the dense model for all ``variants`` that have some, in one calibration per choice of sites,
        whatever the number of levels and criteria."""
        missing = [v for v in variants if v not in (DENSE, RELUFICATION, *self._thresholds)]
        for sites in dict.fromkeys(v.sites for v in missing):
            group = [v for v in missing if v.sites == sites]
            targets, names = sorted({v.sparsity or 0.0 for v in group}), sorted({v.criterion for v in group})
            make(self.model, DENSE)
            made = cats.calibrate(self.model, self.calibration, targets, sites or None, names)
            self._thresholds |= {v: made[v.criterion][v.sparsity or 0.0] for v in group}
        return {v: self._thresholds[v] for v in variants if v in self._thresholds}

    def settings(self, steps: int, learning_rate: float, seed: int) -> TrainSettings:
        """Hyper-parameters that all variants share, but for the rate."""
        options = self.config.options
        return TrainSettings(
            steps,
            options.train_batch_size,
            learning_rate,
            options.weight_decay,
            options.warmup_steps,
            options.micro_batch_size,
            seed,
        )

    def evaluate(self, model: torch.nn.Module | None = None) -> list[TaskResult]:
        """Accuracy of the model as it is now on the tasks of the options."""
        options = self.config.options
        return evaluate(model or self.model, self.tokenizer, self.tasks, options.limit, options.batch_size)


def mean(values: Iterable[float]) -> float:
    """Plain mean."""
    values = list(values)
    return sum(values) / len(values)


def is_pocket(config: Config[Any]) -> bool:
    """Whether tasks and text are those made from the standard library."""
    return config.data.get("source", "pocket") == "pocket"


def task_folder(config: Config[Any]) -> Path | None:
    """Folder of local YAML tasks: option include_path, or built from the standard library for pocket, else none."""
    if config.options.include_path is not None:
        return Path(config.options.include_path)
    if not is_pocket(config):
        return None
    from experiments.pocket.tasks import build_tasks

    return build_once(build_tasks, config.output / "tasks")


def build_once(build: Callable[[Path], object], folder: Path) -> Path:
    """Let one process per machine build ``folder`` while the others wait; returns it."""
    state = accelerate.PartialState()
    if state.is_local_main_process:
        build(folder)
    state.wait_for_everyone()
    return folder


def check(config: Config[Any], folder: Callable[[Config[Any]], Path | None] = task_folder) -> None:
    """Refuse what cannot work before any long work starts.

    Raises:
        ValueError: as `check_models`, or an unknown task.
        OSError: a model's configuration cannot be read.
    """
    if is_worker() or config.finished_only:  # the run that started it has checked; or nothing will be computed
        return
    check_models(config)
    check_tasks(config.options.tasks, folder(config))
    for name in config.models:
        check_tokenizer(load_tokenizer(name), name)
    if "folder" in config.data:  # its sets are read at once, which takes seconds: the hub's would be downloaded
        load_tasks(config.options.tasks, folder(config), config.data["folder"])


def check_models(config: Config[Any]) -> None:
    """Refuse models that cannot work, from their configurations alone.

    Raises:
        ValueError: a model without gated MLPs or without a tokenizer.
        OSError: a model's configuration cannot be read.
    """
    if config.finished_only:
        return
    check_text(config.data)
    for name in config.models:
        if name.startswith("shape:"):
            raise ValueError(f"{config.experiment} needs real weights and a tokenizer, which {name} does not have")
        with torch.device("meta"):
            cats.gated_mlps(AutoModelForCausalLM.from_config(load_config(name)))


def check_length(config: Config[Any], counts: Mapping[str, int]) -> None:
    """Refuse a data folder whose text is too short, before any long work.

    Args:
        config: its options have the length of a block.
        counts: blocks asked for of each purpose, ``train`` and ``heldout``.

    Raises:
        ValueError: as `experiments.data.blocks`, for the first model that the text is too short for.
    """
    if config.finished_only or "folder" not in config.data or PARENT in os.environ:  # which has checked all of them
        return
    for name in config.models:
        tokenizer = load_tokenizer(name)
        if tokenizer is None:  # check_models() refuses it, in the experiment itself
            continue
        for purpose, count in counts.items():
            data.check_length(config.data, tokenizer, purpose, config.seed, count, config.options.length)


def fractions_below(
    model: torch.nn.Module, text: Iterable[Tensor], made: Mapping[float, Thresholds]
) -> dict[tuple[float, str, str], float]:
    """Fraction of values below their threshold, by (key of ``made``, site, layer), at each site that has thresholds."""
    below: Counter[tuple[float, str, str]] = Counter()
    counts: Counter[tuple[str, str]] = Counter()

    def record(site: str, layer: str, values: Tensor) -> None:
        magnitude = values.float().abs()
        counts[site, layer] += magnitude.numel()
        for key, thresholds in made.items():
            below[key, site, layer] += int((magnitude < getattr(thresholds, site)[layer]).sum())

    sites = [site for site in ALL_SITES if all(getattr(thresholds, site) for thresholds in made.values())]
    observe(model, text, record, sites)
    return {(key, site, layer): count / counts[site, layer] for (key, site, layer), count in below.items()}
