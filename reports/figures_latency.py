"""Figures of e05: MLP latency, speed-up over dense, kernel ablation, several rows."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports import style
from reports.load import paper_table
from reports.stats import batch_one, bytes_bound_speedup, kernel_speedups

Tables = Mapping[str, pd.DataFrame]
OPTIMAL = "optimal-all-three-shrunk"
SHAPES = ("Mistral-7B", "Llama2-7B", "Llama2-13B")


def paper_latency() -> pd.DataFrame:
    """The paper's Figures 3 and 6 under this project's names, with the ratio to dense at the same sparsity."""
    paper = paper_table("figure3_figure6_mlp_latency_l40s_fp32")
    dense = paper[paper["implementation"] == "dense"].set_index(["model", "sparsity"])["latency_ms"]
    keys = pd.MultiIndex.from_frame(paper[["model", "sparsity"]])
    names = paper["implementation"].map(style.PAPER_IMPLEMENTATIONS)
    return paper.assign(implementation=names, speedup=dense.reindex(keys).to_numpy() / paper["latency_ms"])


def _grid(table: pd.DataFrame, height: float) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    """One panel a (dtype, shape), shapes in the paper's order; at most three shapes, the paper's own first."""
    found = list(table["shape"].unique())
    shapes = [s for s in SHAPES if s in found] + [s for s in found if s not in SHAPES]
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


def e05_latency(tables: Tables) -> Figure:
    """The paper's Figure 3: latency against sparsity: dense, ours, "Optimal", and the bound by bytes."""
    table = batch_one(tables["e05_mlp_latency"])
    figure, panels = _grid(table, 1.5)
    for number, ((dtype, shape), ax) in enumerate(panels.items()):
        part = table[(table["dtype"] == dtype) & (table["shape"] == shape)]
        names = [name for name in (OPTIMAL, "cats") if name in set(part["implementation"])]
        ends = [_curve(ax, part, name, "geomean_ms", band=name != OPTIMAL) for name in names]
        dense = part.loc[part["implementation"] == "dense", "geomean_ms"]
        if len(dense):  # its time does not depend on sparsity, and most harnesses take it once
            style.level_line(ax, dense.mean())
            ends.append((100, dense.mean(), "dense", style.GREY))
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


def e05_speedup(tables: Tables) -> Figure:
    """Figure 3 as ratios to dense, so that machines compare: ours, the paper's kernel on its own GPU, the bounds."""
    table, paper = batch_one(tables["e05_mlp_latency"]), paper_latency()
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


def e05_ablation(tables: Tables) -> Figure:
    """The paper's Figure 6: fused with a mask, fused with compaction, unfused; ours above, the paper's below."""
    table, paper = batch_one(tables["e05_mlp_latency"]), paper_latency()
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


def e05_rows(tables: Tables) -> Figure | None:
    """Speed-up against the number of rows at 50 % and 70 % sparsity of each row; None when only one row was timed."""
    table = kernel_speedups(tables["e05_mlp_latency"])
    table = table[table["implementation"] == "cats"]
    if table["rows"].nunique() < 2:
        return None
    figure, panels = _grid(table, 1.5)
    for number, ((dtype, shape), ax) in enumerate(panels.items()):
        part = table[(table["dtype"] == dtype) & (table["shape"] == shape)]
        ends = []
        for target, colour in ((0.5, style.BLUE), (0.7, style.GREEN), (0.9, style.ORANGE)):
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
