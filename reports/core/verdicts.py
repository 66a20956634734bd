"""The words of a verdict, and how a measured number with its interval becomes one.

A rule turns one run into `Finding` objects, one per model or condition. It states its bounds as margins: the distance
to the bound, positive where the claim holds. All margins have to be positive. A margin decides only when its whole
95 % interval lies on one side; an interval that is unknown decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from reports.core.load import Run
from reports.core.statistics import Estimate

HOLDS, FAILS, UNDECIDED, NOT_TESTED = "holds here", "does not hold here", "undecided", "not tested"
ON_POCKET = {HOLDS: "holds on the pocket model", FAILS: "does not hold on the pocket model"}

REAL, POCKET, GPU, CPU = "real models", "pocket model", "GPU", "CPU"
COLUMNS = (REAL, POCKET, GPU, CPU)
POCKET_MODEL = "pocket"


@dataclass(frozen=True)
class Finding:
    """What one rule says of one model or condition.

    Attributes:
        model: what was measured, short: a model or the shape of one.
        column: one of `COLUMNS`.
        verdict: `HOLDS`, `FAILS`, `UNDECIDED` or `NOT_TESTED`.
        ours: the measured figures.
        uncertainty: their intervals.
        reason: why the verdict is no clear one.
        condition: what else tells this finding from others of the model, such as a dtype.
        aspect: which part of the claim, where it has several.
        settings: options that a new measurement needs to allow a verdict.
    """

    model: str
    column: str
    verdict: str
    ours: str = ""
    uncertainty: str = ""
    reason: str = ""
    condition: str = ""
    aspect: str = ""
    settings: str = ""

    @property
    def words(self) -> str:
        """The verdict as printed: never more than "on the pocket model" for the pocket model."""
        return ON_POCKET.get(self.verdict, self.verdict) if self.column == POCKET else self.verdict

    def because(self, verdict: str, reason: str) -> Finding:
        """The same with another verdict, for ``reason``."""
        return replace(self, verdict=verdict, reason="; ".join(filter(None, [self.reason, reason])))


Rule = Callable[[Run], list[Finding]]


def column_of(model: str) -> str:
    """`POCKET` for the model that comes with the project, else `REAL`."""
    return POCKET if model == POCKET_MODEL else REAL


def untested(model: str, reason: str, column: str = "", **more: str) -> Finding:
    """A finding without a verdict, for ``reason``."""
    return Finding(model, column or column_of(model), NOT_TESTED, reason=reason, **more)


def decide(margins: Iterable[tuple[str, Estimate]]) -> tuple[str, str]:
    """Verdict, and why unless it holds, from (name, margin) pairs that all have to be positive or 0.

    One margin that is negative for certain refutes the claim; it holds when all are positive for certain.
    """
    margins = list(margins)
    if not margins:
        return NOT_TESTED, "nothing to compare"
    missed = _names([name for name, margin in margins if margin.known and margin.high < 0])
    if missed:
        return FAILS, f"missed by {missed}"
    unknown = [(name, margin.how) for name, margin in margins if not margin.known]
    if unknown:
        how = _names([how for _, how in unknown])
        return UNDECIDED, f"error unknown: {_names([name for name, _ in unknown])}" + (f" ({how})" if how else "")
    near = _names([name for name, margin in margins if margin.low < 0])
    return (UNDECIDED, f"within the error of the bound: {near}") if near else (HOLDS, "")


def _names(names: Sequence[str]) -> str:
    shown = list(dict.fromkeys(filter(None, names)))
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def combined(verdicts: Iterable[str]) -> str:
    """One verdict for several conditions: the claim holds where it holds in all that were tested.

    One that does not hold outweighs those that do; one undecided keeps the rest from holding.
    """
    tested = [verdict for verdict in verdicts if verdict != NOT_TESTED]
    for verdict in (FAILS, UNDECIDED, HOLDS):
        if verdict in tested:
            return verdict
    return NOT_TESTED
