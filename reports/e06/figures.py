"""Figures of e06: generation throughput, its ratio to dense, what it costs to grow, shares of a token's time."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.framework.tables import ShareRow, ThroughputRow
from reports.core import style
from reports.core.load import Run, paper_models, paper_table
from reports.core.merge import ORIGIN
from reports.measures.generation import GENERATION_KEYS, figure_4, generation_speedups

LOOP_HATCH = {"eager": "", "compiled": "////", "graph": "....", "graph-tuned": "xxxx"}
LEAST = 1.6
"""Bars that a group is as high as, at least: its name has two lines."""
OTHER_HATCHES = ("oooo", "----", "||||", "++++")


def hatch(loop: str, loops: list[str]) -> str:
    """The pattern of a loop's bars; one that is not known takes the next free one."""
    others = [name for name in loops if name not in LOOP_HATCH]
    return LOOP_HATCH[loop] if loop in LOOP_HATCH else OTHER_HATCHES[others.index(loop) % len(OTHER_HATCHES)]


def figure_4_rows(run: Run) -> pd.DataFrame:
    """The paper's Figure 4 in one run: a row per model, dtype, loop and generated length."""
    return figure_4(generation_speedups(run.tables[ThroughputRow.table]))


def condition_name(model: object, layers: object, *rest: object) -> str:
    """`Mistral-7B, 32 layers, bfloat16`; the values are those of a group's key."""
    return ", ".join([style.model_name(str(model)), f"{layers:.0f} layers", *(style.dtype_name(str(x)) for x in rest)])


def ratio_figure(run: Run) -> Figure | None:
    """The paper's Figure 4 as ratios to dense, ours beside the paper's: so that different machines compare."""
    lengths = figure_4_rows(run)
    if lengths.empty:
        return None
    paper = paper_table("figure4_throughput_l40s_fp32").pivot_table(
        index=["model", "generated_tokens"], columns="variant", values="tokens_per_second"
    )
    paper_ratio = paper.rename(columns={"cats-50": "tokens_per_second", "dense": "dense_tokens_per_second"})
    paper_ratio["speedup"] = paper_ratio["tokens_per_second"] / paper_ratio["dense_tokens_per_second"]
    paper_ratio = paper_ratio.reset_index()
    models = [str(model) for model in lengths["model"].unique()]
    beside = list(dict.fromkeys(name for model in models for name in paper_models(model, paper_ratio["model"])))
    groups = [
        (
            f"{style.model_name(str(model))}, {layers:.0f} layers\n{style.dtype_name(str(dtype))}, {loop}"
            + (f", at {origin}" if origin else ""),
            part,
            str(loop),
        )
        for (model, layers, dtype, loop, origin), part in lengths.groupby(
            ["model", "layers", "dtype", "loop", ORIGIN], sort=False
        )
    ]
    groups += [(f"{name}\npaper, eager", paper_ratio[paper_ratio["model"] == name], "paper") for name in beside]
    figure, ax = plt.subplots(
        figsize=(style.WIDTH, 0.5 + 0.148 * sum(max(len(part), LEAST) + 0.5 for _, part, _ in groups))
    )
    middles, end_of_group = [], 0.0
    for _, part, loop in groups:
        part = part.sort_values("generated_tokens")
        y = end_of_group + np.arange(len(part))  # a bar is as thick in a group of one as in a group of four
        middles.append(y.mean())
        end_of_group += max(len(part), LEAST) + 0.7
        look: dict[str, Any] = {
            "color": style.GREEN if loop == "paper" else style.BLUE,
            "alpha": 0.55 if ORIGIN in part and part[ORIGIN].iloc[0] else 1.0,
            "hatch": "" if loop == "paper" else hatch(loop, [name for *_, name in groups if name != "paper"]),
        }
        ax.barh(y, part["speedup"] - 1, 0.9, left=1, edgecolor="white", linewidth=0, **look)
        for position, row in zip(y, part.to_dict("records"), strict=True):
            error = row["speedup"] * row.get("log_stderr", np.nan)
            if np.isfinite(error):
                ax.errorbar(row["speedup"], position, xerr=error, color=style.BLACK, lw=0.8, capsize=1.5)
            rates = [style.significant(row[name]) for name in ("dense_tokens_per_second", "tokens_per_second")]
            length = f"{row['generated_tokens']:.0f} tokens"
            text = f"{style.times(row['speedup'])}  {length}, {rates[0]} to {rates[1]} tokens/s"
            end = (max(row["speedup"] + (error if np.isfinite(error) else 0), 1), position)
            ax.annotate(text, end, xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
    ax.axvline(1, color=style.GREY, lw=0.8)
    ax.set_yticks(middles, [title for title, *_ in groups], fontsize=7.5, linespacing=0.95)
    ax.invert_yaxis()
    ax.margins(x=0.28, y=0.01)
    ax.set_xlabel("tokens per second, CATS-50 over dense in the same loop")
    return figure


GROWTH = {"prompt_tokens": "prompt tokens", "batch": "batch", "sparsity_target": "sparsity, %", "layers": "layers"}


def growth(speedups: pd.DataFrame, dimension: str) -> pd.DataFrame:
    """The conditions in which only `dimension` varies, per (model, dtype, loop): those with the most values of it.

    CATS only; a condition measured for Figure 4 and for growth counts once.
    """
    speedups = speedups[speedups["criterion"] == "cats"]
    grows = speedups["loop"] == "eager"  # its cache grows with the tokens: no size was chosen
    speedups = speedups.assign(cache_tokens=speedups["cache_tokens"].mask(grows, 0))
    keys = [key for key in [*GENERATION_KEYS, "sparsity_target"] if key != "condition"]
    speedups = speedups.sort_values("condition", ascending=False).drop_duplicates(keys)
    free_of = {dimension, "condition", "cache_tokens" if dimension == "prompt_tokens" else dimension}
    others = [key for key in [*GENERATION_KEYS, "sparsity_target"] if key not in free_of]
    group = ["machine", "model", "dtype", "loop"]
    count = speedups.groupby(others, dropna=False)[dimension].transform("nunique")
    kept = speedups[(count > 1) & (count == count.groupby([speedups[g] for g in group]).transform("max"))]
    if kept.empty:
        return kept
    free = [key for key in others if key not in group]
    first = kept.groupby(group)[free].transform("first")
    same = ((kept[free] == first) | (kept[free].isna() & first.isna())).all(axis=1)
    return kept[same].sort_values([*group, dimension])


def growth_figure(run: Run) -> Figure | None:
    """Speed-up against context, batch, sparsity and layers; a cross marks where CATS stops paying (ratio below 1)."""
    speedups = generation_speedups(run.tables[ThroughputRow.table])
    grown = {dimension: growth(speedups, dimension) for dimension in GROWTH}
    grown = {dimension: part for dimension, part in grown.items() if len(part)}
    if not grown:
        return None
    rows = -(-len(grown) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(style.WIDTH, 1.75 * rows), squeeze=False)
    for ax in axes.flat[len(grown) :]:
        ax.set_visible(False)
    looks: dict[tuple[str, ...], str] = {}
    palette = (style.BLUE, style.ORANGE, style.GREEN, style.VERMILLION, style.PURPLE, style.SKY, style.GREY)
    for ax, (dimension, part) in zip(axes.flat, grown.items(), strict=False):
        for key, line in part.groupby(["model", "dtype", "loop"], sort=False):
            name = tuple(str(piece) for piece in key)
            colour = looks.setdefault(name, palette[len(looks) % len(palette)])
            x = line[dimension] * (100 if dimension == "sparsity_target" else 1)
            ax.errorbar(x, line["speedup"], line["speedup"] * line["log_stderr"], fmt="o-", color=colour, capsize=2)
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
    labels = [f"{style.model_name(model)}, {style.dtype_name(dtype)}, {loop}" for model, dtype, loop in looks]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False, fontsize=8)
    return figure


def shares_figure(run: Run) -> Figure:
    """Where the time of one decoded token goes, per model, dtype and loop."""
    table = run.tables[ShareRow.table]
    groups = list(table.groupby(["model", "layers", "dtype", "loop"], sort=False))
    looks = {
        "mlp": ("MLP", style.BLUE, "white"),
        "attention": ("attention", style.ORANGE, "black"),
        "head": ("head", style.GREEN, "white"),
        "other": ("other", style.GREY, "white"),
    }
    figure, ax = plt.subplots(figsize=(style.WIDTH, 0.7 + 0.36 * len(groups)))
    for place, (_, part) in enumerate(groups):
        left = 0.0
        for row in part[part["share"] > 0].to_dict("records"):
            width = 100 * row["share"]
            name, colour, ink = looks.get(row["component"], (row["component"], style.PURPLE, "white"))
            ax.barh(place, width, 0.7, left=left, color=colour)
            if width > 8:
                label = f"{name} {width:.0f} %"
                ax.text(left + width / 2, place, label, ha="center", va="center", color=ink, fontsize=8)
            left += width
    ax.axvline(100, color=style.BLACK, lw=0.8, ls=":")
    ax.set_yticks(range(len(groups)), [condition_name(*key) for key, _ in groups])
    ax.invert_yaxis()
    ax.set(xlabel="share of the time of one decoded token, dense, %", xlim=(0, None))
    return figure
