"""What the report says of e02: zero-shot accuracy and perplexity without fine-tuning (Table 1, perplexity of v4)."""

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
from reports.core.document import Block, Table, escape
from reports.core.load import Run, paper_models, paper_table
from reports.core.protocol import CALIBRATION, of, phrases, tasks_and_items, values
from reports.core.section import Aspect, Drawing, Painter, Section
from reports.core.tables import accuracy_summary, paper_rows, zero_shot
from reports.core.verdicts import POCKET_MODEL
from reports.measures.accuracy import zero_shot_means
from reports.rules.e02 import c2_near_base, c3_beats_relufication, c11_perplexity

PAPER_RELU_SPARSITY = 0.90  # the paper gives "about 90 %" and no measured value

PROTOCOL = (
    Aspect("models", "Mistral-7B, Llama2-7B (13B: averages)", of(ZeroShotRow, lambda table: values(table, "model"))),
    Aspect("tasks", "openbookqa, arc_easy, winogrande, hellaswag, arc_challenge, piqa, boolq, sciq; lm-eval's acc, "
           "0-shot, all items", of(ZeroShotRow, tasks_and_items)),
    Aspect("calibration", "500 samples of RefinedWeb", phrases("e02", *CALIBRATION)),
    Aspect("path", "dense, then a mask", of(ZeroShotRow, lambda table: values(table, "path"))),
)  # fmt: skip

ACCURACY_CAPTION = """
Mean zero-shot accuracy against measured sparsity, without fine-tuning; ours first, then the paper's (where
ReLUfication stands at the 90 % that the paper states). Circles: base (grey), CATS-50 (blue), CATS-70 (green),
CATS-90 (orange), CATS at ReLUfication's own sparsity (purple); diamond: ReLUfication; squares: other criteria, by name.
Bars: one standard error."""
TABLE_1 = """
zero-shot accuracy in the layout of the paper's Table 1, ± one standard error (lm-eval's; that of the mean takes
the tasks as independent). Bold: the best sparse variant of each column."""
PAPER_TABLE_1 = "The paper's Table 1. Bold: the best sparse variant of each column."
SUMMARY = """
sparsity, mean accuracy and perplexity on held-out text. The change against base is paired over the same items, ± one
standard error. “CATS at ReLU's sparsity” is the matched comparison that the paper leaves out."""
PAPER_PERPLEXITY = "The paper's increase of perplexity against its dense models (Table 3 of its fourth version)."
POCKET_NOTE = (
    "The pocket model's checkpoint was chosen by its loss on held-out modules from which its tasks are made too: its "
    "accuracies are a little too high. All variants share that, and what is compared are differences between them."
)


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
        ax.set_title(f"{name} (ours)" if ours else f"{name} (paper)")
    for ax, (model, part) in zip(flat[len(panels) :], perplexity.groupby("model") if extra else (), strict=False):
        accuracy_panel(ax, part)
        _perplexity_axis(ax, part["value"], str(model))
    flat[0].set_ylabel("mean zero-shot accuracy")
    return figure


def _perplexity_axis(ax: Axes, measured: pd.Series, model: str) -> None:
    ax.set(title=f"{model}, held-out text", ylabel="perplexity")
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


def accuracy_panel(ax: Axes, means: pd.DataFrame) -> None:
    """One model's values against measured sparsity, in percent, with one standard error."""
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
            "ReLU", (100 * relu["sparsity_measured"].iloc[0], relu["value"].iloc[0]), xytext=(-6, -2),
            textcoords="offset points", ha="right", va="center", color=style.VERMILLION, fontsize=8,
        )  # fmt: skip
    ax.set(xlabel="sparsity, %", xlim=(-6, 140 if ends else 104), xticks=[0, 50, 70, 90])


def glance(runs: list[Run]) -> Painter | None:
    """Accuracy against sparsity of the first model that has it, the pocket model only where there is no other."""
    tables = [table for run in runs if (table := run.table(ZeroShotRow)) is not None]
    models = [(str(model), of) for means in map(zero_shot_means, tables) if len(means)
              for model, of in means.groupby("model", sort=False)]  # fmt: skip
    if not models:
        return None
    model, part = min(models, key=lambda pair: pair[0] == POCKET_MODEL)

    def paint(ax: Axes) -> None:
        accuracy_panel(ax, part)
        chance, count = part["chance"].iloc[0], part["tasks"].iloc[0]
        if np.isfinite(chance):
            ax.axhline(chance, color=style.GREY, lw=0.8, ls=":")
            ax.annotate("chance", (0, chance), xytext=(0, 3), textcoords="offset points", color=style.GREY, fontsize=8)
        ax.set(title=f"{model}: zero-shot, no fine-tuning", ylabel=f"mean accuracy, {count} tasks")

    return paint


def paper_table_1(models: list[str]) -> pd.DataFrame:
    """The paper's Table 1 for the models that stand beside ours."""
    paper = paper_table("table1_zero_shot")
    names = dict.fromkeys(name for model in models for name in paper_models(model, paper["model"]))
    rows: list[dict[str, str]] = []
    for name in names:
        rows += paper_rows(paper[paper["model"] == name], name)
    return pd.DataFrame(rows).fillna(style.DASH)


def paper_perplexity() -> pd.DataFrame:
    """The paper's increases of perplexity, a row per model and variant."""
    paper = paper_table("table3_v4_perplexity")
    wide = paper.pivot_table(index=["model", "variant"], columns="fine_tuned", values="perplexity_increase_percent")
    rows = []
    for model, variant in wide.index:
        increases = wide.loc[(model, variant)]
        rows.append(
            {
                "Model": str(model),
                "": style.variant_name(str(variant)),
                "Without fine-tuning": style.signed_percent(increases.get("no", math.nan) / 100),
                "Fine-tuned": style.signed_percent(increases.get("yes", math.nan) / 100),
            }
        )
    return pd.DataFrame(rows)


def contents(run: Run) -> list[Block]:
    """One run's tables."""
    table = run.table(ZeroShotRow)
    if table is None:
        return []
    models = [str(model) for model in table["model"].unique()]
    blocks: list[Block] = []
    for model in models:
        if not len(table[(table["model"] == model) & (table["metric"] == "acc")]):
            continue
        blocks += [
            Table(zero_shot(table, model), f"{escape(model)}: {TABLE_1}"),
            Table(accuracy_summary(table, model, beside_paper=True), f"{escape(model)}: {SUMMARY}"),
        ]
    return [*blocks, Table(paper_table_1(models), PAPER_TABLE_1), Table(paper_perplexity(), PAPER_PERPLEXITY)]


def note(runs: list[Run]) -> str:
    """The caution about the pocket model, where a run has it."""
    tables = [table for run in runs if (table := run.table(ZeroShotRow)) is not None]
    return POCKET_NOTE if any((table["model"] == POCKET_MODEL).any() for table in tables) else ""


SECTION = Section(
    experiment="e02",
    title="Zero-shot accuracy (Table 1)",
    tables=(ZeroShotRow, ItemSample, TextSample),
    protocol=PROTOCOL,
    figures=(Drawing("e02_accuracy", ZeroShotRow, accuracy_figure, ACCURACY_CAPTION),),
    contents=contents,
    rules=(("C2", c2_near_base), ("C3", c3_beats_relufication), ("C11", c11_perplexity)),
    note=note,
    glance=glance,
)
