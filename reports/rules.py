"""The rules that judge the paper's claims C1 to C10: pure functions from one run's tables to findings.

A rule answers with one `Finding` per model (or condition) that it can judge. `holds=None` means that the tables do not
allow a verdict, with the reason in `ours`. The first paragraph of each docstring is the rule as the report prints it.
SE is one standard error; a margin is the distance to the rule's bound, positive inside; a verdict that a margin of
less than 2 SE could turn is `undecided`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from reports.stats import (
    batch_one,
    finetuning_means,
    generation_speedups,
    histogram_quantile,
    sparsity_means,
    speedup_at,
    task_means,
    throughput_by_length,
    zero_shot_means,
)
from reports.style import (
    dtype_name,
    model_name,
    number,
    percent,
    plus_minus,
    points,
    ratio_error,
    times,
    times_range,
    variant_name,
)

Tables = Mapping[str, pd.DataFrame]
LEVELS = ("cats-50", "cats-70", "cats-90")
RIVALS = {"unfused": "gather", "compacting": "fused-compact"}  # of the fused kernel with a mask


@dataclass(frozen=True)
class Finding:
    """What one rule found on one model: the measured figure, how sure it is, and whether the claim holds.

    `settings` are the options that a new measurement needs to allow a verdict.
    """

    model: str
    ours: str
    uncertainty: str = ""
    holds: bool | None = None
    undecided: bool = False
    settings: str = ""


def _margin(margin: float, stderr: float) -> str:
    """The distance to a rule's bound, in standard errors too."""
    said = f"margin {points(margin)} points"
    if not math.isfinite(stderr) or stderr <= 0:
        return f"{said}, no standard error was measured"
    count = abs(margin) / stderr
    return f"{said}, " + (f"{count:.1f} SE" if count <= 10 else "over 10 SE")


def _judged(model: str, ours: str, uncertainty: str, margins: Iterable[tuple[float, float, bool]]) -> Finding:
    """The finding of a rule that sets bounds: (margin, SE, whether it holds) for each; all have to hold.

    It is undecided when 2 SE could turn it: some bound is that near if all hold, every bound missed if not.
    """
    margins = list(margins)
    holds = all(held for *_, held in margins)
    near = [abs(margin) < 2 * stderr for margin, stderr, held in margins if held == holds]
    return Finding(model, ours, uncertainty, holds, any(near) if holds else all(near))


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
        return Finding(model, f"{', '.join(absent)} not measured on all tasks")
    base = at["dense"]
    if base.value - base.chance <= 2 * base.stderr:
        return Finding(model, f"the base model is at chance ({number(base.value)}, {number(base.chance)})")
    return None


def c1_concentration(tables: Tables) -> list[Finding]:
    """Reproduced if, in each layer shown, the 50 % threshold lies below 15 % of the 99.9th percentile of the gate
    activations' magnitude (a uniform distribution has 50 %, a normal one 20 %).

    Where that percentile lies beyond the histogram's last edge, the share is known only to be smaller than the one
    to that edge: enough to reproduce, not to refute.
    """
    findings = []
    for model, part in tables["e01_histogram"].groupby("model", sort=False):
        shares, beyond = {}, set()
        edge = part.loc[np.isfinite(part["bin_right"]), "bin_right"].max()
        for index, layer in part.groupby("layer_index"):
            name, reach = f"layer {index:.0f}", histogram_quantile(layer, 0.999)
            shares[name] = histogram_quantile(layer, 0.5) / reach
            if reach >= edge and not np.isfinite(layer["bin_right"]).all():
                beyond.add(name)
        ours = "; ".join(f"{name}: {'under ' * (name in beyond)}{percent(share)}" for name, share in shares.items())
        worst = max(shares, key=lambda name: shares[name])
        seen = f"{part['count'].sum() / len(shares) / 1e6:.3g} million activations a layer"
        if shares[worst] >= 0.15 and {name for name, share in shares.items() if share >= 0.15} <= beyond:
            seen += f"; the 99.9th percentile lies beyond the histogram's end at {edge:g}"
            bins = 8 * int(np.isfinite(part["bin_right"]).sum() / len(shares))
            wider = f"--set e01.largest={8 * edge:g} --set e01.bins={bins}"
            findings.append(Finding(str(model), ours, seen, settings=wider))
        else:
            findings.append(Finding(str(model), ours, seen, shares[worst] < 0.15))
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
        margin = change + 0.02
        ours = f"{plus_minus(cats.value, cats.stderr)} / {number(dense.value)} ({points(change)} points)"
        uncertainty = f"± {number(100 * stderr, 2)} points (paired SE); {_margin(margin, stderr)}"
        findings.append(_judged(model, ours, uncertainty, [(margin, stderr, margin >= 0)]))
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
        uncertainty = f"smallest lead {variant_name(worst)}'s: {_margin(*leads[worst])}"
        findings.append(_judged(model, ours, uncertainty, [(*lead, lead[0] > 0) for lead in leads.values()]))
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
        pairs = [(level, step) for level in LEVELS for step in steps]
        absent = [f"{variant_name(v)} at step {step}" for v, step in [*pairs, ("dense", 0)] if (v, step) not in at]
        if absent or not within:
            text = f"{', '.join(absent) or 'ReLUfication at a step within the first 500'} not measured on all tasks"
            findings.append(Finding(model, text))
            continue
        leads = {pair: at[pair].lead(at["relufication", pair[1]]) for pair in pairs}
        worst = min(leads, key=lambda pair: leads[pair][0])
        base, cats = at["dense", 0], at["cats-70", within[-1]]
        gap, gap_stderr = cats.lead(base)
        margins = [(*lead, lead[0] > 0) for lead in leads.values()]
        ours = f"{sum(held for *_, held in margins)} of {len(leads)} comparisons won; CATS-70 at step {within[-1]} "
        ours += f"{number(cats.value)} / base {number(base.value)} ({points(gap)} points)"
        uncertainty = f"smallest lead {variant_name(worst[0])}'s at step {worst[1]}: {_margin(*leads[worst])}; "
        uncertainty += f"CATS-70: {_margin(gap + 0.02, gap_stderr)}; {part['seeds'].min():.0f} seeds"
        findings.append(_judged(model, ours, uncertainty, [*margins, (gap + 0.02, gap_stderr, gap >= -0.02)]))
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
            findings.append(Finding(str(name), f"{', '.join(absent)} not measured"))
            continue
        drifts = {level: rows[level]["sparsity"] - rows[level]["sparsity_target"] for level in LEVELS}
        margins = [(0.1 - abs(drifts[level]), rows[level]["seed_stderr"]) for level in LEVELS]
        worst = max(drifts, key=lambda level: abs(drifts[level]))
        ends = part[["lowest_layer", "highest_layer"]].sub(part["sparsity_target"], axis=0).to_numpy().ravel()
        ours = ", ".join(f"{variant_name(level)}: {percent(rows[level]['sparsity'])}" for level in LEVELS)
        uncertainty = f"largest drift {points(drifts[worst])} points: {_margin(*min(margins))}; "
        uncertainty += f"largest of a single layer {points(max(ends, key=abs))} points"
        findings.append(_judged(str(name), ours, uncertainty, [(*margin, margin[0] >= 0) for margin in margins]))
    return findings


def c6_task_finetuning(tables: Tables) -> list[Finding]:
    """Reproduced if, in mean accuracy after task fine-tuning, CATS-50 is at most 0.5 points below base, and
    ReLUfication at least 10 points below it (half of the paper's 19).
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
        loss, loss_stderr = base.lead(relu)
        ours = f"CATS-50 {number(cats.value)} / {number(base.value)} ({points(gap)} points); ReLUfication "
        ours += f"{number(relu.value)} ({points(-loss)} points)"
        margins = [(gap + 0.005, gap_stderr, gap >= -0.005), (loss - 0.1, loss_stderr, loss >= 0.1)]
        uncertainty = f"CATS-50: {_margin(*margins[0][:2])}; ReLUfication: {_margin(*margins[1][:2])}"
        findings.append(_judged(model, ours, uncertainty, margins))
    return findings


def _kernel_groups(tables: Tables) -> list[tuple[str, pd.DataFrame]]:
    """Batch-1 speed-ups by shape and dtype, at the paper's 7B shapes and the largest number of threads timed."""
    speedups = batch_one(tables["e05_mlp_latency"])
    groups = speedups[speedups["shape"].isin(["Mistral-7B", "Llama2-7B"])].groupby(["shape", "dtype"], sort=False)
    return [(f"{shape} shape, {dtype_name(str(dtype))}", part) for (shape, dtype), part in groups]


def c7_kernel_speed(tables: Tables) -> list[Finding]:
    """Reproduced if dense time over CATS time at batch 1 is at least 1.40 at 50 % sparsity and 1.70 at 70 %."""
    findings = []
    for name, group in _kernel_groups(tables):
        part = group[group["implementation"] == "cats"]
        half, more = (speedup_at(part, target) if len(part) else None for target in (0.5, 0.7))
        if half is None or more is None:
            findings.append(Finding(name, "no CATS kernel timed around 50 % and 70 % sparsity"))
            continue
        bounds = ((half, 1.4), (more, 1.7))
        ours = "; ".join(f"{times(at.speedup)} at {at.where}" for at, _ in bounds)
        uncertainty = "p20 to p80: " + "; ".join(times_range(at.low, at.high) for at, _ in bounds)
        holds = all(at.speedup >= bound for at, bound in bounds)
        lost = all(at.low < bound <= at.high for at, bound in bounds if at.speedup < bound)
        undecided = any(at.low < bound for at, bound in bounds) if holds else lost
        findings.append(Finding(name, ours, uncertainty, holds, undecided))
    return findings


def c8_fused_mask(tables: Tables) -> list[Finding]:
    """Reproduced if the fused kernel with a mask is faster than the unfused and than the index-compacting one, each in
    the geometric mean over the measured sparsities from 20 % to 95 %.

    Where the paper's algorithm was not timed, this project's kernel (fused, with a mask, too) stands for it. Losing
    to one of the two refutes the claim where the other was not timed.
    """
    findings = []
    for name, group in _kernel_groups(tables):
        group = group[group["sparsity_target"].between(0.195, 0.955)]
        kernels = {str(kernel): of.set_index("sparsity_target") for kernel, of in group.groupby("implementation")}
        fused = kernels.get("fused-mask", kernels.get("cats"))
        ratios = {title: _time_ratios(fused, kernels.get(kernel)) for title, kernel in RIVALS.items()}
        means = {title: np.exp(np.log(ratio).mean()) for title, ratio in ratios.items() if len(ratio)}
        absent = [title for title in RIVALS if title not in means]
        lost = [mean for mean in means.values() if mean["time"] <= 1]
        ours = ", ".join(f"{times(mean['time'])} the speed of {title}" for title, mean in means.items())
        ours = "; ".join(filter(None, [ours, *(f"{title} not timed beside it" for title in absent)]))
        ours += " (our kernel)" * (bool(means) and "fused-mask" not in kernels)
        if absent and not lost:
            findings.append(Finding(name, ours))
            continue
        uncertainty = "p20 to p80: " + "; ".join(times_range(mean["low"], mean["high"]) for mean in means.values())
        won = pd.concat([ratios[title]["time"] for title in means], axis=1, join="inner").gt(1).all(axis=1)
        uncertainty += f"; fastest at {won.sum()} of {len(won)} sparsities"
        near = [mean["low"] <= 1 < mean["high"] for mean in lost or means.values()]
        findings.append(Finding(name, ours, uncertainty, not lost, all(near) if lost else any(near)))
    return findings


def _time_ratios(fused: pd.DataFrame | None, rival: pd.DataFrame | None) -> pd.DataFrame:
    """Time of the rival over time of the fused kernel, with its p20 to p80 range, at each common sparsity."""
    if fused is None or rival is None:
        return pd.DataFrame()
    ends = {"time": ("geomean_ms", "geomean_ms"), "low": ("p20_ms", "p80_ms"), "high": ("p80_ms", "p20_ms")}
    return pd.DataFrame({name: rival[over] / fused[under] for name, (over, under) in ends.items()}).dropna()


def c9_generation(tables: Tables) -> list[Finding]:
    """Reproduced if CATS-50 generates at least 1.15 times the tokens per second of dense at batch 1, in the geometric
    mean over generated lengths, in the loop (eager, compiled or graph) in which dense is fastest.
    """
    lengths = throughput_by_length(generation_speedups(tables["e06_throughput"]))
    findings = []
    for (model, layers, dtype), part in lengths.groupby(["model", "layers", "dtype"], sort=False):
        common = part.groupby("generated_tokens")["loop"].transform("nunique") == part["loop"].nunique()
        compared = part[common] if common.any() else part
        ranks = compared.groupby("loop")["dense_tokens_per_second"].agg(lambda rates: np.log(rates).mean())
        loops = {str(loop): _loop_mean(part[part["loop"] == loop]) for loop in ranks.sort_values(ascending=False).index}
        (speedup, stderr), *_ = loops.values()
        ours = "; ".join(f"{times(mean)}{ratio_error(error)} ({loop} loop)" for loop, (mean, error) in loops.items())
        judged = part[part["loop"] == next(iter(loops))]
        spread = f"± is one SE over {judged['prompts'].min():.0f} prompts" if math.isfinite(stderr) else "one prompt"
        spread += f"; lengths {times_range(judged['speedup'].min(), judged['speedup'].max())}"
        spread += f"; measured sparsity {percent(judged['sparsity_measured'].mean())}"
        name = f"{model_name(str(model))}, {layers:.0f} layers, {dtype_name(str(dtype))}"
        findings.append(Finding(name, ours, spread, speedup >= 1.15, abs(speedup - 1.15) < 2 * stderr))
    return findings


def _loop_mean(part: pd.DataFrame) -> tuple[float, float]:
    """Geometric mean of the ratios over generated lengths, and its standard error."""
    mean = math.exp(np.log(part["speedup"]).mean())
    return mean, mean * math.sqrt((part["log_stderr"] ** 2).sum(skipna=False)) / len(part)


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
        margin = change + 0.05
        findings.append(_judged(model, ours, _margin(margin, stderr), [(margin, stderr, margin >= 0)]))
    return findings
