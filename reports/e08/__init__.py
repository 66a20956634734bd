"""What the report says of e08: every criterion at the same bytes, what each affords, and how fast it is there."""

from __future__ import annotations

import pandas as pd

from experiments.framework.tables import (
    CriterionRow,
    CriterionSample,
    CriterionSpeedRow,
    CriterionSpeedSample,
    CriterionTextSample,
)
from reports.core import style
from reports.core.document import Block, Table, escape
from reports.core.load import Run
from reports.core.protocol import CALIBRATION, of, options, phrases, span, values
from reports.core.section import Aspect, Drawing, Section
from reports.e08.figures import frontier_figure, title
from reports.e08.tables import WITH_KERNEL, affordable_table, criteria_table, prompts_table, speed_table

_SAMPLE = phrases("e08", *CALIBRATION)


def _calibration(run: Run) -> str:
    """On what text, and whether behind the thresholds of earlier layers."""
    how = "layer by layer" if options(run, "e08").get("sequential") else "of the dense model"
    return f"{sample}; {how}" if (sample := _SAMPLE(run)) else ""


PROTOCOL = (
    Aspect("models", "one method, on Mistral-7B and Llama2-7B", of(CriterionRow, lambda table: values(table, "model"))),
    Aspect("criteria", "the gate's activation against one threshold per layer",
           of(CriterionRow, lambda table: ", ".join(title(name) for name in table["criterion"].unique()))),
    Aspect("calibration", "as for Table 1; of the dense model", _calibration),
    Aspect("tasks", "eight, for its own method",
           of(CriterionRow, lambda table: _tasks(table[table["metric"] == "acc"]))),
    Aspect("speed", "its own kernel, in float32",
           of(CriterionSpeedRow, lambda table: f"{values(table, 'machine')}; {values(table, 'dtype')}")),
)  # fmt: skip

NOTE = (
    "CATS keeps the neurons whose gate activation is large; CHESS weighs it by the typical size of what it "
    "multiplies, gate-norm by the norm of the neuron's row of the down projection as well; up and up-norm do the same "
    "with the other product, which then decides; auto chooses the side and the weights of each layer "
    "on calibration text. TEAL and WINA skip inputs of the linear layers "
    "that are small (WINA: times the norm of their column). "
    "ReLUfication puts ReLU in place of the activation. Oracle keeps the neurons that add most to the output, random "
    f"any. This project's kernels serve {', '.join(map(title, WITH_KERNEL))}; the others run as masks."
)

FIGURE_CAPTION = """
Quality of one model under every criterion. Increase of perplexity on held-out text (log scale; dotted: the 1.0 % at
which 99 % of dense are left) and, where tasks were measured, the change of mean accuracy (bars: 95 %, paired over
items; dotted: 99 % of dense), against the bytes of the MLPs that a token reads, and against the measured speed-up over
dense where this project's kernel serves the criterion (where none was measured: against the bytes of the whole model).
Every point of one level reads the same bytes. Oracle is what nobody can decide without computing everything: the
ceiling. Random is the floor; what raises perplexity by more than 1000 % is left out."""
AFFORDABLE_TABLE = """
The most sparsity that keeps 99 % of dense, and the speed-up measured there. A level keeps 99 % of accuracy (the mean
over the tasks) where the whole 95 % interval of the difference, paired over items, lies above minus 1 % of dense's; of
perplexity where dense's over its own is at least 0.99 in the whole interval, paired over blocks of text. It loses them
where the whole interval says the opposite. Shown is the largest measured level that keeps them with no smaller one that
loses them; “under”: the smallest level measured loses them; “undecided to”: larger levels lie within the error. Nothing
is interpolated. Then: increase of perplexity at 50 % ± one standard error (in brackets the sparsity where it misses its
target by more than a point), and the ratio of that perplexity to CATS's, paired. “model”: the linear layers of the
attention skip inputs too, at the same bytes of the whole model."""
CRITERIA_TABLE = """
increase of perplexity on held-out text at the bytes of a sparsity of 30, 50 and 70 % of the neurons, ± one standard
error, paired with the dense model over blocks of text; in brackets the measured sparsity where it misses the target by
more than a point. “Against CATS”: the ratio of the two perplexities at 50 %, paired."""
PROMPTS_TABLE = """
Whether leaving the prompt dense helps what is generated after it: the same thresholds with every token masked, and with
the prompt's tokens dense. Perplexity is of the second half of each block after the first; exact match of generated
answers, in the form that the prompt's examples show. Changes from dense, ± one standard error, paired over blocks or
items."""
SPEED_TABLE = """
Speed at batch 1, dense and sparse in the same rounds: all MLPs for one token, weights cold, and one decode step of the
whole model, each in the loop in which it is fastest. In brackets: 95 %, paired over rounds."""


def _tasks(table: pd.DataFrame) -> str:
    return f"{table['task'].nunique()} of {span(table, 'items')} items each" if len(table) else "none"


def contents(run: Run) -> list[Block]:
    """What each criterion affords; the effect of a dense prompt where that was measured."""
    blocks: list[Block] = []
    if run.table(CriterionRow) is not None:
        blocks.append(Table(affordable_table(run), AFFORDABLE_TABLE))
        if len(prompts := prompts_table(run.tables[CriterionRow.table], short=True)):
            blocks.append(Table(prompts, PROMPTS_TABLE))
    return blocks


def more(run: Run) -> list[Block]:
    """Every criterion at three levels, and all speeds."""
    blocks: list[Block] = []
    if (table := run.table(CriterionRow)) is not None:
        for model in table["model"].unique():
            name = escape(style.model_name(str(model)))
            blocks.append(Table(criteria_table(table, model), f"{name}: {CRITERIA_TABLE.strip()}"))
        if len(prompts := prompts_table(table)):
            blocks.append(Table(prompts, PROMPTS_TABLE))
    if (speed := run.table(CriterionSpeedRow)) is not None:
        blocks.append(Table(speed_table(speed), SPEED_TABLE))
    return blocks


SECTION = Section(
    experiment="e08",
    title="Every criterion at the same bytes (beyond the paper)",
    tables=(CriterionRow, CriterionSample, CriterionTextSample, CriterionSpeedRow, CriterionSpeedSample),
    protocol=PROTOCOL,
    figures=(Drawing("e08_frontier", CriterionRow, frontier_figure, FIGURE_CAPTION, per_model=True),),
    contents=contents,
    more=more,
    note=lambda runs: NOTE,
)
