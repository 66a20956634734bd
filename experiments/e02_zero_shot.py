"""Table 1: zero-shot accuracy of the dense model, CATS-50, -70, -90 and ReLUfication, without fine-tuning.

Beyond the paper: CATS at the sparsity that ReLUfication itself has, paired differences from the dense model on the same
items, and perplexity on held-out text. The model is patched once; from level to level only its thresholds change.
Cost: six evaluations of the tasks; a few minutes for the pocket model on two cores, about an hour for a 7B model on
one H200.

    nox -s experiment -- e02 --model PATH_OR_HUB_ID
    accelerate launch --num_processes 8 -m experiments run e02 --profile paper      # items split over 8 GPUs
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, TypeVar

import torch

import cats
from cats.calibration import Thresholds
from cats.evaluation import TaskResult, paired_difference, perplexity
from experiments.framework.config import Config
from experiments.framework.results import Row
from experiments.framework.subject import (
    DENSE,
    RELUFICATION,
    Subject,
    Variant,
    cats_variant,
    check,
    mean,
    put,
    read_results,
    save_results,
)

HIGHEST_MATCH = 0.999
"""Above this sparsity a quantile rests on too few activations: CATS is then matched at this one instead."""


@dataclass(frozen=True)
class ZeroShotRow(Row):
    """One variant on one task (metric acc), or on the held-out text (metric perplexity)."""

    table: ClassVar[str] = "e02_zero_shot"
    model: str
    variant: str
    sparsity_target: float | None
    sparsity_measured: float | None
    task: str
    metric: str
    value: float
    stderr: float | None = None
    difference: float | None = None
    difference_stderr: float | None = None
    items: int | None = None
    chance: float | None = None


T = TypeVar("T", bound=ZeroShotRow)


def run(config: Config) -> Iterable[Row]:
    """Measure every variant of each model. Options: levels, and those of `Subject`."""
    levels = config.options["levels"]
    check(config, levels)
    for name in config.models:
        yield from measure_model(config, name, [cats_variant(level) for level in levels])


def measure_model(config: Config, name: str, levels: Sequence[Variant]) -> list[Row]:
    """All rows of one model. ReLUfication comes before CATS, whose matched level needs its sparsity."""
    subject = Subject(config, name)
    rows = {DENSE.name: measure(subject, DENSE), RELUFICATION.name: measure(subject, RELUFICATION)}
    measured = rows[RELUFICATION.name][0].sparsity_measured
    assert measured is not None
    matched = Variant("cats-matched", min(measured, HIGHEST_MATCH))
    if measured > HIGHEST_MATCH:
        config.notes[f"{name}/cats-matched"] = (
            f"ReLUfication is {measured:.5f} sparse; CATS is matched at {HIGHEST_MATCH}"
        )
    everything = [*levels, matched]
    for variant in config.progress(everything, name, len(everything)):
        rows[variant.name] = measure(subject, variant, everything)
    order = [DENSE, *levels, RELUFICATION, matched]
    return [row for variant in order for row in rows[variant.name]]


def measure(subject: Subject, variant: Variant, calibrated: Sequence[Variant] = ()) -> list[ZeroShotRow]:
    """Rows of one variant: a unit of work of its own. ``calibrated``: all levels that one pass should serve."""
    key = f"{subject.name}/{variant.name}"
    rows = subject.config.unit(key, partial(_measure, subject, variant, calibrated), (ZeroShotRow,))
    return [row for row in rows if isinstance(row, ZeroShotRow)]


def _measure(subject: Subject, variant: Variant, calibrated: Sequence[Variant]) -> list[Row]:
    thresholds: Thresholds | None = None
    if variant.sparsity is not None:
        thresholds = subject.thresholds(calibrated)[variant]
    put(subject.model, variant, thresholds)
    rows: list[Row] = [*zero_shot_rows(subject, variant, ZeroShotRow)]
    return rows


def zero_shot_rows(subject: Subject, variant: Variant, row: type[T], model: torch.nn.Module | None = None) -> list[T]:
    """Evaluate the model as it is now; differences are from the dense results that the dense variant left behind."""
    model = model or subject.model
    dense_file = subject.config.workdir(f"{subject.name}/dense results") / "results.json"
    measured = mean(list(cats.measure_sparsity(model, subject.heldout).values()))
    results = subject.evaluate(model)
    if variant == DENSE:
        save_results(dense_file, results)
    pairs = [paired_difference(a, b) for a, b in zip(results, read_results(dense_file), strict=True)]
    start = (subject.name, variant.name, variant.sparsity, measured)
    rows = [
        row(*start, *_scores(result), *pair, result.items, result.chance)
        for result, pair in zip(results, pairs, strict=True)
    ]
    value = perplexity(model, subject.heldout)
    if not math.isfinite(value):
        raise ValueError(f"perplexity of {variant.name} on held-out text is {value}: the model is broken in this dtype")
    return [*rows, row(*start, "heldout_text", "perplexity", value)]


def _scores(result: TaskResult) -> tuple[str, str, float, float]:
    return result.task, "acc", result.accuracy, result.stderr
