"""Means over tasks, seeds and layers after fine-tuning, and differences with both of their errors: items and seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from reports.core.statistics import (
    Z95,
    Estimate,
    paired_difference,
    quadrature,
    standard_error,
    t_quantile,
    unpack_flags,
)
from reports.measures.accuracy import variants


def _over_seeds(part: pd.DataFrame, tasks: set[str], trained: bool) -> dict[str, float] | None:
    """Mean accuracy over tasks of one (variant, step): per seed, then over seeds.

    stderr joins the item error (the same items for every seed, so it does not shrink with seeds) and the seed error,
    which is unknown for a single seed; before any training there is none.
    """
    per_seed = list(_by_seed(part, tasks).values())
    if not per_seed:
        return None
    items = quadrature(part.groupby("task")["stderr"].mean()) / len(tasks)
    seeds = standard_error(np.array(per_seed)) if trained else 0.0
    return {
        "accuracy": float(np.mean(per_seed)),
        "stderr": float(np.hypot(items, seeds)),
        "item_stderr": items,
        "low": min(per_seed),
        "high": max(per_seed),
        "seeds": len(per_seed),
    }


def _by_seed(part: pd.DataFrame, tasks: set[str]) -> dict[Any, float]:
    """Mean accuracy over tasks for each seed that has them all."""
    groups = part.groupby("seed", dropna=False)
    return {seed: float(one["accuracy"].mean()) for seed, one in groups if set(one["task"]) == tasks}


def _difference(part: pd.DataFrame, dense: pd.DataFrame, tasks: set[str]) -> float:
    """Mean accuracy over tasks against the dense model's, over the seeds that both have; NaN without one."""
    ours, theirs = _by_seed(part, tasks), _by_seed(dense, tasks)
    common = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return float(np.mean(common)) if common else math.nan


def finetuning_means(table: pd.DataFrame) -> pd.DataFrame:
    """One row per (model, variant, step) of e03: mean accuracy over tasks and seeds, its stderr, extremes."""
    table = table[table["accuracy"].notna()]
    rows = []
    for model, of_model in table.groupby("model", sort=False):
        tasks = set(of_model["task"])
        for variant in variants(of_model):
            for step, part in of_model[of_model["variant"] == variant].astype({"step": int}).groupby("step"):
                means = _over_seeds(part, tasks, trained=int(str(step)) > 0)
                if means:
                    rows.append({"model": model, "variant": variant, "step": step, **means})
    columns = ["model", "variant", "step", "accuracy", "stderr", "item_stderr", "low", "high", "seeds"]
    return pd.DataFrame(rows, columns=columns)


def task_means(table: pd.DataFrame) -> pd.DataFrame:
    """One row per (model, variant, task) of e04, and the task 'average': accuracy, stderr, sparsity, chance, and the
    difference from the dense model over the seeds that both have."""
    rows = []
    for model, of_model in table[table["accuracy"].notna()].groupby("model", sort=False):
        tasks = sorted(of_model["task"].unique())
        dense = of_model[of_model["variant"] == "dense"]
        for variant in variants(of_model):
            of_variant = of_model[of_model["variant"] == variant]
            for name, wanted in [*((task, [task]) for task in tasks), ("average", tasks)]:
                part = of_variant[of_variant["task"].isin(wanted)]
                means = _over_seeds(part, set(wanted), trained=True)
                if means:
                    rest = {key: part[key].mean() for key in ("sparsity_target", "sparsity_measured", "chance")}
                    rest["difference"] = _difference(part, dense[dense["task"].isin(wanted)], set(wanted))
                    rows.append({"model": model, "variant": variant, "task": name, **means, **rest})
    columns = ["model", "variant", "task", "accuracy", "stderr", "item_stderr", "low", "high", "seeds"]
    return pd.DataFrame(rows, columns=[*columns, "sparsity_target", "sparsity_measured", "chance", "difference"])


def sparsity_means(table: pd.DataFrame) -> pd.DataFrame:
    """One row per (model, variant, recalibrated) of e03_sparsity's last step: mean over layers and seeds."""
    rows = []
    for (model, variant, recalibrated), part in table.groupby(["model", "variant", "recalibrated"], sort=False):
        last = part[part["step"] == part["step"].max()]
        per_seed = last.groupby("seed", dropna=False)["sparsity_measured"].mean().to_numpy()
        per_layer = last.groupby("layer_index")["sparsity_measured"].mean()
        rows.append(
            {
                "model": model,
                "variant": variant,
                "recalibrated": bool(recalibrated),
                "step": int(last["step"].iloc[0]),
                "sparsity_target": last["sparsity_target"].iloc[0],
                "sparsity": last["sparsity_measured"].mean(skipna=False),
                "per_seed": per_seed,
                "lowest_layer": per_layer.min(),
                "highest_layer": per_layer.max(),
                "accuracy": last.groupby("seed", dropna=False)["accuracy_mean"].first().mean(),
            }
        )
    return pd.DataFrame(rows)


def mean_over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Rows in the layout of e02 with a column ``seed``: one per model, variant, task and metric, the mean over seeds.

    Standard errors join those of the items, which are the same for every seed, and that over seeds.
    """
    keys = ["model", "variant", "task", "metric"]
    rows = []
    for _, part in table.groupby(keys, sort=False):
        row = part.iloc[0].copy()
        if len(part) > 1:
            row["sparsity_measured"] = part["sparsity_measured"].mean()
            for column, error in (("value", "stderr"), ("difference", "difference_stderr")):
                over_seeds = standard_error(part[column].to_numpy())
                row[column] = part[column].mean(skipna=False)
                row[error] = math.hypot(part[error].mean(skipna=False), over_seeds)
        rows.append(row)
    return pd.DataFrame(rows, columns=table.columns).infer_objects()


@dataclass(frozen=True)
class Trained:
    """One variant as trained: its rows of accuracy, and its items where samples were kept.

    Attributes:
        rows: columns task, seed, accuracy, stderr.
        samples: columns task, seed, correct; may be empty.
        trained: False before the first step, where no seed matters yet.
    """

    rows: pd.DataFrame
    samples: pd.DataFrame
    trained: bool = True

    def per_seed(self) -> pd.Series:
        """Mean over tasks for each seed that has them all."""
        tasks = self.rows["task"].nunique()
        by_seed = self.rows.groupby("seed")["accuracy"].agg(["mean", "count"])
        return by_seed.loc[by_seed["count"] == tasks, "mean"]

    def items(self) -> dict[str, np.ndarray]:
        """Task -> share of the seeds that answered each item correctly; empty without samples of every task."""
        packed = self.samples.groupby("task")["correct"].agg(list).to_dict()
        if set(packed) != set(self.rows["task"]):
            return {}
        lengths = {task: {len(text) for text in texts} for task, texts in packed.items()}
        if any(len(of_task) > 1 for of_task in lengths.values()):
            return {}
        return {str(task): np.mean([unpack_flags(text) for text in texts], axis=0) for task, texts in packed.items()}

    def item_stderr(self) -> float:
        """Standard error of the mean over tasks that comes from its items."""
        return quadrature(self.rows.groupby("task")["stderr"].mean()) / self.rows["task"].nunique()


def lead(first: Trained, second: Trained) -> Estimate:
    """Mean accuracy of one over another: paired over seeds (Student's t) and over items, both errors together.

    The error is unknown with a single training seed. Without samples the items' error is the unpaired one, which is
    too large.
    """
    here, other = first.per_seed(), second.per_seed()
    if here.empty or other.empty:
        return Estimate(math.nan)
    if first.trained and second.trained:
        common = here.index.intersection(other.index)
        differences = (here[common] - other[common]).to_numpy()
        if not len(differences):
            return Estimate(math.nan)
    else:  # what was not trained has no seed to pair with
        ours = here.to_numpy() if first.trained else np.array([here.mean()])
        theirs = other.to_numpy() if second.trained else np.array([other.mean()])
        differences = ours - theirs
    value, count = float(differences.mean()), len(differences)
    seeds = t_quantile(count) * standard_error(differences) if first.trained or second.trained else 0.0
    try:
        paired = paired_difference(first.items(), second.items())
        items, how = max(paired.high - paired.value, paired.value - paired.low), "items paired"
    except ValueError:
        items = Z95 * math.hypot(first.item_stderr(), second.item_stderr())
        how = "items not paired"
    half = math.hypot(items, seeds)
    trained = f"{count} seed{'s' * (count != 1)}, " if first.trained or second.trained else ""
    return Estimate(value, value - half, value + half, trained + how)
