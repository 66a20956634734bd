"""The rule of C10: CATS on the attention inputs too."""

from __future__ import annotations

import pandas as pd

from experiments.framework.tables import AttentionRow, AttentionSample
from reports.core.load import Run
from reports.core.style import number, plus_minus
from reports.core.verdicts import UNDECIDED, Finding, column_of, decide
from reports.measures.accuracy import of_the_paper, points_interval, scores, unfit

COST = 0.03


def c10_attention(run: Run) -> list[Finding]:
    """Holds here if CATS-50 on the attention inputs too costs at most 3 points of mean accuracy against CATS-50 on the
    MLP alone (the paper's own cost is 2.4), with and without fine-tuning where both were measured, paired over items.

    One fine-tuning with one seed decides nothing.
    """
    table, samples = run.table(AttentionRow), run.table(AttentionSample)
    if table is None:
        return []
    findings = []
    for finetuned in (False, True):
        at = plain_names(of_the_paper(table), finetuned)
        kept = None if samples is None else plain_names(samples, finetuned)
        if finetuned and at.loc[at["criterion"] == "cats"].empty:
            continue
        for model in at.loc[at["metric"] == "acc", "model"].unique():
            findings.append(_finding(str(model), at, kept, finetuned))
    return findings


def plain_names(table: pd.DataFrame, finetuned: bool) -> pd.DataFrame:
    """One half of a table, with its variants named alike; the dense model was perhaps measured before training only."""
    half = table[table["finetuned"] == finetuned]
    if finetuned:
        dense = table[
            (table["criterion"] == "dense") & ~table["model"].isin(half.loc[half["criterion"] == "dense", "model"])
        ]
        half = pd.concat([half, dense[dense["model"].isin(half["model"])]])
    return half.assign(variant=half["variant"].str.removesuffix("-finetuned"))


def _finding(model: str, table: pd.DataFrame, samples: pd.DataFrame | None, finetuned: bool) -> Finding:
    aspect = "fine-tuned" if finetuned else "without fine-tuning"
    at = scores(table, samples, model)
    if problem := unfit(model, at, ("dense", "cats-50", "cats-50-attention"), aspect):
        return problem
    wide, narrow = at["cats-50-attention"], at["cats-50"]
    change = wide.lead(narrow)
    verdict, reason = decide([("attention too against MLP alone", change.shifted(COST))])
    ours = f"{plus_minus(wide.value, wide.stderr)} / {number(narrow.value)} MLP only / {number(at['dense'].value)} base"
    finding = Finding(model, column_of(model), verdict, ours, points_interval(change), reason, aspect=aspect)
    return finding.because(UNDECIDED, "a single training seed") if finetuned else finding
