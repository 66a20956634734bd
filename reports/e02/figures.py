"""Figures of e02: accuracy and perplexity against sparsity, and the cost of CATS-50 against the size of the model."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from experiments.framework.tables import ItemSample, TextSample, ZeroShotRow
from reports.core import style
from reports.core.load import Run, paper_models, paper_table
from reports.core.section import Painter
from reports.core.verdicts import POCKET_MODEL
from reports.measures.accuracy import log_ratio, scores, zero_shot_means

PAPER_RELU_SPARSITY = 0.90  # the paper gives "about 90 %" and no measured value
HALF = "cats-50"


def accuracy_figure(run: Run) -> Figure:
    """Mean accuracy (and perplexity) against sparsity: a line per criterion, ReLUfication as a point; the paper's."""
    table = run.tables[ZeroShotRow.table]
    means, perplexity = zero_shot_means(table), zero_shot_means(table, "perplexity")
    paper = paper_table("table1_zero_shot").query("task == 'average'")
    models = [str(model) for model in means["model"].unique()] if len(means) else []
    beside = list(dict.fromkeys(name for model in models for name in paper_models(model, paper["model"])))
    panels = [(model, True) for model in models] + [(name, False) for name in beside]
    extra = len(perplexity["model"].unique()) if len(perplexity) else 0
    count = max(1, len(panels) + extra)
    rows, columns = (count + 3) // 4, min(count, 4)
    figure, axes = plt.subplots(rows, columns, figsize=(style.WIDTH, 2.3 * rows), squeeze=False)
    flat = list(axes.flat)
    for ax in flat[count:]:
        ax.set_visible(False)
    for ax, (name, ours) in zip(flat, panels, strict=False):
        part = means[means["model"] == name] if ours else _as_means(paper[paper["model"] == name])
        accuracy_panel(ax, part)
        ax.set_title(f"{style.short_name(name)} (ours)" if ours else f"{name} (paper)", fontsize=8.5)
    for ax, (model, part) in zip(
        flat[len(panels) :], perplexity.groupby("model", sort=False) if extra else (), strict=False
    ):
        accuracy_panel(ax, part)
        _perplexity_axis(ax, part["value"], style.short_name(str(model)))
    flat[0].set_ylabel("mean zero-shot accuracy")
    return figure


def _perplexity_axis(ax: Axes, measured: pd.Series, model: str) -> None:
    ax.set(ylabel="perplexity")
    ax.set_title(f"{model}, text", fontsize=8.5)
    if measured.max() > 3 * measured.min():
        ax.set_yscale("log")
        ax.set_ylabel("perplexity, log scale")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.yaxis.set_minor_formatter(NullFormatter())


def _as_means(paper: pd.DataFrame) -> pd.DataFrame:
    targets = {"dense": 0.0, "cats-50": 0.5, "cats-70": 0.7, "cats-90": 0.9, "relufication": PAPER_RELU_SPARSITY}
    criterion = paper["variant"].str.split("-").str[0]
    return pd.DataFrame(
        {
            "variant": paper["variant"],
            "criterion": criterion,
            "value": paper["accuracy"],
            "sparsity_measured": paper["variant"].map(targets),
            "stderr": np.nan,
        }
    )


def accuracy_panel(ax: Axes, means: pd.DataFrame, relu_offset: tuple[float, float] = (-6, -2)) -> None:
    """One model's values against measured sparsity, in percent, with one standard error; `relu_offset`, in points: from
    ReLUfication's marker to its name."""
    at = means[means["value"].notna()].copy()
    at.loc[at["variant"] == "dense", "sparsity_measured"] = 0.0
    dense = at[at["variant"] == "dense"]
    others = [name for name in at["criterion"].unique() if name not in ("dense", "cats", "relufication")]
    colours = dict(zip(others, style.OTHER_COLOURS * len(others), strict=False))
    ends = []
    for criterion, part in at.groupby("criterion", sort=False):
        colour = colours.get(str(criterion), style.GREY)
        if criterion not in ("dense", "relufication"):
            line = pd.concat([dense, part]).sort_values("sparsity_measured")
            ax.plot(100 * line["sparsity_measured"], line["value"], color=colour, lw=1, zorder=1)
        for row in part.to_dict("records"):
            marker = "D" if criterion == "relufication" else "s" if criterion in colours else "o"
            shown = colour if criterion in colours else style.variant_colour(row["variant"])
            error = row["stderr"] if np.isfinite(row["stderr"]) else None
            ax.errorbar(100 * row["sparsity_measured"], row["value"], error, fmt=marker, color=shown, capsize=2, ms=5)
        if criterion in colours:
            last = part.sort_values("sparsity_measured").iloc[-1]
            ends.append((100 * last["sparsity_measured"], last["value"], str(criterion), colour))
    style.label_ends(ax, ends, size=7)
    relu = at[at["variant"] == "relufication"]
    if len(relu):
        ax.annotate(
            "ReLU", (100 * relu["sparsity_measured"].iloc[0], relu["value"].iloc[0]), xytext=relu_offset,
            textcoords="offset points", ha="right", va="center", color=style.VERMILLION, fontsize=8,
        )  # fmt: skip
    ax.set(xlabel="sparsity, %", xlim=(-6, 140 if ends else 104), xticks=[0, 50, 70, 90])


def glance(runs: list[Run]) -> Painter | None:
    """Accuracy against sparsity of the largest model that has it, the pocket model only where there is no other."""
    tables = [table for run in runs if (table := run.table(ZeroShotRow)) is not None]
    models = [(str(model), of) for means in map(zero_shot_means, tables) if len(means)
              for model, of in means.groupby("model", sort=False)]  # fmt: skip
    if not models:
        return None
    model, part = min(models, key=lambda pair: (pair[0] == POCKET_MODEL, -np.nan_to_num(style.parameters(pair[0]))))

    def paint(ax: Axes) -> None:
        accuracy_panel(ax, part, relu_offset=(-6, 7))  # above the line of chance, which it may be near to
        chance, count = part["chance"].iloc[0], part["tasks"].iloc[0]
        if np.isfinite(chance):
            ax.axhline(chance, color=style.GREY, lw=0.8, ls=":")
            ax.annotate("chance", (0, chance), xytext=(0, 3), textcoords="offset points", color=style.GREY, fontsize=8)
        ax.set(title=f"{style.short_name(model)}: zero-shot, no fine-tuning", ylabel=f"mean accuracy, {count} tasks")

    return paint


def size_points(run: Run) -> pd.DataFrame:
    """What CATS-50 costs: a row per model and metric, ours with the 95 % interval, and the paper's without one.

    Columns: model, paper (whether it is the paper's), parameters, metric (``acc``: points of mean accuracy;
    ``perplexity``: increase in percent), value, low, high.
    """
    table = run.tables[ZeroShotRow.table]
    rows = []
    for model in dict.fromkeys(table["model"]):
        if not math.isfinite(style.parameters(model)):
            continue
        who = {"model": style.short_name(model), "paper": False, "parameters": style.parameters(model)}
        part = table[table["model"] == model]
        at = scores(part, run.table(ItemSample), model)
        if {"dense", HALF} <= set(at):
            change = at[HALF].lead(at["dense"], to_dense=True)
            ends = [100 * end for end in (change.value, change.low, change.high)]
            rows.append({**who, "metric": "acc", **dict(zip(("value", "low", "high"), ends, strict=True))})
        text = part[part["metric"] == "perplexity"]
        if {"dense", HALF} <= set(text["variant"]):
            raised = log_ratio(text, run.table(TextSample), model, HALF)
            ends = [100 * math.expm1(end) for end in (raised.value, raised.low, raised.high)]
            rows.append({**who, "metric": "perplexity", **dict(zip(("value", "low", "high"), ends, strict=True))})
    return pd.DataFrame([*rows, *_paper_sizes()])


def _paper_sizes() -> list[dict[str, object]]:
    accuracy = paper_table("table1_zero_shot").query("task == 'average'").pivot(index="model", columns="variant")
    text = paper_table("table3_v4_perplexity").query("variant == @HALF and fine_tuned == 'no'")
    unknown = {"low": math.nan, "high": math.nan}
    change = 100 * (accuracy["accuracy"][HALF] - accuracy["accuracy"]["dense"])
    points = [(name, "acc", value) for name, value in change.items()]
    points += list(text.assign(metric="perplexity")[["model", "metric", "perplexity_increase_percent"]].to_numpy())
    return [
        {"model": str(name), "paper": True, "parameters": style.parameters(str(name)), "metric": metric, "value": value,
         **unknown}
        for name, metric, value in points
    ]  # fmt: skip


def size_figure(run: Run) -> Figure | None:
    """Two panels over the size of the model: what CATS-50 costs in accuracy, and in perplexity."""
    points = size_points(run)
    if points["paper"].all():
        return None
    figure, axes = plt.subplots(1, 2, figsize=(style.WIDTH, 2.5))
    titles = {"acc": ("change of mean accuracy, points", -2.0), "perplexity": ("increase of perplexity, %", 2.0)}
    for ax, (metric, (title, bound)) in zip(axes, titles.items(), strict=True):
        part = points[points["metric"] == metric]
        for row in part.to_dict("records"):
            colour = style.GREEN if row["paper"] else style.BLUE
            error = None
            if math.isfinite(row["low"]):
                error = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
            marker = "D" if row["paper"] else "o"
            ax.errorbar(row["parameters"], row["value"], error, fmt=marker, color=colour, capsize=2, ms=5)
        ax.axhline(bound, color=style.GREY, lw=0.8, ls=":")
        ax.set(xscale="log", xlabel="parameters", ylabel=title)
        ax.set_xlim(part["parameters"].min() / 1.8, part["parameters"].max() * 6)
        ends = [(row["parameters"], row["value"], row["model"] + " (paper)" * row["paper"],
                 style.GREEN if row["paper"] else style.BLUE) for row in part.to_dict("records")]  # fmt: skip
        style.label_ends(ax, ends, size=7, in_a_column=False)
    axes[1].set_yscale("log")
    axes[1].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes[1].yaxis.set_major_formatter(ScalarFormatter())
    axes[1].yaxis.set_minor_formatter(NullFormatter())
    return figure
