"""The rule of C9: generation throughput."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd

from experiments.framework.tables import QuantizationThroughputRow, ThroughputRow
from reports.core.load import Run, paper_model
from reports.core.provenance import processor
from reports.core.style import dtype_name, model_name, percent, times, times_range
from reports.core.verdicts import GPU, NOT_TESTED, UNDECIDED, Finding, decide, untested
from reports.measures.generation import BENCH, figure_4, over_lengths, pairs
from reports.rules.e05 import ONE_PROCESS

BARS = {"Llama2-7B": 1.18, "Mistral-7B": 1.21}
PAPER_LOOP = "eager"
FLOATS = ("float32", "bfloat16", "float16")  # quantised weights are no condition of the paper
TUNED = {GPU: "graph-tuned", "CPU": "compiled"}  # the loop in which dense has its strongest form
EAGER_ASPECT, FASTEST_ASPECT = "eager loop, as in the paper", "fastest loop timed in the run"


def c9_generation(run: Run) -> list[Finding]:
    """Holds here if CATS-50 generates at batch 1 at least 1.18 (Llama2-7B) or 1.21 (Mistral-7B) times the tokens per
    second of dense, in the geometric mean over generated lengths; once in the paper's loop (eager), once in the loop in
    which dense is fastest.

    Lengths of one prompt and repeat count once, and the error is over prompts and repeats (Student's t), wider by 2 %
    of the bar, since all of them are of one process: undecided with a single prompt, or with a single repeat, where the
    drift from run to run is unknown. Models with fewer layers than published decide nothing, nor do models without a
    figure in the paper. The fastest loop is undecided where dense was not timed in its strongest form (graph-tuned on a
    GPU, compiled on a CPU), and where another run shown has a faster dense on such a machine that would change the
    verdict, since inductor's tuning does not find the same program each time; it is for the run that timed the
    strongest form to decide.
    """
    table = run.table(ThroughputRow)
    if table is None:
        return []
    at = figure_4(pairs(table[table["dtype"].isin(FLOATS)]))
    bench = [name for name in BENCH if name not in ("loop", "attention")]
    findings = []
    for _, part in at.groupby(bench, sort=False):
        part = _strongest_attention(part)
        loops = _by_dense_speed(part)
        if problem := _undecidable(part):
            shown = [_finding(run, part[part["loop"] == loop], "") for loop in loops]
            findings += [replace(finding, verdict=NOT_TESTED, reason=problem) for finding in shown]
            continue
        chosen = [(EAGER_ASPECT, PAPER_LOOP)] if PAPER_LOOP in loops else []
        chosen.append((FASTEST_ASPECT, loops[0]))
        if PAPER_LOOP not in loops:
            findings.append(replace(_named(run, part), aspect=EAGER_ASPECT, reason="the eager loop was not timed"))
        for aspect, loop in chosen:
            finding = _judged(_finding(run, part[part["loop"] == loop], aspect), part, loop, loops)
            if aspect == FASTEST_ASPECT:
                finding = _beside(run, finding, part[part["loop"] == loop], loops)
            findings.append(finding)
    return findings


def _beside(run: Run, finding: Finding, part: pd.DataFrame, loops: list[str]) -> Finding:
    """The finding as the other runs shown leave it: theirs may have the stronger loop, or the faster dense."""
    rates, tuned = dense_beside(run, part), TUNED[finding.column]
    if tuned not in loops and (other := rates.loc[rates["loop"] == tuned, "run"]).size:
        return replace(finding, verdict=NOT_TESTED, reason=f"the loop {tuned} was timed in {other.iloc[0]}")
    here = part.groupby("generated_tokens")["dense_tokens_per_second"].agg(_geomean)
    rates = rates.assign(faster=rates["tokens_per_second"] / rates["generated_tokens"].map(here)).dropna()
    by_run = [(_geomean(of["faster"]), str(of["run"].iloc[0])) for _, of in rates.groupby(["run", "loop"], sort=False)]
    factor, label = max(by_run, default=(0.0, ""))
    if factor <= 1:
        return finding
    bar, ratio = BARS[paper_model(finding.model) or ""] * factor, over_lengths(part)
    said = f"{times(ratio.value / factor)} over the faster dense of {label}"
    finding = replace(finding, uncertainty=f"{finding.uncertainty}; {said}")
    verdict, _ = decide([("the bar", ratio.shifted(-bar).widened(ONE_PROCESS * bar))])
    if finding.verdict in (UNDECIDED, verdict):
        return finding
    return finding.because(UNDECIDED, said)


def dense_beside(run: Run, part: pd.DataFrame) -> pd.DataFrame:
    """Dense in the other runs shown, of the same model on the same machine: run, loop, generated_tokens and the
    geometric mean of tokens_per_second."""
    first, rows = part.iloc[0], []
    for other in run.beside:
        for row_type, kept in (
            (ThroughputRow, {"batch": 1, "condition": "figure"}),
            (QuantizationThroughputRow, {"format": "none"}),
        ):
            table = other.table(row_type)
            if table is None:
                continue
            wanted = (table["variant"] == "dense") & (table["tokens_per_second"] > 0)
            alike = {name: first[name] for name in ("machine", "model", "dtype", "layers")}
            for column, value in {**alike, **kept}.items():
                wanted &= table[column] == value
            for (loop, length), of in table[wanted].groupby(["loop", "generated_tokens"], sort=False):
                rows.append((other.label, loop, length, _geomean(of["tokens_per_second"])))
    return pd.DataFrame(rows, columns=["run", "loop", "generated_tokens", "tokens_per_second"])


def _geomean(values: pd.Series) -> float:
    return float(np.exp(np.log(values).mean()))


def _undecidable(part: pd.DataFrame) -> str:
    """Why this model cannot decide the claim; nothing where it can."""
    first = part.iloc[0]
    if first["layers"] != first["model_layers"]:
        return f"{first['layers']:.0f} of {first['model_layers']:.0f} layers: shown, decides nothing"
    known = paper_model(str(first["model"])) in BARS
    return "" if known else "the paper gives no figure for this model"


def _strongest_attention(part: pd.DataFrame) -> pd.DataFrame:
    """Where a loop was timed with several kinds of attention: that with which dense is fastest."""
    rates = np.log(part.set_index(["loop", "attention"])["dense_tokens_per_second"]).groupby(level=[0, 1]).mean()
    best = set(rates.groupby(level=0).idxmax())
    return part[[pair in best for pair in zip(part["loop"], part["attention"], strict=True)]]


def _by_dense_speed(part: pd.DataFrame) -> list[str]:
    """The loops, that in which dense is fastest first; compared at the lengths that all have, if there are any."""
    common = part.groupby("generated_tokens")["loop"].transform("nunique") == part["loop"].nunique()
    rates = np.log((part[common] if common.any() else part).set_index("loop")["dense_tokens_per_second"])
    return [str(loop) for loop in rates.groupby(level=0).mean().sort_values(ascending=False).index]


def _named(run: Run, part: pd.DataFrame) -> Finding:
    """A finding without verdict that says what was measured."""
    first = part.iloc[0]
    condition = dtype_name(str(first["dtype"]))
    if first["layers"] != first["model_layers"]:
        condition += f", {first['layers']:.0f} of {first['model_layers']:.0f} layers"
    return untested(model_name(str(first["model"])), "", processor(run, str(first["machine"])), condition=condition)


def _finding(run: Run, part: pd.DataFrame, aspect: str) -> Finding:
    """The measured ratio in one loop, without a verdict."""
    ratio, first = over_lengths(part), part.iloc[0]
    finding = _named(run, part)
    lengths = [of["log_ratio"].mean() for _, of in part.groupby("generated_tokens")]
    ends = times_range(math.exp(min(lengths)), math.exp(max(lengths)))
    ours = f"{times(ratio.value)} in the loop {first['loop']} (lengths {ends})"
    uncertainty = f"{times_range(ratio.low, ratio.high)}, " if ratio.known else ""
    uncertainty += f"{ratio.how}; measured sparsity {percent(part['sparsity_measured'].mean())}"
    return replace(finding, aspect=aspect, ours=ours, uncertainty=uncertainty)


def _judged(finding: Finding, part: pd.DataFrame, loop: str, loops: list[str]) -> Finding:
    """The finding with its verdict, from the rows of all loops of one model."""
    part = part[part["loop"] == loop]
    bar = BARS[paper_model(finding.model) or ""]
    margin = over_lengths(part).shifted(-bar).widened(ONE_PROCESS * bar)
    verdict, reason = decide([(f"the bar of {bar:.2f}x", margin)])
    finding = replace(finding, verdict=verdict, reason=reason)
    if part["prompt"].nunique() < 2:
        return replace(finding, verdict=UNDECIDED, reason="a single prompt")
    if part["repeat"].nunique() < 2:
        return replace(finding, verdict=UNDECIDED, reason="a single repeat: drift from run to run is unknown")
    tuned = TUNED[finding.column]
    if finding.aspect == FASTEST_ASPECT and tuned not in loops:
        return replace(finding, verdict=UNDECIDED, reason=f"dense was not timed in the loop {tuned}")
    return finding
