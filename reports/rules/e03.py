"""The rules of C4 and C5, and of C11 after fine-tuning."""

from __future__ import annotations

import numpy as np
import pandas as pd

from experiments.framework.tables import FinetuningRow, FinetuningSample, SparsityRow
from reports.core.load import Run
from reports.core.statistics import Estimate, mean_estimate
from reports.core.style import number, percent, points, variant_name
from reports.core.verdicts import FAILS, NOT_TESTED, UNDECIDED, Finding, column_of, decide, untested
from reports.measures.accuracy import LEVELS, of_the_paper, points_interval
from reports.measures.finetuning import Trained, lead, sparsity_means
from reports.rules.e02 import RAISED_BY, perplexity_finding

WITHIN = 0.05


def c4_finetuned(run: Run) -> list[Finding]:
    """Holds here if every CATS level is more accurate than ReLUfication at every evaluated step, and CATS-70 is at most
    2 points below the base model before fine-tuning at the last step evaluated within the first 500.

    Both the items' and the seeds' errors count; a single seed decides nothing. A level that was not measured leaves the
    claim untested or undecided unless another has failed it.
    """
    table, samples = run.table(FinetuningRow), run.table(FinetuningSample)
    if table is None:
        return []
    findings = []
    for name, part in of_the_paper(table[table["accuracy"].notna()]).groupby("model", sort=False):
        model = str(name)
        kept = None if samples is None else samples[samples["model"] == model]
        at = _trained(part, kept)
        steps = sorted(step for variant, step in at if variant == "relufication")
        within = [step for step in steps if 0 < step <= 500]
        unmeasured = [level for level in LEVELS if not any(variant == level for variant, _ in at)]
        pairs = [(level, step) for level in LEVELS if level not in unmeasured for step in steps]
        needed = [*pairs, ("dense", 0)]
        absent = [f"{variant_name(v)} at step {step}" for v, step in dict.fromkeys(needed) if (v, step) not in at]
        if absent or not within or not pairs:
            text = ", ".join(absent[:3]) or "ReLUfication at a step within the first 500"
            findings.append(untested(model, f"{text} not measured on all tasks"))
            continue
        leads = {(level, step): lead(at[level, step], at["relufication", step]) for level, step in pairs}
        gap = lead(at["cats-70", within[-1]], at["dense", 0]) if "cats-70" not in unmeasured else None
        findings.append(without(unmeasured, _c4_finding(model, leads, gap, within[-1])))
    return findings


def without(unmeasured: list[str], finding: Finding) -> Finding:
    """What a claim about every level comes to when some were not measured: one that fails it is enough, and none that
    is undecided becomes more."""
    if not unmeasured or finding.verdict == FAILS:
        return finding
    verdict = UNDECIDED if finding.verdict == UNDECIDED else NOT_TESTED
    return finding.because(verdict, f"{', '.join(map(variant_name, unmeasured))} not measured")


def _trained(part: pd.DataFrame, samples: pd.DataFrame | None) -> dict[tuple[str, int], Trained]:
    """(variant, step) -> what was measured there, where some seed has all tasks."""
    tasks = part["task"].nunique()
    at = {}
    for (variant, step), rows in part.groupby(["variant", "step"], sort=False):
        own = pd.DataFrame(columns=["task", "seed", "correct"])
        if samples is not None:
            own = samples[(samples["variant"] == variant) & (samples["step"] == step)]
        if rows["task"].nunique() == tasks:
            at[str(variant), int(float(str(step)))] = Trained(rows, own, trained=float(str(step)) > 0)
    return at


def _c4_finding(model: str, leads: dict[tuple[str, int], Estimate], gap: Estimate | None, step: int) -> Finding:
    named = [(f"{variant_name(level)} at step {at}", one) for (level, at), one in leads.items()]
    won = sum(one.value > 0 for one in leads.values())
    ours = f"{won} of {len(leads)} comparisons won"
    worst = min(named, key=lambda pair: pair[1].value)
    uncertainty = f"smallest lead {worst[0]}: {points_interval(worst[1])}"
    if gap is not None:
        named.append((f"CATS-70 against base at step {step}", gap.shifted(0.02)))
        ours += f"; CATS-70 at step {step} {points(gap.value)} points from base"
        uncertainty += f"; CATS-70: {points_interval(gap)}"
    verdict, reason = decide(named)
    return Finding(model, column_of(model), verdict, ours, uncertainty, reason)


def c5_sparsity_kept(run: Run) -> list[Finding]:
    """Holds here if each CATS level's mean sparsity after fine-tuning, not recalibrated, is within 5 points of its
    target: that changes the bytes of the MLP by 5 to 8 %. The paper's own figures, up to 9.9 points off, miss it. A
    level that was not measured leaves the claim untested unless another has failed it.
    """
    table = run.table(SparsityRow)
    if table is None:
        return []
    means = sparsity_means(of_the_paper(table))
    means = means[~means["recalibrated"] & means["variant"].isin(LEVELS) & means["sparsity"].notna()]
    findings = []
    for name, part in means.groupby("model", sort=False):
        model = str(name)
        rows = {str(row["variant"]): row for row in part.to_dict("records")}
        drifts = {
            level: mean_estimate(rows[level]["per_seed"] - rows[level]["sparsity_target"], "over seeds")
            for level in LEVELS
            if level in rows
        }
        margins = [
            (variant_name(level), one)
            for level, drift in drifts.items()
            for one in (drift.shifted(WITHIN), drift.negative().shifted(WITHIN))
        ]
        verdict, reason = decide(margins)
        worst = max(drifts, key=lambda level: abs(drifts[level].value))
        ends = part[["lowest_layer", "highest_layer"]].sub(part["sparsity_target"], axis=0).to_numpy().ravel()
        ours = ", ".join(f"{variant_name(level)}: {percent(rows[level]['sparsity'])}" for level in drifts)
        uncertainty = f"largest drift {variant_name(worst)}'s: {points_interval(drifts[worst])}; "
        uncertainty += f"of a single layer {points(max(ends, key=abs))} points; "
        uncertainty += f"{len(rows[worst]['per_seed'])} seeds"
        finding = Finding(model, column_of(model), verdict, ours, uncertainty, reason)
        findings.append(without([level for level in LEVELS if level not in rows], finding))
    return findings


def c11_finetuned_perplexity(run: Run) -> list[Finding]:
    """Holds here after fine-tuning if, at the last step, CATS-50's perplexity of held-out text is at most 2 % above
    dense's and ReLUfication's at least 10 % above it, all fine-tuned alike, paired over seeds.
    """
    table = run.table(FinetuningRow)
    if table is None:
        return []
    losses = of_the_paper(table).drop_duplicates(["model", "variant", "seed", "step"])
    findings = []
    for name, part in losses.groupby("model", sort=False):
        model, aspect = str(name), "fine-tuned"
        last = part[(part["step"] == part["step"].max()) & (part["step"] > 0) & part["eval_loss"].notna()]
        by_variant = {str(v): of.set_index("seed")["eval_loss"] for v, of in last.groupby("variant")}
        if absent := [variant for variant in ("dense", *RAISED_BY) if variant not in by_variant]:
            reason = f"no loss of {', '.join(map(variant_name, absent))} after fine-tuning"
            findings.append(untested(model, reason, aspect=aspect))
            continue
        raised = {variant: _over_seeds(by_variant[variant], by_variant["dense"]) for variant in RAISED_BY}
        dense = f"dense {number(float(np.exp(by_variant['dense'].mean())), 2)} at step {last['step'].iloc[0]:.0f}"
        findings.append(perplexity_finding(model, raised, dense, aspect))
    return findings


def _over_seeds(losses: pd.Series, dense: pd.Series) -> Estimate:
    """Mean log ratio over the common seeds."""
    differences = (losses - dense).dropna().to_numpy()
    if not len(differences):
        return Estimate(float("nan"))
    return mean_estimate(differences, f"{len(differences)} seeds")
