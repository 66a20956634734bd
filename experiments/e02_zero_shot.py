"""Table 1: zero-shot accuracy of the dense model, CATS-50, -70, -90 and ReLUfication, without fine-tuning.

Purpose: what each criterion costs in accuracy at each level. Beyond the paper: any other criterion of `cats.criteria`,
by name in the option ``criteria``; CATS at the sparsity that ReLUfication itself has; differences from the dense model
on the same items; and perplexity on held-out text, paired over its blocks. Every item and every block is kept.
Cost: an evaluation of the tasks for the dense model, ReLUfication, the matched level, and each criterion at each level;
two minutes for the pocket model on two cores, about an hour for a 7B model on one H200.

    nox -s experiment -- e02 --model PATH_OR_HUB_ID
    nox -s experiment -- e02 --set 'e02.criteria=["cats", "chess", "up-norm", "oracle"]'
    accelerate launch --num_processes 8 -m experiments run e02 --profile paper      # items split over 8 GPUs
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from cats.criteria import names
from experiments.framework.common_options import EvaluationOptions
from experiments.framework.config import Config
from experiments.framework.cost import Cost, evaluation, memory_per_parameter, text
from experiments.framework.options import OneOf
from experiments.framework.subject import Subject, check, check_length
from experiments.framework.tables import ItemSample, Row, TextSample, ZeroShotRow
from experiments.framework.variants import DENSE, RELUFICATION, Variant, make, variant
from experiments.framework.zero_shot import Samples, measure_as_is

HIGHEST_MATCH = 0.999
"""Above this sparsity a quantile rests on too few activations: CATS is then matched at this one instead."""
ROWS = (ZeroShotRow, ItemSample, TextSample)


@dataclass(frozen=True, kw_only=True)
class Options(EvaluationOptions):
    """Options of e02.

    Attributes:
        criteria: each is measured at each of ``levels``.
    """

    criteria: tuple[Annotated[str, OneOf(names)], ...] = ("cats",)

    def variants(self) -> list[Variant]:
        """Every criterion at every level; one that has no level once."""
        return list(dict.fromkeys(variant(name, level) for name in self.criteria for level in self.levels))


def text_blocks(config: Config[Options]) -> dict[str, int]:
    """Blocks of text that it needs of each purpose."""
    return {"train": config.options.calibration_blocks, "heldout": config.options.heldout_blocks}


def run(config: Config[Options]) -> Iterable[Row]:
    """Measure every variant of each model."""
    check(config)
    check_length(config, text_blocks(config))
    for name in config.models:
        yield from measure_model(config, name)


def cost(config: Config[Options]) -> Cost:
    """One evaluation per variant, and calibration."""
    options = config.options
    heldout = text(options.heldout_blocks, options.length, options.batch_size)
    each = evaluation(options.tasks, options.limit, options.batch_size) + heldout * 2
    # the matched level is calibrated once more
    calibration = text(options.calibration_blocks, options.length, options.batch_size) * 2
    return Cost(each * (len(options.variants()) + 3) + calibration, memory=memory_per_parameter([config.dtype]))


def measure_model(config: Config[Options], name: str) -> list[Row]:
    """All rows of one model. ReLUfication comes before CATS, whose matched level needs its sparsity."""
    subject, variants = Subject(config, name), config.options.variants()
    levels = [v for v in variants if v != RELUFICATION]
    matched: list[Variant] = []
    rows: dict[Variant, list[Row]] = {}

    def order() -> Iterator[Variant]:
        yield DENSE
        dense = Samples.of(rows[DENSE])
        config.compute_ahead(dict(job(subject, v, levels, dense) for v in (RELUFICATION, *levels)), ROWS)
        yield RELUFICATION
        if "cats" in config.options.criteria:
            matched.append(matched_to(rows[RELUFICATION], config, name))
        yield from (*levels, *matched)

    for v in config.progress(order(), name, 2 + len(levels) + ("cats" in config.options.criteria)):
        calibrated = () if v in (DENSE, RELUFICATION) else (*levels, *matched)
        rows[v] = measure(subject, v, calibrated, Samples.of(rows.get(DENSE, [])))
    return [row for v in (DENSE, *levels, RELUFICATION, *matched) for row in rows[v]]


def matched_to(relufied: Sequence[Row], config: Config[Options], name: str) -> Variant:
    """CATS at the sparsity of ReLUfication, which has no rows only where nothing is computed (`Config.missing`)."""
    if not relufied:
        return Variant("cats-matched", "cats")
    first = relufied[0]
    assert isinstance(first, ZeroShotRow) and first.sparsity_measured is not None
    measured = first.sparsity_measured
    if measured > HIGHEST_MATCH:
        config.notes[f"{name}/cats-matched"] = (
            f"ReLUfication is {measured:.5f} sparse; CATS is matched at {HIGHEST_MATCH}"
        )
    return Variant("cats-matched", "cats", min(measured, HIGHEST_MATCH))


def measure(subject: Subject, v: Variant, calibrated: Sequence[Variant], dense: Samples | None) -> list[Row]:
    """Rows of one variant: a unit of work of its own.

    Args:
        calibrated: all variants that one calibration should serve.
        dense: what differences are taken from; None for the dense model.
    """
    return subject.config.unit(*job(subject, v, calibrated, dense), ROWS)


def job(
    subject: Subject, v: Variant, calibrated: Sequence[Variant], dense: Samples | None
) -> tuple[str, Callable[[], list[Row]]]:
    """The unit's key, and what computes it."""
    return f"{subject.name}/{v.name}", partial(_measure, subject, v, calibrated, dense)


def _measure(subject: Subject, v: Variant, calibrated: Sequence[Variant], dense: Samples | None) -> list[Row]:
    make(subject.model, v, subject.thresholds(calibrated).get(v))
    measurement = measure_as_is(subject)
    samples = measurement.samples()
    who = subject.columns(v)
    rows: list[Row] = [
        ZeroShotRow(**who, path=v.path, sparsity_target=v.sparsity, sparsity_measured=measurement.sparsity, **columns)
        for columns in measurement.scores(dense or samples)
    ]
    rows += [ItemSample(**who, task=task, correct=correct) for task, correct in samples.correct.items()]
    return [*rows, TextSample(**who, tokens_per_block=measurement.tokens_per_block, nats=samples.nats)]
