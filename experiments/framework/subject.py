"""What the accuracy experiments share: the variants, how to put one onto a model, and what to measure it with."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import accelerate
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import cats
from cats.calibration import Thresholds, check_sparsity
from cats.evaluation import TaskResult, Tasks, check_tasks, check_tokenizer, evaluate, load_tasks
from cats.finetuning import TrainSettings
from cats.models import load_config, load_model, load_tokenizer
from cats.observe import observe
from experiments.data import batches, check_text
from experiments.framework.config import Config
from experiments.framework.files import write_text_atomically
from experiments.framework.identity import task_identity, text_identity

SWEEP_SEED = 1000  # of short runs that choose a learning rate; the measured runs' seeds are others
ALL_SITES = ("gate", "attention_input", "mlp_input")


@dataclass(frozen=True)
class Variant:
    """One curve of a figure: the dense model, CATS at a target sparsity (of ``sites``), or ReLUfication."""

    name: str
    sparsity: float | None = None
    sites: tuple[str, ...] = ("gate",)

    @property
    def family(self) -> str:
        """``dense``, ``cats`` or ``relufication``: what shares a learning rate."""
        return self.name.split("-")[0]


DENSE, RELUFICATION = Variant("dense"), Variant("relufication")


def cats_variant(sparsity: float, sites: tuple[str, ...] = ("gate",)) -> Variant:
    """CATS-50 and so on. Raises ValueError for a sparsity outside [0, 1)."""
    check_sparsity(sparsity)
    return Variant(f"cats-{100 * sparsity:g}" + ("-attention" if sites == ALL_SITES else ""), sparsity, sites)


def put(model: torch.nn.Module, variant: Variant, thresholds: Thresholds | None = None) -> None:
    """Make ``model`` this variant, whatever it is now; from one CATS level to another only thresholds change.

    Accuracy is measured on the dense masked path, the one that training uses: lm-eval's batches are longer than the
    sparse kernel's limit in any case.
    """
    if variant.family != "cats":
        cats.remove(model)
        if variant == RELUFICATION:
            cats.relufy(model)
        return
    assert thresholds is not None
    cats.apply(model, thresholds, kernel="reference")


def mean(values: Sequence[float]) -> float:
    """Plain mean."""
    return sum(values) / len(values)


class Subject:
    """One model with its tasks and texts, each loaded when it is first needed: resuming a finished unit needs none.

    Options read: tasks, limit, batch_size, calibration_blocks, heldout_blocks, length.
    """

    def __init__(self, config: Config, name: str) -> None:
        self.config, self.name = config, name
        self._tuned: dict[tuple[float, tuple[str, ...]], Thresholds] = {}

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

    def folder(self) -> Path | None:
        """Where local YAML tasks are."""
        return task_folder(self.config)

    @cached_property
    def tasks(self) -> Tasks:
        folder = self.config.data.get("folder")
        tasks = load_tasks(self.config.options["tasks"], self.folder(), folder)
        for name, task in tasks.items():
            self.config.identify_data(f"task {name}", task_identity(task, folder))
        return tasks

    def text(self, purpose: str, blocks: int) -> list[Tensor]:
        """Batches of token ids for ``train`` or ``heldout``."""
        options = self.config.options
        return batches(self.config, self.tokenizer, purpose, blocks, options["length"], options["batch_size"])

    @cached_property
    def calibration(self) -> list[Tensor]:
        return self.text("train", self.config.options["calibration_blocks"])

    @cached_property
    def heldout(self) -> list[Tensor]:
        return self.text("heldout", self.config.options["heldout_blocks"])

    def thresholds(self, variants: Sequence[Variant]) -> dict[Variant, Thresholds]:
        """Thresholds of the dense model for all CATS ``variants``, in one pass over the calibration text."""
        missing = [v for v in variants if v.sparsity is not None and (v.sparsity, v.sites) not in self._tuned]
        for sites in {v.sites for v in missing}:
            targets = [v.sparsity for v in missing if v.sites == sites and v.sparsity is not None]
            put(self.model, DENSE)
            for target, thresholds in cats.calibrate(self.model, self.calibration, targets, sites).items():
                self._tuned[target, sites] = thresholds
        return {v: self._tuned[v.sparsity, v.sites] for v in variants if v.sparsity is not None}

    def settings(self, steps: int, learning_rate: float, seed: int) -> TrainSettings:
        """Hyper-parameters that all variants share, but for the rate.

        Options read: train_batch_size, micro_batch_size, weight_decay, warmup_steps.
        """
        options = self.config.options
        return TrainSettings(
            steps,
            options["train_batch_size"],
            learning_rate,
            options["weight_decay"],
            options["warmup_steps"],
            options.get("micro_batch_size"),
            seed,
        )

    def evaluate(self, model: torch.nn.Module | None = None) -> list[TaskResult]:
        """Accuracy of the model as it is now on the tasks of the options."""
        options = self.config.options
        return evaluate(model or self.model, self.tokenizer, self.tasks, options.get("limit"), options["batch_size"])


def save_results(path: Path, results: Sequence[TaskResult]) -> None:
    """Keep results with their item-by-item vectors, for differences taken after an interruption."""
    write_text_atomically(path, json.dumps([vars(result) for result in results]))


def read_results(path: Path) -> list[TaskResult]:
    """What `save_results` wrote."""
    return [TaskResult(**{**fields, "correct": tuple(fields["correct"])}) for fields in json.loads(path.read_text())]


def is_pocket(config: Config) -> bool:
    """Whether tasks and text are those made from the standard library."""
    return config.data.get("source", "pocket") == "pocket"


def task_folder(config: Config) -> Path | None:
    """Folder of local YAML tasks: option include_path, or built from the standard library for pocket, else none."""
    if "include_path" in config.options:
        return Path(config.options["include_path"])
    if not is_pocket(config):
        return None
    from experiments.pocket.tasks import build_tasks

    return build_once(build_tasks, config.output / "tasks")


def build_once(build: Callable[[Path], object], folder: Path) -> Path:
    """Let one process a machine build ``folder`` while the others wait; returns it."""
    state = accelerate.PartialState()
    if state.is_local_main_process:
        build(folder)
    state.wait_for_everyone()
    return folder


def check(config: Config, levels: Sequence[float], folder: Callable[[Config], Path | None] = task_folder) -> None:
    """Refuse what cannot work before any long work starts.

    Raises:
        ValueError: as `check_models`, no text, no task or an unknown one.
        OSError: a model's configuration cannot be read.
    """
    check_models(config, levels)
    for key in ("calibration_blocks", "heldout_blocks"):
        if config.options.get(key, 1) < 1:
            raise ValueError(
                f"{config.experiment}.{key} must be at least 1, not {config.options[key]}: there would be no text"
            )
    if not config.options.get("tasks"):
        raise ValueError(f"{config.experiment}.tasks is missing: give a list of lm-eval task names")
    check_tasks(config.options["tasks"], folder(config))
    for name in config.models:
        check_tokenizer(load_tokenizer(name), name)
    if "folder" in config.data:  # its sets are read at once, which takes seconds: the hub's would be downloaded
        load_tasks(config.options["tasks"], folder(config), config.data["folder"])


def check_models(config: Config, levels: Sequence[float]) -> None:
    """Refuse models and sparsities that cannot work, from the models' configurations alone.

    Raises:
        ValueError: a level outside [0, 1), a model without gated MLPs or without a tokenizer.
        OSError: a model's configuration cannot be read.
    """
    check_text(config.data)
    for level in levels:
        check_sparsity(level)
    for name in config.models:
        if name.startswith("shape:"):
            raise ValueError(f"{config.experiment} needs real weights and a tokenizer, which {name} does not have")
        with torch.device("meta"):
            cats.gated_mlps(AutoModelForCausalLM.from_config(load_config(name)))


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
