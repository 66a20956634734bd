"""What the report says of e01: activation histograms and thresholds (Figure 1)."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from experiments.framework.tables import HistogramRow, ThresholdRow
from reports.core import style
from reports.core.document import Block, Table, escape, without_constant
from reports.core.load import Run
from reports.core.protocol import of, phrases, values
from reports.core.section import Aspect, Drawing, Section
from reports.measures.histogram import concentration, quantile
from reports.rules.e01 import c1_concentration

LEVEL_COLOURS = {0.5: style.BLUE, 0.7: style.GREEN, 0.9: style.ORANGE}

PROTOCOL = (
    Aspect("models", "Llama2-7B, Mistral-7B", of(HistogramRow, lambda table: values(table, "model"))),
    Aspect("control", "none", of(HistogramRow, lambda table: _controls(table))),
    Aspect("calibration", "500 samples of RefinedWeb (the authors' code: 100)",
           phrases("e01", "{blocks} blocks of {length} tokens, text: {source}")),
)  # fmt: skip

HISTOGRAM_CAPTION = """
Share of the gate activations by magnitude, as in the paper's Figure 1. Vertical lines: the thresholds that
zero 50, 70 and 90 % of the calibration text's activations. Black outline: the same model with random weights on the
same text, where it was measured. The axis ends at the 99.5th percentile, or where the measured bins end; the share
beyond it is written at its end."""
THRESHOLDS_CAPTION = """
Left: the threshold of every layer, per target sparsity. Right, in the same colours: how far the sparsity on held-out
text is from its target; dashed lines at one point."""
CONCENTRATION_TABLE = """
Share of the gate activations below a tenth of their 99.9th percentile (C1), and the 50 % quantile as a share of that
percentile; the control is the same model with random weights on the same text."""
THRESHOLD_TABLE = "Thresholds over the layers and the sparsity they give on text that calibration has not seen."


def _controls(table: pd.DataFrame) -> str:
    controlled, everything = (set(part["model"]) for part in (table[table["weights"] == "random"], table))
    which = "" if controlled == everything else f" ({', '.join(map(style.model_name, sorted(controlled)))})"
    return f"random weights, the same text{which}" if controlled else "none"


def histogram_figure(run: Run) -> Figure:
    """The paper's Figure 1: share of the activations by magnitude, one panel per layer, a row per model."""
    table, thresholds = run.tables[HistogramRow.table], run.table(ThresholdRow)
    control, table = table[table["weights"] == "random"], table[table["weights"] != "random"]
    models = list(table["model"].unique())
    columns = max((part["layer_index"].nunique() for _, part in table.groupby("model")), default=1)
    size = (style.WIDTH, 2.0 if len(models) == 1 else 1.15 * len(models) + 0.3)
    figure, axes = plt.subplots(max(1, len(models)), columns, figsize=size, squeeze=False)
    for row, model in zip(axes, models, strict=False):
        of_model = table[table["model"] == model]
        for ax in row[of_model["layer_index"].nunique() :]:
            ax.set_visible(False)
        for ax, (index, layer) in zip(row, of_model.groupby("layer_index"), strict=False):
            _histogram_panel(ax, layer, control[(control["model"] == model) & (control["layer_index"] == index)])
            ax.set_title(f"layer {index:.0f}" if len(models) == 1 else f"{style.short_name(model)}, layer {index:.0f}")
            if thresholds is not None:
                at = thresholds[(thresholds["model"] == model) & (thresholds["layer_index"] == index)]
                at = at[at["criterion"].eq("cats") & at["weights"].ne("random")]
                _threshold_lines(ax, at, small=len(models) > 1)
        row[0].set_ylabel("share of activations")
    for ax in axes[-1]:
        ax.set_xlabel(r"$|\mathrm{SiLU}(xW_\mathrm{gate})|$")
    return figure


def _histogram_panel(ax: Axes, layer: pd.DataFrame, control: pd.DataFrame) -> None:
    """At most 80 bars up to the 99.5th percentile: what is beyond would only stretch the axis."""
    top = quantile(layer, 0.995)
    edges, cumulative = _cumulative(layer)
    step = max(1, int(np.searchsorted(edges, top)) // 80)
    ax.stairs(np.diff(cumulative[::step]), edges[::step], fill=True, color=style.SKY, alpha=0.8, lw=0)
    if len(control):
        outline = np.interp(edges[::step], *_cumulative(control))
        ax.stairs(np.diff(outline), edges[::step], color=style.BLACK, lw=0.8)
    ax.set_xlim(0, top)
    beyond = 1 - float(np.interp(top, edges, cumulative))
    look: dict[str, Any] = {"color": style.GREY, "fontsize": 7.5, "ha": "right", "linespacing": 1.0}
    ax.text(0.99, 0.03, f"{style.percent(beyond)}\nbeyond", transform=ax.transAxes, **look)
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


def _cumulative(layer: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Edges of the closed bins, and the share of the activations below each."""
    layer = layer.sort_values("bin_left")
    closed = layer[np.isfinite(layer["bin_right"])]
    edges = np.append(closed["bin_left"].to_numpy(), closed["bin_right"].iloc[-1])
    return edges, np.append(0.0, np.cumsum(closed["count"].to_numpy())) / layer["count"].sum()


def _threshold_lines(ax: Axes, thresholds: pd.DataFrame, small: bool) -> None:
    """A line per threshold, as high as the bars, and their values in the room above."""
    high = ax.dataLim.y1
    room, size, step = (1.9, 6.5, 0.16) if small else (1.5, 8, 0.11)
    ax.set_ylim(0, room * high)
    for place, row in enumerate(thresholds.sort_values("sparsity_target").to_dict("records")):
        target = round(row["sparsity_target"], 2)
        colour = LEVEL_COLOURS.get(target, style.BLACK)
        ax.plot([row["threshold"]] * 2, [0, high], color=colour, lw=1.2)
        look: dict[str, Any] = {"color": style.INK.get(colour, colour), "fontsize": size, "ha": "right", "va": "top"}
        label = f"{100 * target:g} %: {row['threshold']:.3f}"
        ax.text(0.99, 0.98 - step * place, label, transform=ax.transAxes, **look)


def thresholds_figure(run: Run) -> Figure:
    """Thresholds of every layer, and how far the sparsity on held-out text is from its target."""
    table = run.tables[ThresholdRow.table]
    table = table[table["criterion"].eq("cats") & table["weights"].ne("random")]
    models = list(table["model"].unique())
    size = (style.WIDTH, 1.9 * max(1, len(models)))
    figure, axes = plt.subplots(max(1, len(models)), 2, figsize=size, squeeze=False)
    for (left, right), model in zip(axes, models, strict=False):
        ends = []
        for target, part in table[table["model"] == model].groupby("sparsity_target"):
            part, level = part.sort_values("layer_index"), float(str(target))
            colour = LEVEL_COLOURS.get(round(level, 2), style.BLACK)
            left.plot(part["layer_index"], part["threshold"], "o-", color=colour)
            right.plot(part["layer_index"], 100 * (part["sparsity_heldout"] - level), "o-", color=colour)
            ends.append((part["layer_index"].iloc[-1], part["threshold"].iloc[-1], f"{100 * level:g} %", colour))
        left.set_ylim(bottom=0)
        right.axhline(0, color=style.GREY, lw=0.8, ls=":")
        for bound in (-1, 1):
            right.axhline(bound, color=style.GREY, lw=0.6, ls="--")
        low, high = right.get_ylim()
        right.set_ylim(min(low, -1.3), max(high, 1.3))
        name = style.short_name(model)
        left.set(title=name, ylabel="threshold")
        right.set(title=f"{name}, held-out text", ylabel=f"sparsity {style.MINUS} target, points")
        for ax in (left, right):
            ax.set_xlabel("layer")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        style.label_ends(left, ends)
    return figure


def concentration_table(table: pd.DataFrame) -> pd.DataFrame:
    """Per model and layer: how concentrated the activations are, beside the control."""
    rows, last = [], None
    several = table["model"].nunique() > 1
    for (model, layer), part in table.groupby(["model", "layer_index"], sort=False):
        cells = {"Model": escape(style.model_name(str(model))) if model != last else "", "Layer": f"{layer:.0f}"}
        last = model
        for weights, name in (("pretrained", "trained"), ("random", "control")):
            of_weights = part[part["weights"] == weights]
            known = len(of_weights) > 0
            cells[f"Small, {name}"] = style.percent(concentration(of_weights).share) if known else style.DASH
            median = quantile(of_weights, 0.5) / quantile(of_weights, 0.999) if known else float("nan")
            cells[f"Median, {name}"] = style.percent(median)
        rows.append(cells)
    frame = pd.DataFrame(rows)
    return frame if several else frame.drop(columns="Model")


def threshold_table(table: pd.DataFrame) -> pd.DataFrame:
    """Per model, criterion and target: thresholds over layers, and the sparsity they give on held-out text."""
    rows = []
    groups = ["model", "weights", "criterion", "sparsity_target"]
    for (model, weights, criterion, target), part in table.groupby(groups, sort=False):
        held, level = part["sparsity_heldout"], float(str(target))
        rows.append(
            {
                "Model": escape(style.model_name(str(model))),
                "Weights": escape(str(weights)),
                "Criterion": escape(str(criterion)),
                "Target": f"{100 * level:g} %",
                "Layers": str(len(part)),
                "Thresholds": f"{part['threshold'].min():.4f} to {part['threshold'].max():.4f}",
                "Held-out sparsity": f"{style.percent(held.min())} to {style.percent(held.max())}",
                "Largest distance, points": style.number(100 * (held - level).abs().max(), 2),
            }
        )
    frame = pd.DataFrame(rows)
    for column in ("Model", "Weights", "Criterion"):
        frame = without_constant(frame, column)
    return frame


def contents(run: Run) -> list[Block]:
    """How concentrated the activations are."""
    table = run.table(HistogramRow)
    return [] if table is None else [Table(concentration_table(table), CONCENTRATION_TABLE)]


def more(run: Run) -> list[Block]:
    """The thresholds."""
    table = run.table(ThresholdRow)
    return [] if table is None else [Table(threshold_table(table), THRESHOLD_TABLE)]


SECTION = Section(
    experiment="e01",
    title="Activation histograms (Figure 1)",
    tables=(HistogramRow, ThresholdRow),
    protocol=PROTOCOL,
    figures=(
        Drawing("e01_histogram", HistogramRow, histogram_figure, HISTOGRAM_CAPTION),
        Drawing("e01_thresholds", ThresholdRow, thresholds_figure, THRESHOLDS_CAPTION, secondary=True),
    ),
    contents=contents,
    more=more,
    rules=(("C1", c1_concentration),),
)
