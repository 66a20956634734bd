"""Which criterion keeps the most quality at the same bytes: every criterion of `cats.criteria` on the same model.

Purpose: the printed comparisons of training-free criteria contradict each other. Here all of them run as masks,
compared in float32, on the same model, text and tasks, at levels that read the same bytes per token: neuron criteria at
k, input criteria (teal, wina) at 2k/3 of the MLPs' inputs, and once more over attention and MLPs at the bytes of the
model. Random is the floor and oracle the ceiling. What is skipped is measured on held-out text; a row whose sparsity
misses its target by more than a point says so (``on_target``). Differences from the dense model and from cats are
paired.
Cost: one calibration per family of criteria whatever the number of levels, then a pass over the held-out text and an
evaluation of the tasks per criterion and level; a minute for the pocket model on two cores without tasks.

    nox -s experiment -- e08 --model PATH_OR_HUB_ID
    nox -s experiment -- e08 --set 'e08.criteria=["cats", "up-norm", "auto"]' --set 'e08.tasks=["arc_easy", "boolq"]'
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Annotated, Any

import torch
from torch import Tensor

import cats
from cats.calibration import Thresholds
from cats.criteria import get, names
from cats.devices import execution_device
from experiments.e08_criteria.cases import DENSE_CASE, Case, Weights, cases, skips_inputs
from experiments.e08_criteria.heldout import losses_and_skipped
from experiments.framework.common_options import EvaluationOptions
from experiments.framework.config import Config
from experiments.framework.cost import FORWARD, Cost, evaluation_tokens, memory_per_parameter
from experiments.framework.options import MayBeEmpty, OneOf, Sparsity
from experiments.framework.subject import Subject, check, check_models, mean
from experiments.framework.tables import CriterionRow, CriterionSample, CriterionTextSample, Row
from experiments.framework.zero_shot import Measurement, Samples

ROWS = (CriterionRow, CriterionSample, CriterionTextSample)
TOLERANCE = 0.01
"""Of the measured sparsity, for a row to count as one at its target."""
CALIBRATION_PASSES = 12
"""Two for neuron criteria, one or two for inputs in each scope, and what `auto` computes beyond a pass or two."""


@dataclass(frozen=True, kw_only=True)
class Options(EvaluationOptions):
    """Options of e08.

    Attributes:
        criteria: names in `cats.criteria`; all of them by default.
        levels: k of the neuron criteria; the others are measured at as many bytes.
        tasks: may be empty: perplexity alone.
    """

    criteria: tuple[Annotated[str, OneOf(names)], ...] = field(default_factory=names)
    levels: tuple[Sparsity, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    tasks: Annotated[tuple[str, ...], MayBeEmpty()] = ()

    def cases(self) -> list[Case]:
        """Dense first, then cats, then the others."""
        return cases(self.criteria, self.levels)


def run(config: Config[Options]) -> Iterable[Row]:
    """Measure every criterion at every level on each model."""
    if config.options.tasks:
        check(config)
    check_models(config)
    for name in config.models:
        yield from measure_model(config, name)


def cost(config: Config[Options]) -> Cost:
    """A pass over the held-out text and the tasks per case, and calibration."""
    options = config.options
    each = evaluation_tokens(options.tasks, options.limit) + options.length * options.heldout_blocks
    calibration = CALIBRATION_PASSES * options.length * options.calibration_blocks
    flops = FORWARD * (len(options.cases()) * each + calibration)
    return Cost(flops=flops, memory=memory_per_parameter([config.dtype]))


def measure_model(config: Config[Options], name: str) -> list[Row]:
    """All rows of one model; a case is a unit of work of its own."""
    subject, every = Comparison(config, name), config.options.cases()
    rows: list[Row] = []
    samples: dict[Case, Samples] = {}
    for case in config.progress(every, name, len(every)):
        dense = samples.get(DENSE_CASE)
        versus = samples.get(Case("cats", level=case.level)) if case.level is not None else None
        own = config.unit(f"{name}/{case.key}", partial(measure, subject, case, dense, versus), ROWS)
        if case == DENSE_CASE or case.criterion == "cats":
            samples[case] = Samples.of(own)
        rows += own
    return rows


class Comparison(Subject):
    """A `Subject` with the thresholds of every case."""

    def __init__(self, config: Config[Any], name: str) -> None:
        super().__init__(config, name)
        self._made: dict[Case, Thresholds] = {}

    @cached_property
    def weights(self) -> Weights:
        return Weights(self.model)

    @cached_property
    def heldout_on_device(self) -> list[Tensor]:
        """The held-out text where the model is."""
        return [ids.to(execution_device(self.model)) for ids in self.heldout]

    def thresholds_of(self, case: Case) -> Thresholds:
        """One calibration of the dense model serves all criteria of a family and all their levels."""
        if case not in self._made:
            family = [other for other in self.config.options.cases() if _family(other) == _family(case)]
            targets = sorted({other.target(self.weights) for other in family})
            criteria = list(dict.fromkeys(other.criterion for other in family))
            cats.remove(self.model)
            sites = case.sites if skips_inputs(case.criterion) else None
            made = cats.calibrate(self.model, self.calibration, targets, sites, criteria)
            self._made |= {other: made[other.criterion][other.target(self.weights)] for other in family}
        return self._made[case]


def _family(case: Case) -> tuple[object, ...]:
    """Cases that share it share a calibration: criteria of one kind and scope; each that searches is alone."""
    if case == DENSE_CASE:
        return (case.criterion,)
    own = case.criterion if get(case.criterion).searches else ""
    return (skips_inputs(case.criterion), case.scope, own)


def measure(subject: Comparison, case: Case, dense: Samples | None, versus: Samples | None) -> list[Row]:
    """Rows of one case.

    Args:
        dense: samples of the dense model; None where the case is that.
        versus: samples of cats at as many bytes; None where there are none.
    """
    model, config = subject.model, subject.config
    thresholds = subject.thresholds_of(case) if case != DENSE_CASE else None
    cats.remove(model)
    if thresholds is not None:
        cats.apply(model, thresholds, kernel="reference")
    torch.manual_seed(config.seed)  # of criteria that draw at random
    losses, skipped = losses_and_skipped(model, subject.heldout_on_device)
    if not math.isfinite(mean(losses)):
        raise ValueError(
            f"the loss of {case.key} on held-out text is {mean(losses)}: the model is broken in this dtype"
        )
    results = subject.evaluate(model) if config.options.tasks else []
    measurement = Measurement(0.0, results, losses, config.options.length)
    return _rows(subject, case, measurement, skipped, dense, versus)


def _rows(
    subject: Comparison,
    case: Case,
    measurement: Measurement,
    skipped: dict[str, float],
    dense: Samples | None,
    versus: Samples | None,
) -> list[Row]:
    read, samples = subject.weights.read(case, skipped), measurement.samples()
    who: dict[str, Any] = {
        "model": subject.name, "criterion": case.criterion, "variant": case.variant, "scope": case.scope,
    }  # fmt: skip
    if case.criterion == "cats":
        versus = samples
    on_target = None
    if case.level is not None and read.sparsity_measured is not None:
        on_target = abs(read.sparsity_measured - case.level) <= TOLERANCE
    rows: list[Row] = [
        CriterionRow(
            **who,
            path="dense" if case == DENSE_CASE else "dense masked",
            sparsity_target=case.level,
            on_target=on_target,
            **vars(read),
            **columns,
            **against,
        )
        for columns, against in zip(
            measurement.scores(dense or samples), _against_cats(measurement, versus), strict=True
        )
    ]
    rows += [CriterionSample(**who, task=task, correct=correct) for task, correct in samples.correct.items()]
    return [*rows, CriterionTextSample(**who, tokens_per_block=measurement.tokens_per_block, nats=samples.nats)]


def _against_cats(measurement: Measurement, versus: Samples | None) -> Sequence[dict[str, Any]]:
    """The columns cats_difference and cats_difference_stderr of each row; empty without cats."""
    if versus is None:
        return [{}] * (len(measurement.results) + 1)
    return [
        {"cats_difference": columns["difference"], "cats_difference_stderr": columns["difference_stderr"]}
        for columns in measurement.scores(versus)
    ]
