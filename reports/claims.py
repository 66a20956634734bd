"""The paper's claims C1 to C10 and the rules that judge them: pure functions from tables to findings.

A rule sees one run's tables and answers with one `Finding` per model (or condition) that it can judge. `holds=None`
means the tables do not allow a verdict, with the reason in `ours`. The first sentence of each docstring is the rule
as it is printed in the report. "SE" is one standard error; a margin of less than 2 SE is said to be undecided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from reports.load import Run, command
from reports.stats import (
    finetuning_means,
    generation_speedups,
    histogram_quantile,
    kernel_speedups,
    sparsity_means,
    speedup_at,
    task_means,
    throughput_by_length,
    zero_shot_means,
)
from reports.style import dtype_name, number, percent, plus_minus, points, times, variant_name

Tables = Mapping[str, pd.DataFrame]
REPRODUCED, NOT_REPRODUCED, NOT_TESTED = "reproduced", "not reproduced", "not tested here"
LEVELS = ("cats-50", "cats-70", "cats-90")


@dataclass(frozen=True)
class Finding:
    """What one rule found on one model: the measured figure, how sure it is, and whether the claim holds."""

    model: str
    ours: str
    uncertainty: str
    holds: bool | None


@dataclass(frozen=True)
class Claim:
    """One claim of the paper, where the paper shows it, and the rule that judges it."""

    id: str
    statement: str
    paper: str
    experiment: str
    rule: Callable[[Tables], list[Finding]]

    @property
    def rule_text(self) -> str:
        """The rule in one sentence: the first of the rule's docstring."""
        return " ".join((self.rule.__doc__ or "").split("\n\n")[0].split())


def _margin(margin: float, stderr: float) -> str:
    """How far the measurement is from the bound, in standard errors."""
    if not math.isfinite(stderr) or stderr <= 0:
        return f"{points(margin)} points from the bound; no standard error was measured"
    text = f"{points(margin)} points = {abs(margin) / stderr:.1f} SE {'inside' if margin >= 0 else 'beyond'} the bound"
    return text + ("; undecided: less than 2 SE" if abs(margin) < 2 * stderr else "")


@dataclass(frozen=True)
class Score:
    """Mean accuracy of one variant, as the rules compare it."""

    value: float
    stderr: float
    difference_stderr: float = math.nan
    chance: float = math.nan
    sparsity: float = math.nan

    def lead(self, other: Score) -> tuple[float, float]:
        """Lead over another, with the unpaired standard error: an upper bound, since the items are shared."""
        return self.value - other.value, math.hypot(self.stderr, other.stderr)


def _scores(part: pd.DataFrame, value: str = "value") -> dict[str, Score]:
    """Variant -> score, for the variants whose mean is defined."""
    found = {}
    for row in part[part[value].notna()].to_dict("records"):
        rest = row.get("difference_stderr", math.nan), row.get("chance", math.nan), row["sparsity_measured"]
        found[str(row["variant"])] = Score(row[value], row["stderr"], *rest)
    return found


def _unfit(model: str, at: dict[str, Score], needed: tuple[str, ...]) -> Finding | None:
    """Why these scores allow no verdict: a variant is missing, or the base model has nothing to lose."""
    absent = [variant_name(name) for name in needed if name not in at]
    if absent:
        return Finding(model, f"{', '.join(absent)} not measured on all tasks", "", None)
    base = at["dense"]
    if base.value - base.chance <= 2 * base.stderr:
        return Finding(model, f"the base model is at chance ({number(base.value)}, {number(base.chance)})", "", None)
    return None


def c1_concentration(tables: Tables) -> list[Finding]:
    """Reproduced if, in each layer shown, the 50 % threshold lies below 15 % of the 99.9th percentile of the gate
    activations' magnitude (a uniform distribution has 50 %, a normal one 20 %).
    """
    findings = []
    for model, part in tables["e01_histogram"].groupby("model", sort=False):
        shares = {
            f"layer {index:.0f}": histogram_quantile(layer, 0.5) / histogram_quantile(layer, 0.999)
            for index, layer in part.groupby("layer_index")
        }
        ours = "; ".join(f"{layer}: {percent(share)}" for layer, share in shares.items())
        seen = f"{part['count'].sum() / len(shares):,.0f} activations a layer"
        worst = max(shares.values())
        findings.append(Finding(str(model), ours, f"{seen}; largest share {percent(worst)}", worst < 0.15))
    return findings


def c2_near_base(tables: Tables) -> list[Finding]:
    """Reproduced if CATS-50's mean zero-shot accuracy, not fine-tuned, is at most 2 points below the base model's."""
    findings = []
    for name, part in zero_shot_means(tables["e02_zero_shot"]).groupby("model", sort=False):
        model, at = str(name), _scores(part)
        if problem := _unfit(model, at, ("dense", "cats-50")):
            findings.append(problem)
            continue
        cats, dense = at["cats-50"], at["dense"]
        change, stderr = cats.value - dense.value, cats.difference_stderr
        ours = f"{plus_minus(cats.value, cats.stderr)} / {number(dense.value)} ({points(change)} points)"
        uncertainty = f"± {number(100 * stderr, 2)} points (paired SE); {_margin(change + 0.02, stderr)}"
        findings.append(Finding(model, ours, uncertainty, change >= -0.02))
    return findings


def c3_beats_relufication(tables: Tables) -> list[Finding]:
    """Reproduced if CATS-50, CATS-70 and CATS-90 each have a higher mean zero-shot accuracy than ReLUfication, all
    without fine-tuning.
    """
    findings = []
    for name, part in zero_shot_means(tables["e02_zero_shot"]).groupby("model", sort=False):
        model, at = str(name), _scores(part)
        if problem := _unfit(model, at, ("dense", "relufication", *LEVELS)):
            findings.append(problem)
            continue
        relu = at["relufication"]
        leads = {level: at[level].lead(relu) for level in LEVELS}
        worst = min(leads, key=lambda level: leads[level][0])
        ours = ", ".join(f"{variant_name(level)} {number(at[level].value)}" for level in LEVELS)
        ours += f" / {number(relu.value)} (ReLUfication, {percent(relu.sparsity, 0)} sparse)"
        uncertainty = f"smallest lead: {variant_name(worst)}, {_margin(*leads[worst])}"
        findings.append(Finding(model, ours, uncertainty, all(lead > 0 for lead, _ in leads.values())))
    return findings


def c4_finetuned(tables: Tables) -> list[Finding]:
    """Reproduced if every CATS level is more accurate than ReLUfication at every evaluated step, and CATS-70 is at most
    2 points below the base model before fine-tuning at the last step evaluated within the first 500.
    """
    findings = []
    for name, part in finetuning_means(tables["e03_finetuning"]).groupby("model", sort=False):
        model = str(name)
        at = {(r["variant"], r["step"]): Score(r["accuracy"], r["stderr"]) for r in part.to_dict("records")}
        steps = sorted(step for variant, step in at if variant == "relufication")
        within = [step for step in steps if 0 < step <= 500]
        needed = [(level, step) for level in LEVELS for step in steps] + [("dense", 0)]
        absent = [f"{variant_name(variant)} at step {step}" for variant, step in needed if (variant, step) not in at]
        if absent or not within:
            text = f"{', '.join(absent) or 'ReLUfication at a step within the first 500'} not measured on all tasks"
            findings.append(Finding(model, text, "", None))
            continue
        leads = {pair: at[pair].lead(at["relufication", pair[1]]) for pair in needed[:-1]}
        worst = min(leads, key=lambda pair: leads[pair][0])
        base, cats = at["dense", 0], at["cats-70", within[-1]]
        gap, gap_stderr = cats.lead(base)
        won = sum(lead > 0 for lead, _ in leads.values())
        ours = f"{won} of {len(leads)} comparisons won; CATS-70 at step {within[-1]} {number(cats.value)}"
        ours += f" / base {number(base.value)} ({points(gap)} points)"
        uncertainty = f"smallest lead: {variant_name(worst[0])} at step {worst[1]}, {_margin(*leads[worst])}; "
        uncertainty += f"CATS-70: {_margin(gap + 0.02, gap_stderr)}; {part['seeds'].min():.0f} seeds"
        findings.append(Finding(model, ours, uncertainty, won == len(leads) and gap >= -0.02))
    return findings


def c5_sparsity_kept(tables: Tables) -> list[Finding]:
    """Reproduced if each CATS level's mean sparsity after fine-tuning, not recalibrated, is within 10 points of its
    target.
    """
    means = sparsity_means(tables["e03_sparsity"])
    means = means[~means["recalibrated"] & means["variant"].isin(LEVELS) & means["sparsity"].notna()]
    findings = []
    for name, part in means.groupby("model", sort=False):
        rows = {str(row["variant"]): row for row in part.to_dict("records")}
        if absent := [variant_name(level) for level in LEVELS if level not in rows]:
            findings.append(Finding(str(name), f"{', '.join(absent)} not measured", "", None))
            continue
        drifts = {level: rows[level]["sparsity"] - rows[level]["sparsity_target"] for level in LEVELS}
        worst = max(drifts, key=lambda level: abs(drifts[level]))
        margin = 0.10 - abs(drifts[worst])
        ours = ", ".join(f"{variant_name(level)}: {percent(rows[level]['sparsity'])}" for level in LEVELS)
        uncertainty = f"largest drift {points(drifts[worst])} points; {_margin(margin, rows[worst]['seed_stderr'])}"
        layers = percent(part["lowest_layer"].min(), 0), percent(part["highest_layer"].max(), 0)
        findings.append(Finding(str(name), ours, f"{uncertainty}; single layers {' to '.join(layers)}", margin >= 0))
    return findings


def c6_task_finetuning(tables: Tables) -> list[Finding]:
    """Reproduced if, in mean accuracy after task fine-tuning, CATS-50 is not significantly (2 SE) more than 0.5 points
    below base, and ReLUfication is significantly (2 SE) below CATS-50.
    """
    means = task_means(tables["e04_task_finetuning"])
    findings = []
    for name, part in means[means["task"] == "average"].groupby("model", sort=False):
        model, at = str(name), _scores(part, "accuracy")
        if problem := _unfit(model, at, ("dense", "cats-50", "relufication")):
            findings.append(problem)
            continue
        base, cats, relu = at["dense"], at["cats-50"], at["relufication"]
        gap, gap_stderr = cats.lead(base)
        lead, lead_stderr = cats.lead(relu)
        ours = f"CATS-50 {number(cats.value)} / {number(base.value)} ({points(gap)} points); ReLUfication "
        ours += f"{number(relu.value)} ({points(relu.value / base.value - 1)} % of base)"
        uncertainty = f"CATS-50: {_margin(gap + 0.005, gap_stderr)}; ReLUfication: {_margin(lead, lead_stderr)}"
        holds = gap + 2 * gap_stderr >= -0.005 and lead > 2 * lead_stderr
        findings.append(Finding(model, ours, uncertainty, holds))
    return findings


def _kernel_groups(tables: Tables) -> list[tuple[str, pd.DataFrame]]:
    """Batch-1 speed-ups by shape and dtype, at the paper's 7B shapes and the largest number of threads timed."""
    speedups = kernel_speedups(tables["e05_mlp_latency"])
    speedups = speedups[(speedups["rows"] == 1) & speedups["shape"].isin(["Mistral-7B", "Llama2-7B"])]
    most = speedups.groupby(["machine", "shape", "dtype"])["threads"].transform("max")
    speedups = speedups[speedups["threads"].isna() | (speedups["threads"] == most)]
    groups = speedups.groupby(["shape", "dtype"], sort=False)
    return [(f"{shape} shape, {dtype_name(str(dtype))}", part) for (shape, dtype), part in groups]


def c7_kernel_speed(tables: Tables) -> list[Finding]:
    """Reproduced if dense time over CATS time at batch 1 is at least 1.40 at 50 % sparsity and 1.70 at 70 %."""
    findings = []
    for name, group in _kernel_groups(tables):
        part = group[group["implementation"] == "cats"]
        half, more = (speedup_at(part, target) if len(part) else None for target in (0.5, 0.7))
        if half is None or more is None:
            findings.append(Finding(name, "no CATS kernel timed around 50 % and 70 % sparsity", "", None))
            continue
        ours = "; ".join(f"{times(speedup)} {note}" for speedup, _, _, note in (half, more))
        uncertainty = "p20 to p80: " + "; ".join(f"{times(low)} to {times(high)}" for _, low, high, _ in (half, more))
        if half[1] < 1.4 < half[2] or more[1] < 1.7 < more[2]:
            uncertainty += "; undecided: a bound lies inside its range"
        findings.append(Finding(name, ours, uncertainty, bool(half[0] >= 1.4 and more[0] >= 1.7)))
    return findings


def c8_fused_mask(tables: Tables) -> list[Finding]:
    """Reproduced if the fused kernel with a mask is faster than the unfused and than the index-compacting one, each in
    the geometric mean over the measured sparsities from 20 % to 95 %.

    Where the paper's algorithm was not timed, this project's kernel (fused, with a mask, too) stands for it.
    """
    findings = []
    for name, group in _kernel_groups(tables):
        group = group[group["sparsity_target"].between(0.195, 0.955)]
        latency = group.pivot_table(index="sparsity_target", columns="implementation", values="geomean_ms")
        fused = "fused-mask" if "fused-mask" in latency else "cats"
        needed = {fused, "gather", "fused-compact"}
        common = latency.dropna(subset=list(needed)) if needed <= set(latency.columns) else latency.iloc[:0]
        if common.empty:
            findings.append(Finding(name, "not all three kernels were timed at a common sparsity", "", None))
            continue
        ratios = common[["gather", "fused-compact"]].div(common[fused], axis=0).to_numpy()
        unfused, compacting = np.exp(np.log(ratios).mean(axis=0))
        ours = f"{times(unfused)} faster than unfused, {times(compacting)} than compacting"
        ours += " (our kernel)" if fused == "cats" else ""
        won = int((ratios > 1).all(axis=1).sum())
        uncertainty = f"fastest at {won} of {len(ratios)} sparsities; single ratios {times(ratios.min())} to "
        findings.append(Finding(name, ours, uncertainty + times(ratios.max()), bool(min(unfused, compacting) > 1)))
    return findings


def c9_generation(tables: Tables) -> list[Finding]:
    """Reproduced if CATS-50 generates at least 1.15 times the tokens per second of dense at batch 1, in the geometric
    mean over generated lengths, in the loop (eager or compiled) in which dense is fastest.
    """
    lengths = throughput_by_length(generation_speedups(tables["e06_throughput"]))
    findings = []
    for (model, layers, dtype), part in lengths.groupby(["model", "layers", "dtype"], sort=False):
        part = part.assign(log=np.log(part["speedup"]), dense=np.log(part["dense_tokens_per_second"]))
        # Only lengths timed in every loop can say which loop is the fastest.
        common = part.groupby("generated_tokens")["loop"].transform("nunique") == part["loop"].nunique()
        ranks = (part[common] if common.any() else part).groupby("loop")["dense"].mean().sort_values(ascending=False)
        loops = [(str(loop), part[part["loop"] == loop]) for loop in ranks.index]
        means = [(loop, math.exp(of["log"].mean())) for loop, of in loops]
        (best, speedup), judged = means[0], loops[0][1]
        ours = f"{times(speedup)} ({best} loop)" + "".join(f"; {times(mean)} ({loop})" for loop, mean in means[1:])
        stderr = speedup * math.sqrt((judged["log_stderr"] ** 2).sum(skipna=False)) / len(judged)
        spread = f"over lengths {times(judged['speedup'].min())} to {times(judged['speedup'].max())}"
        if math.isfinite(stderr):
            spread = f"± {stderr:.3f} (SE over prompts); {spread}"
            spread += "; undecided: bound within 2 SE" if abs(speedup - 1.15) < 2 * stderr else ""
        spread += f"; measured sparsity {percent(judged['sparsity_measured'].mean())}"
        findings.append(
            Finding(f"{model}, {layers:.0f} layers, {dtype_name(str(dtype))}", ours, spread, speedup >= 1.15)
        )
    return findings


def c10_attention(tables: Tables) -> list[Finding]:
    """Reproduced if CATS-50 on the attention inputs too costs at most 5 points of mean accuracy against CATS-50 on the
    MLP alone, after fine-tuning where that was measured.
    """
    findings = []
    for name, part in zero_shot_means(tables["e07_attention"]).groupby("model", sort=False):
        model, at = str(name), _scores(part)
        if problem := _unfit(model, at, ("dense", "cats-50", "cats-50-attention")):
            findings.append(problem)
            continue
        tuned = "-finetuned" if {"cats-50-finetuned", "cats-50-attention-finetuned"} <= set(at) else ""
        wide, narrow = at[f"cats-50-attention{tuned}"], at[f"cats-50{tuned}"]
        change, stderr = wide.lead(narrow)
        ours = f"{plus_minus(wide.value, wide.stderr)} / {number(narrow.value)} MLP only ({points(change)} points)"
        ours += f" / {number(at['dense'].value)} base"
        if tuned:
            before, _ = at["cats-50-attention"].lead(at["cats-50"])
            ours += f"; before fine-tuning {points(before)} points"
        findings.append(Finding(model, ours, _margin(change + 0.05, stderr), change >= -0.05))
    return findings


CLAIMS = (
    Claim("C1", "gate activations concentrate near zero", "Figure 1 (histograms)", "e01", c1_concentration),
    Claim("C2", "CATS-50 stays within 1-2 % of base without fine-tuning",
          "0.6890 / 0.6994 (Mistral-7B), 0.6433 / 0.6589 (Llama2-7B)", "e02", c2_near_base),
    Claim("C3", "CATS beats ReLUfication at every sparsity without fine-tuning",
          "0.4368 (CATS-90) / 0.3230 (ReLUfication), Mistral-7B", "e02", c3_beats_relufication),
    Claim("C4", "with LoRA, every CATS level beats ReLUfication at every step; CATS-70 is near base within 500 steps",
          "CATS-70 at step 350: 0.6834 / 0.6994 (Mistral-7B), 0.6192 / 0.6589 (Llama2-7B)", "e03", c4_finetuned),
    Claim("C5", "sparsity stays near its target after fine-tuning",
          "41.1, 60.6, 82.5 % (Mistral-7B), 59.9, 77.1, 91.6 % (Llama2-7B) for 50, 70, 90 %", "e03", c5_sparsity_kept),
    Claim("C6", "after task fine-tuning CATS-50 is within 0.5 % of base, ReLUfication about 19 % below",
          "0.9059 / 0.9072; ReLUfication 0.7134 (Mistral-7B)", "e04", c6_task_finetuning),
    Claim("C7", "the kernel is about 40 % faster than dense at 50 % sparsity, about 70 % at 70 %",
          "1.4x at 50 %, 1.7x at 70 % (L40S, float32)", "e05", c7_kernel_speed),
    Claim("C8", "a fused kernel with a mask beats the unfused and the index-compacting ones", "Figure 6", "e05",
          c8_fused_mask),
    Claim("C9", "generation is 18 % and 21 % faster at 50 % sparsity", "1.18x (Llama2-7B), 1.21x (Mistral-7B)", "e06",
          c9_generation),
    Claim("C10", "CATS extends to the attention inputs at a cost of a few points",
          "0.6684 / 0.6921 MLP only / 0.6994 base (Mistral-7B)", "e07", c10_attention),
)  # fmt: skip

TABLE_OF = {
    "C1": "e01_histogram", "C2": "e02_zero_shot", "C3": "e02_zero_shot", "C4": "e03_finetuning", "C5": "e03_sparsity",
    "C6": "e04_task_finetuning", "C7": "e05_mlp_latency", "C8": "e05_mlp_latency", "C9": "e06_throughput",
    "C10": "e07_attention",
}  # fmt: skip

COLUMNS = ("claim", "statement", "paper", "run", "model", "ours", "uncertainty", "verdict", "rule", "command")


def judge(runs: list[Run]) -> pd.DataFrame:
    """claims.csv: a row per claim, run and model; a claim that no run measured has one row with the command to run."""
    rows = []
    for claim in CLAIMS:
        table = TABLE_OF[claim.id]
        of_claim = []
        for run in runs:
            found = claim.rule(run.tables) if table in run.tables else []
            if table in run.problems:
                found = [Finding("", f"{table}.csv is broken: {run.problems[table]}", "", None)]
            of_claim += [_row(claim, run.label, finding) for finding in found]
        rows += of_claim or [_row(claim, "", Finding("", "", "", None))]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _row(claim: Claim, run: str, finding: Finding) -> dict[str, str]:
    verdict = NOT_TESTED if finding.holds is None else REPRODUCED if finding.holds else NOT_REPRODUCED
    return {
        "claim": claim.id,
        "statement": claim.statement,
        "paper": claim.paper,
        "run": run,
        "model": finding.model,
        "ours": finding.ours,
        "uncertainty": finding.uncertainty,
        "verdict": verdict,
        "rule": claim.rule_text,
        "command": command(claim.experiment) if finding.holds is None else "",
    }
