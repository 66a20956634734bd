"""Figures of e05: MLP latency, speed-up over dense, the paper's kernels, several rows."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.framework.tables import LatencyRow
from reports.core import style
from reports.core.load import Run
from reports.core.section import Painter
from reports.measures.latency import (
    COMPILED,
    OPTIMAL,
    OURS,
    SHAPES,
    TORCH,
    batch_one,
    bytes_bound_speedup,
    kernel_speedups,
    paper_latency,
)

TARGETS = ((0.5, style.BLUE), (0.7, style.GREEN), (0.9, style.ORANGE))


def speedups(run: Run) -> pd.DataFrame:
    """Speed-ups of one run's table."""
    return kernel_speedups(run.tables[LatencyRow.table])


def _grid(table: pd.DataFrame, height: float) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    """One panel per (dtype, shape), shapes in the paper's order; at most three shapes, the paper's own first."""
    measured = list(table["shape"].unique())
    shapes = [s for s in SHAPES if s in measured] + [s for s in measured if s not in SHAPES]
    dtypes = sorted(table["dtype"].unique(), key=lambda name: (name != "float32", name))
    rows, columns = len(dtypes), len(shapes)
    figure, axes = plt.subplots(
        rows, columns, figsize=(style.WIDTH if columns > 1 else 3.8, height * rows), squeeze=False, sharex=True
    )
    panels = {}
    for i, dtype in enumerate(dtypes):
        for j, shape in enumerate(shapes):
            ax = axes[i][j]
            part = table[(table["dtype"] == dtype) & (table["shape"] == shape)]
            if part.empty:
                ax.set_visible(False)
                continue
            ax.set_title(f"{shape}, {style.dtype_name(dtype)}")
            if i == rows - 1:
                ax.set_xlabel("sparsity, %")
            panels[str(dtype), str(shape)] = ax
    return figure, panels


def _curve(ax: Axes, part: pd.DataFrame, name: str, column: str, band: bool = False) -> tuple[float, float, str, str]:
    curve = part[part["implementation"] == name].sort_values("sparsity_target")
    x = 100 * curve["sparsity"]
    colour = style.IMPLEMENTATION_COLOURS.get(name, style.PURPLE)
    ax.plot(x, curve[column], "-" if name == OPTIMAL else "o-", color=colour, ms=2.8)
    if band:
        ax.fill_between(x, curve["p20_ms"], curve["p80_ms"], color=colour, alpha=0.18, lw=0)
    return x.iloc[-1], curve[column].iloc[-1], style.IMPLEMENTATION_NAMES.get(name, name), colour


def latency_figure(run: Run) -> Figure | None:
    """The paper's Figure 3: latency against sparsity: dense, ours, "Optimal", and the bound by bytes."""
    table = batch_one(speedups(run))
    if table.empty:
        return None
    figure, panels = _grid(table, 1.5)
    for number, ((dtype, shape), ax) in enumerate(panels.items()):
        part = table[(table["dtype"] == dtype) & (table["shape"] == shape)]
        names = [name for name in (OPTIMAL, "cats") if name in set(part["implementation"])]
        ends = [_curve(ax, part, name, "geomean_ms", band=name != OPTIMAL) for name in names]
        for name in (TORCH, COMPILED):  # their times do not depend on sparsity
            dense = part.loc[part["implementation"] == name, "geomean_ms"]
            if len(dense):
                style.level_line(ax, dense.mean())
                ends.append((100, dense.mean(), style.IMPLEMENTATION_NAMES[name], style.GREY))
        bound = part[part["implementation"] == "cats"].sort_values("sparsity")
        if bound["bound_ms"].notna().any():
            ax.plot(100 * bound["sparsity"], bound["bound_ms"], ":", color=style.PURPLE)
            ends.append((100 * bound["sparsity"].iloc[-1], bound["bound_ms"].iloc[-1], "bytes bound", style.PURPLE))
        ax.set_ylim(bottom=0)
        style.sparsity_axis(ax, 138)
        style.label_ends(ax, ends, size=7.5)
        if number % max(1, len({s for _, s in panels})) == 0:
            ax.set_ylabel("latency, ms")
    return figure


def speedup_figure(run: Run) -> Figure | None:
    """Figure 3 as ratios to dense, so that machines compare: ours, the paper's kernel on its own GPU, the bounds."""
    table, paper = batch_one(speedups(run)), paper_latency()
    if table.empty:
        return None
    figure, panels = _grid(table, 1.5)
    s = np.linspace(0, 0.97, 60)
    for number, ((dtype, shape), ax) in enumerate(panels.items()):
        part = table[(table["dtype"] == dtype) & (table["shape"] == shape)]
        ends = []
        if (part["implementation"] == "cats").any():
            ends.append(_curve(ax, part, "cats", "speedup"))
        ax.plot(100 * s, bytes_bound_speedup(s), ":", color=style.PURPLE)
        ends.append((97, float(bytes_bound_speedup(0.97)), "ratio of bytes", style.PURPLE))
        theirs = paper[(paper["model"] == shape) & (paper["implementation"] == "fused-mask")].sort_values("sparsity")
        if len(theirs):
            ax.plot(100 * theirs["sparsity"], theirs["speedup"], "--", color=style.GREEN)
            ends.append((100 * theirs["sparsity"].iloc[-1], theirs["speedup"].iloc[-1], "paper's kernel", style.GREEN))
        style.level_line(ax, 1)
        style.sparsity_axis(ax, 142)
        style.label_ends(ax, ends, size=7.5)
        if number % max(1, len({s for _, s in panels})) == 0:
            ax.set_ylabel("speed-up over dense")
    return figure


def ablation_figure(run: Run) -> Figure | None:
    """The paper's Figure 6: fused with a mask, fused with compaction, unfused; ours above, the paper's below."""
    table, paper = batch_one(speedups(run)), paper_latency()
    if not table["implementation"].isin(["gather", "fused-compact", "fused-mask"]).any():
        return None
    table = table[table["shape"].isin(["Mistral-7B", "Llama2-7B"])] if table["shape"].isin(SHAPES[:2]).any() else table
    panels = [
        (f"{shape}, {style.dtype_name(str(dtype))} (ours)", part)
        for (dtype, shape), part in table.groupby(["dtype", "shape"], sort=False)
    ]
    theirs = [(f"{m} (paper, L40S, float32)", paper[paper["model"] == m].assign(sparsity_target=paper["sparsity"]))
              for m in SHAPES[:2]]  # fmt: skip
    panels += theirs
    rows = (len(panels) + 1) // 2
    figure, axes = plt.subplots(rows, 2, figsize=(style.WIDTH, 1.4 * rows), squeeze=False, sharex=True)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (title, part) in zip(axes.flat, panels, strict=False):
        present = set(part["implementation"])
        names = [name for name in ("gather", "fused-compact", "fused-mask", "cats") if name in present]
        ends = [_curve(ax, part, name, "speedup") for name in names]
        style.level_line(ax, 1)
        style.sparsity_axis(ax, 140)
        ax.set_title(title)
        style.label_ends(ax, ends, size=7.5)
    for ax in axes[:, 0]:
        ax.set_ylabel("speed-up over dense")
    for ax in axes[-1]:
        ax.set_xlabel("sparsity, %")
    return figure


def rows_figure(run: Run) -> Figure | None:
    """Speed-up against the number of rows at 50 % and 70 % sparsity of each row; None when only one row was timed."""
    table = speedups(run)
    table = table[table["implementation"] == "cats"]
    if table["rows"].nunique() < 2:
        return None
    figure, panels = _grid(table, 1.5)
    for number, ((dtype, shape), ax) in enumerate(panels.items()):
        part = table[(table["dtype"] == dtype) & (table["shape"] == shape)]
        ends = []
        for target, colour in TARGETS:
            at = part[np.isclose(part["sparsity_target"], target)].groupby("rows")["speedup"].mean()
            if len(at):
                ax.plot(at.index, at, "o-", color=colour)
                ends.append((at.index[-1], at.iloc[-1], f"{100 * target:.0f} %", colour))
        ax.axhline(1, color=style.GREY, lw=0.8)
        ticks = sorted(part["rows"].unique())
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
        ax.minorticks_off()
        ax.set_xlabel("rows (batch)")
        style.label_ends(ax, ends)
        if number % max(1, len({s for _, s in panels})) == 0:
            ax.set_ylabel("speed-up over dense")
    return figure


def _own(run: Run) -> pd.DataFrame:
    """Speed-ups of our kernel at batch 1."""
    table = batch_one(speedups(run))
    return table[table["implementation"] == OURS]


def glance(runs: list[Run]) -> Painter | None:
    """Speed-up of our kernel against sparsity at the first timed of the paper's shapes: for every machine and dtype the
    run in which dense was fastest."""
    measured = [run for run in runs if run.table(LatencyRow) is not None and len(speedups(run))]
    own = pd.concat([_own(run).assign(run=run.label) for run in measured]) if measured else pd.DataFrame()
    shape = next((name for name in SHAPES if measured and name in set(own["shape"])), None)
    if shape is None:
        return None
    own = own[own["shape"] == shape]
    own = own[own["dense_ms"] == own.groupby(["machine", "dtype"])["dense_ms"].transform("min")]

    def paint(ax: Axes) -> None:
        s = np.linspace(0, 0.95, 60)
        ax.plot(100 * s, bytes_bound_speedup(s), ":", color=style.PURPLE)
        ends = [(95.0, float(bytes_bound_speedup(0.95)), "ratio of bytes", style.PURPLE)]
        palette = iter([style.BLUE, style.ORANGE, style.GREEN, style.VERMILLION, style.SKY, style.BLACK] * 4)
        for (label, dtype), part in own.groupby(["run", "dtype"], sort=False):
            part = part[part["sparsity"] <= 0.96].sort_values("sparsity")
            colour = next(palette)
            ax.plot(100 * part["sparsity"], part["speedup"], "o-", color=colour)
            name = style.dtype_name(str(dtype)) + (f", {label}" if len(runs) > 1 else "")
            ends.append((100 * part["sparsity"].iloc[-1], part["speedup"].iloc[-1], name, colour))
        style.level_line(ax, 1)
        style.sparsity_axis(ax, 135)
        ax.set(title=f"MLP of {shape}, batch 1", xlabel="sparsity, %")
        ax.set_ylabel("speed-up over dense")
        style.label_ends(ax, ends)

    return paint
