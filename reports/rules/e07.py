"""The rule of C10: CATS on the attention inputs too."""

from __future__ import annotations

import pandas as pd

from experiments.framework.tables import AttentionRow, AttentionSample
from reports.core.load import Run
from reports.core.style import number, plus_minus
from reports.core.verdicts import UNDECIDED, Finding, column_of, decide, untested
from reports.measures.accuracy import of_the_paper, points_interval, scores, unfit, variants
from reports.measures.finetuning import Trained, lead

COST = 0.03
WIDE, NARROW = "cats-50-attention", "cats-50"
BOUNDED = "attention too against MLP alone"


def c10_attention(run: Run) -> list[Finding]:
    """Holds here if CATS-50 on the attention inputs too costs at most 3 points of mean accuracy against CATS-50 on the
    MLP alone (the paper's own cost is 2.4), with and without fine-tuning where both were measured, paired over items.

    After fine-tuning the two are paired over training seeds as well; one seed decides nothing.
    """
    table, samples = run.table(AttentionRow), run.table(AttentionSample)
    if table is None:
        return []
    table = of_the_paper(table)
    table = table[table["metric"] == "acc"]
    findings = []
    for model in table["model"].unique():
        of_model = table[table["model"] == model]
        kept = None if samples is None else samples[samples["model"] == model]
        plain, tuned = of_model[~of_model["finetuned"]], of_model[of_model["finetuned"]]
        findings.append(_plain(str(model), plain, None if kept is None else kept[~kept["finetuned"]]))
        if tuned["criterion"].eq("cats").any():
            findings.append(_finetuned(str(model), tuned, plain, None if kept is None else kept[kept["finetuned"]]))
    return findings


def _plain(model: str, table: pd.DataFrame, samples: pd.DataFrame | None) -> Finding:
    aspect = "without fine-tuning"
    at = scores(table, samples, model)
    if problem := unfit(model, at, ("dense", NARROW, WIDE), aspect):
        return problem
    wide, narrow = at[WIDE], at[NARROW]
    change = wide.lead(narrow)
    verdict, reason = decide([(BOUNDED, change.shifted(COST))])
    ours = f"{plus_minus(wide.value, wide.stderr)} / {number(narrow.value)} MLP only / {number(at['dense'].value)} base"
    return Finding(model, column_of(model), verdict, ours, points_interval(change), reason, aspect=aspect)


def _finetuned(model: str, table: pd.DataFrame, plain: pd.DataFrame, samples: pd.DataFrame | None) -> Finding:
    """Both paired over their common seeds; the dense model was perhaps measured before training only."""
    aspect = "fine-tuned"
    at = trained(table, samples)
    at = {**trained(plain, None), **at} if "dense" not in at else at
    if absent := [name for name in ("dense", NARROW, WIDE) if name not in at or at[name].per_seed().empty]:
        return untested(model, f"{', '.join(absent)} not measured on all tasks", aspect=aspect)
    change = lead(at[WIDE], at[NARROW])
    verdict, reason = decide([(BOUNDED, change.shifted(COST))])
    wide, narrow, dense = (float(at[name].per_seed().mean()) for name in (WIDE, NARROW, "dense"))
    ours = f"{number(wide)} / {number(narrow)} MLP only / {number(dense)} base"
    finding = Finding(model, column_of(model), verdict, ours, points_interval(change), reason, aspect=aspect)
    single = len(at[WIDE].per_seed().index.intersection(at[NARROW].per_seed().index)) < 2
    return finding.because(UNDECIDED, "a single training seed") if single else finding


def trained(table: pd.DataFrame, samples: pd.DataFrame | None) -> dict[str, Trained]:
    """Variant, without its ending ``-finetuned`` -> its rows and samples of every seed."""
    table = table.assign(variant=table["variant"].str.removesuffix("-finetuned"), accuracy=table["value"])
    if samples is not None:
        samples = samples.assign(variant=samples["variant"].str.removesuffix("-finetuned"))
    nothing = pd.DataFrame(columns=["task", "seed", "correct"])
    return {
        name: Trained(
            table[(table["variant"] == name) & table["accuracy"].notna()],
            nothing if samples is None else samples[samples["variant"] == name],
        )
        for name in variants(table)
    }
