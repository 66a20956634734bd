"""Figures of e01 to e04: histograms, accuracy against sparsity, fine-tuning curves, sparsity left, task fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter, ScalarFormatter

from reports import style
from reports.load import paper_models, paper_table
from reports.stats import finetuning_means, histogram_quantile, sparsity_means, task_means, variants, zero_shot_means

Tables = Mapping[str, pd.DataFrame]
PAPER_RELU_SPARSITY = 0.90  # the paper gives "about 90 %" and no measured value
LEVEL_COLOURS = {0.5: style.BLUE, 0.7: style.GREEN, 0.9: style.ORANGE}


def e01_histogram(tables: Tables) -> Figure:
    """The paper's Figure 1: share of the activations by magnitude, one panel a layer, a row a model."""
    table, thresholds = tables["e01_histogram"], tables.get("e01_thresholds")
    models = list(table["model"].unique())
    columns = max(part["layer_index"].nunique() for _, part in table.groupby("model"))
    figure, axes = plt.subplots(len(models), columns, figsize=(style.WIDTH, 2.1 * len(models)), squeeze=False)
    for row, model in zip(axes, models, strict=True):
        of_model = table[table["model"] == model]
        for ax in row[of_model["layer_index"].nunique() :]:
            ax.set_visible(False)
        for ax, (index, layer) in zip(row, of_model.groupby("layer_index"), strict=False):
            _histogram_panel(ax, layer)
            ax.set_title(f"layer {index:.0f}" if len(models) == 1 else f"{model}, layer {index:.0f}")
            if thresholds is not None:
                at = thresholds[(thresholds["model"] == model) & (thresholds["layer_index"] == index)]
                _threshold_lines(ax, at)
        row[0].set_ylabel("share of activations per bin")
    for ax in axes[-1]:
        ax.set_xlabel(r"$|\mathrm{SiLU}(xW_\mathrm{gate})|$")
    return figure


def _histogram_panel(ax: Axes, layer: pd.DataFrame) -> None:
    """At most 80 bars up to the 99.5th percentile: what is beyond would only stretch the axis."""
    layer = layer[np.isfinite(layer["bin_right"])].sort_values("bin_left")
    top = histogram_quantile(layer, 0.995)
    edges = np.append(layer["bin_left"].to_numpy(), layer["bin_right"].iloc[-1])
    cumulative = np.append(0.0, np.cumsum(layer["count"].to_numpy()))
    step = max(1, int(np.searchsorted(edges, top)) // 80)
    edges, cumulative = edges[::step], cumulative[::step]
    ax.stairs(np.diff(cumulative) / cumulative[-1], edges, fill=True, color=style.SKY, alpha=0.8, lw=0)
    ax.set_xlim(0, top)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))


def _threshold_lines(ax: Axes, thresholds: pd.DataFrame) -> None:
    for place, row in enumerate(thresholds.sort_values("sparsity_target").to_dict("records")):
        target = round(row["sparsity_target"], 2)
        colour = LEVEL_COLOURS.get(target, style.BLACK)
        ax.axvline(row["threshold"], color=colour, lw=1.2)
        label = f"{100 * target:g} %: {row['threshold']:.3f}"
        look: dict[str, Any] = {"transform": ax.transAxes, "ha": "right", "va": "top", "color": colour, "fontsize": 8}
        ax.text(0.99, 0.97 - 0.13 * place, label, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1}, **look)


def e01_thresholds(tables: Tables) -> Figure:
    """Thresholds of every layer, and how far the sparsity on held-out text is from its target."""
    table = tables["e01_thresholds"]
    models = list(table["model"].unique())
    figure, axes = plt.subplots(len(models), 2, figsize=(style.WIDTH, 2.1 * len(models)), squeeze=False)
    for (left, right), model in zip(axes, models, strict=True):
        ends = []
        for target, part in table[table["model"] == model].groupby("sparsity_target"):
            part = part.sort_values("layer_index")
            colour = LEVEL_COLOURS.get(round(float(str(target)), 2), style.BLACK)
            left.plot(part["layer_index"], part["threshold"], "o-", color=colour)
            drift = 100 * (part["sparsity_heldout"] - float(str(target)))
            right.plot(part["layer_index"], drift, "o-", color=colour)
            ends.append(
                (part["layer_index"].iloc[-1], part["threshold"].iloc[-1], f"{100 * float(str(target)):g} %", colour)
            )
        left.set_ylim(bottom=0)
        right.axhline(0, color=style.GREY, lw=0.8, ls=":")
        for bound in (-1, 1):
            right.axhline(bound, color=style.GREY, lw=0.6, ls="--")
        right.set_ylim(
            *(f(bound, limit) for f, bound, limit in zip((min, max), right.get_ylim(), (-1.3, 1.3), strict=True))
        )
        for ax, label in ((left, "threshold"), (right, f"held-out sparsity {style.MINUS} target, points")):
            ax.set(xlabel="layer", ylabel=label, title=model)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        style.label_ends(left, ends)
    return figure


def e02_accuracy(tables: Tables) -> Figure:
    """Mean accuracy (and perplexity) against sparsity: CATS as a line, ReLUfication as a point; the paper's beside."""
    means = zero_shot_means(tables["e02_zero_shot"])
    perplexity = zero_shot_means(tables["e02_zero_shot"], "perplexity")
    paper = paper_table("table1_zero_shot").query("task == 'average'")
    models = [str(model) for model in means["model"].unique()]
    beside = list(dict.fromkeys(name for model in models for name in paper_models(model, paper["model"])))
    panels = [(model, True) for model in models] + [(name, False) for name in beside]
    extra = 1 if len(perplexity) else 0
    count = len(panels) + extra
    rows = (count + 3) // 4
    columns = min(count, 4)
    figure, axes = plt.subplots(rows, columns, figsize=(style.WIDTH, 2.3 * rows), squeeze=False)
    flat = list(axes.flat)
    for ax in flat[count:]:
        ax.set_visible(False)
    for ax, (name, ours) in zip(flat, panels, strict=False):
        part = means[means["model"] == name] if ours else _as_means(paper[paper["model"] == name])
        accuracy_panel(ax, part)
        ax.set_title(f"{name} (ours)" if ours else f"{name} (paper)")
    if extra:
        for model in models:
            accuracy_panel(flat[count - 1], perplexity[perplexity["model"] == model])
        _perplexity_axis(flat[count - 1], perplexity["value"])
    flat[0].set_ylabel("mean zero-shot accuracy")
    return figure


def _perplexity_axis(ax: Axes, values: pd.Series) -> None:
    ax.set(title="held-out text (ours)", ylabel="perplexity")
    if values.max() > 3 * values.min():
        ax.set_yscale("log")
        ax.set_ylabel("perplexity, log scale")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.yaxis.set_minor_formatter(NullFormatter())


def _as_means(paper: pd.DataFrame) -> pd.DataFrame:
    target = paper["variant"].map(
        {"dense": 0.0, "cats-50": 0.5, "cats-70": 0.7, "cats-90": 0.9, "relufication": PAPER_RELU_SPARSITY}
    )
    return pd.DataFrame(
        {"variant": paper["variant"], "value": paper["accuracy"], "sparsity_measured": target, "stderr": np.nan}
    )


def accuracy_panel(ax: Axes, means: pd.DataFrame) -> None:
    """One model's values against measured sparsity, in percent, with one standard error."""
    at = means[means["value"].notna()].copy()
    at.loc[at["variant"] == "dense", "sparsity_measured"] = 0.0
    line = at[at["variant"].eq("dense") | at["variant"].str.fullmatch(r"cats-(\d+|matched)")].sort_values(
        "sparsity_measured"
    )
    ax.plot(100 * line["sparsity_measured"], line["value"], color=style.GREY, lw=1, zorder=1)
    for row in at.to_dict("records"):
        marker = "D" if row["variant"] == "relufication" else "o"
        colour = style.variant_colour(row["variant"])
        error = row["stderr"] if np.isfinite(row["stderr"]) else None
        ax.errorbar(100 * row["sparsity_measured"], row["value"], error, fmt=marker, color=colour, capsize=2, ms=5)
    relu = at[at["variant"] == "relufication"]
    if len(relu):
        ax.annotate(
            "ReLU", (100 * relu["sparsity_measured"].iloc[0], relu["value"].iloc[0]), xytext=(-6, -2),
            textcoords="offset points", ha="right", va="center", color=style.VERMILLION, fontsize=8,
        )  # fmt: skip
    ax.set(xlabel="sparsity, %", xlim=(-6, 104), xticks=[0, 50, 70, 90])


def e03_curves(tables: Tables) -> Figure:
    """The paper's Figure 2: mean accuracy against LoRA steps, all variants; the band spans the seeds."""
    means = finetuning_means(tables["e03_finetuning"])
    paper = paper_table("figure2_finetuning_accuracy")
    models = [str(model) for model in means["model"].unique()]
    beside = list(dict.fromkeys(name for model in models for name in paper_models(model, paper["model"])))
    count = len(models) + len(beside)
    ratios = [1.5] * len(models) + [1.0] * len(beside)
    figure, axes = plt.subplots(
        1, count, figsize=(style.WIDTH, 2.9), squeeze=False, gridspec_kw={"width_ratios": ratios}
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
        len(models), 2, figsize=(style.WIDTH, 2.8 * len(models)), squeeze=False, gridspec_kw={"width_ratios": [1.5, 1]}
    )
    for (left, right), model in zip(axes, models, strict=True):
        part = table[table["model"] == model]
        for variant in variants(part):
            _sparsity_lines(left, part[part["variant"] == variant], style.variant_colour(variant))
        means = sparsity_means(part)
        _sparsity_means_panel(right, means, paper[paper["model"].isin(paper_models(model, paper["model"]))])
        left.set(xlabel="layer", ylabel="sparsity after fine-tuning, %", title=f"{model} (ours), by layer")
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        low = 100 * min(part["sparsity_measured"].min(), 0.4) - 3
        for ax in (left, right):
            ax.set_ylim(low, 101)
    return figure


def _sparsity_lines(ax: Axes, part: pd.DataFrame, colour: str) -> None:
    ax.axhline(100 * part["sparsity_target"].iloc[0], color=colour, lw=0.8, ls=":")
    for recalibrated, of_kind in part.groupby("recalibrated"):
        layers = 100 * of_kind.groupby("layer_index")["sparsity_measured"].mean()
        ax.plot(
            layers.index, layers, "s--" if recalibrated else "o-", color=colour, mfc="white" if recalibrated else colour
        )


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
    labels = ["ours", "ours, reca-\nlibrated", *(f"{name}\n(paper)" for name in names[2:])]
    ax.set_xticks(range(len(names)), labels, fontsize=7.5)
    ax.set(title="mean over layers", xlim=(-0.5, len(names) - 0.5))


def e04_tasks(tables: Tables) -> Figure:
    """The paper's Table 2 as a picture: accuracy against base after task fine-tuning, ours and the paper's."""
    means = task_means(tables["e04_task_finetuning"])
    paper = paper_table("table2_task_finetuning").assign(stderr=np.nan)
    models = [str(model) for model in means["model"].unique()]
    panels = [(f"{model} (ours)", means[means["model"] == model]) for model in models]
    panels += [("Mistral-7B (paper)", paper)]
    figure, axes = plt.subplots(1, len(panels), figsize=(style.WIDTH, 2.5), squeeze=False, sharey=True)
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
