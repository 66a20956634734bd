"""Figures of e05 and e06: MLP latency, kernel ablation, rows, generation throughput, what it costs to grow."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from reports import style
from reports.load import paper_models, paper_table
from reports.stats import (
    GENERATION_KEYS,
    bytes_bound_speedup,
    generation_speedups,
    kernel_speedups,
    throughput_by_length,
)

Tables = Mapping[str, pd.DataFrame]
SHAPES = ("Mistral-7B", "Llama2-7B", "Llama2-13B")
LOOP_HATCH = {"eager": "", "compiled": "////"}


def batch_one(tables: Tables) -> pd.DataFrame:
    """Speed-ups at one row, at the largest number of threads timed, per shape and dtype."""
    table = kernel_speedups(tables["e05_mlp_latency"])
    table = table[table["rows"] == 1]
    most = table.groupby(["machine", "shape", "dtype"])["threads"].transform("max")
    return table[table["threads"].isna() | (table["threads"] == most)]


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
    x = 100 * curve["sparsity_target" if name == "dense" else "sparsity"]
    colour = style.IMPLEMENTATION_COLOURS.get(name, style.PURPLE)
    ax.plot(x, curve[column], "-" if name in ("dense", "optimal-all-three-shrunk") else "o-", color=colour, ms=2.8)
    if band:
        ax.fill_between(x, curve["p20_ms"], curve["p80_ms"], color=colour, alpha=0.18, lw=0)
    return x.iloc[-1], curve[column].iloc[-1], style.IMPLEMENTATION_NAMES.get(name, name), colour


def e05_latency(tables: Tables) -> Figure:
    """The paper's Figure 3: latency against sparsity: dense, ours, "Optimal", and the bound by bytes."""
    table = batch_one(tables)
    figure, panels = _grid(table, 2.3)
    for number, ((dtype, shape), ax) in enumerate(panels.items()):
        part = table[(table["dtype"] == dtype) & (table["shape"] == shape)]
        present = set(part["implementation"])
        names = [name for name in ("dense", "optimal-all-three-shrunk", "cats") if name in present]
        ends = [_curve(ax, part, name, "geomean_ms", band=name != "optimal-all-three-shrunk") for name in names]
        bound = part[part["implementation"] == "cats"].sort_values("sparsity")
        if bound["bound_ms"].notna().any():
            ax.plot(100 * bound["sparsity"], bound["bound_ms"], ":", color=style.PURPLE)
            ends.append((100 * bound["sparsity"].iloc[-1], bound["bound_ms"].iloc[-1], "bytes bound", style.PURPLE))
        ax.set_ylim(bottom=0)
        ax.set_xlim(-3, 143)
        ax.set_xticks([0, 25, 50, 75, 100])
        style.label_ends(ax, ends, size=7.5)
        if number % max(1, len({s for _, s in panels})) == 0:
            ax.set_ylabel("latency, ms")
    return figure


def e05_speedup(tables: Tables) -> Figure:
    """Figure 3 as ratios to dense, so that machines compare: ours, the paper's kernel on its own GPU, the bounds."""
    table, paper = batch_one(tables), paper_latency()
    figure, panels = _grid(table, 2.3)
    s = np.linspace(0, 0.97, 60)
    for number, ((dtype, shape), ax) in enumerate(panels.items()):
        part = table[(table["dtype"] == dtype) & (table["shape"] == shape)]
        ends = []
        if (part["implementation"] == "cats").any():
            ends.append(_curve(ax, part, "cats", "speedup"))
        ax.plot(100 * s, bytes_bound_speedup(s), ":", color=style.PURPLE)
        ends.append((97, float(bytes_bound_speedup(0.97)), "bytes bound", style.PURPLE))
        theirs = paper[(paper["model"] == shape) & (paper["implementation"] == "fused-mask")].sort_values("sparsity")
        if len(theirs):
            ax.plot(100 * theirs["sparsity"], theirs["speedup"], "--", color=style.GREEN)
            ends.append((100 * theirs["sparsity"].iloc[-1], theirs["speedup"].iloc[-1], "paper's kernel", style.GREEN))
        ax.axhline(1, color=style.GREY, lw=0.8)
        ax.set_xlim(-3, 150)
        ax.set_xticks([0, 25, 50, 75, 100])
        style.label_ends(ax, ends, size=7.5)
        if number % max(1, len({s for _, s in panels})) == 0:
            ax.set_ylabel("speed-up over dense")
    return figure


def e05_ablation(tables: Tables) -> Figure:
    """The paper's Figure 6: fused with a mask, fused with compaction, unfused; ours above, the paper's below."""
    table, paper = batch_one(tables), paper_latency()
    table = table[table["shape"].isin(["Mistral-7B", "Llama2-7B"])] if table["shape"].isin(SHAPES[:2]).any() else table
    panels = [
        (f"{shape}, {style.dtype_name(str(dtype))} (ours)", part)
        for (dtype, shape), part in table.groupby(["dtype", "shape"], sort=False)
    ]
    theirs = [(f"{m} (paper, L40S, float32)", paper[paper["model"] == m].assign(sparsity_target=paper["sparsity"]))
              for m in SHAPES[:2]]  # fmt: skip
    panels += theirs
    rows = (len(panels) + 1) // 2
    figure, axes = plt.subplots(rows, 2, figsize=(style.WIDTH, 2.1 * rows), squeeze=False, sharex=True)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (title, part) in zip(axes.flat, panels, strict=False):
        present = set(part["implementation"])
        names = [name for name in ("gather", "fused-compact", "fused-mask", "cats") if name in present]
        ends = [_curve(ax, part, name, "speedup") for name in names]
        ax.axhline(1, color=style.GREY, lw=0.8)
        ax.set(title=title, xlim=(-3, 140))
        ax.set_xticks([0, 25, 50, 75, 100])
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
    figure, panels = _grid(table, 2.0)
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


def e06_throughput(tables: Tables) -> Figure | None:
    """The paper's Figure 4: tokens per second for each generated length, dense and CATS-50, eager and compiled."""
    lengths = throughput_by_length(generation_speedups(tables["e06_throughput"]))
    groups = list(lengths.groupby(["model", "layers", "dtype"], sort=False))
    if not groups:
        return None
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(style.WIDTH, 2.4 * rows), squeeze=False)
    for ax in axes.flat[len(groups) :]:
        ax.set_visible(False)
    for ax, ((model, layers, dtype), part) in zip(axes.flat, groups, strict=False):
        ticks = sorted(part["generated_tokens"].unique())
        loops = [loop for loop in ("eager", "compiled") if loop in set(part["loop"])]
        width = 0.84 / (2 * len(loops))
        for i, loop in enumerate(loops):
            of_loop = part[part["loop"] == loop].set_index("generated_tokens").reindex(ticks)
            for j, (column, colour) in enumerate(
                (("dense_tokens_per_second", style.GREY), ("tokens_per_second", style.BLUE))
            ):
                x = np.arange(len(ticks)) + (2 * i + j - len(loops) + 0.5) * width
                label = f"{'CATS-50' if j else 'Base'}, {loop}"
                hatch = {"hatch": LOOP_HATCH[loop], "edgecolor": "white", "linewidth": 0}
                ax.bar(x, of_loop[column], width * 0.94, color=colour, label=label, **hatch)
                if j:
                    for position, height, ratio in zip(x, of_loop[column], of_loop["speedup"], strict=True):
                        if np.isfinite(height):
                            ax.annotate(
                                style.times(ratio),
                                (position, height),
                                ha="center",
                                va="bottom",
                                fontsize=7.5,
                                path_effects=[withStroke(linewidth=2, foreground="white")],
                            )
        ax.set_xticks(range(len(ticks)), [f"{tick:.0f}" for tick in ticks])
        ax.set_title(f"{model}, {layers:.0f} layers, {style.dtype_name(str(dtype))}")
        ax.margins(y=0.12)
        ax.set_xlabel("generated tokens")
    for ax in axes[:, 0]:
        ax.set_ylabel("tokens per second")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def e06_ratio(tables: Tables) -> Figure | None:
    """Figure 4 as ratios to dense, ours beside the paper's bars: the form in which different machines compare."""
    lengths = throughput_by_length(generation_speedups(tables["e06_throughput"]))
    if lengths.empty:
        return None
    paper = paper_table("figure4_throughput_l40s_fp32").pivot_table(
        index=["model", "generated_tokens"], columns="variant", values="tokens_per_second"
    )
    paper_ratio = (paper["cats-50"] / paper["dense"]).rename("speedup").reset_index()
    models = [str(model) for model in lengths["model"].unique()]
    beside = list(dict.fromkeys(name for model in models for name in paper_models(model, paper_ratio["model"])))
    groups = [
        (
            f"{model}, {layers:.0f} layers\n{style.dtype_name(str(dtype))}, {loop}",
            part,
            style.BLUE,
            LOOP_HATCH.get(str(loop), ""),
        )
        for (model, layers, dtype, loop), part in lengths.groupby(["model", "layers", "dtype", "loop"], sort=False)
    ]
    groups += [(f"{name}\npaper, eager", paper_ratio[paper_ratio["model"] == name], style.GREEN, "") for name in beside]
    figure, ax = plt.subplots(figsize=(style.WIDTH, 0.5 + 0.15 * sum(len(part) + 1 for _, part, _, _ in groups)))
    for place, (_, part, colour, hatch) in enumerate(groups):
        part = part.sort_values("generated_tokens")
        height = 0.8 / len(part)
        y = place + (np.arange(len(part)) - (len(part) - 1) / 2) * height
        ax.barh(y, part["speedup"] - 1, height * 0.9, left=1, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
        for position, row in zip(y, part.to_dict("records"), strict=True):
            text = f"{style.times(row['speedup'])}  {row['generated_tokens']:.0f} tokens"
            ax.annotate(text, (max(row["speedup"], 1), position), xytext=(3, 0), textcoords="offset points", va="center",
                        fontsize=7)  # fmt: skip
    ax.axvline(1, color=style.GREY, lw=0.8)
    ax.set_yticks(range(len(groups)), [title for title, *_ in groups], fontsize=7.5)
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.set_xlabel("tokens per second, CATS-50 over dense in the same loop")
    return figure


GROWTH = {"prompt_tokens": "prompt tokens", "batch": "batch", "sparsity_target": "sparsity, %", "layers": "layers"}


def growth(speedups: pd.DataFrame, dimension: str) -> pd.DataFrame:
    """The conditions in which only `dimension` varies, per (model, dtype, loop): those with the most values of it."""
    others = [key for key in [*GENERATION_KEYS, "sparsity_target"] if key != dimension]
    group = ["machine", "model", "dtype", "loop"]
    count = speedups.groupby(others, dropna=False)[dimension].transform("nunique")
    kept = speedups[(count > 1) & (count == count.groupby([speedups[g] for g in group]).transform("max"))]
    if kept.empty:
        return kept
    free = [key for key in others if key not in group]
    first = kept.groupby(group)[free].transform("first")
    same = ((kept[free] == first) | (kept[free].isna() & first.isna())).all(axis=1)
    return kept[same].sort_values([*group, dimension])


def e06_growth(tables: Tables) -> Figure | None:
    """Speed-up against context, batch, sparsity and layers; a cross marks where CATS stops paying (ratio below 1)."""
    speedups = generation_speedups(tables["e06_throughput"])
    found = {dimension: growth(speedups, dimension) for dimension in GROWTH}
    found = {dimension: part for dimension, part in found.items() if len(part)}
    if not found:
        return None
    rows = -(-len(found) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(style.WIDTH, 2.4 * rows), squeeze=False)
    for ax in axes.flat[len(found) :]:
        ax.set_visible(False)
    looks: dict[tuple[str, ...], str] = {}
    palette = [
        style.BLUE,
        style.ORANGE,
        style.GREEN,
        style.VERMILLION,
        style.PURPLE,
        style.SKY,
        style.GREY,
        style.BLACK,
    ]
    for ax, (dimension, part) in zip(axes.flat, found.items(), strict=False):
        for key, line in part.groupby(["model", "dtype", "loop"], sort=False):
            name = tuple(str(piece) for piece in key)
            colour = looks.setdefault(name, palette[len(looks) % len(palette)])
            x = line[dimension] * (100 if dimension == "sparsity_target" else 1)
            ax.plot(x, line["speedup"], "o-", color=colour)
            below = line["speedup"] < 1
            ax.plot(x[below], line["speedup"][below], "x", color=style.BLACK, ms=7, mew=1.5)
        ax.axhline(1, color=style.GREY, lw=0.8)
        ax.set_xlabel(GROWTH[dimension])
        if dimension != "sparsity_target":
            ticks = sorted(part[dimension].unique())
            ax.set_xscale("log", base=2)
            ax.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
            ax.minorticks_off()
    for ax in axes[:, 0]:
        ax.set_ylabel("speed-up over dense")
    handles = [plt.Line2D([], [], color=colour, marker="o") for colour in looks.values()]
    labels = [f"{name[0]}, {style.dtype_name(name[1])}, {name[2]}" for name in looks]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False, fontsize=8)
    return figure


def e06_shares(tables: Tables) -> Figure:
    """Where the time of one decoded token goes, per model and dtype."""
    table = tables["e06_shares"]
    groups = list(table.groupby(["model", "layers", "dtype"], sort=False))
    colours = {"mlp": style.BLUE, "attention": style.ORANGE, "head": style.GREEN, "other": style.GREY}
    figure, ax = plt.subplots(figsize=(style.WIDTH, 0.7 + 0.36 * len(groups)))
    for place, (_, part) in enumerate(groups):
        left = 0.0
        for row in part.to_dict("records"):
            width = 100 * row["share"]
            ax.barh(place, width, 0.7, left=left, color=colours.get(row["component"], style.PURPLE))
            if width > 6:
                label = f"{row['component']} {width:.0f} %"
                ax.text(left + width / 2, place, label, ha="center", va="center", color="white", fontsize=8)
            left += width
    names = [f"{model}, {layers:.0f} layers, {style.dtype_name(str(dtype))}" for (model, layers, dtype), _ in groups]
    ax.set_yticks(range(len(groups)), names)
    ax.invert_yaxis()
    ax.set(xlabel="share of the time of one decoded token, dense, %", xlim=(0, 100))
    return figure
