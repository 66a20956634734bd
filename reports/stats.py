"""From tidy rows to the few numbers that tables, figures and claims share: means, their standard errors, ratios.

Averages over tasks are plain means, as in the paper; their standard error is sqrt(sum se^2) / n (tasks independent).
A mean is defined only over the full set of tasks of its model: with one task unmeasured it is NaN, not a mean of the
rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

ORDER = ("dense", "cats-50", "cats-70", "cats-90", "cats-matched", "relufication")
NEAR_SPARSITY = 0.05  # a measured row this near to a sparsity stands for it; else two neighbours are interpolated


def variants(table: pd.DataFrame) -> list[str]:
    """The variants of a table: in the paper's order, then others by name, then all those fine-tuned."""

    def rank(name: str) -> tuple[bool, int, str]:
        plain = name.removesuffix("-finetuned")
        return plain != name, ORDER.index(plain) if plain in ORDER else len(ORDER), name

    return sorted(table["variant"].unique(), key=rank)


def sum_in_quadrature(errors: pd.Series) -> float:
    """sqrt(sum se^2); NaN when any is unmeasured."""
    return float(np.sqrt(np.sum(np.square(errors.to_numpy(dtype=float)))))


def zero_shot_means(table: pd.DataFrame, metric: str = "acc") -> pd.DataFrame:
    """One row per (model, variant): mean over tasks of value, difference and chance, with standard errors.

    The difference to dense is paired (same items); its stderr comes from the CSV's difference_stderr.
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
                    "variant": variant,
                    "sparsity_target": part["sparsity_target"].iloc[0],
                    "sparsity_measured": part["sparsity_measured"].mean(),
                    "value": part["value"].mean() if whole else np.nan,
                    "stderr": sum_in_quadrature(part["stderr"]) / n if whole else np.nan,
                    "difference": part["difference"].mean(skipna=False) if whole else np.nan,
                    "difference_stderr": sum_in_quadrature(part["difference_stderr"]) / n if whole else np.nan,
                    "chance": part["chance"].mean(skipna=False),
                    "items": part["items"].sum(),
                    "tasks": n,
                }
            )
    return pd.DataFrame(rows)


def _over_seeds(part: pd.DataFrame, tasks: set[str]) -> dict[str, float] | None:
    """Mean accuracy over tasks of one (variant, step): per seed, then over seeds.

    stderr joins the item error (the same items for every seed, so it does not shrink with seeds) and the seed error.
    """
    per_seed = [one["accuracy"].mean() for _, one in part.groupby("seed", dropna=False) if set(one["task"]) == tasks]
    if not per_seed:
        return None
    items = sum_in_quadrature(part.groupby("task")["stderr"].mean()) / len(tasks)
    seeds = float(np.std(per_seed, ddof=1) / np.sqrt(len(per_seed))) if len(per_seed) > 1 else 0.0
    return {
        "accuracy": float(np.mean(per_seed)),
        "stderr": float(np.hypot(items, seeds)),
        "low": min(per_seed),
        "high": max(per_seed),
        "seeds": len(per_seed),
    }


def finetuning_means(table: pd.DataFrame) -> pd.DataFrame:
    """One row per (model, variant, step) of e03: mean accuracy over tasks and seeds, its stderr, extremes."""
    table = table[table["accuracy"].notna()]
    rows = []
    for model, of_model in table.groupby("model", sort=False):
        tasks = set(of_model["task"])
        for variant in variants(of_model):
            for step, part in of_model[of_model["variant"] == variant].astype({"step": int}).groupby("step"):
                means = _over_seeds(part, tasks)
                if means:
                    rows.append({"model": model, "variant": variant, "step": step, **means})
    return pd.DataFrame(rows, columns=["model", "variant", "step", "accuracy", "stderr", "low", "high", "seeds"])


def task_means(table: pd.DataFrame) -> pd.DataFrame:
    """One row per (model, variant, task) of e04, and the task 'average': accuracy, stderr, sparsity, chance."""
    rows = []
    for model, of_model in table[table["accuracy"].notna()].groupby("model", sort=False):
        tasks = sorted(of_model["task"].unique())
        for variant in variants(of_model):
            of_variant = of_model[of_model["variant"] == variant]
            for name, wanted in [*((task, [task]) for task in tasks), ("average", tasks)]:
                part = of_variant[of_variant["task"].isin(wanted)]
                means = _over_seeds(part, set(wanted))
                if means:
                    rest = {key: part[key].mean() for key in ("sparsity_target", "sparsity_measured", "chance")}
                    rows.append({"model": model, "variant": variant, "task": name, **means, **rest})
    columns = ["model", "variant", "task", "accuracy", "stderr", "low", "high", "seeds"]
    return pd.DataFrame(rows, columns=[*columns, "sparsity_target", "sparsity_measured", "chance"])


def sparsity_means(table: pd.DataFrame) -> pd.DataFrame:
    """One row per (model, variant, recalibrated) of e03_sparsity's last step: mean over layers and seeds."""
    rows = []
    for (model, variant, recalibrated), part in table.groupby(["model", "variant", "recalibrated"], sort=False):
        last = part[part["step"] == part["step"].max()]
        per_seed = last.groupby("seed", dropna=False)["sparsity_measured"].mean()
        per_layer = last.groupby("layer_index")["sparsity_measured"].mean()
        rows.append(
            {
                "model": model,
                "variant": variant,
                "recalibrated": bool(recalibrated),
                "step": int(last["step"].iloc[0]),
                "sparsity_target": last["sparsity_target"].iloc[0],
                "sparsity": last["sparsity_measured"].mean(skipna=False),
                "seed_stderr": float(per_seed.std(ddof=1) / np.sqrt(len(per_seed))) if len(per_seed) > 1 else np.nan,
                "lowest_layer": per_layer.min(),
                "highest_layer": per_layer.max(),
                "accuracy": last.groupby("seed", dropna=False)["accuracy_mean"].first().mean(),
            }
        )
    return pd.DataFrame(rows)


def histogram_quantile(layer: pd.DataFrame, q: float) -> float:
    """Quantile of one layer's histogram, linear inside a bin; an open last bin counts as its left edge."""
    layer = layer.sort_values("bin_left")
    left, right, count = (layer[name].to_numpy(dtype=float) for name in ("bin_left", "bin_right", "count"))
    cumulative = np.cumsum(count) / count.sum()
    i = int(np.searchsorted(cumulative, q))
    if not np.isfinite(right[i]):
        return float(left[i])
    before = cumulative[i - 1] if i else 0.0
    return float(left[i] + (q - before) / (cumulative[i] - before) * (right[i] - left[i]))


KERNEL_KEYS = ["machine", "shape", "dtype", "rows", "threads"]


def kernel_speedups(table: pd.DataFrame) -> pd.DataFrame:
    """e05 rows that were measured, each with `speedup` = dense / this, and the p20 to p80 range `low`, `high`.

    Dense is the row of the same machine, shape, dtype, rows and threads whose sparsity target is nearest
    (some harnesses time dense once, some at every sparsity).
    """
    measured = table[(table["error"].str.strip() == "") & table["geomean_ms"].notna()].copy()
    measured["sparsity"] = measured["sparsity"].fillna(measured["sparsity_target"])
    groups = []
    for _, part in measured.groupby(KERNEL_KEYS, sort=False, dropna=False):
        dense = part[part["implementation"] == "dense"].reset_index(drop=True)
        if dense.empty:
            continue
        at = dense["sparsity_target"].fillna(0.0).to_numpy()
        nearest = [int(np.argmin(np.abs(at - s))) for s in part["sparsity_target"].fillna(0.0)]
        base = dense.iloc[nearest].reset_index(drop=True)
        part = part.reset_index(drop=True)
        part["speedup"] = base["geomean_ms"] / part["geomean_ms"]
        part["low"] = base["p20_ms"] / part["p80_ms"]
        part["high"] = base["p80_ms"] / part["p20_ms"]
        part["dense_ms"] = base["geomean_ms"]
        part["reachable"] = base["geomean_ms"] / part["bound_ms"]
        groups.append(part)
    if not groups:
        return measured.assign(speedup=np.nan, low=np.nan, high=np.nan, dense_ms=np.nan, reachable=np.nan).iloc[:0]
    return pd.concat(groups, ignore_index=True)


def batch_one(table: pd.DataFrame) -> pd.DataFrame:
    """Speed-ups of e05 at one row, at the largest number of threads timed, per machine, shape and dtype."""
    speedups = kernel_speedups(table)
    speedups = speedups[speedups["rows"] == 1]
    most = speedups.groupby(["machine", "shape", "dtype"])["threads"].transform("max")
    return speedups[speedups["threads"].isna() | (speedups["threads"] == most)]


@dataclass(frozen=True)
class SpeedupAt:
    """Speed-up near a sparsity: where it was measured, its p20 to p80 range, the speed-up at the bound by bytes."""

    where: str
    speedup: float
    low: float
    high: float
    reachable: float


def speedup_at(part: pd.DataFrame, target: float) -> SpeedupAt | None:
    """At the measured row nearest to `target`, else interpolated between two; None outside of what was measured."""
    names = ("speedup", "low", "high", "reachable")
    part = part.sort_values("sparsity")
    row = part.iloc[int((part["sparsity"] - target).abs().argmin())]
    if abs(row["sparsity"] - target) <= NEAR_SPARSITY:
        return SpeedupAt(f"{100 * row['sparsity']:.3g} %", *(float(row[name]) for name in names))
    if not part["sparsity"].min() <= target <= part["sparsity"].max():
        return None
    values = [float(np.interp(target, part["sparsity"], part[name])) for name in names]
    return SpeedupAt(f"{100 * target:.0f} %, interpolated", *values)


def bytes_bound_speedup(sparsity: float | np.ndarray) -> float | np.ndarray:
    """Speed-up that skipping rows of W_up and W_down allows when W_gate is read whole: 3 / (1 + 2 (1 - s))."""
    return 3.0 / (1.0 + 2.0 * (1.0 - sparsity))


GENERATION_KEYS = ["machine", "model", "layers", "dtype", "loop", "batch", "prompt_tokens", "generated_tokens"]


def generation_speedups(table: pd.DataFrame) -> pd.DataFrame:
    """e06: one row per condition and sparse variant: geometric mean over prompts of tokens/s, paired ratio to dense.

    log_stderr is the standard error of the mean log ratio over prompts (NaN with a single prompt).
    """
    columns = [*GENERATION_KEYS, "variant", "sparsity_target"]
    table = table[table["tokens_per_second"] > 0]
    # A condition may be timed more than once on a prompt: those are one prompt still.
    table = table.assign(tokens_per_second=np.log(table["tokens_per_second"]))
    means = table.groupby([*columns, "prompt"], sort=False, dropna=False)[
        ["tokens_per_second", "sparsity_measured"]
    ].mean()
    table = means.reset_index().assign(tokens_per_second=lambda mean: np.exp(mean["tokens_per_second"]))
    dense = table[table["variant"] == "dense"]
    pairs = table[table["variant"] != "dense"].merge(
        dense[[*GENERATION_KEYS, "prompt", "tokens_per_second"]],
        on=[*GENERATION_KEYS, "prompt"],
        suffixes=("", "_dense"),
    )
    rows = []
    for _, part in pairs.groupby(columns, sort=False, dropna=False):
        log_ratio = np.log(part["tokens_per_second"] / part["tokens_per_second_dense"])
        rows.append(
            {
                **part[columns].iloc[0].to_dict(),
                "tokens_per_second": float(np.exp(np.log(part["tokens_per_second"]).mean())),
                "dense_tokens_per_second": float(np.exp(np.log(part["tokens_per_second_dense"]).mean())),
                "speedup": float(np.exp(log_ratio.mean())),
                "log_stderr": float(log_ratio.std(ddof=1) / np.sqrt(len(part))) if len(part) > 1 else np.nan,
                "sparsity_measured": part["sparsity_measured"].mean(),
                "prompts": len(part),
            }
        )
    extra = ["variant", "sparsity_target", "tokens_per_second", "dense_tokens_per_second", "speedup", "log_stderr"]
    return pd.DataFrame(rows, columns=[*GENERATION_KEYS, *extra, "sparsity_measured", "prompts"])


def throughput_conditions(speedups: pd.DataFrame, target: float = 0.5) -> pd.DataFrame:
    """Figure 4's rows out of `generation_speedups`: batch 1, one target sparsity.

    Growth measurements (longer contexts, more layers) stand in the same table; the conditions kept per
    (machine, model, dtype) are those that were timed at the most generated lengths, then on the most prompts.
    """
    at = speedups[(speedups["batch"] == 1) & np.isclose(speedups["sparsity_target"], target)]
    group = ["machine", "model", "dtype"]
    for column in ("layers", "prompt_tokens"):
        timed = at.groupby([*group, column])
        score = 1e6 * timed["generated_tokens"].transform("nunique") + timed["prompts"].transform("sum")
        at = at[score == score.groupby([at[g] for g in group]).transform("max")]
        group.append(column)
    return at


def throughput_by_length(speedups: pd.DataFrame) -> pd.DataFrame:
    """Figure 4: a row per generated length; what is still several is pooled, weighted by the number of prompts."""
    at = throughput_conditions(speedups)
    keys = ["machine", "model", "layers", "dtype", "loop", "generated_tokens"]
    rows: list[dict[Any, Any]] = []
    for _, part in at.groupby(keys, sort=False):
        weight = part["prompts"] / part["prompts"].sum()
        logs = {name: float((np.log(part[name]) * weight).sum()) for name in ("speedup", "dense_tokens_per_second")}
        logs["tokens_per_second"] = float((np.log(part["tokens_per_second"]) * weight).sum())
        rows.append(
            {
                **part[keys].iloc[0].to_dict(),
                **{name: float(np.exp(value)) for name, value in logs.items()},
                "log_stderr": float(np.sqrt(((part["log_stderr"] * weight) ** 2).sum(skipna=False))),
                "sparsity_measured": part["sparsity_measured"].mean(),
                "prompts": int(part["prompts"].sum()),
            }
        )
    return pd.DataFrame(
        rows, columns=[*keys, "speedup", "dense_tokens_per_second", "tokens_per_second", "log_stderr",
                       "sparsity_measured", "prompts"]
    ).sort_values(keys, kind="stable", ignore_index=True)  # fmt: skip
