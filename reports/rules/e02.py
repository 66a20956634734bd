"""The rules of C2, C3 and C11: accuracy and perplexity without fine-tuning."""

from __future__ import annotations

import math

from experiments.framework.tables import ItemSample, TextSample, ZeroShotRow
from reports.core.load import Run
from reports.core.statistics import Estimate
from reports.core.style import number, percent, plus_minus, signed_percent, variant_name
from reports.core.verdicts import Finding, column_of, decide, untested
from reports.measures.accuracy import LEVELS, log_ratio, of_the_paper, points_interval, scores, unfit

RAISED_BY = {"cats-50": math.log(1.02), "relufication": math.log(1.10)}  # at most; at least


def c2_near_base(run: Run) -> list[Finding]:
    """Holds here if CATS-50's mean zero-shot accuracy, not fine-tuned, is at most 2 points below the base model's;
    the difference is paired over items.
    """
    findings = []
    for model, at in _models(run):
        if problem := unfit(model, at, ("dense", "cats-50")):
            findings.append(problem)
            continue
        cats, dense = at["cats-50"], at["dense"]
        change = cats.lead(dense, to_dense=True)
        verdict, reason = decide([("CATS-50 against base", change.shifted(0.02))])
        ours = f"{plus_minus(cats.value, cats.stderr)} / {number(dense.value)}"
        findings.append(Finding(model, column_of(model), verdict, ours, points_interval(change), reason))
    return findings


def c3_beats_relufication(run: Run) -> list[Finding]:
    """Holds here if CATS-50, CATS-70 and CATS-90 each have a higher mean zero-shot accuracy than ReLUfication, all
    without fine-tuning; differences are paired over items.
    """
    findings = []
    for model, at in _models(run):
        if problem := unfit(model, at, ("dense", "relufication", *LEVELS)):
            findings.append(problem)
            continue
        relu = at["relufication"]
        leads = {variant_name(level): at[level].lead(relu) for level in LEVELS}
        verdict, reason = decide(leads.items())
        ours = ", ".join(f"{variant_name(level)} {number(at[level].value)}" for level in LEVELS)
        ours += f" / {number(relu.value)} (ReLUfication, {percent(relu.sparsity, 0)} sparse)"
        if matched := at.get("cats-matched"):
            ours += f"; CATS at ReLUfication's sparsity {number(matched.value)}"
        worst = min(leads, key=lambda name: leads[name].value)
        uncertainty = f"smallest lead {worst}'s: {points_interval(leads[worst])}"
        findings.append(Finding(model, column_of(model), verdict, ours, uncertainty, reason))
    return findings


def _models(run: Run) -> list[tuple[str, dict]]:
    table, samples = run.table(ZeroShotRow), run.table(ItemSample)
    if table is None:
        return []
    table = of_the_paper(table)
    return [(str(m), scores(table, samples, str(m))) for m in table.loc[table["metric"] == "acc", "model"].unique()]


def c11_perplexity(run: Run) -> list[Finding]:
    """Holds here if CATS-50 raises the perplexity of held-out text by at most 2 % and ReLUfication by at least 10 %,
    both against dense and without fine-tuning, paired over blocks of text.
    """
    table, samples = run.table(ZeroShotRow), run.table(TextSample)
    if table is None:
        return []
    table = of_the_paper(table)
    table = table[table["metric"] == "perplexity"]
    findings = []
    for name, part in table.groupby("model", sort=False):
        model, aspect = str(name), "without fine-tuning"
        values = part.set_index("variant")["value"].dropna()
        if absent := [variant for variant in ("dense", *RAISED_BY) if variant not in values]:
            reason = f"no perplexity of {', '.join(map(variant_name, absent))}"
            findings.append(untested(model, reason, aspect=aspect))
            continue
        raised = {variant: log_ratio(part, samples, model, variant) for variant in RAISED_BY}
        findings.append(perplexity_finding(model, raised, f"dense {number(values['dense'], 2)}", aspect))
    return findings


def perplexity_finding(model: str, raised: dict[str, Estimate], ours: str, aspect: str) -> Finding:
    """The finding of C11 from the log ratios of CATS-50 and of ReLUfication to dense."""
    cats, relu = raised["cats-50"], raised["relufication"]
    margins = [
        (variant_name("cats-50"), cats.negative().shifted(RAISED_BY["cats-50"])),
        (variant_name("relufication"), relu.shifted(-RAISED_BY["relufication"])),
    ]
    verdict, reason = decide(margins)
    ours += "".join(f", {variant_name(v)} {signed_percent(math.expm1(e.value))}" for v, e in raised.items())
    ends = [
        f"{variant_name(v)} {signed_percent(math.expm1(e.low))} to {signed_percent(math.expm1(e.high))} ({e.how})"
        for v, e in raised.items()
        if e.known
    ]
    return Finding(model, column_of(model), verdict, ours, "; ".join(ends), reason, aspect=aspect)
