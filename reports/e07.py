"""What the report says of e07: CATS on the attention inputs too (appendix B)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.framework.tables import AttentionRow, AttentionSample, AttentionTextSample
from reports.core import style
from reports.core.document import Block, Table, escape
from reports.core.load import Run, paper_table
from reports.core.protocol import CALIBRATION, of, phrases, tasks_and_items, values
from reports.core.section import Aspect, Drawing, Section
from reports.core.tables import accuracy_summary, zero_shot
from reports.measures.accuracy import variants, zero_shot_means
from reports.measures.finetuning import mean_over_seeds
from reports.rules.e07 import c10_attention

SITE_NAMES = {"gate": "gate", "attention_input": "attention\ninput", "mlp_input": "MLP\ninput"}

PROTOCOL = (
    Aspect("models", "Mistral-7B, after 2000 batches of 16 of general fine-tuning",
           of(AttentionRow, lambda table: values(table, "model"))),
    Aspect("tasks", "the eight of Table 1", of(AttentionRow, tasks_and_items)),
    Aspect("calibration", "as for Table 1", phrases("e07", *CALIBRATION)),
    Aspect("training", "as for Figure 2", of(AttentionRow, lambda table: _training(table))),
)  # fmt: skip

ATTENTION_CAPTION = """
CATS on the MLP's gate alone beside CATS on the inputs of the attention and MLP blocks too (the paper's appendix B, eq.
7). Left: mean accuracy ± one standard error, ours and the paper's for Mistral-7B after fine-tuning (no error given; its
axis is its own). Right: the share of zeros measured on held-out text at each place; dotted: the target."""
SUMMARY = """
CATS on the attention and MLP inputs too (eq. 7) beside CATS on the MLP alone, ± one standard error; the change against
base is paired over the same items. The columns “at ...” hold the share of zeros at each site."""
TASK_TABLE = "CATS on the attention inputs too, by task, ± one standard error. Bold: the better of the two."


def _training(table: pd.DataFrame) -> str:
    seeds = table.loc[table["finetuned"], "seed"].nunique()
    return f"without, and with fine-tuning ({seeds} seed{'s' * (seeds != 1)})" if seeds else "none"


def named(table: pd.DataFrame) -> pd.DataFrame:
    """With the names of fine-tuned variants told apart, each the mean over its seeds."""
    plain = table["variant"].str.removesuffix("-finetuned")
    return mean_over_seeds(table.assign(variant=plain.where(~table["finetuned"], plain + "-finetuned")))


def attention_figure(run: Run) -> Figure:
    """Appendix B: accuracy of CATS on the MLP alone and on the attention inputs too, and the sparsity at each place."""
    table = named(run.tables[AttentionRow.table])
    means = zero_shot_means(table)
    models = [str(model) for model in means["model"].unique()]
    size, ratios = (style.WIDTH, 2.3 if len(models) == 1 else 1.45 * len(models)), {"width_ratios": [1.3, 1, 1.2]}
    figure, axes = plt.subplots(len(models), 3, figsize=size, squeeze=False, gridspec_kw=ratios)
    paper = paper_table("appendix_b_attention").rename(columns={"average_accuracy": "value"}).assign(stderr=np.nan)
    for (ours, theirs, sparsity), model in zip(axes, models, strict=True):
        _variant_points(ours, means[means["model"] == model])
        name = style.short_name(model)
        ours.set(title=f"{name} (ours)", ylabel="mean zero-shot accuracy")
        _variant_points(theirs, paper)
        theirs.set_title("Mistral-7B (paper)")
        _site_bars(sparsity, table[table["model"] == model], small=len(models) > 1)
        sparsity.set(title=f"{name}, held-out text", ylabel="zeros, %")
    return figure


def _variant_points(ax: Axes, means: pd.DataFrame) -> None:
    """A point per variant, with one standard error, its value written beside."""
    names = variants(means)
    for row in means[means["value"].notna()].to_dict("records"):
        x, colour = names.index(row["variant"]), style.variant_colour(row["variant"])
        error = row["stderr"] if np.isfinite(row["stderr"]) else None
        ax.errorbar(x, row["value"], error, fmt="o", color=colour, capsize=2, ms=5)
        ax.annotate(style.number(row["value"], 3), (x, row["value"]), xytext=(5, 0), textcoords="offset points",
                    va="center", fontsize=7.5)  # fmt: skip
    labels = [style.variant_name(name).replace(", ", ",\n").replace(" too", "\ntoo") for name in names]
    ax.set_xticks(range(len(names)), labels, fontsize=7.5)
    ax.set_xlim(-0.4, len(names) - 0.3)
    ax.margins(y=0.15)


def _site_bars(ax: Axes, table: pd.DataFrame, small: bool) -> None:
    """The share of zeros at each place where a variant thresholds; nothing where it does not."""
    sites = table[table["metric"].str.startswith("sparsity_")]
    shown = [site for site in SITE_NAMES if f"sparsity_{site}" in set(sites["metric"])]
    names = variants(sites)
    width = 0.8 / max(1, len(names))
    for place, variant in enumerate(names):
        at = sites[sites["variant"] == variant].set_index("metric")["value"]
        x = np.arange(len(shown)) + (place - (len(names) - 1) / 2) * width
        heights = [100 * at.get(f"sparsity_{site}", np.nan) for site in shown]
        label = "gate only" if "attention" not in variant else "attention too"
        label += ", fine-tuned" * variant.endswith("-finetuned")
        ax.bar(x, heights, width * 0.92, color=style.variant_colour(variant), label=label)
    for target in sites["sparsity_target"].dropna().unique():
        ax.axhline(100 * target, color=style.GREY, lw=0.8, ls=":")
    ax.set_xticks(range(len(shown)), [SITE_NAMES[site] for site in shown], fontsize=7.5)
    ax.set_ylim(0, (1.8 if small else 1.45) * ax.get_ylim()[1])
    if names:
        ax.legend(frameon=False, fontsize=6.5 if small else 7.5, loc="upper right", ncols=2 if small else 1)


def more(run: Run) -> list[Block]:
    """Accuracy, sparsity and perplexity of each variant, and accuracy by task."""
    table = run.table(AttentionRow)
    if table is None:
        return []
    table = named(table)
    by_task = [
        Table(zero_shot(table, model), f"{escape(style.model_name(model))}: {TASK_TABLE}")
        for model in table["model"].unique()
    ]
    return [Table(accuracy_summary(table, beside_paper=False), SUMMARY), *by_task]


SECTION = Section(
    experiment="e07",
    title="CATS in the attention block (appendix B)",
    tables=(AttentionRow, AttentionSample, AttentionTextSample),
    protocol=PROTOCOL,
    figures=(Drawing("e07_attention", AttentionRow, attention_figure, ATTENTION_CAPTION),),
    more=more,
    rules=(("C10", c10_attention),),
)
