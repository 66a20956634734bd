"""e09: perplexity and tasks of one model over formats and levels of one criterion."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import cats
from cats.calibration import Thresholds
from cats.devices import execution_device
from cats.sparsity import overall_sparsity
from experiments.e08_criteria.cases import SAVED
from experiments.e08_criteria.heldout import losses_and_skipped
from experiments.e09_quantization.formats import PLAIN, Format, QuantizedLinears, format_of
from experiments.framework.config import Config
from experiments.framework.subject import Subject, mean
from experiments.framework.tables import QuantizationRow, QuantizationSample, QuantizationTextSample, Row
from experiments.framework.variants import DENSE
from experiments.framework.zero_shot import Measurement, Samples

ROWS = (QuantizationRow, QuantizationSample, QuantizationTextSample)


@dataclass(frozen=True)
class Case:
    """One format at one level of a criterion; no level: dense."""

    format: Format
    criterion: str = DENSE.criterion
    level: float | None = None

    @property
    def variant(self) -> str:
        """As result files hold it: ``cats-50``."""
        return self.criterion if self.level is None else f"{self.criterion}-{100 * self.level:g}"

    @property
    def key(self) -> str:
        """Unique within a model."""
        return f"{self.format.name}/{self.variant}"

    @property
    def columns(self) -> dict[str, Any]:
        """Those that name it in the samples."""
        return {"format": self.format.name, "criterion": self.criterion, "variant": self.variant}


def cases(formats: Sequence[str], criterion: str, levels: Sequence[float]) -> list[Case]:
    """Unquantised first, and of each format dense first: what the others are paired with."""
    made = []
    for name in (PLAIN, *formats):
        form = format_of(name)
        made += [Case(form), *(Case(form, criterion, level) for level in levels)]
    return made


class QuantizedSubject(Subject):
    """A `Subject` whose MLPs can be rounded to a format, and its thresholds in each."""

    def __init__(self, config: Config[Any], name: str) -> None:
        super().__init__(config, name)
        self._format: Format | None = None
        self._made: dict[Format, dict[float, Thresholds]] = {}

    @cached_property
    def linears(self) -> QuantizedLinears:
        return QuantizedLinears(self.model)

    @cached_property
    def heldout_on_device(self) -> list[Tensor]:
        """The held-out text where the model is."""
        return [ids.to(execution_device(self.model)) for ids in self.heldout]

    def round_to(self, form: Format) -> None:
        """Make the model the dense one of this format."""
        cats.remove(self.model)
        if form != self._format:
            self.linears.round_to(form)
            self._format = form

    def make(self, case: Case) -> None:
        """Make the model this case's; one calibration of the quantised model serves all levels."""
        self.round_to(case.format)
        if case.level is None:
            return
        if case.format not in self._made:
            levels, criterion = self.config.options.levels, case.criterion
            made = cats.calibrate(self.model, self.calibration, list(levels), None, [criterion])
            self._made[case.format] = made[criterion]
        cats.apply(self.model, self._made[case.format][case.level], kernel="reference")


def measure(subject: QuantizedSubject, case: Case, plain: Samples | None, dense: Samples | None) -> list[Row]:
    """Rows of one case.

    Args:
        plain: samples of the unquantised dense model; None where the case is that.
        dense: samples of the dense model of the case's format; None where the case is that.
    """
    subject.make(case)
    torch.manual_seed(subject.config.seed)
    losses, skipped = losses_and_skipped(subject.model, subject.heldout_on_device)
    if not math.isfinite(mean(losses)):
        raise ValueError(f"the loss of {case.key} on held-out text is {mean(losses)}: the model is broken in this form")
    results = subject.evaluate(subject.model) if subject.config.options.tasks else []
    measurement = Measurement(0.0, results, losses, subject.config.options.length)
    samples = measurement.samples()
    stored, unquantised = (sum(of.values()) for of in (subject.linears.stored, subject.linears.plain_bytes))
    sparsity = overall_sparsity(subject.model, skipped) if skipped else None
    memory = stored / unquantised
    against = measurement.scores(dense or samples)
    rows: list[Row] = [
        QuantizationRow(
            model=subject.name,
            **case.format.columns,
            criterion=case.criterion,
            variant=case.variant,
            path="dense" if case.level is None else "dense masked",
            sparsity_target=case.level,
            sparsity_measured=sparsity,
            mlp_bytes=memory * (1 - SAVED * (sparsity or 0.0)),
            mlp_memory=memory,
            **columns,
            format_difference=of_format["difference"],
            format_difference_stderr=of_format["difference_stderr"],
        )
        for columns, of_format in zip(measurement.scores(plain or samples), against, strict=True)
    ]
    who = {"model": subject.name, **case.columns}
    rows += [QuantizationSample(**who, task=task, correct=correct) for task, correct in samples.correct.items()]
    return [*rows, QuantizationTextSample(**who, tokens_per_block=measurement.tokens_per_block, nats=samples.nats)]
