"""What the report says and in which order: claims, a section an experiment, the appendix."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from reports import tables, tables_speed
from reports.appendix import appendix, machine, provenance_line
from reports.claims import CLAIMS, NOT_REPRODUCED, NOT_TESTED, REPRODUCED
from reports.document import Block, Heading, Picture, Table, Text, escape
from reports.load import EXPERIMENTS, TABLES, Run, command
from reports.protocol import protocol

TEMPLATE = Path(__file__).parent / "template"

CAPTIONS: dict[str, str] = {
    name: " ".join(text.split())
    for name, text in tomllib.loads((TEMPLATE / "captions.toml").read_text(encoding="utf-8")).items()
}

FIGURES_OF = {
    "e01": ("e01_histogram", "e01_thresholds"),
    "e02": ("e02_accuracy",),
    "e03": ("e03_curves", "e03_sparsity"),
    "e04": ("e04_tasks",),
    "e05": ("e05_latency", "e05_speedup", "e05_ablation", "e05_rows"),
    "e06": ("e06_throughput", "e06_ratio", "e06_growth", "e06_shares"),
    "e07": ("e07_attention",),
}

Drawn = dict[tuple[str, str], str]


def build(runs: list[Run], judged: pd.DataFrame, drawn: Drawn, headline: str | None) -> list[Block]:
    """Every block of the report, in order."""
    blocks = _claims(runs, judged)
    if headline:
        blocks.append(Picture(headline, CAPTIONS["headline"]))
    for experiment in EXPERIMENTS:
        blocks += _experiment(experiment, runs, drawn)
    return blocks + appendix(runs)


def _claims(runs: list[Run], judged: pd.DataFrame) -> list[Block]:
    count = judged["verdict"].value_counts()
    said = ", ".join(f"{count.get(verdict, 0)} {verdict}" for verdict in (REPRODUCED, NOT_REPRODUCED, NOT_TESTED))
    said += f"; {judged['undecided'].eq('yes').sum()} of them undecided"
    several = len(runs) > 1
    where = f"{len(runs)} runs" if several else f"the run *{escape(runs[0].label)}*"
    intro = (
        f"The paper's claims, judged on {where} by rules that are code (Table 2). One row is one claim on one model or "
        f"condition: {said}. Accuracies are fractions, “points” hundredths; SE is one standard error; a margin is the "
        "distance from the rule's bound, positive inside; “undecided” marks a verdict that the measurement's own "
        "uncertainty (2 SE, or the 20th to 80th percentile of timings) could turn. The paper's numbers come from its "
        "own models and hardware, so a ratio or an ordering is compared, not a value."
    )
    rules = [{"": claim.id, "Rule": escape(claim.rule_text)} for claim in CLAIMS]
    return [
        Heading(1, "Claims"),
        Text(intro),
        Table(
            tables.claims(judged, several), "The paper's claims and what was found.", (3.4, 12, 11, 12, 16, 16, 11.5)
        ),
        Table(pd.DataFrame(rules), "The rules that give the verdicts.", (4, 90)),
    ]


def _experiment(experiment: str, runs: list[Run], drawn: Drawn) -> list[Block]:
    blocks: list[Block] = [Heading(1, EXPERIMENTS[experiment])]
    measured = [run for run in runs if any(name.startswith(experiment) for name in run.tables)]
    blocks += [
        Text(f"**Broken in {escape(run.label)}:** {escape(sentence)}.")
        for run in runs
        for sentence in run.broken(experiment)
    ]
    if not measured:
        return [*blocks, Text(f"Not measured here; run `{command(experiment)}`.")]
    blocks.append(
        Table(
            protocol(experiment, measured),
            "The paper's protocol and what was done here.",
            (14, 38, *([38] * len(measured))),
        )
    )
    for run in measured:
        if len(runs) > 1:
            blocks.append(Heading(2, f"{escape(run.label)}: {escape(machine(run))}"))
        blocks.append(Text(provenance_line(run, experiment), with_next=True))
        absent = [
            name
            for name in TABLES
            if name.startswith(experiment) and name not in run.tables and name not in run.problems
        ]
        if absent:
            blocks.append(Text(f"Not measured here: {escape(', '.join(absent))}; run `{command(experiment, run)}`."))
        blocks += [
            Picture(
                drawn[name, run.label], f"{escape(run.label)}: {CAPTIONS[name]}" if len(runs) > 1 else CAPTIONS[name]
            )
            for name in FIGURES_OF[experiment]
            if (name, run.label) in drawn
        ]
        blocks += TABLES_OF[experiment](run)
    return blocks


def _e01(run: Run) -> list[Block]:
    table = run.table("e01_thresholds")
    return [] if table is None else [Table(tables.thresholds(table), CAPTIONS["table_thresholds"])]


def _e02(run: Run) -> list[Block]:
    table = run.tables["e02_zero_shot"]
    blocks: list[Block] = []
    for model in table["model"].unique():
        name = escape(model)
        blocks += [
            Table(tables.zero_shot(table, model), f"{name}: {CAPTIONS['table_zero_shot']}"),
            Table(tables.zero_shot_paper(model), CAPTIONS["table_zero_shot_paper"]),
            Table(tables.zero_shot_summary(table, model), f"{name}: {CAPTIONS['table_zero_shot_summary']}"),
        ]
    return blocks


def _e03(run: Run) -> list[Block]:
    blocks: list[Block] = []
    if (table := run.table("e03_finetuning")) is not None:
        for model in table["model"].unique():
            blocks.append(Table(tables.finetuning(table, model), f"{escape(model)}: {CAPTIONS['table_finetuning']}"))
    if (table := run.table("e03_sparsity")) is not None:
        for model in table["model"].unique():
            caption = f"{escape(model)}: {CAPTIONS['table_finetuned_sparsity']}"
            blocks.append(Table(tables.finetuned_sparsity(table, model), caption))
    if (table := run.table("e03_sweep")) is not None:
        blocks.append(Table(tables.sweep(table), CAPTIONS["table_sweep"]))
    return blocks


def _e04(run: Run) -> list[Block]:
    table = run.tables["e04_task_finetuning"]
    blocks: list[Block] = []
    for model in table["model"].unique():
        name = escape(model)
        blocks += [
            Table(tables.task_finetuning(table, model), f"{name}: {CAPTIONS['table_task_finetuning']}"),
            Table(tables.task_sparsity(table, model), f"{name}: {CAPTIONS['table_task_sparsity']}"),
        ]
    blocks.append(Table(tables.task_finetuning_paper(), CAPTIONS["table_task_paper"]))
    if (rates := run.table("e04_sweep")) is not None:
        blocks.append(Table(tables.sweep(rates), CAPTIONS["table_task_sweep"]))
    return blocks


def _e05(run: Run) -> list[Block]:
    table = run.tables["e05_mlp_latency"]
    machines = escape(", ".join(table["machine"].unique()))
    threads = ", ".join(f"{count:.0f}" for count in sorted(table["threads"].dropna().unique()))
    where = machines + (f" ({threads} threads)" if threads else "")
    caption = f"Speed-up of one MLP block over dense at batch 1 on {where}; {CAPTIONS['table_latency']}"
    blocks: list[Block] = [Table(tables_speed.latency(run.tables), caption)]
    if len(several := tables_speed.latency_rows(run.tables)):
        blocks.append(Table(several, CAPTIONS["table_latency_rows"]))
    failed = tables_speed.latency_errors(table)
    return [*blocks, Table(failed, "What could not be timed, and why.")] if len(failed) else blocks


def _e06(run: Run) -> list[Block]:
    blocks: list[Block] = []
    if (table := run.table("e06_throughput")) is not None:
        shown = tables_speed.throughput(table)
        caption = f"Generation on {escape(', '.join(table['machine'].unique()))}, {CAPTIONS['table_throughput']}"
        blocks.append(Table(shown, caption) if len(shown) else Text("No length was timed both dense and with CATS-50."))
        if len(grown := tables_speed.growth(table)):
            blocks.append(Table(grown, CAPTIONS["table_growth"]))
    if (table := run.table("e06_amdahl")) is not None:
        blocks.append(Table(tables_speed.amdahl(table), CAPTIONS["table_amdahl"]))
    if (table := run.table("e06_greedy")) is not None:
        blocks.append(Table(tables_speed.greedy(table), CAPTIONS["table_greedy"]))
    return blocks


def _e07(run: Run) -> list[Block]:
    table = run.tables["e07_attention"]
    blocks: list[Block] = []
    for model in table["model"].unique():
        caption = f"{escape(model)}: {CAPTIONS['table_attention']}"
        blocks += [
            Table(tables.zero_shot_summary(table, model).pipe(_without_paper), caption),
            Table(tables.zero_shot(table, model), f"{escape(model)}: {CAPTIONS['table_attention_tasks']}"),
        ]
    return blocks


def _without_paper(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[[column for column in frame if not str(column).endswith("(paper)")]]


TABLES_OF: dict[str, Callable[[Run], list[Block]]] = {
    "e01": _e01, "e02": _e02, "e03": _e03, "e04": _e04, "e05": _e05, "e06": _e06, "e07": _e07,
}  # fmt: skip
