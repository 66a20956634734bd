"""Generation by whole models on weights of every format: tokens per second and memory."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.framework.tables import QuantizationThroughputRow
from reports.core import style
from reports.core.document import escape
from reports.core.load import Run
from reports.core.merge import at_commit
from reports.core.statistics import standard_error
from reports.e09.names import ALL, COLOURS, NOT_MEASURED, OTHERS, format_name
from reports.rules.e09 import PLAIN

GENERATION_CAPTION = """
Tokens per second of greedy generation at batch 1 by format of the MLPs' weights, dense (pale) and sparse, in one loop,
geometric means over prompts and repeats, all of one run: inductor finds another program in each. Other programs: *not
measured*."""
GENERATION_TABLE = """
greedy generation at batch 1, geometric means over prompts and repeats. “Over dense”: over the dense model of the same
format, ± one standard error, paired by prompt and repeat. “Over unquantised”: over the unquantised model of the same
variant, and over the unquantised dense one. “Weights”: all weights of the model as they are stored; “peak”: the largest
memory in use while generating, over the weights. Only the MLPs are quantised."""
WITH_ALL_LAYERS = """ Where it says “all layers”, attention projections and the output matrix are, too (in int8 with one
scale per row)."""
BENCH = ["machine", "model", "layers", "model_layers", "dtype", "attention", "loop", "generated_tokens"]
PAIR = ["prompt", "repeat"]


def groups(table: pd.DataFrame) -> list[tuple[pd.Series, pd.DataFrame]]:
    """Rows of each bench (machine, model, dtype, loop, length), the longest generation last, and what it is."""
    parts = table[table["tokens_per_second"] > 0].groupby(BENCH, sort=False, dropna=False)
    return [(part.iloc[0], part) for _, part in parts]


def rates(part: pd.DataFrame) -> pd.DataFrame:
    """One row per format and variant of one bench: format, variant, tokens per second, its ratio to the dense model of
    the same format with the standard error of the logarithm, weights in bytes, and peak memory over them."""
    logs = part.assign(log_rate=np.log(part["tokens_per_second"]))
    rows = []
    for (name, variant), own in logs.groupby(["format", "variant"], sort=False):
        dense = logs[(logs["format"] == name) & (logs["criterion"] == "dense")]
        paired = own.merge(dense[[*PAIR, "log_rate"]], on=PAIR, suffixes=("", "_dense"))
        difference = (paired["log_rate"] - paired["log_rate_dense"]).to_numpy()
        rows.append(
            {
                "format": name,
                "variant": variant,
                "rate": float(np.exp(own["log_rate"].mean())),
                "over_dense": float(np.exp(difference.mean())) if len(difference) else np.nan,
                "log_stderr": standard_error(difference),
                "weights": own["weight_bytes"].iloc[0],
                "peak": own["peak_memory_bytes"].max() / own["weight_bytes"].iloc[0],
                "sparsity": own["sparsity_measured"].mean(),
            }
        )
    return pd.DataFrame(rows)


def table_caption(bench: pd.Series, part: pd.DataFrame) -> str:
    """What the table of one bench shows."""
    more = WITH_ALL_LAYERS if part["format"].astype(str).str.endswith(ALL).any() else ""
    return f"{escape(title(bench))}: {GENERATION_TABLE.strip()}{more}"


def generation_table(part: pd.DataFrame) -> pd.DataFrame:
    """One bench: a row per format and variant, then what was not measured."""
    table = rates(part)
    plain = table[table["format"] == PLAIN].set_index("variant")["rate"]
    rows = []
    for row in table.to_dict("records"):
        dense = row["variant"] == "dense"
        rows.append(
            {
                "Weights": format_name(row["format"]),
                "Variant": style.variant_name(row["variant"]),
                "Tokens/s": style.significant(row["rate"]),
                "Over dense": style.DASH if dense else _ratio(row["over_dense"], row["log_stderr"]),
                "Over unquantised": style.times(row["rate"] / plain.get(row["variant"], np.nan)),
                "Over unquantised dense": style.times(row["rate"] / plain.get("dense", np.nan)),
                "GB": style.significant(row["weights"] / 1e9),
                "Peak": style.times(row["peak"]),
            }
        )
    rows += [{"Weights": style.DASH, "Variant": name, "Tokens/s": NOT_MEASURED} for name in OTHERS]
    return pd.DataFrame(rows).fillna(style.DASH)


def _ratio(ratio: float, log_stderr: float) -> str:
    return style.times(ratio) + style.ratio_error(ratio * log_stderr)


def title(bench: pd.Series) -> str:
    """Machine, model, dtype, loop and length in words."""
    layers = (
        "" if bench["layers"] == bench["model_layers"] else f", {bench['layers']:g} of {bench['model_layers']:g} layers"
    )
    dtype, name = style.dtype_name(str(bench["dtype"])), style.model_name(str(bench["model"]))
    tokens = f"{bench['generated_tokens']:g} tokens"
    return f"{bench['machine']}, {name}{layers}, {dtype}, loop {bench['loop']}, {tokens}"


def generation_figure(run: Run) -> Figure | None:
    """A panel per machine, model and loop, at the longest generation."""
    table = run.tables[QuantizationThroughputRow.table]
    longest: dict[tuple[str, ...], tuple[pd.Series, pd.DataFrame]] = {}
    for bench, part in groups(table):
        key = tuple(str(bench[name]) for name in BENCH[:-1])
        if key not in longest or bench["generated_tokens"] > longest[key][0]["generated_tokens"]:
            longest[key] = bench, part
    shown = list(longest.values())[:4]
    if not shown:
        return None
    figure, axes = style.panels(len(shown), 1.85)
    for ax, (bench, part) in zip(axes.flat, shown, strict=False):
        _bars(ax, rates(part))
        ax.set_title(
            f"{style.model_name(str(bench['model']))}, {bench['loop']}{at_commit(part)}\n{bench['machine']}", fontsize=8
        )
    for line in axes:
        line[0].set_ylabel("tokens per second")
    return figure


def _bars(ax: Axes, table: pd.DataFrame) -> None:
    colours = (style.GREY, *COLOURS)
    left, places, labels = 0.0, [], []
    for number, (name, rows) in enumerate(table.groupby("format", sort=False)):
        start = left
        for row in rows.to_dict("records"):
            alpha = 0.45 if row["variant"] == "dense" else 1.0
            ax.bar(left, row["rate"], width=0.9, color=colours[number % len(colours)], alpha=alpha)
            ax.annotate(f"{row['rate']:.3g}", (left, row["rate"]), ha="center", va="bottom", fontsize=7)
            left += 1
        places.append((start + left - 1) / 2)
        labels.append("none" if name == PLAIN else str(name).replace("-", "\n"))
        left += 0.8
    ax.text(
        left, 0, f" {', '.join(OTHERS[:2])}: {NOT_MEASURED}", rotation=90, fontsize=6.5, va="bottom", color=style.GREY
    )
    ax.set_xlim(right=left + 1)
    ax.margins(y=0.12)
    ax.set_xticks(places, labels, fontsize=7)
    ax.tick_params(axis="x", length=0)
