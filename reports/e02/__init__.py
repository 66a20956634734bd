"""What the report says of e02: zero-shot accuracy and perplexity without fine-tuning (Table 1, perplexity of v4)."""

from __future__ import annotations

import math

import pandas as pd

from experiments.framework.tables import ItemSample, TextSample, ZeroShotRow
from reports.core import style
from reports.core.document import Block, Table, escape
from reports.core.load import Run, paper_models, paper_table
from reports.core.protocol import CALIBRATION, of, phrases, tasks_and_items, values
from reports.core.section import Aspect, Drawing, Section
from reports.core.tables import accuracy_summary, paper_rows, zero_shot
from reports.core.verdicts import POCKET_MODEL
from reports.e02.figures import accuracy_figure, glance, size_figure
from reports.rules.e02 import c2_near_base, c3_beats_relufication, c11_perplexity

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
SIZE_CAPTION = """
What CATS-50 costs without fine-tuning against the size of the model (parameters, as its name says). Circles: ours, with
the 95 % interval, paired over items and over blocks of text; weights dequantised from files of the quantisation named
in the table below, instruction-tuned and code models among them. Diamonds: the paper's (Table 1 and the 13B averages;
the perplexities of its fourth version), without an interval. The paper's perplexity is on another text than ours, and
its models are other families: the order of magnitude can be compared, not the value. Dotted: bounds of C2, C11."""
TABLE_1 = """
zero-shot accuracy in the layout of the paper's Table 1, ± one standard error (lm-eval's; that of the mean takes
the tasks as independent). Bold: the best sparse variant of each column."""
PAPER_TABLE_1 = "The paper's Table 1. Bold: the best sparse variant of each column."
SUMMARY = """
Sparsity, mean accuracy and perplexity on held-out text. The change against base is paired over the same items, ± one
standard error. “CATS at ReLU's sparsity” is the matched comparison that the paper leaves out."""
PAPER_PERPLEXITY = "The paper's increase of perplexity against its dense models (Table 3 of its fourth version)."
POCKET_NOTE = (
    "The pocket model's checkpoint was chosen by its loss on held-out modules from which its tasks are made too: its "
    "accuracies are a little too high. All variants share that, and what is compared are differences between them."
)


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
    """Sparsity, accuracy and perplexity of each variant."""
    table = run.table(ZeroShotRow)
    if table is None or not (table["metric"] == "acc").any():
        return []
    return [Table(accuracy_summary(table, beside_paper=True), SUMMARY)]


def more(run: Run) -> list[Block]:
    """Accuracy by task, and the paper's tables."""
    table = run.table(ZeroShotRow)
    if table is None:
        return []
    models = [str(model) for model in table.loc[table["metric"] == "acc", "model"].unique()]
    blocks: list[Block] = [
        Table(zero_shot(table, model), f"{escape(style.model_name(model))}: {TABLE_1}") for model in models
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
    figures=(
        Drawing("e02_accuracy", ZeroShotRow, accuracy_figure, ACCURACY_CAPTION),
        Drawing("e02_size", ZeroShotRow, size_figure, SIZE_CAPTION),
    ),
    contents=contents,
    more=more,
    rules=(("C2", c2_near_base), ("C3", c3_beats_relufication), ("C11", c11_perplexity)),
    note=note,
    glance=glance,
)
