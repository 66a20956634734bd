"""What the report says of e08: every criterion at the same bytes, on held-out text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.framework.tables import CriterionRow, CriterionSample, CriterionTextSample
from reports.core import style
from reports.core.document import Block, Table, Text, escape
from reports.core.load import Run
from reports.core.protocol import CALIBRATION, of, phrases, values
from reports.core.section import Aspect, Drawing, Section

TITLES = {"cats": "CATS", "chess": "CHESS", "teal": "TEAL", "wina": "WINA", "relufication": "ReLUfication"}
COLOURS = {
    "cats": style.BLUE,
    "auto": style.VERMILLION,
    "chess": style.GREEN,
    "up-norm": style.ORANGE,
    "teal": style.PURPLE,
    "wina": style.SKY,
    "oracle": style.BLACK,
}
LEVELS = (0.3, 0.5, 0.7)
HIGHEST = 10.0  # an increase of perplexity by 1000 %: above it a model is of no use, and the figure ends

PROTOCOL = (
    Aspect("models", "one method, on Mistral-7B and Llama2-7B", of(CriterionRow, lambda table: values(table, "model"))),
    Aspect("criteria", "the gate's activation against one threshold per layer",
           of(CriterionRow, lambda table: ", ".join(title(name) for name in table["criterion"].unique()))),
    Aspect("calibration", "as for Table 1", phrases("e08", *CALIBRATION)),
)  # fmt: skip

FIGURE_CAPTION = """
Increase of perplexity on held-out text (log scale) against the bytes of the MLPs that a token reads, as a fraction of
dense: the lower left is better. Every point of one level reads the same bytes. Oracle (black) is what nobody can decide
without computing everything, the ceiling; random, the floor, lies at the top or above it. Criteria without a colour of
their own are grey. One kernel of this project serves all of them but TEAL, WINA, oracle and random."""
TABLE_CAPTION = """
increase of perplexity on held-out text at the bytes of a sparsity of 30, 50 and 70 % of the neurons, ± one standard
error, paired with the dense model over blocks of text; in brackets the measured sparsity where it misses the target by
more than a point. “Against CATS”: the ratio of the two perplexities at 50 %, paired. “model” in a name: the linear
layers of the attention skip inputs too, at the same bytes of the whole model."""


def title(criterion: str) -> str:
    """A criterion's name as its authors write it; ours in lower case."""
    return TITLES.get(criterion, criterion)


def _name(row: Mapping[Any, Any]) -> str:
    return title(str(row["criterion"])) + (", model" if row["scope"] == "model" else "")


def text_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of perplexity, with its increase over the dense model as a fraction."""
    rows = table[table["metric"] == "perplexity"]
    return rows.assign(increase=np.exp(rows["difference"]) - 1)


def criteria_figure(run: Run) -> Figure:
    """A panel per model: increase of perplexity against the bytes of the MLPs."""
    table = text_rows(run.tables[CriterionRow.table])
    models = [str(model) for model in table["model"].unique()]
    figure, axes = plt.subplots(1, len(models), figsize=(style.WIDTH, 3.2), squeeze=False)
    for ax, model in zip(axes[0], models, strict=True):
        part = table[(table["model"] == model) & (table["scope"] == "mlp") & (table["criterion"] != "dense")]
        _panel(ax, part)
        ax.set(title=style.model_name(model), xlabel="bytes of the MLPs, % of dense")
    axes[0][0].set_ylabel("increase of perplexity, %")
    return figure


def _panel(ax: Axes, part: pd.DataFrame) -> None:
    ends = []
    for criterion, rows in part.groupby("criterion", sort=False):
        rows = rows[rows["increase"].between(1e-3, HIGHEST)].sort_values("mlp_bytes")
        if rows.empty:
            continue
        name = str(criterion)
        colour = COLOURS.get(name, style.GREY)
        x, y = 100 * rows["mlp_bytes"], 100 * rows["increase"]
        ax.plot(x, y, "o-" if name in COLOURS else ".-", color=colour, ms=3, lw=1.4 if name in COLOURS else 0.8)
        ends.append((x.iloc[-1], y.iloc[-1], title(name), colour))
    ax.set_yscale("log")
    ax.set_xlim(right=ax.get_xlim()[1] + 0.3 * np.ptp(ax.get_xlim()))
    style.label_ends(ax, ends, size=7.5)


def criteria_table(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """One row per criterion and scope: the increase of perplexity at each of `LEVELS`, and against CATS at 50 %."""
    part = text_rows(table[table["model"] == model])
    part = part[part["sparsity_target"].notna()]
    rows = []
    for (_, _), of_one in part.groupby(["criterion", "scope"], sort=False):
        cells: dict[str, str] = {"": escape(_name(of_one.iloc[0].to_dict()))}
        for level in LEVELS:
            cells[f"{100 * level:.0f} %"] = _cell(of_one[np.isclose(of_one["sparsity_target"], level)])
        half = of_one[np.isclose(of_one["sparsity_target"], 0.5)]
        cells["Against CATS"] = _ratio(half)
        at_half = half["increase"].iloc[0] if len(half) else np.inf
        rows.append((at_half, cells))
    return pd.DataFrame([cells for _, cells in sorted(rows, key=lambda row: row[0])])


def _cell(rows: pd.DataFrame) -> str:
    if rows.empty or not np.isfinite(rows["increase"].iloc[0]):
        return style.DASH
    row = rows.iloc[0]
    if row["increase"] > HIGHEST:
        return f"over +{100 * HIGHEST:.0f} %"
    error = 100 * (1 + row["increase"]) * row["difference_stderr"]
    text = f"{100 * row['increase']:+.1f} ± {error:.1f} %".replace("-", style.MINUS)
    missed = row["on_target"] is False or row["on_target"] == 0
    return f"{text} ({style.percent(row['sparsity_measured'])})" if missed else text


def _ratio(rows: pd.DataFrame) -> str:
    if rows.empty or not np.isfinite(rows["cats_difference"].iloc[0]) or rows["criterion"].iloc[0] == "cats":
        return style.DASH
    row = rows.iloc[0]
    ratio = float(np.exp(row["cats_difference"]))
    return f"{ratio:.3f} ± {ratio * row['cats_difference_stderr']:.3f}" if ratio < HIGHEST else f"over {HIGHEST:.0f}"


def contents(run: Run) -> list[Block]:
    """One run's tables."""
    table = run.table(CriterionRow)
    if table is None:
        return []
    blocks: list[Block] = []
    for model in table["model"].unique():
        blocks.append(Table(criteria_table(table, model), f"{escape(model)}: {TABLE_CAPTION}"))
    if (table["metric"] != "perplexity").any():
        tasks = ", ".join(sorted(table.loc[table["metric"] != "perplexity", "task"].unique()))
        blocks.append(Text(f"Tasks were measured too ({escape(tasks)}); their rows are in {CriterionRow.table}.csv."))
    return blocks


SECTION = Section(
    experiment="e08",
    title="Every criterion at the same bytes (beyond the paper)",
    tables=(CriterionRow, CriterionSample, CriterionTextSample),
    protocol=PROTOCOL,
    figures=(Drawing("e08_criteria", CriterionRow, criteria_figure, FIGURE_CAPTION),),
    contents=contents,
)
