"""Figures of e01, e02 and e07: histograms and thresholds, accuracy against sparsity, the attention variant."""

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
from reports.stats import histogram_quantile, variants, zero_shot_means

Tables = Mapping[str, pd.DataFrame]
PAPER_RELU_SPARSITY = 0.90  # the paper gives "about 90 %" and no measured value
LEVEL_COLOURS = {0.5: style.BLUE, 0.7: style.GREEN, 0.9: style.ORANGE}


def e01_histogram(tables: Tables) -> Figure:
    """The paper's Figure 1: share of the activations by magnitude, one panel a layer, a row a model."""
    table, thresholds = tables["e01_histogram"], tables.get("e01_thresholds")
    models = list(table["model"].unique())
    columns = max(part["layer_index"].nunique() for _, part in table.groupby("model"))
    figure, axes = plt.subplots(len(models), columns, figsize=(style.WIDTH, 2.0 * len(models)), squeeze=False)
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
        row[0].set_ylabel("share of activations")
    for ax in axes[-1]:
        ax.set_xlabel(r"$|\mathrm{SiLU}(xW_\mathrm{gate})|$")
    return figure


def _histogram_panel(ax: Axes, layer: pd.DataFrame) -> None:
    """At most 80 bars up to the 99.5th percentile: what is beyond would only stretch the axis."""
    layer = layer.sort_values("bin_left")
    top, total = histogram_quantile(layer, 0.995), layer["count"].sum()
    layer = layer[np.isfinite(layer["bin_right"])]
    edges = np.append(layer["bin_left"].to_numpy(), layer["bin_right"].iloc[-1])
    cumulative = np.append(0.0, np.cumsum(layer["count"].to_numpy())) / total
    step = max(1, int(np.searchsorted(edges, top)) // 80)
    ax.stairs(np.diff(cumulative[::step]), edges[::step], fill=True, color=style.SKY, alpha=0.8, lw=0)
    ax.set_xlim(0, top)
    beyond = 1 - float(np.interp(top, edges, cumulative))
    look: dict[str, Any] = {"color": style.GREY, "fontsize": 7.5, "ha": "right", "linespacing": 1.0}
    ax.text(0.99, 0.03, f"{style.percent(beyond)}\nbeyond", transform=ax.transAxes, **look)
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


def _threshold_lines(ax: Axes, thresholds: pd.DataFrame) -> None:
    """A line a threshold, as high as the bars, and their values in the room above."""
    high = ax.dataLim.y1
    ax.set_ylim(0, 1.5 * high)
    for place, row in enumerate(thresholds.sort_values("sparsity_target").to_dict("records")):
        target = round(row["sparsity_target"], 2)
        colour = LEVEL_COLOURS.get(target, style.BLACK)
        ax.plot([row["threshold"]] * 2, [0, high], color=colour, lw=1.2)
        look: dict[str, Any] = {"color": style.INK.get(colour, colour), "fontsize": 8, "ha": "right", "va": "top"}
        label = f"{100 * target:g} %: {row['threshold']:.3f}"
        ax.text(0.99, 0.98 - 0.11 * place, label, transform=ax.transAxes, **look)


def e01_thresholds(tables: Tables) -> Figure:
    """Thresholds of every layer, and how far the sparsity on held-out text is from its target."""
    table = tables["e01_thresholds"]
    models = list(table["model"].unique())
    figure, axes = plt.subplots(len(models), 2, figsize=(style.WIDTH, 1.9 * len(models)), squeeze=False)
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
        left.set(title=model, ylabel="threshold")
        right.set(title=f"{model}, held-out text", ylabel=f"sparsity {style.MINUS} target, points")
        for ax in (left, right):
            ax.set_xlabel("layer")
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


SITE_NAMES = {"gate": "gate", "attention_input": "attention\ninput", "mlp_input": "MLP\ninput"}


def e07_attention(tables: Tables) -> Figure:
    """Appendix B: accuracy of CATS on the MLP alone and on the attention inputs too, and the sparsity at each place."""
    table = tables["e07_attention"]
    means = zero_shot_means(table)
    models = [str(model) for model in means["model"].unique()]
    figure, axes = plt.subplots(
        len(models), 3, figsize=(style.WIDTH, 2.5 * len(models)), squeeze=False,
        gridspec_kw={"width_ratios": [1.3, 1, 1.2]},
    )  # fmt: skip
    paper = paper_table("appendix_b_attention").rename(columns={"average_accuracy": "value"}).assign(stderr=np.nan)
    for (ours, theirs, sparsity), model in zip(axes, models, strict=True):
        _variant_points(ours, means[means["model"] == model])
        ours.set(title=f"{model} (ours)", ylabel="mean zero-shot accuracy")
        _variant_points(theirs, paper)
        theirs.set_title("Mistral-7B (paper)")
        _site_bars(sparsity, table[table["model"] == model])
        sparsity.set(title=f"{model}, held-out text", ylabel="zeros, %")
    return figure


def _variant_points(ax: Axes, means: pd.DataFrame) -> None:
    """A point a variant, with one standard error, its value written beside."""
    names = variants(means)
    for row in means[means["value"].notna()].to_dict("records"):
        x, colour = names.index(row["variant"]), style.variant_colour(row["variant"].removesuffix("-finetuned"))
        error = row["stderr"] if np.isfinite(row["stderr"]) else None
        ax.errorbar(x, row["value"], error, fmt="o", color=colour, capsize=2, ms=5)
        ax.annotate(style.number(row["value"], 3), (x, row["value"]), xytext=(5, 0), textcoords="offset points",
                    va="center", fontsize=7.5)  # fmt: skip
    labels = [style.variant_name(name).replace(", ", ",\n").replace(" too", "\ntoo") for name in names]
    ax.set_xticks(range(len(names)), labels, fontsize=7.5)
    ax.set_xlim(-0.4, len(names) - 0.3)
    ax.margins(y=0.15)


def _site_bars(ax: Axes, table: pd.DataFrame) -> None:
    """The share of zeros at each place where a variant thresholds; nothing where it does not."""
    sites = table[table["metric"].str.startswith("sparsity_")]
    found = [site for site in SITE_NAMES if f"sparsity_{site}" in set(sites["metric"])]
    names = variants(sites)
    width = 0.8 / max(1, len(names))
    for place, variant in enumerate(names):
        at = sites[sites["variant"] == variant].set_index("metric")["value"]
        x = np.arange(len(found)) + (place - (len(names) - 1) / 2) * width
        heights = [100 * at.get(f"sparsity_{site}", np.nan) for site in found]
        colour = style.variant_colour(variant.removesuffix("-finetuned"))
        label = "gate only" if "attention" not in variant else "attention too"
        label += ", fine-tuned" * variant.endswith("-finetuned")
        ax.bar(x, heights, width * 0.92, color=colour, label=label)
    for target in sites["sparsity_target"].dropna().unique():
        ax.axhline(100 * target, color=style.GREY, lw=0.8, ls=":")
    ax.set_xticks(range(len(found)), [SITE_NAMES[site] for site in found], fontsize=7.5)
    ax.set_ylim(0, 1.45 * ax.get_ylim()[1])
    if names:
        ax.legend(frameon=False, fontsize=7.5, loc="upper right")
