"""Draws every figure that the tables of a run allow, and the headline figure over all runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports import figures_accuracy, figures_finetuning, figures_latency, figures_throughput, style
from reports.load import Run
from reports.stats import batch_one, bytes_bound_speedup, zero_shot_means

Draw = Callable[[Mapping[str, pd.DataFrame]], Figure | None]

FIGURES: dict[str, tuple[str, Draw]] = {
    "e01_histogram": ("e01_histogram", figures_accuracy.e01_histogram),
    "e01_thresholds": ("e01_thresholds", figures_accuracy.e01_thresholds),
    "e02_accuracy": ("e02_zero_shot", figures_accuracy.e02_accuracy),
    "e03_curves": ("e03_finetuning", figures_finetuning.e03_curves),
    "e03_sparsity": ("e03_sparsity", figures_finetuning.e03_sparsity),
    "e04_tasks": ("e04_task_finetuning", figures_finetuning.e04_tasks),
    "e05_latency": ("e05_mlp_latency", figures_latency.e05_latency),
    "e05_speedup": ("e05_mlp_latency", figures_latency.e05_speedup),
    "e05_ablation": ("e05_mlp_latency", figures_latency.e05_ablation),
    "e05_rows": ("e05_mlp_latency", figures_latency.e05_rows),
    "e06_throughput": ("e06_throughput", figures_throughput.e06_throughput),
    "e06_ratio": ("e06_throughput", figures_throughput.e06_ratio),
    "e06_growth": ("e06_throughput", figures_throughput.e06_growth),
    "e06_shares": ("e06_shares", figures_throughput.e06_shares),
    "e07_attention": ("e07_attention", figures_accuracy.e07_attention),
}
"""Figure name -> the table it needs, and what draws it (None where the table holds nothing to draw)."""


def draw_all(runs: list[Run], folder: Path) -> dict[tuple[str, str], str]:
    """Draw each run's figures. Returns (figure name, run label) -> file stem, for those that could be drawn."""
    drawn = {}
    for run in runs:
        suffix = "" if len(runs) == 1 else "_" + re.sub(r"[^A-Za-z0-9.]+", "-", run.label)
        for name, (table, draw) in FIGURES.items():
            if table not in run.tables:
                continue
            figure = draw(run.tables)
            if figure is not None:
                style.save(figure, folder / f"{name}{suffix}")
                drawn[name, run.label] = f"{name}{suffix}"
    return drawn


def draw_headline(runs: list[Run], folder: Path) -> str | None:
    """figures/headline: accuracy (left) and MLP speed-up (right) against sparsity, whichever is there."""
    accurate = next((run for run in runs if "e02_zero_shot" in run.tables), None)
    timed = [run for run in runs if "e05_mlp_latency" in run.tables]
    count = (accurate is not None) + bool(timed)
    if not count:
        return None
    figure, axes = plt.subplots(1, count, figsize=(style.WIDTH if count == 2 else 3.8, 2.7), squeeze=False)
    if accurate is not None:
        _headline_accuracy(axes[0][0], accurate)
    if timed:
        _headline_speed(axes[0][-1], timed)
    style.save(figure, folder / "headline")
    return "headline"


def _headline_accuracy(ax: Axes, run: Run) -> None:
    means = zero_shot_means(run.tables["e02_zero_shot"])
    model = str(means["model"].iloc[0])
    part = means[means["model"] == model]
    figures_accuracy.accuracy_panel(ax, part)
    chance = part["chance"].iloc[0]
    if np.isfinite(chance):
        ax.axhline(chance, color=style.GREY, lw=0.8, ls=":")
        ax.annotate("chance", (0, chance), xytext=(0, 3), textcoords="offset points", color=style.GREY, fontsize=8)
    ax.set(
        title=f"{model}: zero-shot, no fine-tuning",
        ylabel="mean accuracy, 8 tasks" if part["tasks"].iloc[0] == 8 else "mean accuracy",
    )
    cats = part[part["variant"].str.startswith("cats-")].sort_values("sparsity_measured")
    if len(cats):
        ax.annotate("CATS", (100 * cats["sparsity_measured"].iloc[0], cats["value"].iloc[0]), xytext=(0, 7),
                    textcoords="offset points", ha="center", color=style.BLUE, fontsize=8)  # fmt: skip


def _headline_speed(ax: Axes, runs: list[Run]) -> None:
    s = np.linspace(0, 0.95, 60)
    ax.plot(100 * s, bytes_bound_speedup(s), ":", color=style.PURPLE)
    ends = [(95.0, float(bytes_bound_speedup(0.95)), "ratio of bytes", style.PURPLE)]
    palette = iter([style.BLUE, style.ORANGE, style.GREEN, style.VERMILLION, style.SKY, style.BLACK] * 4)
    shapes = []
    for run in runs:
        table = batch_one(run.tables["e05_mlp_latency"])
        table = table[table["implementation"] == "cats"]
        shape = next((name for name in figures_latency.SHAPES if name in set(table["shape"])), None)
        shapes.append(shape)
        for dtype, part in table[table["shape"] == shape].groupby("dtype", sort=False):
            part = part[part["sparsity"] <= 0.96].sort_values("sparsity")
            colour = next(palette)
            ax.plot(100 * part["sparsity"], part["speedup"], "o-", color=colour)
            name = style.dtype_name(str(dtype)) + (f", {run.label}" if len(runs) > 1 else "")
            ends.append((100 * part["sparsity"].iloc[-1], part["speedup"].iloc[-1], name, colour))
    style.level_line(ax, 1)
    style.sparsity_axis(ax, 135)
    ax.set(title=f"MLP of {shapes[0]}, batch 1", xlabel="sparsity, %", ylabel="speed-up over dense")
    style.label_ends(ax, ends)
