"""What the report says of e06: generation throughput (Figure 4)."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from experiments.framework.tables import AmdahlRow, GreedyRow, ShareRow, ThroughputRow
from reports.core import style
from reports.core.document import Block, Table, Text, escape, without_constant
from reports.core.load import Run
from reports.core.merge import ORIGIN
from reports.core.protocol import of, phrases, values
from reports.core.section import Aspect, Drawing, Section
from reports.core.tables import without_empty
from reports.e06 import figures
from reports.measures.generation import GENERATION_KEYS, figure_4, generation_speedups
from reports.rules.e06 import c9_generation

PROTOCOL = (
    Aspect("machine", "one L40S", of(ThroughputRow, lambda table: values(table, "machine"))),
    Aspect("model", "Mistral-7B and Llama2-7B, whole (32 layers)", of(ThroughputRow, lambda table: _models(table))),
    Aspect("dtype, loop", "float32, eager generate",
           of(ThroughputRow, lambda table: f"{values(table, 'dtype')}; {values(table, 'loop')}")),
    Aspect("attention", "",
           phrases("e06", "{attention}", "inductor's dependent launches in the graph loop: {dependent_launch}")),
    Aspect("weights", "the models' own", of(ThroughputRow, lambda table: _weights(table))),
    Aspect("prompts", "50 of RefinedWeb, batch 1", of(ThroughputRow, lambda table: _prompts(table))),
    Aspect("generated tokens", "256, 512, 1024, 2048",
           of(ThroughputRow, lambda table: values(table, "generated_tokens"))),
)  # fmt: skip

RATIO_CAPTION = """
The paper's Figure 4 as ratios to dense in the same loop and run (C9 looks at other runs' dense too; bars begin at 1;
black: one standard error over prompts and repeats), beside the paper's on its L40S; tokens per second of dense and of
CATS-50 at batch 1, prefill apart. Plain bars: eager loop, hatched: compiled, dotted: graph (the compiled step replayed
without Python in between), crossed: graph-tuned (the same, tuned further). Pale, with a commit: of other code than the
latest run's."""
GROWTH_CAPTION = """
Speed-up of generation against what may grow: context, batch, sparsity, layers; the other conditions are
fixed. Bars: one standard error over prompts and repeats; a cross marks where CATS no longer pays."""
SHARES_CAPTION = """
Where the time of one decoded token goes in the dense model; only the MLP's share can be sped up. The parts are timed
alone: where they add to more than the token, “other” is negative and the bar ends beyond 100 %."""
THROUGHPUT_TABLE = """
batch 1, geometric mean over prompts and repeats ± one standard error of the paired ratio; memory: peak."""
GROWTH_TABLE = """
other conditions than Figure 4's; tokens per second are of all sequences of a batch together."""
AMDAHL_TABLE = "Amdahl's law: what the MLP's share of the time and the kernel's own gain allow, and what was measured."
COMMITS = "“Commit”: of rows of other code than the latest run's."
GREEDY_TABLE = """
greedy tokens: how many of the first generated tokens two ways of computing the same function agree on."""


def _figure_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Figure 4's rows where there are any, else all."""
    rows = table[table["condition"] == "figure"]
    return rows if len(rows) else table


def _models(table: pd.DataFrame) -> str:
    sizes = _figure_rows(table)[["model", "layers", "model_layers"]].drop_duplicates()
    return ", ".join(
        f"{style.model_name(str(model))}, {layers:.0f} of {whole:.0f} layers"
        for model, layers, whole in sizes.itertuples(index=False)
    )


def _weights(table: pd.DataFrame) -> str:
    random = table["weights"].eq("random")
    if not random.any():
        return "the models' own"
    which = "" if random.all() else f" ({', '.join(map(style.model_name, table.loc[random, 'model'].unique()))})"
    return f"random, and random tokens for prompts and calibration{which}"


def _prompts(table: pd.DataFrame) -> str:
    rows = _figure_rows(table)
    prompts, repeats = rows["prompt"].nunique(), rows["repeat"].nunique()
    return f"{prompts} of {values(rows, 'prompt_tokens')} tokens, {repeats} repeat{'s' * (repeats != 1)} each"


def _condition(row: dict[Any, Any]) -> dict[str, str]:
    """The columns in which all tables of generation begin."""
    return {
        "Model": escape(style.model_name(row["model"])),
        "Layers": f"{row['layers']:.0f}",
        "Dtype": style.dtype_name(row["dtype"]),
        "Loop": escape(str(row.get("loop", ""))),
        "Commit": escape(str(row.get(ORIGIN) or style.DASH)),
    }


def _table(shown: pd.DataFrame, caption: str) -> Table:
    """With a column of commits, and what it means, where some rows are of other code than the latest run's."""
    if "Commit" not in shown or (shown["Commit"] == style.DASH).all():
        return Table(shown.drop(columns="Commit", errors="ignore"), caption)
    return Table(shown, f"{caption} {COMMITS}")


def _rates(row: dict[Any, Any]) -> dict[str, str]:
    """Tokens per second and their ratio."""
    return {
        "Dense, tokens/s": style.significant(row["dense_tokens_per_second"]),
        "Sparse, tokens/s": style.significant(row["tokens_per_second"]),
        "Speed-up": style.times(row["speedup"]) + style.ratio_error(row["log_stderr"] * row["speedup"]),
    }


def throughput_table(speedups: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Figure 4's numbers: tokens per second for each length, dense and CATS-50, with what else the run cost."""
    rows = []
    for row in figure_4(speedups).to_dict("records"):
        same = (table[GENERATION_KEYS] == [row[key] for key in GENERATION_KEYS]).all(axis=1)
        dense = table.loc[same & table["criterion"].eq("dense"), "peak_memory_bytes"].max()
        rows.append(
            {
                **_condition(row),
                "Tokens": f"{row['generated_tokens']:.0f}",
                **_rates(row),
                "Sparsity": style.percent(row["sparsity_measured"]),
                "Prefill, s": style.significant(row["prefill_s"]),
                "Compile, s": style.significant(row["compile_s"]) if row["compile_s"] > 0 else style.DASH,
                "Memory": style.times(row["peak_memory_bytes"] / dense if dense > 0 else math.nan),
            }
        )
    return without_empty(pd.DataFrame(rows))


def growth_table(speedups: pd.DataFrame) -> pd.DataFrame:
    """What was timed beside Figure 4's conditions: other batches, prompts, sparsities, depths and criteria."""
    fixed = figure_4(speedups).drop(columns="condition")
    keys = [key for key in GENERATION_KEYS if key != "condition"] + ["variant"]
    marked = speedups.merge(fixed[keys].drop_duplicates(), on=keys, how="left", indicator="beside")
    rows = []
    for row in marked[marked["beside"] == "left_only"].to_dict("records"):
        rows.append(
            {
                **_condition(row),
                "Variant": escape(style.variant_name(row["variant"])),
                "Batch": f"{row['batch']:.0f}",
                "Prompt": f"{row['prompt_tokens']:.0f}",
                "Tokens": f"{row['generated_tokens']:.0f}",
                "Sparsity": style.percent(row["sparsity_measured"]),
                "Path": escape(row["path"]),
                **_rates(row),
            }
        )
    frame = pd.DataFrame(rows)
    for column in ("Dtype", "Loop", "Path") if len(frame) > 1 else ():
        frame = without_constant(frame, column)
    return frame


def amdahl_table(table: pd.DataFrame) -> pd.DataFrame:
    """What Amdahl's law allows from the MLP's share and the kernel's gain, against what was measured."""
    rows = [
        {
            **_condition(row),
            "Variant": escape(style.variant_name(row["variant"])),
            "Kernel gain": style.times(row["kernel_speedup"]),
            "MLP share": style.percent(row["mlp_share"]),
            "Predicted": style.times(row["predicted_speedup"]),
            "Measured": style.times(row["measured_speedup"]),
            "Measured / predicted": style.number(row["fraction_of_predicted"], 2),
        }
        for row in table.to_dict("records")
    ]
    return pd.DataFrame(rows)


def greedy_table(table: pd.DataFrame) -> pd.DataFrame:
    """Whether CATS generates the tokens it must."""
    rows = [
        {
            **_condition(row),
            "Check": escape(row["check"].replace("cats-", "CATS-")),
            "Identical tokens": f"{row['identical_tokens']:.0f} of {row['tokens']:.0f}",
        }
        for row in table.to_dict("records")
    ]
    return pd.DataFrame(rows).drop(columns="Loop")


def contents(run: Run) -> list[Block]:
    """The figure holds the rates."""
    if (table := run.table(ThroughputRow)) is not None and generation_speedups(table).empty:
        return [Text("No condition was timed both dense and sparse.")]
    return []


def more(run: Run) -> list[Block]:
    """All rates, what Amdahl's law allows, other conditions, and the check of the tokens."""
    blocks: list[Block] = []
    label = escape(run.label)
    if (table := run.table(AmdahlRow)) is not None:
        blocks.append(_table(amdahl_table(table), f"{label}: {AMDAHL_TABLE.strip()}"))
    if (table := run.table(ThroughputRow)) is not None:
        speedups = generation_speedups(table)
        shown = throughput_table(speedups, table)
        if len(shown):
            machines = escape(", ".join(table["machine"].unique()))
            blocks.append(_table(shown, f"{label}: generation on {machines}, {THROUGHPUT_TABLE.strip()}"))
        if len(grown := growth_table(speedups)):
            blocks.append(_table(grown, f"{label}: {GROWTH_TABLE.strip()}"))
    if (table := run.table(GreedyRow)) is not None:
        blocks.append(_table(greedy_table(table), f"{label}: {GREEDY_TABLE.strip()}"))
    return blocks


SECTION = Section(
    experiment="e06",
    title="Generation throughput (Figure 4)",
    tables=(ThroughputRow, ShareRow, AmdahlRow, GreedyRow),
    protocol=PROTOCOL,
    figures=(
        Drawing("e06_ratio", ThroughputRow, figures.ratio_figure, RATIO_CAPTION),
        Drawing("e06_growth", ThroughputRow, figures.growth_figure, GROWTH_CAPTION, secondary=True),
        Drawing("e06_shares", ShareRow, figures.shares_figure, SHARES_CAPTION, secondary=True),
    ),
    contents=contents,
    more=more,
    by_run=True,
    rules=(("C9", c9_generation),),
)
