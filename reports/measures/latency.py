"""Speed-ups of the MLP's implementations over dense, and the interval of a ratio from paired rounds (e05)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from reports.core import style
from reports.core.load import paper_table
from reports.core.statistics import Estimate, paired_ratio, unpack_numbers

NEAR_SPARSITY = 0.05  # a measured row this near to a sparsity stands for it
KERNEL_KEYS = ["machine", "shape", "dtype", "rows", "threads"]
SHAPES = ("Mistral-7B", "Llama2-7B", "Llama2-13B")
TORCH, COMPILED, OURS, OPTIMAL = "dense", "dense-compiled", "cats", "optimal-all-three-shrunk"


def figure_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Without the variants that no figure of the paper has: a threshold per neuron, W_up as the decider."""
    return table[table["decider"].isin(["", "gate"]) & table["threshold"].isin(["", "number"])]


def timed(table: pd.DataFrame) -> pd.DataFrame:
    """Rows that were timed."""
    return table[(table["error"].str.strip() == "") & table["geomean_ms"].notna()]


def kernel_speedups(table: pd.DataFrame) -> pd.DataFrame:
    """Timed rows, each with what it is compared with, at the same machine, shape, dtype, rows and threads.

    New columns: ``baseline`` (the fastest of torch's MLP and the compiled one) and ``dense_ms``, its time;
    ``speedup`` over it; ``over_torch`` over torch's F.linear as the paper measured; ``over_own`` over our kernel at 0 %
    sparsity; ``reachable``, the speed-up that reading the needed bytes at the measured bandwidth allows. NaN where the
    other was not timed.
    """
    measured = timed(figure_rows(table)).copy()
    measured["sparsity"] = measured["sparsity"].fillna(measured["sparsity_target"])
    groups = []
    for _, part in measured.groupby(KERNEL_KEYS, sort=False, dropna=False):
        by_name = {str(name): of for name, of in part.groupby("implementation")}
        dense = {name: by_name[name]["geomean_ms"].median() for name in (TORCH, COMPILED) if name in by_name}
        if not dense:
            continue
        baseline = min(dense, key=lambda name: dense[name])
        own = by_name.get(OURS, part.iloc[:0])
        own = own.loc[np.isclose(own["sparsity_target"], 0), "geomean_ms"]
        groups.append(
            part.assign(
                baseline=baseline,
                dense_ms=dense[baseline],
                speedup=dense[baseline] / part["geomean_ms"],
                over_torch=dense.get(TORCH, np.nan) / part["geomean_ms"],
                over_own=own.iloc[0] / part["geomean_ms"] if len(own) else np.nan,
                reachable=dense[baseline] / part["bound_ms"],
            )
        )
    if not groups:
        names = ("baseline", "dense_ms", "speedup", "over_torch", "over_own", "reachable")
        return measured.iloc[:0].assign(**{name: np.nan for name in names})
    return pd.concat(groups, ignore_index=True)


def batch_one(speedups: pd.DataFrame) -> pd.DataFrame:
    """Those at one row, at the largest number of threads timed, per machine, shape and dtype."""
    speedups = speedups[speedups["rows"] == 1]
    most = speedups.groupby(["machine", "shape", "dtype"])["threads"].transform("max")
    return speedups[speedups["threads"].isna() | (speedups["threads"] == most)]


def near(part: pd.DataFrame, target: float) -> pd.Series | None:
    """The measured row nearest to a sparsity, None where none is within 5 points."""
    if part.empty:
        return None
    distance = (part["sparsity"] - target).abs().to_numpy()
    return part.iloc[int(distance.argmin())] if distance.min() <= NEAR_SPARSITY else None


@dataclass(frozen=True)
class Rounds:
    """The rounds kept of one machine, shape, dtype, rows and threads: (implementation, target) -> times in ms."""

    times: dict[tuple[str, float], np.ndarray]

    def of(self, implementation: str, target: float) -> np.ndarray:
        """Times of one implementation at a target; dense is timed at any target, the nearest counts. May be empty."""
        targets = [at for name, at in self.times if name == implementation]
        if not targets:
            return np.array([])
        nearest = min(targets, key=lambda at: abs(at - target))
        if abs(nearest - target) > 1e-6 and implementation not in (TORCH, COMPILED):
            return np.array([])
        return self.times[implementation, nearest]

    def ratio(self, slow: str, slow_target: float, fast: str, fast_target: float) -> Estimate:
        """Median of the paired ratios of times; unknown where rounds were not kept or do not pair."""
        try:
            return paired_ratio(self.of(slow, slow_target), self.of(fast, fast_target))
        except ValueError:
            return Estimate(np.nan)


def rounds(samples: pd.DataFrame | None, row: pd.Series) -> Rounds:
    """The samples beside one row of the table."""
    if samples is None:
        return Rounds({})
    part = figure_rows(samples)
    for key in KERNEL_KEYS:
        part = part[part[key].isna()] if pd.isna(row[key]) else part[part[key] == row[key]]
    part = part[part["implementation"].isin([TORCH, COMPILED]) | part["sparsity_target"].notna()]
    records = part.assign(sparsity_target=part["sparsity_target"].fillna(0.0)).to_dict("records")
    return Rounds({(r["implementation"], r["sparsity_target"]): unpack_numbers(r["milliseconds"]) for r in records})


def bytes_bound_speedup(sparsity: float | np.ndarray) -> float | np.ndarray:
    """Speed-up that skipping rows of W_up and W_down allows when W_gate is read whole: 3 / (1 + 2 (1 - s))."""
    return 3.0 / (1.0 + 2.0 * (1.0 - sparsity))


def paper_latency() -> pd.DataFrame:
    """The paper's Figures 3 and 6 under this project's names, with the ratio to dense at the same sparsity."""
    paper = paper_table("figure3_figure6_mlp_latency_l40s_fp32")
    dense = paper[paper["implementation"] == "dense"].set_index(["model", "sparsity"])["latency_ms"]
    keys = pd.MultiIndex.from_frame(paper[["model", "sparsity"]])
    names = paper["implementation"].map(style.PAPER_IMPLEMENTATIONS)
    return paper.assign(implementation=names, speedup=dense.reindex(keys).to_numpy() / paper["latency_ms"])
