"""What the report says of e09: int8 and int4 weights under sparsity, quality, memory and speed."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.framework.tables import (
    QuantizationRow,
    QuantizationSample,
    QuantizationSpeedRow,
    QuantizationSpeedSample,
    QuantizationTextSample,
)
from reports.core import style
from reports.core.document import Block, Table, Text, escape, without_constant
from reports.core.load import Run
from reports.core.protocol import CALIBRATION, of, phrases, values
from reports.core.section import Aspect, Drawing, Section
from reports.core.statistics import Estimate, paired_ratio, unpack_numbers
from reports.rules.e09 import PLAIN, damages_add_up

OURS, TORCH = "cats", "torch"
COLOURS = (style.BLUE, style.SKY, style.VERMILLION, style.ORANGE, style.GREEN, style.PURPLE)
NAMES = {"torch": "torch, dense", "compiled": "compiled, dense"}
NOT_MEASURED = """Other programs' kernels for quantised weights (llama.cpp, gpt-fast, Marlin, GemLite, bitsandbytes):
*not measured*; none of them was run on these machines in these rounds, and their published times are of other
machines."""

PROTOCOL = (
    Aspect("weights", "as trained: float32, no quantisation",
           of(QuantizationRow, lambda table: "rounded to nearest: " + values(table, "format"))),
    Aspect("models", "one method, on Mistral-7B and Llama2-7B", of(QuantizationRow, lambda t: values(t, "model"))),
    Aspect("calibration", "as for Table 1", phrases("e09", *CALIBRATION)),
    Aspect("machine", "one L40S", of(QuantizationSpeedRow, lambda table: values(table, "machine"))),
    Aspect("timing", "as for Figure 3", phrases("e09", "{warmups} warm-ups", "{rounds} rounds, interleaved")),
)  # fmt: skip

QUALITY_CAPTION = """
Increase of perplexity on held-out text over the unquantised dense model (log scale) against the bytes of the MLPs'
weights that a token reads, scales included, as a fraction of the unquantised dense ones: the lower left is better. A
line is one format, from dense at its right end to the highest sparsity at its left."""
SPEED_CAPTION = """
Time of one MLP block at batch 1, cold cache, by format of its weights: this project's kernels (filled, from 0 % to the
highest sparsity), torch's own dense kernels (grey; compiled: hatched), and the bytes that must be read at the measured
bandwidth (black lines). The pocket profile's block, “small”, holds 4 MB and was chosen for its short time: it shows
that everything runs, and decides nothing about the shapes of real models."""
QUALITY_TABLE = """
increase of perplexity on held-out text over the unquantised dense model, ± one standard error, paired over blocks of
text. “Memory” and “read at 50 %”: bytes of the MLPs' weights, scales included, against the unquantised ones."""
ADD_UP_TABLE = """
Do the two damages add up, as logarithms of perplexity? “By the product”: what the factors of quantisation and of
sparsity, each measured alone, give together. """
SPEED_TABLE = """
one MLP block at batch 1, cold cache, medians over rounds. “Over bfloat16” (or the dtype of the activations): over our
own kernel on unquantised weights at the same sparsity. “Over dense”: over the fastest of torch's dense kernels on
weights of as many bits, its own or compiled; in brackets the 95 % interval of the median of ratios paired by round.
“Of the bound”: the time that reading the needed bytes takes at the measured bandwidth, over the time."""


def format_name(name: str) -> str:
    """`int4-128` -> `int4, groups of 128`; `int8-row` -> `int8, one scale per row`; `none` -> `unquantised`."""
    if name == PLAIN:
        return "unquantised"
    bits, _, size = name.partition("-")
    return f"{bits}, one scale per row" if size == "row" else f"{bits}, groups of {size}"


def text_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of perplexity, with its increase as a fraction and the level as a number."""
    rows = table[table["metric"] == "perplexity"]
    return rows.assign(increase=np.expm1(rows["difference"]), level=rows["sparsity_target"].fillna(0.0))


def quality_figure(run: Run) -> Figure:
    """A panel per model: increase of perplexity against the bytes read."""
    table = text_rows(run.tables[QuantizationRow.table])
    models = [str(model) for model in table["model"].unique()]
    figure, axes = plt.subplots(1, len(models), figsize=(style.WIDTH, 3.0), squeeze=False)
    for ax, model in zip(axes[0], models, strict=True):
        part = table[(table["model"] == model)]
        ends = []
        for (name, rows), colour in zip(part.groupby("format", sort=False), (style.GREY, *COLOURS), strict=False):
            rows = rows[rows["increase"] > 1e-4].sort_values("mlp_bytes")
            if rows.empty:
                continue
            x, y = 100 * rows["mlp_bytes"], 100 * rows["increase"]
            ax.plot(x, y, "o-", color=colour, ms=3)
            ends.append((x.iloc[-1], y.iloc[-1], format_name(str(name)), colour))
        ax.set(yscale="log", title=style.model_name(model), xlabel="bytes of the MLPs read, % of unquantised")
        ax.set_xlim(right=ax.get_xlim()[1] + 0.35 * np.ptp(ax.get_xlim()))
        style.label_ends(ax, ends, size=7.5)
    axes[0][0].set_ylabel("increase of perplexity, %")
    return figure


def quality_table(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """One row per format: the increase of perplexity dense and at each level."""
    part = text_rows(table[table["model"] == model])
    levels = sorted(part["level"].unique())
    rows = []
    for name, of_format in part.groupby("format", sort=False):
        at = of_format.drop_duplicates("level").set_index("level")
        cells = {"Weights": format_name(str(name)), "Memory": style.percent(at["mlp_memory"].iloc[0])}
        half = at[np.isclose(at.index, 0.5)]
        cells["Read at 50 %"] = style.percent(half["mlp_bytes"].iloc[0]) if len(half) else style.DASH
        for level in levels:
            heading = f"{100 * level:g} %" if level else "Dense"
            plain_dense = name == PLAIN and not level
            cells[heading] = style.DASH if plain_dense or level not in at.index else _increase(at.loc[level])
        rows.append(cells)
    return pd.DataFrame(rows)


def _increase(row: pd.Series) -> str:
    factor = 1 + row["increase"]
    if not np.isfinite(factor):
        return style.DASH
    error = 100 * factor * row["difference_stderr"]
    text = f"{100 * row['increase']:+.2f}" + (f" ± {error:.2f}" if np.isfinite(error) else "")
    return f"{text} %".replace("-", style.MINUS)


def tasks_table(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """Mean accuracy over tasks by format and variant, and the mean difference from the unquantised dense model."""
    part = table[(table["model"] == model) & (table["metric"] == "acc")]
    rows = []
    for (name, variant), scores in part.groupby(["format", "variant"], sort=False):
        rows.append(
            {
                "Weights": format_name(str(name)),
                "Variant": escape(style.variant_name(str(variant))),
                "Mean accuracy": style.number(scores["value"].mean()),
                "Difference, points": style.points(scores["difference"].mean()),
            }
        )
    return pd.DataFrame(rows)


def add_up_table(run: Run) -> pd.DataFrame:
    """The findings of `damages_add_up`."""
    rows = [
        {
            "Model": escape(style.model_name(finding.model)),
            "Weights": format_name(finding.condition),
            "Measured": escape(finding.ours),
            "Interaction, 95 %": escape(finding.uncertainty),
            "Verdict": f"**{finding.words}**" + (f" ({escape(finding.reason)})" if finding.reason else ""),
        }
        for finding in damages_add_up(run)
    ]
    return without_constant(pd.DataFrame(rows), "Model") if rows else pd.DataFrame()


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
            "Of the bound": style.percent(row["fraction_of_bound"], 0),
        }
        if own:
            cells[f"Over {dtype}"] = style.times(plain.get(row["sparsity_target"], np.nan) / row["p50_ms"])
            cells["Over dense"] = _over_dense(samples, row, dense_of(part, row["bits"]))
        rows.append(cells)
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
    keys = ("machine", "what", "shape", "dtype", "format", "implementation", "sparsity_target")
    found = []
    for row in (slow, fast):
        same = np.logical_and.reduce([samples[key] == row[key] for key in keys])
        found.append(samples[same])
    if any(one.empty for one in found):
        return Estimate(np.nan)
    try:
        return paired_ratio(*(unpack_numbers(one["milliseconds"].iloc[0]) for one in found))
    except ValueError:
        return Estimate(np.nan)


def speed_figure(run: Run) -> Figure | None:
    """A panel per shape and dtype: bars by format, with the bound of each."""
    parts = groups(run.tables[QuantizationSpeedRow.table])[:6]
    if not parts:
        return None
    columns = min(2, len(parts))
    lines = -(-len(parts) // columns)
    size = (style.WIDTH if columns > 1 else 4.6, 2.9 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False)
    for ax in axes.flat[len(parts) :]:
        ax.set_visible(False)
    for ax, ((_, shape, dtype), part) in zip(axes.flat, parts, strict=False):
        _bars(ax, part)
        ax.set_title(f"{shape}, {style.dtype_name(dtype)}")
    for line in axes:
        line[0].set_ylabel("ms per block")
    return figure


def _bars(ax: Axes, part: pd.DataFrame) -> None:
    places, labels, left = [], [], 0.0
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
            left += 1
        places.append((start + left - 1) / 2)
        labels.append("none" if name == PLAIN else str(name).replace("-", "\n"))
        left += 0.8
    ax.set_xticks(places, labels, fontsize=7)
    ax.tick_params(axis="x", length=0)


def _order(implementation: str) -> int:
    return {TORCH: 0, "compiled": 1}.get(implementation, 2)


def contents(run: Run) -> list[Block]:
    """One run's tables."""
    blocks: list[Block] = []
    quality, speed = run.table(QuantizationRow), run.table(QuantizationSpeedRow)
    if quality is not None:
        for model in quality["model"].unique():
            name = escape(style.model_name(model))
            blocks.append(Table(quality_table(quality, model), f"{name}: {QUALITY_TABLE.strip()}"))
            if len(shown := tasks_table(quality, model)):
                blocks.append(Table(shown, f"{name}: mean zero-shot accuracy."))
        if len(shown := add_up_table(run)):
            rule = " ".join((damages_add_up.__doc__ or "").split())
            blocks.append(Table(shown, ADD_UP_TABLE.strip() + " " + rule))
    if speed is not None:
        for (machine, shape, dtype), part in groups(speed):
            caption = f"{escape(machine)}, {escape(shape)}, {style.dtype_name(dtype)}: {SPEED_TABLE.strip()}"
            blocks.append(Table(speed_table(run, part), caption))
        failed = speed[speed["error"].str.strip() != ""]
        if len(failed):
            reasons = failed.groupby(["format", "implementation", "error"], sort=False).size().reset_index()
            said = "; ".join(
                f"{NAMES.get(r['implementation'], 'ours')} on {format_name(r['format'])}: {escape(r['error'])}"
                for r in reasons.to_dict("records")
            )
            blocks.append(Text(f"Not timed: {said}."))
        blocks.append(Text(" ".join(NOT_MEASURED.split())))
    return blocks


SECTION = Section(
    experiment="e09",
    title="int8 and int4 weights under sparsity (beyond the paper)",
    tables=(QuantizationRow, QuantizationSample, QuantizationTextSample, QuantizationSpeedRow, QuantizationSpeedSample),
    protocol=PROTOCOL,
    figures=(
        Drawing("e09_quality", QuantizationRow, quality_figure, QUALITY_CAPTION),
        Drawing("e09_speed", QuantizationSpeedRow, speed_figure, SPEED_CAPTION),
    ),
    contents=contents,
)
