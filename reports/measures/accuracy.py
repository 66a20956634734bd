"""Means of zero-shot accuracy and their differences: what e02 and e07 show and what their rules compare.

Averages over tasks are plain means, as in the paper; their standard error is sqrt(sum se^2) / n (tasks independent).
A mean is defined only over the full set of tasks of its model: with one task unmeasured it is NaN, not a mean of the
rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from reports.core import style
from reports.core.statistics import (
    Estimate,
    bootstrap_means,
    normal_estimate,
    paired_difference,
    quadrature,
    unpack_flags,
    unpack_numbers,
)
from reports.core.verdicts import Finding, untested

ORDER = ("dense", "cats-50", "cats-70", "cats-90", "cats-matched", "relufication")
TARGETS = {"cats-50": 0.5, "cats-70": 0.7, "cats-90": 0.9}
LEVELS = tuple(TARGETS)
MEANS = (
    "model", "criterion", "variant", "sparsity_target", "sparsity_measured", "value", "stderr", "difference",
    "difference_stderr", "chance", "items", "tasks",
)  # fmt: skip
"""Columns of `zero_shot_means`."""


def variants(table: pd.DataFrame) -> list[str]:
    """The variants of a table: in the paper's order, then others as they come, then all those fine-tuned."""
    names = list(dict.fromkeys(table["variant"]))

    def rank(name: str) -> tuple[bool, int, int]:
        plain = name.removesuffix("-finetuned")
        return plain != name, ORDER.index(plain) if plain in ORDER else len(ORDER), names.index(name)

    return sorted(names, key=rank)


def of_the_paper(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of the paper's own variants (dense, CATS, ReLUfication): other criteria change no verdict."""
    return table[table["criterion"].isin(["dense", "cats", "relufication"])]


def zero_shot_means(table: pd.DataFrame, metric: str = "acc") -> pd.DataFrame:
    """One row per (model, variant): mean over tasks of value, difference and chance, with standard errors.

    The difference to dense is paired (same items); its standard error comes from the column difference_stderr.
    """
    table = table[table["metric"] == metric]
    rows = []
    for model, of_model in table.groupby("model", sort=False):
        tasks = set(of_model["task"])
        for variant in variants(of_model):
            part = of_model[of_model["variant"] == variant].drop_duplicates("task")
            whole = set(part.loc[part["value"].notna(), "task"]) == tasks
            n = len(tasks)
            rows.append(
                {
                    "model": model,
                    "criterion": part["criterion"].iloc[0],
                    "variant": variant,
                    "sparsity_target": part["sparsity_target"].iloc[0],
                    "sparsity_measured": part["sparsity_measured"].mean(),
                    "value": part["value"].mean() if whole else np.nan,
                    "stderr": quadrature(part["stderr"]) / n if whole else np.nan,
                    "difference": part["difference"].mean(skipna=False) if whole else np.nan,
                    "difference_stderr": quadrature(part["difference_stderr"]) / n if whole else np.nan,
                    "chance": part["chance"].mean(skipna=False),
                    "items": part["items"].sum(),
                    "tasks": n,
                }
            )
    return pd.DataFrame(rows, columns=list(MEANS))


@dataclass(frozen=True)
class Score:
    """Mean accuracy of one variant, and the correctness of its items where that was kept.

    Attributes:
        value, stderr: mean over tasks, as a fraction.
        difference_stderr: standard error of the difference to dense, paired.
        chance: accuracy of guessing.
        sparsity: measured, as a fraction.
        items: task -> one 0 or 1 per item; empty where no samples were kept.
    """

    value: float
    stderr: float
    difference_stderr: float
    chance: float
    sparsity: float
    items: dict[str, np.ndarray]

    def lead(self, other: Score, to_dense: bool = False) -> Estimate:
        """Lead over another variant: paired over items where samples were kept.

        Without samples, the paired error of the table if the other is the dense model (``to_dense``), else the
        unpaired one: too large, since the items are the same, and so it decides only what is clear anyway.
        """
        value = self.value - other.value
        if self.items and other.items:
            try:
                paired = paired_difference(self.items, other.items)
            except ValueError:  # samples of other items: not those of the table
                paired = Estimate(math.nan)
            if abs(paired.value - value) < 1e-4:
                return paired
        if to_dense:
            return normal_estimate(value, self.difference_stderr, "paired over items, from the table's errors")
        return normal_estimate(value, math.hypot(self.stderr, other.stderr), "not paired: no samples were kept")


def scores(table: pd.DataFrame, samples: pd.DataFrame | None, model: str) -> dict[str, Score]:
    """Variant -> score, for one model's variants whose mean is defined."""
    means = zero_shot_means(table[table["model"] == model])
    kept: dict[str, dict[str, np.ndarray]] = {}
    if samples is not None:
        for row in samples[samples["model"] == model].to_dict("records"):
            kept.setdefault(row["variant"], {})[row["task"]] = unpack_flags(row["correct"])
    tasks = set(table.loc[(table["model"] == model) & (table["metric"] == "acc"), "task"])
    at = {}
    for row in means[means["value"].notna()].to_dict("records"):
        items = kept.get(row["variant"], {})
        rest = row["difference_stderr"], row["chance"], row["sparsity_measured"]
        at[str(row["variant"])] = Score(row["value"], row["stderr"], *rest, items if set(items) == tasks else {})
    return at


def log_ratio(part: pd.DataFrame, samples: pd.DataFrame | None, model: str, variant: str) -> Estimate:
    """Logarithm of a variant's perplexity over dense's: paired over blocks where kept, else the table's own error."""
    row = part[part["variant"] == variant].iloc[0]
    dense = part.loc[part["variant"] == "dense", "value"].iloc[0]
    value = float(np.log(row["value"] / dense))
    if samples is not None:
        of_model = samples[samples["model"] == model].drop_duplicates("variant").set_index("variant")["nats"]
        if {"dense", variant} <= set(of_model.index):
            ours, base = unpack_numbers(of_model[variant]), unpack_numbers(of_model["dense"])
            if len(ours) == len(base) > 1 and abs((ours - base).mean() - value) < 1e-3:
                draws = bootstrap_means(ours - base, np.random.default_rng(0))
                low, high = np.quantile(draws, [0.025, 0.975])
                return Estimate(value, float(low), float(high), "paired over blocks of text")
    if abs(row["difference"] - value) < 1e-3:
        return normal_estimate(value, row["difference_stderr"], "paired over blocks, from the table's errors")
    return Estimate(value)


def unfit(model: str, at: dict[str, Score], needed: tuple[str, ...], aspect: str = "") -> Finding | None:
    """Why these scores allow no verdict: a variant is missing, or the base model has nothing to lose."""
    absent = [style.variant_name(name) for name in needed if name not in at]
    if absent:
        return untested(model, f"{', '.join(absent)} not measured on all tasks", aspect=aspect)
    base = at["dense"]
    if base.value - base.chance <= 2 * base.stderr:
        chance = f"{style.number(base.value)}, {style.number(base.chance)}"
        return untested(model, f"the base model is at chance ({chance})", aspect=aspect)
    return None


def points_interval(estimate: Estimate) -> str:
    """`-0.25 points (-1.10 to +0.60), paired over items`."""
    if not estimate.known:
        return f"{style.points(estimate.value)} points, error unknown"
    return (
        f"{style.points(estimate.value)} points ({style.points(estimate.low)} to {style.points(estimate.high)}), "
        f"{estimate.how}"
    )
