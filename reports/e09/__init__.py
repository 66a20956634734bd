"""What the report says of e09: int8 and int4 weights under sparsity, quality, memory and speed."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.framework.tables import (
    QuantizationRow,
    QuantizationSample,
    QuantizationSpeedRow,
    QuantizationSpeedSample,
    QuantizationTextSample,
    QuantizationThroughputRow,
)
from reports.core import style
from reports.core.document import Block, Table, Text, escape, without_constant
from reports.core.load import Run
from reports.core.protocol import CALIBRATION, of, phrases, values
from reports.core.section import Aspect, Drawing, Section
from reports.core.verdicts import POCKET_MODEL
from reports.e09 import generation, summary
from reports.e09.names import COLOURS, OTHERS, format_name
from reports.e09.speed import NAMES, SPEED_CAPTION, SPEED_TABLE, groups, speed_figure, speed_table
from reports.rules.e09 import PLAIN, damages_add_up

PROTOCOL = (
    Aspect("weights", "as trained: float32, no quantisation",
           of(QuantizationRow, lambda table: "rounded to nearest: " + values(table, "format"))),
    Aspect("models", "one method, on Mistral-7B and Llama2-7B", of(QuantizationRow, lambda t: values(t, "model"))),
    Aspect("calibration", "as for Table 1", phrases("e09", *CALIBRATION)),
    Aspect("machine", "one L40S", of(QuantizationSpeedRow, lambda table: values(table, "machine"))),
    Aspect("timing", "as for Figure 3", phrases("e09", "{warmups} warm-ups", "{rounds} rounds, interleaved")),
)  # fmt: skip

UNMEASURED = """*not measured*; none of these programs with kernels for quantised weights was run on these machines in
these rounds, and their published times are of other machines."""
QUALITY_CAPTION = """
Increase of perplexity on held-out text over the unquantised dense model (log scale) against the bytes of the MLPs'
weights that a token reads, scales included, as a fraction of the unquantised dense ones: the lower left is better. A
line is one format, from dense at its right end to the highest sparsity at its left."""
QUALITY_TABLE = """
increase of perplexity on held-out text over the unquantised dense model, ± one standard error, paired over blocks of
text. “Memory” and “read at 50 %”: bytes of the MLPs' weights, scales included, against the unquantised ones in the
dtype of the run: of float32 int8 is a quarter, of bfloat16 half."""
ADD_UP_TABLE = """
Do the two damages add up, as logarithms of perplexity? “By the product”: what the factors of quantisation and of
sparsity, each measured alone, give together. """


def text_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of perplexity, with its increase as a fraction and the level as a number."""
    rows = table[table["metric"] == "perplexity"]
    return rows.assign(increase=np.expm1(rows["difference"]), level=rows["sparsity_target"].fillna(0.0))


def quality_figure(run: Run) -> Figure:
    """A panel per model: increase of perplexity against the bytes read."""
    table = text_rows(run.tables[QuantizationRow.table])
    models = _shown(table)
    figure, axes = style.panels(len(models), 2.1)
    for ax, model in zip(axes.flat, models, strict=False):
        part = table[(table["model"] == model)]
        ends = []
        for (name, rows), colour in zip(part.groupby("format", sort=False), (style.GREY, *COLOURS), strict=False):
            rows = rows[rows["increase"] > 1e-4].sort_values("mlp_bytes")
            if rows.empty:
                continue
            x, y = 100 * rows["mlp_bytes"], 100 * rows["increase"]
            ax.plot(x, y, "o-", color=colour, ms=3)
            ends.append((x.iloc[-1], y.iloc[-1], format_name(str(name)), colour))
        ax.set(yscale="log", title=style.model_name(model).replace(" (", "\n("), xlabel="bytes of the MLPs read, %")
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
    """Mean accuracy over tasks, a row per format and a column per variant, and in brackets the mean difference from the
    unquantised dense model in points."""
    part = table[(table["model"] == model) & (table["metric"] == "acc")]
    rows: dict[str, dict[str, str]] = {}
    for (name, variant), scores in part.groupby(["format", "variant"], sort=False):
        label, who = format_name(str(name)), escape(style.variant_name(str(variant)))
        shown = f"{style.number(scores['value'].mean())} ({style.points(scores['difference'].mean())})"
        rows.setdefault(label, {"Weights": label})[who] = shown
    return pd.DataFrame(list(rows.values()))


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


def add_up_sentence(run: Run) -> str:
    """For which models and formats the two damages multiply, do not, or cannot be told."""
    by_verdict: dict[str, dict[str, list[str]]] = {}
    for finding in damages_add_up(run):
        name = escape(style.model_name(finding.model))
        by_verdict.setdefault(finding.words, {}).setdefault(name, []).append(format_name(finding.condition))
    said = []
    for words, by_model in by_verdict.items():
        named = [f"{name} ({', '.join(formats)})" for name, formats in by_model.items()]
        said.append(f"**{words}** for {', '.join(named)}")
    return f"That the two damages multiply {'; '.join(said)}." if said else ""


def _summary(shown: pd.DataFrame) -> list[Block]:
    widths = (14, 6.5, 7.5, *[72 / max(1, shown.shape[1] - 3)] * (shown.shape[1] - 3))
    return [Table(shown, summary.SUMMARY_TABLE.strip(), widths)] if len(shown) else []


def _shown(quality: pd.DataFrame) -> list[str]:
    """The models; without the pocket model where there are others."""
    models = [str(model) for model in quality["model"].unique()]
    return [model for model in models if model != POCKET_MODEL] or models


def _quality(quality: pd.DataFrame, model: str) -> Table:
    return Table(quality_table(quality, model), f"{escape(style.model_name(model))}: {QUALITY_TABLE.strip()}")


def _accuracy(quality: pd.DataFrame) -> list[Block]:
    """A table of tasks for each model that has them."""
    tables = {str(model): tasks_table(quality, str(model)) for model in quality["model"].unique()}
    said = "mean zero-shot accuracy (points from the unquantised dense model)."
    return [Table(shown, f"{escape(style.model_name(model))}: {said}") for model, shown in tables.items() if len(shown)]


def contents(run: Run) -> list[Block]:
    """One run's tables."""
    blocks: list[Block] = []
    blocks += _summary(summary.summary_table(run, pocket_too=False))
    quality = run.table(QuantizationRow)
    if quality is not None:
        blocks += [_quality(quality, model) for model in _shown(quality)]
        blocks += [Text(said)] if (said := add_up_sentence(run)) else []
    return blocks


def more(run: Run) -> list[Block]:
    """One run's tables that the PDF leaves out: its figures show what they hold."""
    blocks: list[Block] = []
    quality, speed = run.table(QuantizationRow), run.table(QuantizationSpeedRow)
    if quality is not None:
        blocks += [_quality(quality, model) for model in set(map(str, quality["model"])) - set(_shown(quality))]
        blocks += _accuracy(quality)
    whole = summary.summary_table(run)
    if whole.shape[1] > summary.summary_table(run, pocket_too=False).shape[1]:
        blocks += _summary(whole)
    if quality is not None and len(shown := add_up_table(run)):
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
    table = run.table(QuantizationThroughputRow)
    if table is not None:
        for bench, part in generation.groups(table):
            blocks.append(Table(generation.generation_table(part), generation.table_caption(bench, part)))
    if speed is not None or table is not None:
        blocks.append(Text(f"{', '.join(OTHERS)}: {' '.join(UNMEASURED.split())}"))
    return blocks


SECTION = Section(
    experiment="e09",
    title="int8 and int4 weights under sparsity (beyond the paper)",
    tables=(
        QuantizationRow,
        QuantizationSample,
        QuantizationTextSample,
        QuantizationSpeedRow,
        QuantizationSpeedSample,
        QuantizationThroughputRow,
    ),
    protocol=PROTOCOL,
    figures=(
        Drawing("e09_summary", QuantizationRow, summary.summary_figure, summary.SUMMARY_CAPTION),
        Drawing("e09_quality", QuantizationRow, quality_figure, QUALITY_CAPTION),
        Drawing("e09_speed", QuantizationSpeedRow, speed_figure, SPEED_CAPTION),
        Drawing(
            "e09_generation", QuantizationThroughputRow, generation.generation_figure, generation.GENERATION_CAPTION
        ),
    ),
    contents=contents,
    more=more,
)
