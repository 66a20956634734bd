"""What the report says of e04: task fine-tuning (Tables 2 and 3)."""

from __future__ import annotations

import math
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.framework.tables import TaskFinetuningRow, TaskFinetuningSample, TaskSweepRow
from reports.core import style
from reports.core.document import Block, Table, escape
from reports.core.load import Run, paper_table
from reports.core.protocol import TRAINING, of, phrases, span, swept, values
from reports.core.section import Aspect, Drawing, Section
from reports.core.tables import bold_best, heading, paper_rows, sweep
from reports.measures.accuracy import variants
from reports.measures.finetuning import task_means
from reports.rules.e04 import c6_task_finetuning

PROTOCOL = (
    Aspect("models", "Mistral-7B", of(TaskFinetuningRow, lambda table: values(table, "model"))),
    Aspect("tasks", "CoLA, SST-2, BoolQ", of(TaskFinetuningRow, lambda table: values(table, "task"))),
    Aspect("training", "10 epochs (the authors' script: 1)",
           phrases("e04", "epochs: {epochs}, of {train_items} items", *TRAINING)),
    Aspect("learning rate", "1e-5 (the authors' code)", lambda run: _rates(run)),
    Aspect("seeds", "one", of(TaskFinetuningRow, lambda table: str(table["seed"].nunique()))),
    Aspect("calibration", "1000 samples of the task (the authors' code)",
           phrases("e04", "{calibration_items} items of the task")),
    Aspect("items", "the tasks' validation sets", of(TaskFinetuningRow, lambda table: span(table, "items"))),
)  # fmt: skip

TASKS_CAPTION = """
Accuracy after task fine-tuning, as the difference to the base model fine-tuned in the same way. Bars up to
zero lose nothing. Error bars: one standard error of the difference, from the items and unpaired."""
ACCURACY_TABLE = """
accuracy after task fine-tuning, in the layout of the paper's Table 2, ± one standard error (none where a single seed
was trained). Bold: the best sparse variant of each column, where all were trained with as many seeds. Against base:
over the seeds that both were trained with."""
ONE_ANSWER = " “One answer to all”: always the commoner one, for which nothing of the task need be learned."
COMMONER = {"instruct_boolq": (2033, 3270), "instruct_cola": (721, 1043), "instruct_sst2": (444, 872)}
"""Items of a task's validation set with the commoner answer, and all of them."""
SPARSITY_TABLE = "sparsity left after task fine-tuning, in the layout of the paper's Table 3."
PAPER_TABLE = "The paper's Tables 2 and 3 for Mistral-7B: accuracy, and in brackets the sparsity left."
SWEEP_TABLE = "The learning-rate sweep: loss on training items set aside, after short runs; the lowest is used."


def _rates(run: Run) -> str:
    tried = phrases("e04", "the best of {learning_rates} on {sweep_items} items")(run)
    rates = run.table(TaskSweepRow)
    return ", ".join(filter(None, [tried, swept(rates) if rates is not None else ""]))


def tasks_figure(run: Run) -> Figure:
    """The paper's Table 2 as a picture: accuracy against base after task fine-tuning, ours and the paper's."""
    means = task_means(run.tables[TaskFinetuningRow.table])
    paper = paper_table("table2_task_finetuning").assign(item_stderr=np.nan)
    base = paper[paper["variant"] == "dense"].set_index("task")["accuracy"]
    paper["difference"] = paper["accuracy"] - paper["task"].map(base)
    models = [str(model) for model in means["model"].unique()]
    panels = [(f"{style.short_name(model)} (ours)", means[means["model"] == model]) for model in models]
    panels += [("Mistral-7B (paper)", paper)]
    columns = 3 if len(panels) == 3 else 2
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(style.WIDTH, 1.9 * rows), squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (title, part) in zip(axes.flat, panels, strict=False):
        _difference_bars(ax, part)
        ax.set_title(title)
        ax.tick_params(axis="x", labelsize=7.5 if columns == 2 else 6.5)
    for ax in axes[:, 0]:
        ax.set_ylabel(f"accuracy {style.MINUS} base, points")
    shown = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(
        shown.values(), shown, loc="outside lower center", ncols=max(1, len(shown)), frameon=False, fontsize=8
    )
    return figure


def _difference_bars(ax: Axes, part: pd.DataFrame) -> None:
    """Per task and on average, each variant's accuracy minus base's."""
    names = [name for name in variants(part) if name != "dense"]
    tasks = [task for task in part["task"].unique() if task != "average"] + ["average"]
    width = 0.8 / max(1, len(names))
    for place, variant in enumerate(names):
        change, errors = [], []
        for task in tasks:
            at = part[part["task"] == task].set_index("variant")
            known = {"dense", variant} <= set(at.index)
            change.append(100 * at["difference"][variant] if known else np.nan)
            errors.append(100 * np.hypot(at["item_stderr"][variant], at["item_stderr"]["dense"]) if known else np.nan)
        x = np.arange(len(tasks)) + (place - (len(names) - 1) / 2) * width
        look: dict[str, Any] = {"color": style.variant_colour(variant), "error_kw": {"lw": 0.8}}
        shown = None if np.isnan(errors).all() else errors
        ax.bar(x, change, width * 0.92, yerr=shown, label=style.variant_name(variant), **look)
    ax.axhline(0, color=style.GREY, lw=0.8)
    ax.set_xticks(range(len(tasks)), [style.task_name(task) for task in tasks])


def accuracy_table(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """Table 2's layout: a row per variant, a column per task, then the mean and its change against base."""
    means = task_means(table[table["model"] == model])
    rows, printed = [], []
    for variant in variants(means):
        at = means[means["variant"] == variant].set_index("task").to_dict("index")
        cells = {heading(task): style.DASH for task in dict.fromkeys(means["task"])}
        scores = {heading(str(task)): score for task, score in at.items()}
        cells |= {name: style.plus_minus(score["accuracy"], score["stderr"]) for name, score in scores.items()}
        difference = at["average"]["difference"] if "average" in at else math.nan
        change = style.points(difference) if variant != "dense" else style.DASH
        rows.append({"": escape(style.variant_name(variant)), **cells, "Against base, points": change})
        printed.append({name: score["accuracy"] for name, score in scores.items()} if variant != "dense" else {})
    seeds = means[means["variant"] != "dense"].groupby("task")["seeds"].nunique()
    comparable = {heading(str(task)) for task in seeds.index[seeds == 1]}
    bold_best(rows, [{name: value for name, value in at.items() if name in comparable} for at in printed])
    if shares := one_answer(table[table["model"] == model]):
        shown = {name: style.number(share) for name, share in shares.items()}
        rows.append({"": "One answer to all", **shown, "Against base, points": style.DASH})
    return pd.DataFrame(rows).fillna(style.DASH)


def one_answer(of_model: pd.DataFrame) -> dict[str, float]:
    """Share of the commoner answer by column; nothing unless it is known of every task, and all items were asked."""
    asked = {str(task): int(items) for task, items in of_model.groupby("task")["items"].max().items()}
    if any(COMMONER.get(task, (0, 0))[1] != items for task, items in asked.items()):
        return {}
    shares = {task: COMMONER[task][0] / items for task, items in asked.items()}
    shares["average"] = float(np.mean(list(shares.values())))
    return {heading(task): share for task, share in shares.items()}


def sparsity_table(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """Table 3's layout: the sparsity left after fine-tuning on each task, and its mean."""
    means = task_means(table[table["model"] == model])
    means = means[means["variant"] != "dense"]
    rows = []
    for variant in variants(means):
        part = means[means["variant"] == variant]
        left = {heading(r["task"]): style.percent(r["sparsity_measured"]) for r in part.to_dict("records")}
        target = style.percent(part["sparsity_target"].iloc[0], 0)
        rows.append({"": escape(style.variant_name(variant)), "Target": target, **left})
    return pd.DataFrame(rows).fillna(style.DASH)


def paper_tables_2_and_3() -> pd.DataFrame:
    """The paper's Tables 2 and 3 in one: accuracy, and the sparsity left in brackets."""
    left = paper_table("table3_task_finetuned_sparsity").set_index(["variant", "task"])["sparsity_percent"]
    accuracy = paper_table("table2_task_finetuning")
    rows = paper_rows(accuracy, "")
    for row, variant in zip(rows, variants(accuracy), strict=True):
        for task in accuracy["task"].unique():
            if (variant, task) in left.index:
                row[heading(task)] += f" ({left[variant, task]:.1f} %)"
        del row["Model"]
    return pd.DataFrame(rows)


def contents(run: Run) -> list[Block]:
    """Accuracy, ours and the paper's."""
    table = run.table(TaskFinetuningRow)
    if table is None:
        return []
    blocks: list[Block] = []
    for model, part in table.groupby("model", sort=False):
        caption = f"{escape(style.model_name(str(model)))}: {ACCURACY_TABLE}{ONE_ANSWER * bool(one_answer(part))}"
        blocks.append(Table(accuracy_table(table, str(model)), caption))
    return [*blocks, Table(paper_tables_2_and_3(), PAPER_TABLE)]


def more(run: Run) -> list[Block]:
    """The sparsity left, and the learning rates tried."""
    blocks: list[Block] = []
    if (table := run.table(TaskFinetuningRow)) is not None:
        for model in table["model"].unique():
            name = escape(style.model_name(model))
            blocks.append(Table(sparsity_table(table, model), f"{name}: {SPARSITY_TABLE}"))
    if (rates := run.table(TaskSweepRow)) is not None:
        blocks.append(Table(sweep(rates), SWEEP_TABLE))
    return blocks


SECTION = Section(
    experiment="e04",
    title="Task fine-tuning (Tables 2 and 3)",
    tables=(TaskFinetuningRow, TaskSweepRow, TaskFinetuningSample),
    protocol=PROTOCOL,
    figures=(Drawing("e04_tasks", TaskFinetuningRow, tasks_figure, TASKS_CAPTION),),
    contents=contents,
    more=more,
    rules=(("C6", c6_task_finetuning),),
)
