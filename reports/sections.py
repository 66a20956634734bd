"""What the report says and in which order: claims, a section an experiment, the appendix."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from reports import tables
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
    "e07": (),
}

Drawn = dict[tuple[str, str], str]


def build(runs: list[Run], judged: pd.DataFrame, drawn: Drawn, headline: str | None) -> list[Block]:
    """Every block of the report, in order."""
    blocks = _claims(runs, judged)
    if headline:
        caption = (
            "At a glance. Left: mean accuracy against sparsity without fine-tuning (colours as in the other figures). "
        )
        caption += "Right: speed-up of one MLP block over dense against sparsity, and what the bytes to be read allow."
        blocks.append(Picture(headline, caption))
    for experiment in EXPERIMENTS:
        blocks += _experiment(experiment, runs, drawn)
    return blocks + appendix(runs)


def _claims(runs: list[Run], judged: pd.DataFrame) -> list[Block]:
    count = judged["verdict"].value_counts()
    said = ", ".join(f"{count.get(verdict, 0)} {verdict}" for verdict in (REPRODUCED, NOT_REPRODUCED, NOT_TESTED))
    several = len(runs) > 1
    where = f"{len(runs)} runs" if several else f"the run *{escape(runs[0].label)}*"
    intro = (
        f"The paper's claims, judged on {where} by rules that are code (listed below). One row is one claim on "
        f"one model or condition: {said}. Accuracies are fractions, “points” hundredths; SE is one standard error; "
        "“undecided” marks a verdict whose margin is within the measurement's own uncertainty. The paper's numbers "
        "come from its own models and hardware, so a ratio or an ordering is compared, not a value."
    )
    rules = [{"": claim.id, "Rule": escape(claim.rule_text)} for claim in CLAIMS]
    return [
        Heading(1, "Claims"),
        Text(intro),
        Table(
            tables.claims(judged, several), "The paper's claims and what was found.", (3.2, 12, 12, 10, 16, 17, 11.5)
        ),
        Table(pd.DataFrame(rules), "The rules that give the verdicts, chosen before the measurements.", (4, 90)),
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
        blocks.append(Text(provenance_line(run, experiment)))
        absent = [
            name
            for name in TABLES
            if name.startswith(experiment) and name not in run.tables and name not in run.problems
        ]
        if absent:
            blocks.append(Text(f"Not measured here: {', '.join(absent)}; run `{command(experiment)}`."))
        blocks += [
            Picture(drawn[name, run.label], CAPTIONS[name])
            for name in FIGURES_OF[experiment]
            if (name, run.label) in drawn
        ]
        blocks += TABLES_OF[experiment](run)
    return blocks


def _e01(run: Run) -> list[Block]:
    if "e01_thresholds" not in run.tables:
        return []
    caption = "Thresholds over the layers and the sparsity they give on text that calibration has not seen."
    return [Table(tables.thresholds(run.tables["e01_thresholds"]), caption)]


def _e02(run: Run) -> list[Block]:
    table = run.tables["e02_zero_shot"]
    blocks: list[Block] = []
    for model in table["model"].unique():
        name = escape(model)
        blocks += [
            Table(tables.zero_shot(table, model), f"{name}: {CAPTIONS['table_zero_shot']}"),
            Table(tables.zero_shot_paper(model), "The paper's Table 1."),
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
        blocks.append(Table(tables.sweep(table), "The learning-rate sweep: what was tried and what was used."))
    return blocks


def _e04(run: Run) -> list[Block]:
    table = run.tables["e04_task_finetuning"]
    caption = "accuracy after task fine-tuning (the paper's Table 2) and sparsity left (Table 3), ± one standard error."
    return [
        Table(tables.task_finetuning(table, model), f"{escape(model)}: {caption}") for model in table["model"].unique()
    ]


def _e05(run: Run) -> list[Block]:
    table = run.tables["e05_mlp_latency"]
    machines = escape(", ".join(table["machine"].unique()))
    threads = ", ".join(f"{count:.0f}" for count in sorted(table["threads"].dropna().unique()))
    caption = f"Speed-up of one MLP block over dense at batch 1 on {machines}" + (
        f" ({threads} threads)" if threads else ""
    )
    caption += (
        "; in brackets the range from dense's 20th over CATS' 80th percentile to the reverse. Paper: its nearest "
    )
    caption += "measured sparsity, L40S, float32."
    blocks: list[Block] = [Table(tables.latency(run.tables), caption)]
    failed = tables.latency_errors(table)
    return [*blocks, Table(failed, "What could not be timed, and why.")] if len(failed) else blocks


def _e06(run: Run) -> list[Block]:
    blocks: list[Block] = []
    if (table := run.table("e06_throughput")) is not None:
        shown = tables.throughput(table)
        caption = (
            f"Generation on {escape(', '.join(table['machine'].unique()))}, batch 1, geometric mean over prompts ± one "
        )
        caption += "standard error of the paired ratio; memory: peak of CATS over peak of dense."
        blocks.append(Table(shown, caption) if len(shown) else Text("No length was timed both dense and with CATS-50."))
    if (table := run.table("e06_amdahl")) is not None:
        caption = (
            "Amdahl's law: what the MLP's share of the time and the kernel's own gain allow, and what was measured."
        )
        blocks.append(Table(tables.amdahl(table), caption))
    if (table := run.table("e06_greedy")) is not None:
        blocks.append(Table(tables.greedy(table), CAPTIONS["table_greedy"]))
    return blocks


def _e07(run: Run) -> list[Block]:
    table = run.tables["e07_attention"]
    blocks: list[Block] = []
    for model in table["model"].unique():
        caption = f"{escape(model)}: {CAPTIONS['table_attention']}"
        blocks += [
            Table(tables.zero_shot_summary(table, model).pipe(_without_paper), caption),
            Table(tables.zero_shot(table, model), f"{escape(model)}: the same by task, ± one standard error."),
        ]
    return blocks


def _without_paper(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[[column for column in frame if not str(column).endswith("(paper)")]]


TABLES_OF: dict[str, Callable[[Run], list[Block]]] = {
    "e01": _e01, "e02": _e02, "e03": _e03, "e04": _e04, "e05": _e05, "e06": _e06, "e07": _e07,
}  # fmt: skip
