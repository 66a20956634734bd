"""The speed of one MLP block by format of its weights, beside torch's kernels and what was not measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.framework.tables import QuantizationSpeedRow, QuantizationSpeedSample
from reports.core import style
from reports.core.load import Run
from reports.core.merge import at_commit
from reports.core.statistics import Estimate, paired_ratio, unpack_numbers
from reports.e09.names import COLOURS, NOT_MEASURED, OTHERS, OURS, TORCH, format_name
from reports.rules.e09 import PLAIN

CUT = 2.0
"""Bars are cut off at so many times ours, and their times written in them."""
NAMES = {"torch": "torch, dense", "compiled": "compiled, dense"}
SPEED_CAPTION = """
Time of one MLP block at batch 1, cold cache, in one run, by format of its weights: this project's kernels (filled, from
0 % to the highest sparsity), torch's own dense kernels (grey; compiled: hatched), and the bytes that must be read at
the measured bandwidth (black lines). A bar more than twice as long as ours is cut off, with its time in it. Other
programs: *not measured*. The pocket profile's block, “small”, holds 4 MB and was chosen for its short time: it shows
that everything runs, and decides nothing about the shapes of real models."""
SPEED_TABLE = """
one MLP block at batch 1, cold cache, medians over rounds. “Over bfloat16” (or the dtype of the activations): over our
own kernel on unquantised weights at the same sparsity. “Over dense”: over the fastest of torch's dense kernels on
weights of as many bits, its own or compiled; in brackets the 95 % interval of the median of ratios paired by round.
“Of the bound”: the time that reading the needed bytes takes at the measured bandwidth, over the geometric mean of the
rounds (as in e05), which the bandwidth is of too."""


def timed(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of one MLP block that were timed."""
    return table[(table["what"] == "mlp") & table["p50_ms"].notna()]


def groups(table: pd.DataFrame) -> list[tuple[tuple[str, str, str], pd.DataFrame]]:
    """Timed rows by (machine, shape, dtype)."""
    parts = timed(table).groupby(["machine", "shape", "dtype"], sort=False)
    return [((str(machine), str(shape), str(dtype)), part) for (machine, shape, dtype), part in parts]


def dense_of(part: pd.DataFrame, bits: Any) -> pd.Series | None:
    """The fastest dense of torch's on weights of so many bits (NaN: unquantised), None where none was timed."""
    dense = part[part["implementation"] != OURS]
    dense = dense[dense["bits"].isna()] if pd.isna(bits) else dense[dense["bits"] == bits]
    return None if dense.empty else dense.iloc[int(dense["p50_ms"].to_numpy().argmin())]


def speed_table(run: Run, part: pd.DataFrame) -> pd.DataFrame:
    """One machine, shape and dtype: every format and sparsity, then torch's."""
    samples = run.table(QuantizationSpeedSample)
    ours = part[part["implementation"] == OURS]
    plain = ours[ours["format"] == PLAIN].set_index("sparsity_target")["p50_ms"]
    dtype = style.dtype_name(str(part["dtype"].iloc[0]))
    rows = []
    for row in (series for _, series in part.iterrows()):
        own = row["implementation"] == OURS
        cells = {
            "Weights": format_name(str(row["format"])),
            "Kernel": f"ours, {100 * row['sparsity_target']:g} %" if own else NAMES.get(row["implementation"], "other"),
            "ms": style.significant(row["p50_ms"]),
            "MB stored": f"{row['bytes_stored'] / 1e6:.0f}",
            "MB read": f"{row['bytes_moved'] / 1e6:.0f}",
            "Of the bound": style.percent(_of_bound(samples, row), 0),
        }
        if own:
            cells[f"Over {dtype}"] = style.times(plain.get(row["sparsity_target"], np.nan) / row["p50_ms"])
            cells["Over dense"] = _over_dense(samples, row, dense_of(part, row["bits"]))
        rows.append(cells)
    rows += [{"Weights": style.DASH, "Kernel": name, "ms": NOT_MEASURED} for name in OTHERS]
    return pd.DataFrame(rows).fillna(style.DASH)


def _over_dense(samples: pd.DataFrame | None, row: pd.Series, dense: pd.Series | None) -> str:
    if dense is None:
        return style.DASH
    text = style.times(dense["p50_ms"] / row["p50_ms"])
    ratio = _paired(samples, dense, row)
    return f"{text} ({style.times_range(ratio.low, ratio.high)})" if ratio.known else text


def _paired(samples: pd.DataFrame | None, slow: pd.Series, fast: pd.Series) -> Estimate:
    """Median of the ratios of two rows' times, paired by round; unknown where rounds were not kept."""
    if samples is None:
        return Estimate(np.nan)
    rounds = [_rounds(samples, row) for row in (slow, fast)]
    try:
        return paired_ratio(*rounds)
    except ValueError:
        return Estimate(np.nan)


def _rounds(samples: pd.DataFrame, row: pd.Series) -> np.ndarray:
    """Times of a row in ms; empty where they were not kept."""
    keys = ("machine", "what", "shape", "dtype", "format", "implementation", "sparsity_target")
    same = samples[np.logical_and.reduce([samples[key] == row[key] for key in keys])]
    return unpack_numbers(same["milliseconds"].iloc[0]) if len(same) else np.array([])


def _of_bound(samples: pd.DataFrame | None, row: pd.Series) -> float:
    """The bound over the geometric mean of the rounds; where those were not kept, what the row says."""
    times = np.array([]) if samples is None else _rounds(samples, row)
    return float(row["bound_ms"] / np.exp(np.log(times).mean()) if len(times) else row["fraction_of_bound"])


def speed_figure(run: Run) -> Figure | None:
    """A panel per shape and dtype: bars by format, with the bound of each."""
    parts = groups(run.tables[QuantizationSpeedRow.table])[:6]
    if not parts:
        return None
    figure, axes = style.panels(len(parts), 2.0)
    for ax, ((_, shape, dtype), part) in zip(axes.flat, parts, strict=False):
        _bars(ax, part)
        ax.set_title(f"{shape}, {style.dtype_name(dtype)}{at_commit(part)}")
    for line in axes:
        line[0].set_ylabel("ms per block")
    return figure


def _bars(ax: Axes, part: pd.DataFrame) -> None:
    places, labels, left = [], [], 0.0
    top = CUT * part.loc[part["implementation"] == OURS, "p50_ms"].max()
    for number, (name, rows) in enumerate(part.groupby("format", sort=False)):
        rows = rows.sort_values(
            ["implementation", "sparsity_target"], key=lambda c: c.map(_order) if c.dtype == object else c
        )
        start = left
        for row in rows.to_dict("records"):
            own = row["implementation"] == OURS
            shade = 0.4 + 0.6 * (1 - row["sparsity_target"]) if own else 0.55
            colour = (style.GREY, *COLOURS)[number % (len(COLOURS) + 1)] if own else "#BBBBBB"
            hatch = "///" if row["implementation"] == "compiled" else None
            ax.bar(left, row["p50_ms"], width=0.9, color=colour, alpha=shade, hatch=hatch, edgecolor="white", lw=0)
            ax.plot([left - 0.45, left + 0.45], [row["bound_ms"]] * 2, color=style.BLACK, lw=1.0)
            if row["p50_ms"] > top:
                ax.text(left, 0.98 * top, f"{row['p50_ms']:.2g} ms", fontsize=6.5, rotation=90, ha="center", va="top")
            left += 1
        places.append((start + left - 1) / 2)
        labels.append("none" if name == PLAIN else str(name).replace("-", "\n"))
        left += 0.8
    others = f" {', '.join(OTHERS[:2])}: {NOT_MEASURED}"
    ax.text(left, 0, others, rotation=90, fontsize=6.5, va="bottom", color=style.GREY)
    ax.set_xlim(right=left + 1)
    if part["p50_ms"].max() > top:
        ax.set_ylim(top=top)
    ax.set_xticks(places, labels, fontsize=7)
    ax.tick_params(axis="x", length=0)


def _order(implementation: str) -> int:
    return {TORCH: 0, "compiled": 1}.get(implementation, 2)
