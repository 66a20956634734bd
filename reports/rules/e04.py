"""The rule of C6: accuracy after task fine-tuning."""

from __future__ import annotations

import pandas as pd

from experiments.framework.tables import TaskFinetuningRow, TaskFinetuningSample
from reports.core.load import Run
from reports.core.statistics import quadrature
from reports.core.style import number, points, variant_name
from reports.core.verdicts import Finding, column_of, decide, untested
from reports.measures.accuracy import of_the_paper, points_interval
from reports.measures.finetuning import Trained, lead

NEEDED = ("dense", "cats-50", "relufication")


def c6_task_finetuning(run: Run) -> list[Finding]:
    """Holds here if, in mean accuracy after task fine-tuning, CATS-50 is at most 0.5 points below base, and
    ReLUfication at least 10 points below it (half of the paper's 19).

    Both the items' and the seeds' errors count; a single seed decides nothing.
    """
    table, samples = run.table(TaskFinetuningRow), run.table(TaskFinetuningSample)
    if table is None:
        return []
    findings = []
    for name, part in of_the_paper(table[table["accuracy"].notna()]).groupby("model", sort=False):
        model = str(name)
        at = _trained(part, None if samples is None else samples[samples["model"] == model])
        if absent := [variant_name(variant) for variant in NEEDED if variant not in at]:
            findings.append(untested(model, f"{', '.join(absent)} not measured on all tasks"))
            continue
        values = {variant: float(of.per_seed().mean()) for variant, of in at.items()}
        chance = part.drop_duplicates("task")["chance"].mean()
        if values["dense"] - chance <= 2 * quadrature(at["dense"].rows.groupby("task")["stderr"].mean()) / len(
            at["dense"].rows["task"].unique()
        ):
            findings.append(untested(model, f"the base model is at chance ({number(chance)})"))
            continue
        gap, loss = lead(at["cats-50"], at["dense"]), lead(at["dense"], at["relufication"])
        verdict, reason = decide([("CATS-50", gap.shifted(0.005)), ("ReLUfication", loss.shifted(-0.1))])
        base = at["dense"].per_seed()
        base = base[base.index.isin(at["cats-50"].per_seed().index)]  # those that the difference is over
        ours = f"CATS-50 {number(values['cats-50'])} / {number(float(base.mean()))} ({points(gap.value)} points); "
        ours += f"ReLUfication {number(values['relufication'])} ({points(-loss.value)} points)"
        uncertainty = f"CATS-50: {points_interval(gap)}; ReLUfication: {points_interval(loss.negative())}"
        findings.append(Finding(model, column_of(model), verdict, ours, uncertainty, reason))
    return findings


def _trained(part: pd.DataFrame, samples: pd.DataFrame | None) -> dict[str, Trained]:
    """Variant -> what was measured, where it has all tasks."""
    tasks = part["task"].nunique()
    empty = pd.DataFrame(columns=["task", "seed", "correct"])
    return {
        str(variant): Trained(rows, empty if samples is None else samples[samples["variant"] == variant])
        for variant, rows in part.groupby("variant", sort=False)
        if rows["task"].nunique() == tasks
    }
