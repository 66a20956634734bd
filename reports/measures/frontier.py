"""How much sparsity a criterion affords: its quality at each level with a paired interval, and its speed (e08).

A level keeps 99 % of the dense model where the whole 95 % interval of the paired difference says so, loses it where the
whole interval says the opposite, and is undecided in between. What a criterion affords is the largest measured level
that keeps it with no smaller level that loses it. Nothing is read off between the levels that were measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from reports.core.statistics import Estimate
from reports.measures.accuracy import log_ratio, scores

SHARE = 0.99
TOLERANCE = 0.01
"""How far the measured sparsity may fall short of a level that counts as kept."""
ACCURACY, PERPLEXITY = "acc", "perplexity"
METRICS = (ACCURACY, PERPLEXITY)
KEYS = ["model", "criterion", "scope"]


@dataclass(frozen=True)
class Point:
    """One criterion at one level, in one metric.

    Attributes:
        level: the target, as a fraction.
        variant: as the tables name it.
        measured: the sparsity on held-out text.
        mlp_bytes, model_bytes: fractions read.
        change: of the mean accuracy, as a fraction, or the logarithm of the ratio of perplexities; from dense.
        margin: how far it is from losing 99 % of dense; positive where it keeps them.
    """

    level: float
    variant: str
    measured: float
    mlp_bytes: float
    model_bytes: float
    change: Estimate
    margin: Estimate

    @property
    def keeps(self) -> bool:
        """Whether the interval supports it; never where fewer neurons were skipped than the level says."""
        return self.margin.known and self.margin.low >= 0 and self.measured >= self.level - TOLERANCE

    @property
    def loses(self) -> bool:
        """Whether the interval refutes it."""
        return self.margin.known and self.margin.high < 0


@dataclass(frozen=True)
class Kept:
    """What a criterion affords.

    Attributes:
        point: the largest level that keeps 99 %; None where no measured level does.
        undecided: the largest undecided level above it (below the smallest that loses); None where there is none.
        lost: the smallest level that loses; None where none does.
        smallest, largest: of the levels measured.
    """

    point: Point | None
    undecided: float | None
    lost: float | None
    smallest: float
    largest: float

    @property
    def words(self) -> str:
        """`50 %`, `50 % (undecided to 60 %)`, `under 30 %`, `at least 90 %`, `undecided at 30 to 50 %`."""
        if self.point is None:
            if self.lost == self.smallest:
                return f"under {_percent(self.smallest)}"
            several = self.undecided is not None and self.undecided > self.smallest
            levels = f"{100 * self.smallest:g} to {_percent(self.undecided)}" if several else _percent(self.smallest)
            return f"undecided at {levels}"
        kept = _percent(self.point.level)
        if self.undecided is not None:
            return f"{kept} (undecided to {_percent(self.undecided)})"
        return f"at least {kept}" if self.point.level == self.largest else kept


def _percent(level: float | None) -> str:
    return f"{100 * (level or 0):g} %"


def affords(points: Iterable[Point]) -> Kept | None:
    """What the points of one criterion, scope and metric allow to say; None without points whose interval is known."""
    ordered = sorted((point for point in points if point.margin.known), key=lambda point: point.level)
    if not ordered:
        return None
    lost = next((point.level for point in ordered if point.loses), None)
    below = [point for point in ordered if lost is None or point.level < lost]
    kept = next((point for point in reversed(below) if point.keeps), None)
    above = [point.level for point in below if kept is None or point.level > kept.level]
    return Kept(kept, above[-1] if above else None, lost, ordered[0].level, ordered[-1].level)


def text_points(table: pd.DataFrame, samples: pd.DataFrame | None) -> dict[tuple[str, str, str], list[Point]]:
    """(model, criterion, scope) -> perplexity on held-out text at each level, paired over blocks of text."""
    rows = _masked(table[table["metric"] == PERPLEXITY])
    if samples is not None:
        samples = _masked(samples)
        samples = samples[samples["metric"] == PERPLEXITY]
    points: dict[tuple[str, str, str], list[Point]] = {}
    for (model, scope), part in rows.groupby(["model", "scope"], sort=False):
        whole = _with_dense(rows, str(model), str(scope))
        kept = None if samples is None else _with_dense(samples, str(model), str(scope))
        if not whole["criterion"].eq("dense").any():
            continue
        for row in part[part["sparsity_target"].notna()].to_dict("records"):
            change = log_ratio(whole, kept, str(model), row["variant"])
            margin = change.negative().shifted(-math.log(SHARE))
            points.setdefault((str(model), row["criterion"], str(scope)), []).append(_point(row, change, margin))
    return points


def accuracy_points(table: pd.DataFrame, samples: pd.DataFrame | None) -> dict[tuple[str, str, str], list[Point]]:
    """(model, criterion, scope) -> mean accuracy over the tasks at each level, paired over items."""
    rows = _masked(table[table["metric"] == ACCURACY])
    samples = None if samples is None else _masked(samples)
    points: dict[tuple[str, str, str], list[Point]] = {}
    for (model, scope), part in rows.groupby(["model", "scope"], sort=False):
        whole = _with_dense(rows, str(model), str(scope))
        kept = None if samples is None else _with_dense(samples, str(model), str(scope))
        at = scores(whole, kept, str(model))
        if "dense" not in at:
            continue
        for row in part[part["sparsity_target"].notna()].drop_duplicates("variant").to_dict("records"):
            if row["variant"] in at:
                change = at[row["variant"]].lead(at["dense"], to_dense=True)
                margin = change.shifted((1 - SHARE) * at["dense"].value)
                points.setdefault((str(model), row["criterion"], str(scope)), []).append(_point(row, change, margin))
    return points


def _point(row: dict, change: Estimate, margin: Estimate) -> Point:
    rest = (row["sparsity_measured"], row["mlp_bytes"], row["model_bytes"])
    return Point(round(row["sparsity_target"], 6), row["variant"], *rest, change, margin)


def _masked(table: pd.DataFrame) -> pd.DataFrame:
    """Without rows whose prompt ran dense, which are another question."""
    return table[table["prompt"] == "masked"]


def _with_dense(table: pd.DataFrame, model: str, scope: str) -> pd.DataFrame:
    """One model's rows of one scope, and the dense model's, which has no scope of its own."""
    return table[(table["model"] == model) & ((table["scope"] == scope) | (table["criterion"] == "dense"))]


def fastest(speed: pd.DataFrame | None) -> pd.DataFrame:
    """Rows of e08_speed, for each machine, model, variant and ``what`` those in the loop, dtype and backend in which
    the variant itself is fastest."""
    if speed is None:
        return pd.DataFrame(columns=["machine", "model", "what", "variant", "speedup"])
    time = np.where(speed["unit"] == "ms", speed["value"], 1 / speed["value"])
    ordered = speed.assign(time=time).sort_values("time", kind="stable")
    return ordered.drop_duplicates(["machine", "model", "what", "variant"]).drop(columns="time").sort_index()


def speed_at(speed: pd.DataFrame, model: str, variant: str) -> list[dict]:
    """The rows of `fastest` for one variant of one model: whole tokens before MLPs alone."""
    at = speed[(speed["model"] == model) & (speed["variant"] == variant)]
    return sorted(at.to_dict("records"), key=lambda row: (row["what"] != "token", row["machine"]))
