"""Figures of e03 and e04: fine-tuning curves, the sparsity left, task fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reports import style
from reports.load import paper_models, paper_table
from reports.stats import finetuning_means, sparsity_means, task_means, variants

Tables = Mapping[str, pd.DataFrame]


def e03_curves(tables: Tables) -> Figure:
    """The paper's Figure 2: mean accuracy against LoRA steps, all variants; the band spans the seeds."""
    means = finetuning_means(tables["e03_finetuning"])
    paper = paper_table("figure2_finetuning_accuracy")
    models = [str(model) for model in means["model"].unique()]
    beside = list(dict.fromkeys(name for model in models for name in paper_models(model, paper["model"])))
    count = len(models) + len(beside)
    ratios = [1.5] * len(models) + [1.0] * len(beside)
    figure, axes = plt.subplots(
        1, count, figsize=(style.WIDTH, 2.5), squeeze=False, gridspec_kw={"width_ratios": ratios}
    )
    for ax, name in zip(axes[0], [*models, *beside], strict=True):
        ours = name in models
        part = (
            means[means["model"] == name]
            if ours
            else paper[paper["model"] == name].rename(columns={"average_accuracy": "accuracy"})
        )
        ends = []
        for variant in variants(part):
            curve = part[part["variant"] == variant].sort_values("step")
            colour = style.variant_colour(variant)
            ax.plot(curve["step"], curve["accuracy"], "o-", color=colour, ms=3)
            if ours:
                ax.fill_between(curve["step"], curve["low"], curve["high"], color=colour, alpha=0.18, lw=0)
                ends.append((curve["step"].iloc[-1], curve["accuracy"].iloc[-1], style.variant_name(variant), colour))
        ax.set(title=f"{name} ({'ours' if ours else 'paper'})", xlabel="LoRA steps")
        ax.xaxis.set_major_locator(MaxNLocator(4))
        if ours:
            ax.set_xlim(right=part["step"].max() * 1.42)
            ax.set_xticks(sorted(part["step"].unique())[:: max(1, part["step"].nunique() // 5)])
            style.label_ends(ax, ends)
        else:
            base = paper_table("table1_zero_shot").query("task == 'average' and variant == 'dense' and model == @name")
            ax.axhline(base["accuracy"].iloc[0], color=style.GREY, lw=1, ls="--")
    axes[0][0].set_ylabel("mean zero-shot accuracy")
    return figure


def e03_sparsity(tables: Tables) -> Figure:
    """The paper's Figure 5, by layer: sparsity left after fine-tuning, with and without recalibration; means beside."""
    table = tables["e03_sparsity"]
    table = table[table["step"] == table.groupby(["model", "variant"])["step"].transform("max")]
    paper = paper_table("figure5_finetuned_sparsity")
    models = [str(model) for model in table["model"].unique()]
    figure, axes = plt.subplots(
        len(models), 2, figsize=(style.WIDTH, 2.4 * len(models)), squeeze=False, gridspec_kw={"width_ratios": [1.5, 1]}
    )
    for (left, right), model in zip(axes, models, strict=True):
        part = table[table["model"] == model]
        ends = []
        for variant in variants(part):
            ends.append(_sparsity_lines(left, part[part["variant"] == variant], variant))
        style.label_ends(left, ends, size=7.5)
        means = sparsity_means(part)
        _sparsity_means_panel(right, means, paper[paper["model"].isin(paper_models(model, paper["model"]))])
        left.set(xlabel="layer", ylabel="sparsity after fine-tuning, %", title=f"{model} (ours), by layer")
        last = part["layer_index"].max()
        left.set_xlim(right=1.25 * last + 0.3)
        left.set_xticks([tick for tick in MaxNLocator(integer=True).tick_values(0, last) if 0 <= tick <= last])
        low = 100 * min(part["sparsity_measured"].min(), 0.4) - 3
        for ax in (left, right):
            ax.set_ylim(low, 101)
    return figure


def _sparsity_lines(ax: Axes, part: pd.DataFrame, variant: str) -> style.End:
    """A line a kind of threshold over the layers; returns where its name goes."""
    colour = style.variant_colour(variant)
    ends, target = [part["layer_index"].min(), part["layer_index"].max()], 100 * part["sparsity_target"].iloc[0]
    ax.plot(ends, [target, target], color=colour, lw=0.8, ls=":")
    for recalibrated, of_kind in part.groupby("recalibrated"):
        layers = 100 * of_kind.groupby("layer_index")["sparsity_measured"].mean()
        ax.plot(
            layers.index, layers, "s--" if recalibrated else "o-", color=colour, mfc="white" if recalibrated else colour
        )
    return layers.index[-1], layers.iloc[-1], style.variant_name(variant), colour


def _sparsity_means_panel(ax: Axes, means: pd.DataFrame, paper: pd.DataFrame) -> None:
    names = ["ours", "recalibrated", *paper["model"].unique()]
    for row in means.to_dict("records"):
        colour = style.variant_colour(row["variant"])
        ax.axhline(100 * row["sparsity_target"], color=colour, lw=0.8, ls=":")
        again = row["recalibrated"]
        marker, fill = ("s", "white") if again else ("o", colour)
        ax.plot(int(again), 100 * row["sparsity"], marker, color=colour, mfc=fill, ms=5)
    for row in paper.to_dict("records"):
        colour = style.variant_colour(row["variant"])
        ax.plot(names.index(row["model"]), row["average_sparsity_percent"], "D", color=colour, ms=5)
    labels = ["ours", "recali-\nbrated", *(f"{name}\n(paper)" for name in names[2:])]
    ax.set_xticks(range(len(names)), labels, fontsize=7)
    ax.set(title="mean over layers", xlim=(-0.5, len(names) - 0.5))


def e04_tasks(tables: Tables) -> Figure:
    """The paper's Table 2 as a picture: accuracy against base after task fine-tuning, ours and the paper's."""
    means = task_means(tables["e04_task_finetuning"])
    paper = paper_table("table2_task_finetuning").assign(stderr=np.nan)
    models = [str(model) for model in means["model"].unique()]
    panels = [(f"{model} (ours)", means[means["model"] == model]) for model in models]
    panels += [("Mistral-7B (paper)", paper)]
    figure, axes = plt.subplots(1, len(panels), figsize=(style.WIDTH, 2.0), squeeze=False, sharey=True)
    for ax, (title, part) in zip(axes[0], panels, strict=True):
        names = [name for name in variants(part) if name != "dense"]
        tasks = [task for task in part["task"].unique() if task != "average"] + ["average"]
        for place, variant in enumerate(names):
            change, errors = [], []
            for task in tasks:
                at = part[part["task"] == task].set_index("variant")
                known = {"dense", variant} <= set(at.index)
                change.append(100 * (at["accuracy"][variant] - at["accuracy"]["dense"]) if known else np.nan)
                errors.append(100 * np.hypot(at["stderr"][variant], at["stderr"]["dense"]) if known else np.nan)
            width = 0.8 / len(names)
            x = np.arange(len(tasks)) + (place - (len(names) - 1) / 2) * width
            shown = None if np.isnan(errors).all() else errors
            colour = style.variant_colour(variant)
            ax.bar(
                x,
                change,
                width * 0.92,
                yerr=shown,
                color=colour,
                error_kw={"lw": 0.8},
                label=style.variant_name(variant),
            )
        ax.axhline(0, color=style.GREY, lw=0.8)
        ax.set_xticks(range(len(tasks)), [style.task_name(task) for task in tasks])
        ax.set_title(title)
    axes[0][0].set_ylabel(f"accuracy {style.MINUS} base, points")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    return figure
