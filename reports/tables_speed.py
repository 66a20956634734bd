"""The tables of latency and throughput: data frames of finished cells (Markdown), from the tables of one run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from reports import style
from reports.document import escape, without_constant
from reports.figures_latency import paper_latency
from reports.stats import (
    GENERATION_KEYS,
    batch_one,
    generation_speedups,
    kernel_speedups,
    speedup_at,
    throughput_by_length,
    throughput_conditions,
)

Tables = Mapping[str, pd.DataFrame]


def latency(tables: Tables) -> pd.DataFrame:
    """Speed-up at 50, 70 and 90 %: ours with its p20 to p80 range, the bound by bytes, and the paper's nearest row."""
    table, paper = batch_one(tables["e05_mlp_latency"]), paper_latency()
    paper = paper[paper["implementation"] == "fused-mask"]
    rows = []
    for (machine, shape, dtype), part in table.groupby(["machine", "shape", "dtype"], sort=False):
        cats = part[part["implementation"] == "cats"]
        theirs = paper[paper["model"] == shape]
        for target in (0.5, 0.7, 0.9):
            at = speedup_at(cats, target) if len(cats) else None
            close = theirs[(theirs["sparsity"] - target).abs() <= 0.05]
            near = close.iloc[(close["sparsity"] - target).abs().argsort()[:1]].to_dict("records")
            rows.append(
                {
                    "Machine": escape(str(machine)),
                    "Shape": str(shape),
                    "Dtype": style.dtype_name(str(dtype)),
                    "Sparsity": f"{100 * target:.0f} %",
                    "Dense, ms": style.significant(part["dense_ms"].median()),
                    "Ours": f"{style.times(at.speedup)} ({style.times_range(at.low, at.high)})" if at else style.DASH,
                    "At the bound": style.times(at.reachable) if at else style.DASH,
                    "Of the bound": style.percent(at.speedup / at.reachable, 0) if at else style.DASH,
                    "Paper": f"{style.times(near[0]['speedup'])} at {100 * near[0]['sparsity']:.1f} %"
                    if near
                    else style.DASH,
                }
            )
    return without_constant(pd.DataFrame(rows), "Machine")


def latency_rows(tables: Tables) -> pd.DataFrame:
    """Ours for several rows of x at once: the sparsity of their union, which can be skipped, and the speed-up."""
    table = kernel_speedups(tables["e05_mlp_latency"])
    table = table[(table["implementation"] == "cats") & (table["rows"] > 1)]
    rows = []
    for row in table.to_dict("records"):
        if not any(math.isclose(row["sparsity_target"], target) for target in (0.5, 0.7, 0.9)):
            continue
        weight_rows = row["bytes_moved"] / (row["d"] * (4 if row["dtype"] == "float32" else 2))
        union = 1 - (weight_rows - row["m"]) / 2 / row["m"]
        rows.append(
            {
                "Shape": str(row["shape"]),
                "Dtype": style.dtype_name(str(row["dtype"])),
                "Rows": f"{row['rows']:.0f}",
                "Sparsity of a row": style.percent(row["sparsity"]),
                "Of the union": style.percent(union),
                "Dense, ms": style.significant(row["dense_ms"]),
                "Ours": style.times(row["speedup"]),
                "At the bound": style.times(row["reachable"]),
            }
        )
    return pd.DataFrame(rows)


def latency_errors(table: pd.DataFrame) -> pd.DataFrame:
    """What could not be timed, and why."""
    failed = table[table["error"].str.strip() != ""]
    rows = failed.groupby(["shape", "dtype", "rows", "implementation", "error"]).size().reset_index(name="count")
    return pd.DataFrame(
        [
            {"Shape": r["shape"], "Dtype": style.dtype_name(r["dtype"]), "Rows": f"{r['rows']:.0f}",
             "Implementation": r["implementation"], "Sparsities": str(r["count"]), "Error": escape(r["error"][:200])}
            for r in rows.to_dict("records")
        ]
    )  # fmt: skip


def throughput(table: pd.DataFrame) -> pd.DataFrame:
    """Figure 4's numbers: tokens per second for each length, dense and CATS-50, with what else the run cost."""
    speedups = generation_speedups(table)
    conditions = throughput_conditions(speedups)[GENERATION_KEYS].drop_duplicates()
    timed = table[table["variant"].eq("dense") | np.isclose(table["sparsity_target"], 0.5)].merge(conditions)
    keys = ["model", "layers", "dtype", "loop", "generated_tokens"]
    rows = []
    for row in throughput_by_length(speedups).to_dict("records"):
        same = timed[(timed[keys] == [row[key] for key in keys]).all(axis=1)]
        # dense was timed again beside other sparsities, with more allocated by then: 16 GB where it was 15
        same = same[same["prompt"].isin(same.loc[same["variant"] != "dense", "prompt"])]
        memory = same.groupby(same["variant"].eq("dense"))["peak_memory_bytes"].max()
        ratio = memory.get(False, math.nan) / memory.get(True, math.nan)
        error = row["log_stderr"] * row["speedup"]
        rows.append(
            {
                **_condition(row),
                "Loop": row["loop"],
                "Tokens": f"{row['generated_tokens']:.0f}",
                "Dense, tokens/s": style.significant(row["dense_tokens_per_second"]),
                "CATS-50, tokens/s": style.significant(row["tokens_per_second"]),
                "Speed-up": style.times(row["speedup"]) + style.ratio_error(error),
                "Sparsity": style.percent(row["sparsity_measured"]),
                "Prefill, s": style.significant(same["prefill_s"].median()),
                "Compile, s": style.significant(same["compile_s"].max()) if same["compile_s"].max() > 0 else style.DASH,
                "Memory": style.times(ratio),
            }
        )
    shown = pd.DataFrame(rows)
    return shown.drop(columns=[name for name in shown if (shown[name] == style.DASH).all()])


def growth(table: pd.DataFrame) -> pd.DataFrame:
    """What was timed beside Figure 4's conditions: other batches, prompts, sparsities and depths."""
    speedups = generation_speedups(table)
    rows = []
    for row in speedups.drop(throughput_conditions(speedups).index).to_dict("records"):
        rows.append(
            {
                **_condition(row),
                "Loop": row["loop"],
                "Batch": f"{row['batch']:.0f}",
                "Prompt": f"{row['prompt_tokens']:.0f}",
                "Tokens": f"{row['generated_tokens']:.0f}",
                "Target": style.percent(row["sparsity_target"], 0),
                "Sparsity": style.percent(row["sparsity_measured"]),
                "Dense, tokens/s": style.significant(row["dense_tokens_per_second"]),
                "CATS, tokens/s": style.significant(row["tokens_per_second"]),
                "Speed-up": style.times(row["speedup"]) + style.ratio_error(row["log_stderr"] * row["speedup"]),
            }
        )
    return pd.DataFrame(rows)


def _condition(row: dict[Any, Any]) -> dict[str, str]:
    """The columns in which all tables of generation begin."""
    layers = f"{row['layers']:.0f}"
    return {
        "Model": escape(style.model_name(row["model"])), "Layers": layers, "Dtype": style.dtype_name(row["dtype"])
    }  # fmt: skip


def amdahl(table: pd.DataFrame) -> pd.DataFrame:
    """What Amdahl's law allows from the MLP's share and the kernel's gain, against what was measured."""
    return pd.DataFrame(
        [
            {
                **_condition(row),
                "Kernel gain": style.times(row["kernel_speedup"]),
                "MLP share": style.percent(row["mlp_share"]),
                "Predicted": style.times(row["predicted_speedup"]),
                "Measured": style.times(row["measured_speedup"]),
                "Measured / predicted": style.number(row["measured_speedup"] / row["predicted_speedup"], 2),
            }
            for row in table.to_dict("records")
        ]
    )


def greedy(table: pd.DataFrame) -> pd.DataFrame:
    """Whether CATS generates the tokens it must."""
    return pd.DataFrame(
        [
            {
                **_condition(row),
                "Check": escape(row["check"].replace("cats-", "CATS-")),
                "Identical tokens": f"{row['identical_tokens']:.0f} of {row['tokens']:.0f}",
            }
            for row in table.to_dict("records")
        ]
    )
