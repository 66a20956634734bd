"""What the report says of e03: general fine-tuning (Figures 2 and 5)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.framework.tables import FinetuningRow, FinetuningSample, SparsityRow, SweepRow
from reports.core import style
from reports.core.document import Block, Table, escape
from reports.core.load import Run, paper_models, paper_table
from reports.core.protocol import TRAINING, of, options, phrases, span, swept, values
from reports.core.section import Aspect, Drawing, Section
from reports.core.tables import sweep
from reports.measures.accuracy import variants
from reports.measures.finetuning import finetuning_means, sparsity_means
from reports.rules.e03 import c4_finetuned, c5_sparsity_kept, c11_finetuned_perplexity

PROTOCOL = (
    Aspect("models", "Mistral-7B, Llama2-7B", of(FinetuningRow, lambda table: values(table, "model"))),
    Aspect("training", "RefinedWeb; LoRA on 1 % of the parameters (query, key, gate, down); bfloat16, 8 x L40S, batch "
           "16", phrases("e03", *TRAINING, "sequences of {length} tokens, text: {source}")),
    Aspect("learning rate", "1e-5 (the authors' code)", lambda run: _rates(run)),
    Aspect("evaluation", "every 250 steps from 350 to 2600, eight tasks, one seed",
           of(FinetuningRow, lambda table: _evaluation(table))),
)  # fmt: skip

CURVES_CAPTION = """
Mean zero-shot accuracy against LoRA steps, as in the paper's Figure 2: ours (line: mean over seeds, band:
lowest to highest seed) and, in the same colours, the paper's; dashed: the paper's base model before fine-tuning."""
SPARSITY_CAPTION = """
Sparsity left after fine-tuning (the paper's Figure 5), mean over seeds. Dotted: targets. Filled circles: thresholds as
fixed before training; open squares: recalibrated after it. Right: means over layers, beside the paper's (diamonds)."""
ACCURACY_TABLE = """
mean accuracy at the evaluated steps, mean over seeds ± one standard error (items and seeds; none where a single seed
was trained)."""
SPARSITY_TABLE = """
sparsity left at the last step, mean over layers and seeds, beside the paper's Figure 5."""
SWEEP_TABLE = """
The learning-rate sweep: loss on held-out text that nothing else is measured on, after short runs; the lowest is used.
“At the edge”: of what was tried, so that a still better rate may lie outside."""


def _rates(run: Run) -> str:
    rates = options(run, "e03").get("learning_rates") or []
    if len(rates) == 1:
        return f"{rates[0]:g}, not swept"
    tried = phrases("e03", "the best of {learning_rates} at {sweep_steps} steps")(run)
    table = run.table(SweepRow)
    return ", ".join(filter(None, [tried, swept(table) if table is not None else ""]))


def _evaluation(table: pd.DataFrame) -> str:
    part = table[table["accuracy"].notna()]
    rates = ", ".join(f"{rate:g}" for rate in sorted(part["learning_rate"].dropna().unique()))
    items = f"{part['task'].nunique()} tasks of {span(part, 'items')} items"
    seeds = part["seed"].nunique()
    return f"steps {values(part, 'step')}; {items}; {seeds} seed{'s' * (seeds != 1)}; learning rate {rates}"


def curves_figure(run: Run) -> Figure:
    """The paper's Figure 2: mean accuracy against LoRA steps, all variants; the band spans the seeds."""
    means = finetuning_means(run.tables[FinetuningRow.table])
    paper = paper_table("figure2_finetuning_accuracy")
    models = [str(model) for model in means["model"].unique()]
    beside = list(dict.fromkeys(name for model in models for name in paper_models(model, paper["model"])))
    count = len(models) + len(beside)
    columns = min(3, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(style.WIDTH, 2.3 * rows), squeeze=False)
    flat = list(axes.flat)
    for ax in flat[count:]:
        ax.set_visible(False)
    for ax, model in zip(flat, models, strict=False):
        _our_curves(ax, means[means["model"] == model])
        ax.set_title(f"{style.short_name(model)} (ours)")
    for ax, name in zip(flat[len(models) :], beside, strict=False):
        part = paper[paper["model"] == name]
        for variant in variants(part):
            curve = part[part["variant"] == variant].sort_values("step")
            ax.plot(curve["step"], curve["average_accuracy"], "o-", color=style.variant_colour(variant), ms=3)
        base = paper_table("table1_zero_shot").query("task == 'average' and variant == 'dense' and model == @name")
        ax.axhline(base["accuracy"].iloc[0], color=style.GREY, lw=1, ls="--")
        ax.set_title(f"{name} (paper)")
    for ax in flat[:count]:
        ax.set_xlabel("LoRA steps")
    for ax in axes[:, 0]:
        ax.set_ylabel("mean zero-shot accuracy")
    return figure


def _our_curves(ax: Axes, part: pd.DataFrame) -> None:
    ends = []
    for variant in variants(part):
        curve = part[part["variant"] == variant].sort_values("step")
        colour = style.variant_colour(variant)
        ax.plot(curve["step"], curve["accuracy"], "o-", color=colour, ms=3)
        ax.fill_between(curve["step"], curve["low"], curve["high"], color=colour, alpha=0.18, lw=0)
        ends.append((curve["step"].iloc[-1], curve["accuracy"].iloc[-1], style.variant_name(variant), colour))
    ax.set_xlim(right=part["step"].max() * 1.42)
    ax.set_xticks(sorted(part["step"].unique())[:: max(1, part["step"].nunique() // 5)])
    style.label_ends(ax, ends)


def sparsity_figure(run: Run) -> Figure:
    """The paper's Figure 5, by layer: sparsity left after fine-tuning, with and without recalibration; means beside."""
    table = run.tables[SparsityRow.table]
    table = table[table["step"] == table.groupby(["model", "variant"])["step"].transform("max")]
    paper = paper_table("figure5_finetuned_sparsity")
    models = [str(model) for model in table["model"].unique()]
    size, ratios = (style.WIDTH, 2.4 * len(models)), {"width_ratios": [1.5, 1]}
    figure, axes = plt.subplots(len(models), 2, figsize=size, squeeze=False, gridspec_kw=ratios)
    for (left, right), model in zip(axes, models, strict=True):
        part = table[table["model"] == model]
        ends = [_sparsity_lines(left, part[part["variant"] == variant], variant) for variant in variants(part)]
        style.label_ends(left, ends, size=7.5)
        _sparsity_means_panel(
            right, sparsity_means(part), paper[paper["model"].isin(paper_models(model, paper["model"]))]
        )
        left.set(
            xlabel="layer", ylabel="sparsity after fine-tuning, %", title=f"{style.short_name(model)} (ours), by layer"
        )
        last = part["layer_index"].max()
        left.set_xlim(right=1.25 * last + 0.3)
        left.set_xticks([tick for tick in MaxNLocator(integer=True).tick_values(0, last) if 0 <= tick <= last])
        low = 100 * min(part["sparsity_measured"].min(), 0.4) - 3
        for ax in (left, right):
            ax.set_ylim(low, 101)
    return figure


def _sparsity_lines(ax: Axes, part: pd.DataFrame, variant: str) -> style.End:
    """A line per kind of threshold over the layers; returns where its name goes."""
    colour = style.variant_colour(variant)
    ends, target = [part["layer_index"].min(), part["layer_index"].max()], 100 * part["sparsity_target"].iloc[0]
    ax.plot(ends, [target, target], color=colour, lw=0.8, ls=":")
    for recalibrated, of_kind in part.groupby("recalibrated"):
        layers = 100 * of_kind.groupby("layer_index")["sparsity_measured"].mean()
        line, fill = ("s--", "white") if recalibrated else ("o-", colour)
        ax.plot(layers.index, layers, line, color=colour, mfc=fill)
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


def accuracy_table(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """A row per variant, a column per evaluated step (at most seven, evenly chosen), accuracy ± its standard error."""
    means = finetuning_means(table[table["model"] == model])
    steps = sorted(means["step"].unique())
    if len(steps) > 7:
        steps = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, 7).round().astype(int))]
    rows = []
    for variant in variants(means):
        at = means[means["variant"] == variant].set_index("step").to_dict("index")
        cells = {"": escape(style.variant_name(variant))}
        for step in steps:
            score = at.get(step)
            cells[f"step {step}"] = style.plus_minus(score["accuracy"], score["stderr"]) if score else style.DASH
        rows.append(cells)
    return pd.DataFrame(rows)


def sparsity_table(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """Figure 5's numbers: mean sparsity left, with and without recalibration, accuracy, and the paper's."""
    means = sparsity_means(table[table["model"] == model])
    paper = paper_table("figure5_finetuned_sparsity")
    rows = []
    for row in means.to_dict("records"):
        theirs = {}
        for name in paper_models(model, paper["model"]):
            at = paper[(paper["model"] == name) & (paper["variant"] == row["variant"])]["average_sparsity_percent"]
            theirs[f"{name} (paper)"] = f"{at.iloc[0]:.1f} %" if len(at) and not row["recalibrated"] else style.DASH
        rows.append(
            {
                "": escape(style.variant_name(row["variant"])) + (", recalibrated" if row["recalibrated"] else ""),
                "Target": style.percent(row["sparsity_target"], 0),
                "Mean sparsity": style.percent(row["sparsity"]),
                "Single layers": f"{style.percent(row['lowest_layer'])} to {style.percent(row['highest_layer'])}",
                "Mean accuracy": style.number(row["accuracy"]),
                **theirs,
            }
        )
    return pd.DataFrame(rows)


def contents(run: Run) -> list[Block]:
    """Accuracy and sparsity after fine-tuning."""
    blocks: list[Block] = []
    if (table := run.table(FinetuningRow)) is not None:
        for model in table["model"].unique():
            blocks.append(Table(accuracy_table(table, model), f"{escape(style.model_name(model))}: {ACCURACY_TABLE}"))
    if (table := run.table(SparsityRow)) is not None:
        for model in table["model"].unique():
            blocks.append(Table(sparsity_table(table, model), f"{escape(style.model_name(model))}: {SPARSITY_TABLE}"))
    return blocks


def more(run: Run) -> list[Block]:
    """The learning rates tried."""
    table = run.table(SweepRow)
    return [] if table is None else [Table(sweep(table), SWEEP_TABLE)]


SECTION = Section(
    experiment="e03",
    title="General fine-tuning (Figures 2 and 5)",
    tables=(FinetuningRow, SparsityRow, SweepRow, FinetuningSample),
    protocol=PROTOCOL,
    figures=(
        Drawing("e03_curves", FinetuningRow, curves_figure, CURVES_CAPTION),
        Drawing("e03_sparsity", SparsityRow, sparsity_figure, SPARSITY_CAPTION, secondary=True),
    ),
    contents=contents,
    more=more,
    rules=(("C4", c4_finetuned), ("C5", c5_sparsity_kept), ("C11", c11_finetuned_perplexity)),
)
