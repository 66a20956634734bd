"""Rows of one case of e08: perplexity, continuations, tasks, generated answers. Differences are added at the end."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import cats
from cats.calibration import Thresholds
from cats.criteria import get
from cats.devices import execution_device
from cats.evaluation import Tasks
from cats.generated_answers import evaluate_answers, load_answer_tasks
from cats.sequential import settle
from experiments.e08_criteria.cases import DENSE_CASE, MLP, Case, Weights, skips_inputs
from experiments.e08_criteria.heldout import continuation_losses, losses_and_skipped
from experiments.e08_criteria.options import DENSE_PROMPT, MASKED, Piece
from experiments.framework.config import Config
from experiments.framework.identity import task_identity
from experiments.framework.samples import flags, numbers, paired
from experiments.framework.subject import Subject, mean
from experiments.framework.tables import (
    CriterionRow,
    CriterionSample,
    CriterionTextSample,
    Row,
    pack_flags,
    pack_numbers,
)
from experiments.framework.zero_shot import HELDOUT

TOLERANCE = 0.01
"""Of the measured sparsity, for a row to count as one at its target."""
READINGS = {"strict-match": "exact_match", "flexible-extract": "exact_match_flexible"}
"""lm-eval's ways to read an answer, as the column ``metric`` holds them; any other is its first."""


class Comparison(Subject):
    """A `Subject` with the thresholds of every case."""

    def __init__(self, config: Config[Any], name: str) -> None:
        super().__init__(config, name)
        self._made: dict[Case, Thresholds] = {}
        self._passes: dict[Case, tuple[list[float], dict[str, float]]] = {}

    @cached_property
    def weights(self) -> Weights:
        return Weights(self.model)

    @cached_property
    def heldout_on_device(self) -> list[Tensor]:
        """The held-out text where the model is."""
        return [ids.to(execution_device(self.model)) for ids in self.heldout]

    @cached_property
    def answer_tasks(self) -> Tasks:
        folder = self.config.data.get("folder")
        tasks = load_answer_tasks(self.config.options.generation_tasks, self.folder(), folder)
        for name, task in tasks.items():
            self.config.identify_data(f"task {name}", task_identity(task, folder))
        return tasks

    def thresholds_of(self, case: Case) -> Thresholds:
        """One calibration of the dense model serves all criteria of a family and all their levels; with ``sequential``
        one pass more brings each case onto its target."""
        if case not in self._made:
            family = [other for other in self.config.options.cases() if _family(other) == _family(case)]
            targets = sorted({other.target(self.weights) for other in family})
            criteria = list(dict.fromkeys(other.criterion for other in family))
            cats.remove(self.model)
            sites = case.sites if skips_inputs(case.criterion) else None
            made = cats.calibrate(self.model, self.calibration, targets, sites, criteria)
            self._made |= {other: made[other.criterion][other.target(self.weights)] for other in family}
        if self.config.options.sequential and not self._made[case].sequential:
            cats.remove(self.model)
            self._made[case] = settle(self.model, self._made[case], self.calibration)
        return self._made[case]

    def become(self, case: Case, prompt: str = MASKED) -> None:
        """Make the model this case, on the dense masked path: its masks are compared in float32, as the kernel's."""
        thresholds = self.thresholds_of(case) if case != DENSE_CASE else None
        cats.remove(self.model)
        if thresholds is not None:
            prefill = "dense" if prompt == DENSE_PROMPT else "sparse"
            cats.apply(self.model, thresholds, kernel="reference", prefill=prefill)
        torch.manual_seed(self.config.seed)  # of criteria that draw at random

    def heldout_pass(self, case: Case) -> tuple[list[float], dict[str, float]]:
        """Losses of the blocks of held-out text, and what is skipped there; `become` has been called.

        Raises:
            ValueError: the loss is infinite or NaN.
        """
        if case not in self._passes:
            losses, skipped = losses_and_skipped(self.model, self.heldout_on_device)
            if not math.isfinite(mean(losses)):
                raise ValueError(
                    f"the loss of {case.key} on held-out text is {mean(losses)}: the model is broken in this dtype"
                )
            self._passes[case] = losses, skipped
        return self._passes[case]


def _family(case: Case) -> tuple[object, ...]:
    """Cases that share it share a calibration: criteria of one kind and scope; each that searches is alone."""
    if case == DENSE_CASE:
        return (case.criterion,)
    own = case.criterion if get(case.criterion).searches else ""
    return (skips_inputs(case.criterion), case.scope, own)


def measure(subject: Comparison, piece: Piece) -> list[Row]:
    """Rows of one unit, without differences: these are `with_differences`, once all units are there."""
    case = case_of(piece)
    subject.become(case)
    subject.heldout_pass(case)
    subject.become(case, piece.prompt)
    rows: dict[str, Any] = {
        "perplexity": _perplexity,
        "continuations": _continuations,
        "tasks": _tasks,
        "answers": _answers,
    }
    made: list[Row] = rows[piece.kind](subject, piece)
    return made


def case_of(piece: Piece) -> Case:
    """The case that a unit measures."""
    assert piece.case is not None
    return piece.case


def _who(subject: Comparison, piece: Piece) -> dict[str, Any]:
    case = case_of(piece)
    return {
        "model": subject.name, "criterion": case.criterion, "variant": case.variant, "scope": case.scope,
        "prompt": piece.prompt,
    }  # fmt: skip


def _row(subject: Comparison, piece: Piece, **columns: Any) -> CriterionRow:
    case = case_of(piece)
    read = subject.weights.read(case, subject.heldout_pass(case)[1])
    on_target = None
    if case.level is not None and read.sparsity_measured is not None:
        on_target = abs(read.sparsity_measured - case.level) <= TOLERANCE
    path = "dense" if case == DENSE_CASE else "dense masked"
    return CriterionRow(
        **_who(subject, piece), path=path, sparsity_target=case.level, on_target=on_target, **vars(read), **columns
    )


def _of_text(subject: Comparison, piece: Piece, metric: str, losses: Sequence[float]) -> list[Row]:
    length = subject.config.options.length
    sample = CriterionTextSample(
        **_who(subject, piece), tokens_per_block=length, nats=pack_numbers(losses), metric=metric
    )
    value = math.exp(mean(losses))
    return [_row(subject, piece, task=HELDOUT, metric=metric, value=value, items=len(losses)), sample]


def _perplexity(subject: Comparison, piece: Piece) -> list[Row]:
    return _of_text(subject, piece, "perplexity", subject.heldout_pass(case_of(piece))[0])


def _continuations(subject: Comparison, piece: Piece) -> list[Row]:
    losses = continuation_losses(subject.model, subject.heldout_on_device, piece.prompt == DENSE_PROMPT)
    return _of_text(subject, piece, "continuation_perplexity", losses)


def _tasks(subject: Comparison, piece: Piece) -> list[Row]:
    rows: list[Row] = []
    for result in subject.evaluate(subject.model):
        columns = {"value": result.accuracy, "stderr": result.stderr, "items": result.items, "chance": result.chance}
        rows.append(_row(subject, piece, task=result.task, metric="acc", **columns))
        correct = pack_flags(result.correct)
        rows.append(CriterionSample(**_who(subject, piece), task=result.task, correct=correct, metric="acc"))
    return rows


def _answers(subject: Comparison, piece: Piece) -> list[Row]:
    options, rows = subject.config.options, []  # type: Any, list[Row]
    results = evaluate_answers(
        subject.model,
        subject.tokenizer,
        subject.answer_tasks,
        options.generation_items,
        options.generation_batch_size,
    )
    for result in results:
        of: dict[str, Any] = {"task": result.task, "metric": READINGS.get(result.reading, "exact_match")}
        rows.append(_row(subject, piece, **of, value=result.accuracy, stderr=result.stderr, items=result.items))
        rows.append(CriterionSample(**_who(subject, piece), **of, correct=pack_flags(result.correct)))
    return rows


def with_differences(rows: Sequence[Row]) -> list[Row]:
    """``rows`` of one model with the paired differences from dense and from cats, where their samples are there.

    The dense model has no masks: its prompts are the same however they run.
    """
    samples: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        if isinstance(row, CriterionSample):
            samples[row.variant, row.scope, row.prompt, row.task, row.metric] = flags(row.correct)
        elif isinstance(row, CriterionTextSample):
            samples[row.variant, row.scope, row.prompt, HELDOUT, row.metric] = numbers(row.nats)
    return [_paired(row, samples) if isinstance(row, CriterionRow) else row for row in rows]


def _paired(row: CriterionRow, samples: dict[tuple[str, ...], list[float]]) -> CriterionRow:
    what = row.task, row.metric
    own = samples[row.variant, row.scope, row.prompt, *what]
    dense = samples.get((DENSE_CASE.variant, MLP, MASKED, *what))
    if dense is not None:
        difference, error = paired(own, dense)
        row = replace(row, difference=difference, difference_stderr=error)
    if row.sparsity_target is not None:
        versus = samples.get((Case("cats", level=row.sparsity_target).variant, MLP, row.prompt, *what))
        if versus is not None:
            difference, error = paired(own, versus)
            row = replace(row, cats_difference=difference, cats_difference_stderr=error)
    return row
