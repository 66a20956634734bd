"""The rules of C7 and C8: the speed of the kernels."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd

from experiments.framework.tables import LatencyRow, LatencySample, QuantizationSpeedRow
from reports.core.load import Run, paper_table
from reports.core.provenance import processor
from reports.core.statistics import Estimate
from reports.core.style import dtype_name, number, times, times_range
from reports.core.verdicts import UNDECIDED, Finding, decide, untested
from reports.measures.latency import COMPILED, OURS, TORCH, Rounds, batch_one, kernel_speedups, near, rounds

BARS = ((0.5, 1.40), (0.7, 1.70))
FLOATS = ("float32", "bfloat16", "float16")  # quantised weights are no condition of the paper
PAPER_SHAPES = ("Mistral-7B", "Llama2-7B")
PAPER_KERNELS = ("fused-mask", "fused-compact", "gather")
AS_FAST = 1.05  # ours over the authors' own time, at most
ONE_PROCESS = 0.02  # of a bar: two processes that time the same calls on one card differ by this much


def c7_kernel_speed(run: Run) -> list[Finding]:
    """Holds here if dense time over CATS time at batch 1 is at least 1.40 at 50 % sparsity and 1.70 at 70 %, dense
    being the fastest of torch's own MLP and the compiled one; medians of ratios paired by round.

    Undecided where the compiled one was not timed, or rounds were not kept; within 2 % of a bar, since all rounds are
    of one process; and where another run shown has a faster dense on such a card that would change the verdict, since
    inductor's tuning does not find the same program each time. Beside it stand the ratio over torch's own,
    as the paper measured it, and over our kernel at 0 % sparsity, which is the gain of sparsity alone.
    """
    findings = []
    for (machine, shape, dtype), part in _groups(run):
        named = {"column": processor(run, machine), "condition": dtype_name(dtype)}
        rows = [near(part[part["implementation"] == OURS], target) for target, _ in BARS]
        if any(row is None for row in rows):
            findings.append(untested(shape, "no CATS kernel timed at 50 % and 70 % sparsity", **named))
            continue
        known = [row for row in rows if row is not None]
        kept = rounds(run.table(LatencySample), known[0])
        baseline = str(known[0]["baseline"])
        ratios = [kept.ratio(baseline, 0.0, OURS, row["sparsity_target"]) for row in known]
        verdict, reason = decide(_margins(ratios))
        ours = "; ".join(
            _three_ratios(row, ratio, target, baseline)
            for row, ratio, (target, _) in zip(known, ratios, BARS, strict=True)
        )
        ends = [f"{times_range(one.low, one.high)} {one.how}" for one in ratios if one.known]
        finding = Finding(shape, str(named["column"]), verdict, ours, "; ".join(ends), reason, str(named["condition"]))
        if not all(one.known for one in ratios):
            finding = replace(finding, reason="no rounds were kept: error unknown")
        if COMPILED not in set(part["implementation"]):
            finding = finding.because(UNDECIDED, _why_not_compiled(run, machine, shape, dtype))
        here = float(known[0]["dense_ms"])
        elsewhere = faster_dense(run, machine, shape, dtype, here)
        findings.append(_against(elsewhere, here, ratios, finding) if elsewhere else finding)
    return findings


def _margins(ratios: list[Estimate]) -> list[tuple[str, Estimate]]:
    """(level, distance to its bar), with what differs between processes added to the interval."""
    return [
        (f"{100 * target:.0f} %", ratio.shifted(-bar).widened(ONE_PROCESS * bar))
        for (target, bar), ratio in zip(BARS, ratios, strict=True)
    ]


def _against(elsewhere: tuple[str, float], here: float, ratios: list[Estimate], finding: Finding) -> Finding:
    """The finding, undecided if the faster dense of another run would change its verdict."""
    label, took = elsewhere
    scaled = [ratio.scaled(took / here) for ratio in ratios]
    if decide(_margins(scaled))[0] == finding.verdict:
        return finding
    over = ", ".join(times(ratio.value) for ratio in scaled)
    why = f"dense took {number(took, 3)} ms in {label}, {number(here, 3)} here: {over} over that"
    return finding.because(UNDECIDED, why)


def faster_dense(run: Run, machine: str, shape: str, dtype: str, here: float) -> tuple[str, float] | None:
    """The fastest dense MLP of the other runs shown, at one row on the same kind of machine: (run, ms); None where none
    is faster than ``here``."""
    times_of: dict[str, list[float]] = {}
    for other in run.beside:
        for row_type, names, kept in (
            (LatencyRow, (TORCH, COMPILED), {"rows": 1}),
            (QuantizationSpeedRow, ("torch", "compiled"), {"format": "none", "what": "mlp"}),
        ):
            table = other.table(row_type)
            if table is None:
                continue
            wanted = table["implementation"].isin(names) & (table["error"].str.strip() == "")
            for column, value in {"machine": machine, "shape": shape, "dtype": dtype, **kept}.items():
                wanted &= table[column] == value
            times_of.setdefault(other.label, []).extend(table.loc[wanted, "p50_ms"].dropna())
    fastest = min(((min(found), label) for label, found in times_of.items() if found), default=None)
    return (fastest[1], fastest[0]) if fastest and fastest[0] < here else None


def _groups(run: Run) -> list[tuple[tuple[str, str, str], pd.DataFrame]]:
    """Batch-1 rows of the paper's figures at its 7B shapes: ((machine, shape, dtype), speed-ups)."""
    table = run.table(LatencyRow)
    if table is None:
        return []
    speedups = batch_one(kernel_speedups(table[table["dtype"].isin(FLOATS)]))
    counted = speedups["condition"].eq("figure") | speedups["implementation"].isin([TORCH, COMPILED])
    counted &= speedups["shape"].isin(PAPER_SHAPES)
    groups = speedups[counted].groupby(["machine", "shape", "dtype"], sort=False)
    return [((str(machine), str(shape), str(dtype)), part) for (machine, shape, dtype), part in groups]


def _three_ratios(row: pd.Series, ratio: Estimate, target: float, baseline: str) -> str:
    """`at 50 %: 1.35x over the compiled MLP, 1.57x over torch's, 1.37x over our kernel at 0 %`."""
    over = {TORCH: "torch's MLP", COMPILED: "the compiled MLP"}
    said = [f"{times(ratio.value if ratio.known else row['speedup'])} over {over[baseline]}"]
    if baseline != TORCH and math.isfinite(row["over_torch"]):
        said.append(f"{times(row['over_torch'])} over torch's")
    if math.isfinite(row["over_own"]):
        said.append(f"{times(row['over_own'])} over our kernel at 0 %")
    return f"at {100 * target:.0f} %: {', '.join(said)}"


def _why_not_compiled(run: Run, machine: str, shape: str, dtype: str) -> str:
    table = run.tables[LatencyRow.table]
    tried = table[
        (table["implementation"] == COMPILED)
        & (table["machine"] == machine)
        & (table["shape"] == shape)
        & (table["dtype"] == dtype)
    ]
    errors = [error for error in tried["error"] if error.strip()]
    return "the compiled MLP was not timed" + (f" ({errors[0][:80]})" if errors else "")


def c8_fused_mask(run: Run) -> list[Finding]:
    """Holds here if the paper's fused kernel with a mask (fused-mask) is faster than its unfused (gather) and its
    index-compacting one (fused-compact), each in the geometric mean over the measured sparsities from 20 % to 95 %, in
    our versions of the paper's kernels.

    Tested only where our versions of both fused kernels take at most 1.05 times the authors' own time on the same
    machine, at every sparsity timed in both: else the verdict would be one on our versions. Our own kernel stands for
    none of them. Ratios are paired by round; undecided where rounds were not kept.
    """
    authors = paper_table("authors_kernels_h100")
    findings = []
    for (machine, shape, dtype), part in _groups(run):
        column, condition = processor(run, machine), dtype_name(dtype)
        present = set(part["implementation"])
        if absent := [name for name in PAPER_KERNELS if name not in present]:
            findings.append(untested(shape, f"{', '.join(absent)} not timed", column, condition=condition))
            continue
        kept = rounds(run.table(LatencySample), part.iloc[0])
        targets = sorted(set(part.loc[part["implementation"] == "fused-mask", "sparsity_target"]))
        targets = [target for target in targets if 0.195 <= target <= 0.955]
        means, ours = {}, []
        for rival in PAPER_KERNELS[1:]:
            means[rival] = _mean_ratio(part, kept, rival, targets)
            ours.append(f"{times(means[rival].value)} the speed of {rival}")
        finding = Finding(shape, column, UNDECIDED, ", ".join(ours), condition=condition)
        if problem := slower_than_authors(part, authors, machine, shape, dtype):
            findings.append(untested(shape, problem, column, condition=condition, ours=finding.ours))
            continue
        verdict, reason = decide((rival, mean.shifted(-1)) for rival, mean in means.items())
        ends = [f"{times_range(mean.low, mean.high)} ({rival})" for rival, mean in means.items() if mean.known]
        findings.append(Finding(shape, column, verdict, finding.ours, "; ".join(ends), reason, condition))
    return findings


def slower_than_authors(part: pd.DataFrame, authors: pd.DataFrame, machine: str, shape: str, dtype: str) -> str:
    """Why our versions of the paper's fused kernels cannot stand for the authors' own; nothing where they can."""
    theirs = authors[(authors["machine"] == machine) & (authors["shape"] == shape) & (authors["dtype"] == dtype)]
    if theirs.empty:
        return f"our versions were not compared with the authors' own kernels on {machine}"
    slow = {}
    for kernel in ("fused-mask", "fused-compact"):
        own = part[part["implementation"] == kernel].set_index("sparsity_target")["geomean_ms"]
        their = theirs[theirs["implementation"] == kernel].set_index("sparsity")["latency_ms"]
        common = own.index.intersection(their.index)
        if common.empty:
            return f"no sparsity at which both our {kernel} and the authors' own were timed"
        slow[kernel] = float((own[common] / their[common]).max())
    late = [f"{kernel} takes up to {times(ratio)}" for kernel, ratio in slow.items() if ratio > AS_FAST]
    return f"our {' and our '.join(late)} the time of the authors' own" if late else ""


def _mean_ratio(part: pd.DataFrame, kept: Rounds, rival: str, targets: list[float]) -> Estimate:
    """Geometric mean over sparsities of the rival's time over the fused kernel's, with the interval of its rounds."""
    ratios = [kept.ratio(rival, target, "fused-mask", target) for target in targets]
    ratios = [ratio for ratio in ratios if ratio.known]
    if not ratios:
        by_name = {name: part[part["implementation"] == name].set_index("sparsity_target")["geomean_ms"] for name in
                   (rival, "fused-mask")}  # fmt: skip
        common = (by_name[rival] / by_name["fused-mask"]).reindex(targets).dropna()
        return Estimate(float(np.exp(np.log(common).mean()))) if len(common) else Estimate(math.nan)
    logs = np.log([[one.value, one.low, one.high] for one in ratios])
    value, low, high = np.exp(logs.mean(axis=0))
    return Estimate(float(value), float(low), float(high), ratios[0].how)
