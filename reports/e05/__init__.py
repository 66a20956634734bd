"""What the report says of e05: latency of one MLP block (Figures 3 and 6)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from experiments.framework.tables import LatencyRow, LatencySample
from reports.core import style
from reports.core.document import Block, Table, escape, without_constant
from reports.core.load import Run
from reports.core.protocol import of, phrases, values
from reports.core.section import Aspect, Drawing, Section
from reports.core.statistics import Estimate, median_estimate
from reports.core.tables import without_empty
from reports.e05 import figures
from reports.measures.latency import (
    COMPILED,
    OPTIMAL,
    OURS,
    TORCH,
    batch_one,
    kernel_speedups,
    near,
    paper_latency,
    rounds,
    timed,
)
from reports.rules.e05 import c7_kernel_speed, c8_fused_mask

TARGETS = (0.5, 0.7, 0.9)

PROTOCOL = (
    Aspect("machine", "one L40S", of(LatencyRow, lambda table: values(table, "machine"))),
    Aspect("shapes", "Mistral-7B 4096 x 14336, Llama2-7B 4096 x 11008", of(LatencyRow, lambda table: _shapes(table))),
    Aspect("dtype", "float32", of(LatencyRow, lambda table: values(table, "dtype"))),
    Aspect("weights", "random, uniform in [-0.5, 0.5] (the authors' code)",
           of(LatencyRow, lambda table: "random, normal with variance 1 / fan-in; thresholds are quantiles of their "
              "activations")),
    Aspect("“Optimal”", "dense with m (1 - s) neurons", of(LatencyRow, lambda table: _optimal(table))),
    Aspect("dense", "torch's three products", of(LatencyRow, lambda table: _dense(table))),
    Aspect("timing", "20 warm-ups, 80 rounds, geometric mean, 256 MB cleared between rounds",
           phrases("e05", "{warmups} warm-ups", "{rounds} rounds, interleaved", "geometric mean", "cold cache")),
)  # fmt: skip

LATENCY_CAPTION = """
Latency of one MLP block against sparsity at batch 1, cold cache, as in the paper's Figure 3; bands from the
20th to the 80th percentile of single rounds. “Optimal” is the paper's: all three matrices shrunk, which no kernel that
must read the gate matrix whole can reach; the dotted bytes bound is what such a kernel can reach at the measured read
bandwidth."""
SPEEDUP_CAPTION = """
Speed-up of one MLP block over dense against sparsity at batch 1, cold cache: the paper's Figure 3 as ratios. Dense: the
fastest of torch's MLP and the compiled one of the same run (C7 looks at other runs' too). Dashed: the paper's kernel on
its L40S in float32, over torch's. Dotted: 3 / (3 - 2 s), the bytes of dense over those that CATS reads at sparsity s; a
curve above it means that dense itself does not reach the read bandwidth."""
ABLATION_CAPTION = """
The paper's Figure 6 as ratios to dense: fused with a mask (the paper's choice), fused with a compacted index,
neither, in this project's versions; and this project's own kernel (“CATS (ours)”). Higher is faster; last row: the
paper's own measurements."""
ROWS_CAPTION = """
Speed-up over dense for several rows at once; sparsity is that of each row, so that the rows' union is denser.
Below the grey line dense is faster."""
LATENCY_TABLE = """
“CATS, ms”: median over the rounds, in brackets its 95 % interval from order statistics. “Over dense”: over the fastest
dense of the same run, in brackets the 95 % interval of the median of ratios paired by round. Intervals stand where
rounds were kept. “Over torch”: over torch's own MLP, as the paper measured. “Over 0 %”: over our own kernel at 0 %
sparsity, the gain of sparsity alone. “At the bound”: dense's time over that of reading the needed bytes at the measured
bandwidth. Paper: its nearest measured sparsity, L40S, float32."""
ROWS_TABLE = """
several rows at once: a neuron is read if any row keeps it, so that the rows' union is what can be skipped. “Path” is
what really ran."""


def _shapes(table: pd.DataFrame) -> str:
    sizes = table[["shape", "d", "m"]].drop_duplicates().itertuples(index=False)
    return ", ".join(f"{shape} {d:.0f} x {m:.0f}" for shape, d, m in sizes)


def _optimal(table: pd.DataFrame) -> str:
    part = table[table["implementation"] == OPTIMAL]
    widths = (part["m"] * (1 - part["sparsity"])).round()
    return "the same, to a multiple of 128" if (widths % 128 == 0).all() else "the same; odd widths are slow on a GPU"


def _dense(table: pd.DataFrame) -> str:
    names = {TORCH: "torch's three products", COMPILED: "the same compiled"}
    return ", ".join(words for name, words in names.items() if name in set(timed(table)["implementation"]))


def latency_table(run: Run) -> pd.DataFrame:
    """Speed-up at 50, 70 and 90 %: over each baseline, the bound by bytes, and the paper's nearest row."""
    paper = paper_latency()
    paper = paper[paper["implementation"] == "fused-mask"]
    rows = []
    groups = batch_one(kernel_speedups(run.tables[LatencyRow.table])).groupby(["machine", "shape", "dtype"], sort=False)
    for (machine, shape, dtype), part in groups:
        kept = rounds(run.table(LatencySample), part.iloc[0])
        for target in TARGETS:
            at = near(part[part["implementation"] == OURS], target)
            theirs = near(paper[paper["model"] == shape], target)
            cells = {
                "Machine": escape(str(machine)),
                "Shape": escape(str(shape)),
                "Dtype": style.dtype_name(str(dtype)),
                "Sparsity": f"{100 * target:.0f} %",
                "Dense, ms": style.significant(part["dense_ms"].iloc[0]),
                "Dense is": str(part["baseline"].iloc[0]),
                "CATS, ms": style.DASH,
                "Over dense": style.DASH,
            }
            if at is not None:
                ratio = kept.ratio(str(at["baseline"]), 0.0, OURS, at["sparsity_target"])
                interval = f" ({style.times_range(ratio.low, ratio.high)})" if ratio.known else ""
                cells["CATS, ms"] = _median(kept.of(OURS, at["sparsity_target"]), at["p50_ms"])
                cells["Over dense"] = f"{style.times(ratio.value if ratio.known else at['speedup'])}{interval}"
                cells["Over torch"] = style.times(at["over_torch"])
                cells["Over 0 %"] = style.times(at["over_own"])
                cells["At the bound"] = style.times(at["reachable"])
            if theirs is not None:
                cells["Paper"] = f"{style.times(theirs['speedup'])} at {100 * theirs['sparsity']:.1f} %"
            rows.append(cells)
    frame = pd.DataFrame(rows).fillna(style.DASH)
    for column in ("Machine", "Dense is"):
        frame = without_constant(frame, column)
    return frame


def _median(times: np.ndarray, otherwise: float) -> str:
    """Median time in ms with its interval, where rounds were kept."""
    median = median_estimate(times) if len(times) else Estimate(otherwise)
    if not median.known:
        return style.significant(median.value)
    return f"{style.significant(median.value)} ({style.significant(median.low)} to {style.significant(median.high)})"


def rows_table(table: pd.DataFrame) -> pd.DataFrame:
    """Ours for several rows of x at once: the sparsity of their union, which can be skipped, and the speed-up."""
    table = kernel_speedups(table)
    table = table[(table["implementation"] == OURS) & (table["rows"] > 1)]
    rows = []
    for (shape, dtype, count), part in table.groupby(["shape", "dtype", "rows"], sort=False):
        cells = {"Shape": escape(str(shape)), "Dtype": style.dtype_name(str(dtype)), "Rows": f"{count:.0f}"}
        cells["Dense, ms"] = style.significant(part["dense_ms"].iloc[0])
        for target in TARGETS:
            at = part[(part["sparsity_target"] - target).abs() < 1e-6]
            if at.empty:
                continue
            row = at.iloc[0]
            union = 1 - row["active_neurons"] / row["m"]
            cells[f"{100 * target:.0f} % of a row"] = style.times(row["speedup"])
            cells[f"Union of {100 * target:.0f} %"] = style.percent(union)
        cells["Path"] = escape(", ".join(part["path"].unique()))
        rows.append(cells)
    frame = pd.DataFrame(rows)
    return frame.fillna(style.DASH).pipe(without_empty) if len(frame) else frame


def errors_table(table: pd.DataFrame) -> pd.DataFrame:
    """What could not be timed, and why."""
    failed = table[table["error"].str.strip() != ""]
    rows = failed.groupby(["shape", "dtype", "rows", "implementation", "error"]).size().reset_index(name="count")
    return pd.DataFrame(
        [
            {"Shape": escape(r["shape"]), "Dtype": style.dtype_name(r["dtype"]), "Rows": f"{r['rows']:.0f}",
             "Implementation": escape(r["implementation"]), "Sparsities": str(r["count"]),
             "Error": escape(r["error"][:200])}
            for r in rows.to_dict("records")
        ]
    )  # fmt: skip


def contents(run: Run) -> list[Block]:
    """Speed-up at one row."""
    table = run.table(LatencyRow)
    if table is None:
        return []
    machines = escape(", ".join(table["machine"].unique()))
    threads = ", ".join(f"{count:.0f}" for count in sorted(table["threads"].dropna().unique()))
    where = machines + (f" ({threads} threads)" if threads else "")
    caption = f"Speed-up of one MLP block at batch 1 on {where}. {LATENCY_TABLE.strip()}"
    blocks: list[Block] = []
    if len(shown := latency_table(run)):
        blocks.append(Table(shown, caption))
    return blocks


def more(run: Run) -> list[Block]:
    """Several rows at once, and what could not be timed."""
    table = run.table(LatencyRow)
    if table is None:
        return []
    label = escape(run.label)
    blocks: list[Block] = []
    if len(several := rows_table(table)):
        blocks.append(Table(several, f"{label}: {ROWS_TABLE.strip()}"))
    failed = errors_table(table)
    return [*blocks, Table(failed, f"{label}: what could not be timed, and why.")] if len(failed) else blocks


SECTION = Section(
    experiment="e05",
    title="MLP latency (Figures 3 and 6)",
    tables=(LatencyRow, LatencySample),
    protocol=PROTOCOL,
    figures=(
        Drawing("e05_latency", LatencyRow, figures.latency_figure, LATENCY_CAPTION, secondary=True),
        Drawing("e05_speedup", LatencyRow, figures.speedup_figure, SPEEDUP_CAPTION),
        Drawing("e05_ablation", LatencyRow, figures.ablation_figure, ABLATION_CAPTION, secondary=True),
        Drawing("e05_rows", LatencyRow, figures.rows_figure, ROWS_CAPTION, secondary=True),
    ),
    contents=contents,
    more=more,
    by_run=True,
    rules=(("C7", c7_kernel_speed), ("C8", c8_fused_mask)),
    glance=figures.glance,
)
