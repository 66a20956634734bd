"""What the report says and in which order: claims, a section an experiment, the appendix. Text here, numbers from tables."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from reports import style, tables
from reports.claims import CLAIMS, NOT_REPRODUCED, NOT_TESTED, REPRODUCED
from reports.document import Block, Heading, Picture, Table, Text, escape
from reports.load import EXPERIMENTS, TABLES, Run, command
from reports.protocol import protocol

LOG = Path(__file__).parent.parent / "docs" / "LOG.md"

CAPTIONS = {
    "e01_histogram": "Share of the gate activations by magnitude, as in the paper's Figure 1. Vertical lines: the thresholds "
    "that zero 50, 70 and 90 % of the calibration text's activations. A tall peak left of the 50 % line means that half "
    "of the activations are small against the rest. The axis ends at the 99.5th percentile.",
    "e01_thresholds": "Left: the threshold of every layer, per target sparsity. Right: how far the sparsity on held-out text "
    "is from its target; dashed lines at one point.",
    "e02_accuracy": "Mean zero-shot accuracy against measured sparsity, without fine-tuning; ours first, then the paper's "
    "(where ReLUfication stands at the 90 % that the paper states). Circles: base (grey), CATS-50 (blue), CATS-70 (green), "
    "CATS-90 (orange), CATS at ReLUfication's own sparsity (purple); diamond: ReLUfication. Bars: one standard error.",
    "e03_curves": "Mean zero-shot accuracy against LoRA steps, as in the paper's Figure 2: ours (line: mean over seeds, band: "
    "lowest to highest seed) and, in the same colours, the paper's; dashed: the paper's base model before fine-tuning.",
    "e03_sparsity": "Sparsity left after fine-tuning (the paper's Figure 5). Dotted: targets. Filled circles: thresholds as "
    "fixed before training; open squares: recalibrated after it. Right: means over layers, beside the paper's (diamonds).",
    "e04_tasks": "Accuracy after task fine-tuning, as the difference to the base model fine-tuned in the same way. "
    "Bars up to zero lose nothing. Error bars: one standard error of the difference, unpaired.",
    "e05_latency": "Latency of one MLP block against sparsity at batch 1, cold cache, as in the paper's Figure 3; bands from the "
    "20th to the 80th percentile. “Optimal” is the paper's: all three matrices shrunk, which no kernel that must read "
    "W_gate can reach; the dotted bytes bound is what such a kernel can reach at the measured read bandwidth.",
    "e05_speedup": "The same as ratios to dense, the form in which machines compare. Dashed: the paper's kernel on its L40S in "
    "float32. Dotted: 3 / (1 + 2 (1 - s)), the bytes of dense over the bytes that CATS reads at sparsity s.",
    "e05_ablation": "The paper's Figure 6 as ratios to dense: fused with a mask (the paper's choice), fused with a "
    "compacted index, neither. Higher is faster; last row: the paper's own measurements.",
    "e05_rows": "Speed-up over dense for several rows at once; sparsity is that of each row, so that the rows' union is "
    "denser. Below the grey line dense is faster.",
    "e06_throughput": "Generated tokens per second at batch 1, prefill apart, as in the paper's Figure 4. Plain bars: eager loop, "
    "hatched: compiled. Above each CATS bar: its ratio to dense in the same loop.",
    "e06_ratio": "The same as ratios to dense (bars begin at 1), beside the paper's on its L40S.",
    "e06_growth": "Speed-up of generation against what may grow: context, batch, sparsity, layers; the other "
    "conditions are fixed. A cross marks where CATS no longer pays.",
    "e06_shares": "Where the time of one decoded token goes in the dense model; only the MLP's share can be sped up.",
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
    return blocks + _appendix(runs)


def _claims(runs: list[Run], judged: pd.DataFrame) -> list[Block]:
    count = judged["verdict"].value_counts()
    said = ", ".join(f"{count.get(verdict, 0)} {verdict}" for verdict in (REPRODUCED, NOT_REPRODUCED, NOT_TESTED))
    several = len(runs) > 1
    where = f"{len(runs)} runs" if several else f"the run *{escape(runs[0].label)}*"
    intro = (
        f"The paper's claims, judged on {where} by rules that are code (listed below). One row is one claim on one model or "
        f"condition: {said}. Accuracies are fractions; “points” are hundredths of them; SE is one standard error; "
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
        Table(pd.DataFrame(rules), "The rules that give the verdicts, fixed before the measurements.", (4, 90)),
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
            Table(tables.zero_shot(table, model), f"{name}: zero-shot accuracy in the layout of the paper's Table 1, ± one "
                  "standard error (lm-eval's; of the mean: tasks independent)."),
            Table(tables.zero_shot_paper(model), "The paper's Table 1."),
            Table(tables.zero_shot_summary(table, model), f"{name}: sparsity, mean accuracy and perplexity on held-out text. "
                  "The change against base is paired over the same items. “CATS at ReLU's sparsity” is the matched "
                  "comparison that the paper leaves out."),
        ]  # fmt: skip
    return blocks


def _e03(run: Run) -> list[Block]:
    blocks: list[Block] = []
    if (table := run.table("e03_finetuning")) is not None:
        for model in table["model"].unique():
            caption = f"{escape(model)}: mean accuracy at the evaluated steps, mean over seeds ± one standard error (items and "
            blocks.append(Table(tables.finetuning(table, model), f"{caption}seeds)."))
    if (table := run.table("e03_sparsity")) is not None:
        for model in table["model"].unique():
            caption = f"{escape(model)}: sparsity left at the last step, mean over layers and seeds, beside the paper's Figure 5."
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
    return blocks


def _e07(run: Run) -> list[Block]:
    table = run.tables["e07_attention"]
    blocks: list[Block] = []
    for model in table["model"].unique():
        caption = f"{escape(model)}: CATS on the attention and MLP inputs too (eq. 7) beside CATS on the MLP alone. The paper, "
        caption += "Mistral-7B after fine-tuning: 0.6684, MLP alone 0.6921, base 0.6994."
        blocks += [
            Table(tables.zero_shot_summary(table, model).drop(columns="Perplexity").pipe(_without_paper), caption),
            Table(tables.zero_shot(table, model), f"{escape(model)}: the same by task, ± one standard error."),
        ]
    return blocks


def _without_paper(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[[column for column in frame if not str(column).endswith("(paper)")]]


TABLES_OF: dict[str, Callable[[Run], list[Block]]] = {
    "e01": _e01, "e02": _e02, "e03": _e03, "e04": _e04, "e05": _e05, "e06": _e06, "e07": _e07,
}  # fmt: skip


def machine(run: Run) -> str:
    """The machine in words: the GPU where one was used, else the processor."""
    for name in ("e06_throughput", "e05_mlp_latency"):
        if name in run.tables:
            return str(run.tables[name]["machine"].iloc[0])
    for entry in run.provenance.values():
        hardware = entry.get("hardware")
        if isinstance(hardware, dict) and (hardware.get("gpus") or hardware.get("cpu")):
            gpus = hardware.get("gpus") or []
            return ", ".join(gpus) if gpus else f"{hardware['cpu']}, {hardware.get('cores', '?')} cores"
        if isinstance(hardware, str):
            return hardware
    return "unknown machine"


def commit(entry: dict[str, Any]) -> str:
    """`0123456789`, and whether the tree had changes that were not committed."""
    name = str(entry.get("commit") or "unknown")[:10]
    return name + (", with uncommitted changes" if entry.get("dirty") else "")


def provenance_line(run: Run, experiment: str) -> str:
    """When, how long, from which commit: one paragraph."""
    entry = run.provenance.get(experiment)
    if entry is None:
        return "Provenance: none recorded for this experiment."
    seconds = entry.get("seconds")
    took = style.duration(float(seconds)) if isinstance(seconds, int | float) else "an unknown time"
    said = [f"measured {escape(str(entry.get('started', 'at an unknown time')))}", f"took {took}"]
    said.append(f"commit {escape(commit(entry))}")
    said += [
        f"{key.replace('_', ' ')} {escape(str(entry[key]))}"
        for key in ("seed", "model_hash", "data_hash")
        if entry.get(key) not in (None, "")
    ]
    torch = (entry.get("versions") or {}).get("torch")
    return f"Provenance: {', '.join(said)}" + (f", torch {escape(str(torch))}." if torch else ".")


def _appendix(runs: list[Run]) -> list[Block]:
    blocks: list[Block] = [Heading(1, "Appendix"), Heading(2, "Machines and versions")]
    for run in runs:
        rows = _facts(run)
        caption = f"{escape(run.label)}: hardware, versions and settings, as recorded with the measurements."
        blocks.append(
            Table(pd.DataFrame(rows), caption, (22, 78)) if rows else Text(f"{escape(run.label)}: no provenance.")
        )
    blocks += [Heading(2, "Missing pieces"), *_missing(runs)]
    if LOG.exists():
        blocks += [Heading(2, "Log of what was tried"), Text(_demote(LOG.read_text(encoding="utf-8")))]
    return blocks


def _facts(run: Run) -> list[dict[str, str]]:
    """Facts that all experiments share once; those that differ once per experiment."""
    by_key: dict[str, dict[str, list[str]]] = {}
    for experiment, entry in run.provenance.items():
        for key, value in entry.items():
            text = _plain(value)
            if key not in ("tables",) and text:
                by_key.setdefault(key, {}).setdefault(text, []).append(experiment)
    rows = []
    for key, values in by_key.items():
        for text, experiments in values.items():
            everywhere = len(experiments) == len(run.provenance)
            where = "" if everywhere else f" ({', '.join(experiments)})"
            rows.append({"What": escape(key.replace("_", " ")) + where, "Recorded": escape(text)})
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key} {_plain(inner)}" for key, inner in value.items() if inner not in (None, "", [], {}))
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return "" if value is None else str(value)


def _missing(runs: list[Run]) -> list[Block]:
    rows = []
    for run in runs:
        for name in TABLES:
            if name in run.tables:
                continue
            why = f"broken: {run.problems[name]}" if name in run.problems else "not measured here"
            rows.append({"Run": escape(run.label), "Table": escape(f"{name}.csv"), "Why": escape(why),
                         "Command": f"`{command(name[:3])}`"})  # fmt: skip
        if "provenance" in run.problems:
            rows.append(
                {
                    "Run": escape(run.label),
                    "Table": "provenance.json",
                    "Why": escape(run.problems["provenance"]),
                    "Command": "",
                }
            )
    if not rows:
        return [Text("None: every table of every run is there and readable.")]
    return [Table(pd.DataFrame(rows), "Tables that are not in these runs.", (14, 20, 40, 26))]


def _demote(markdown: str) -> str:
    """The log's headings three levels down, outside code blocks, its own title dropped."""
    out, code = [], False
    for line in markdown.splitlines():
        code ^= line.startswith("```")
        if not code and line.startswith("# "):
            continue
        out.append(re.sub(r"^(#+) ", r"##\1 ", line) if not code else line)
    return "\n".join(out).strip()
