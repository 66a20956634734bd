"""Speed, memory and quality of every format side by side: one figure and one table."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from experiments.framework.tables import QuantizationRow, QuantizationSpeedRow, QuantizationThroughputRow
from reports.core import style
from reports.core.document import escape
from reports.core.load import Run
from reports.core.verdicts import POCKET_MODEL
from reports.e09 import generation, speed
from reports.e09.names import COLOURS, NOT_MEASURED, OTHERS, OURS, format_name
from reports.rules.e09 import PLAIN

LEVELS = (0.0, 0.5)
SUMMARY_CAPTION = """
Every format at 0 % (hollow) and at 50 % sparsity (filled): increase of perplexity over the unquantised dense model (log
scale) against the speed-up of one MLP block over torch's fastest unquantised dense one; the area of a point is the
memory of the MLPs' weights. The lower right is better. Model and shape are different ones where the heading says so.
Other programs: *not measured*."""
SUMMARY_TABLE = """
Speed, memory and quality side by side. Memory: of the MLPs' weights, over unquantised ones of the first block.
Perplexity: increase over the unquantised dense model. Block: speed-up of one MLP block over torch's fastest
unquantised dense one. Tokens: those generated per second over the unquantised dense model in the same loop and run."""
Key = tuple[str, float]


def quality(run: Run) -> dict[str, dict[Key, float]]:
    """Model -> (format, level) -> increase of perplexity as a fraction."""
    table = run.table(QuantizationRow)
    if table is None:
        return {}
    rows = table[table["metric"] == "perplexity"]
    made: dict[str, dict[Key, float]] = {}
    for row in rows.assign(level=rows["sparsity_target"].fillna(0.0)).to_dict("records"):
        made.setdefault(str(row["model"]), {})[str(row["format"]), row["level"]] = float(np.expm1(row["difference"]))
    return made


def blocks(run: Run) -> dict[tuple[str, str, str], dict[Key, float]]:
    """(machine, shape, dtype) -> (format, level) -> speed-up of our kernel over torch's fastest unquantised dense."""
    table = run.table(QuantizationSpeedRow)
    made: dict[tuple[str, str, str], dict[Key, float]] = {}
    for key, part in [] if table is None else speed.groups(table):
        dense = speed.dense_of(part, np.nan)
        if dense is not None:
            own = part[part["implementation"] == OURS].to_dict("records")
            made[key] = {(str(r["format"]), r["sparsity_target"]): dense["p50_ms"] / r["p50_ms"] for r in own}
    return made


def generated(run: Run) -> dict[str, dict[Key, float]]:
    """Bench in words -> (format, level) -> tokens per second over the unquantised dense model."""
    table = run.table(QuantizationThroughputRow)
    made: dict[str, dict[Key, float]] = {}
    for bench, part in [] if table is None else generation.groups(table):
        targets = part.drop_duplicates(["format", "variant"]).set_index(["format", "variant"])["sparsity_target"]
        rows = generation.rates(part)
        base = rows[(rows["format"] == PLAIN) & (rows["variant"] == "dense")]["rate"]
        if len(base):
            levels = [float(np.nan_to_num(targets[row["format"], row["variant"]])) for row in rows.to_dict("records")]
            keys = zip(rows["format"], levels, strict=True)
            made[generation.title(bench)] = dict(zip(keys, rows["rate"] / base.iloc[0], strict=True))
    return made


def memory(run: Run) -> dict[str, float]:
    """Format -> bytes of the MLPs' weights over unquantised ones of the first block timed, and where none was, of the
    models; never of both, whose unquantised weights may be of different dtypes."""
    table = run.table(QuantizationSpeedRow)
    if table is not None:
        own = table[(table["implementation"] == OURS) & table["bytes_stored"].notna()]
        for _, part in own.groupby(["machine", "shape", "dtype"], sort=False):
            stored = part.drop_duplicates("format").set_index("format")["bytes_stored"]
            if PLAIN in stored:
                shares = stored / stored[PLAIN]
                return {str(name): float(share) for name, share in zip(shares.index, shares, strict=True)}
    quality = run.table(QuantizationRow)
    if quality is None:
        return {}
    of_format = quality.drop_duplicates("format").set_index("format")["mlp_memory"]
    return {str(name): float(share) for name, share in zip(of_format.index, of_format, strict=True)}


def summary_table(run: Run, pocket_too: bool = True) -> pd.DataFrame:
    """A row per format at 0 and at 50 %; empty where fewer than two of speed, generation and quality were measured.

    Without ``pocket_too`` the pocket profile's model and block are left out beside real ones, and rows of other
    programs, of which the figures say that they were not measured; and formats whose speed was not measured.
    """
    of_quality, of_blocks, of_generation, stored = quality(run), blocks(run), generated(run), memory(run)
    if not pocket_too:
        of_quality = {key: of for key, of in of_quality.items() if key != POCKET_MODEL} or of_quality
        of_blocks = {key: of for key, of in of_blocks.items() if key[1] != "small"} or of_blocks
        of_generation = {
            key: of for key, of in of_generation.items() if f", {POCKET_MODEL}," not in key
        } or of_generation
    if sum(map(bool, (of_quality, of_blocks, of_generation))) < 2:
        return pd.DataFrame()
    columns: dict[str, dict[Key, str]] = {}
    for model, values in of_quality.items():
        name = escape(style.model_name(model))
        shown = {key: style.signed_percent(value, 2) for key, value in values.items() if key != (PLAIN, 0.0)}
        columns[f"Perplexity, {name}"] = shown
    for (machine, shape, dtype), values in of_blocks.items():
        heading = f"Block, {escape(shape)}, {style.dtype_name(dtype)}, {escape(machine)}"
        columns[heading] = {key: style.times(value) for key, value in values.items()}
    for bench, values in of_generation.items():
        columns[f"Tokens, {escape(bench)}"] = {key: style.times(value) for key, value in values.items()}
    timed = {name for values in [*of_blocks.values(), *of_generation.values()] for name, _ in values}
    formats = dict.fromkeys(name for shown in columns.values() for name, _ in shown if pocket_too or name in timed)
    rows: list[dict[str, Any]] = []
    for name in formats:
        for level in LEVELS:
            cells = {heading: shown[name, level] for heading, shown in columns.items() if (name, level) in shown}
            if cells:
                start = {"Weights": format_name(name), "Sparsity": f"{100 * level:g} %"}
                rows.append({**start, "Memory": style.percent(stored.get(name, np.nan)), **cells})
    if pocket_too:
        rows += [{"Weights": f"{name}: {NOT_MEASURED}"} for name in OTHERS]
    return pd.DataFrame(rows, columns=["Weights", "Sparsity", "Memory", *columns]).fillna(style.DASH)


def summary_figure(run: Run) -> Figure | None:
    """A panel for each machine's first shape, with the first model; None where speed or quality was not measured."""
    of_quality, of_blocks, stored = quality(run), blocks(run), memory(run)
    if not of_quality or not of_blocks:
        return None
    model, increases = next(iter(of_quality.items()))
    machines = {machine: key for key in reversed(of_blocks) for machine in key[:1]}
    figure, axes = plt.subplots(1, len(machines), figsize=(style.WIDTH, 2.7), squeeze=False)
    for ax, (machine, key) in zip(axes[0], reversed(machines.items()), strict=True):
        formats = dict.fromkeys(name for name, _ in of_blocks[key])
        for name, colour in zip(formats, (style.GREY, *COLOURS) * 2, strict=False):
            points = [
                (of_blocks[key][name, level], 100 * increases[name, level], level)
                for level in LEVELS
                if (name, level) in of_blocks[key] and increases.get((name, level), 0.0) > 0
            ]
            if not points:
                continue
            x, y, levels = zip(*points, strict=True)
            ax.plot(x, y, color=colour, lw=0.8, zorder=1)
            faces = ["white" if level == min(LEVELS) else colour for level in levels]
            ax.scatter(x, y, s=160 * stored.get(name, 1.0), facecolors=faces, edgecolors=colour)
            ax.scatter([], [], s=30, color=colour, label=format_name(name))
        shape, dtype = key[1], style.dtype_name(key[2])
        ax.margins(0.1, 0.15)
        ax.set(yscale="log", xlabel=f"speed-up of one block over dense\nother programs: {NOT_MEASURED}")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_title(f"{style.model_name(model)}; {shape}, {dtype}\n{machine}", fontsize=8)
        ax.legend(fontsize=6.5, frameon=False)
    axes[0][0].set_ylabel("increase of perplexity, %")
    return figure
