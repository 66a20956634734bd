"""The paper's protocol beside what a run did, read off its tables and provenance: deviations are seen at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd

from reports import style
from reports.document import escape
from reports.load import Run

Told = Callable[[Run, pd.DataFrame], str]


def _values(column: str, digits: int = 0) -> Told:
    """The distinct values of a column."""

    def told(run: Run, table: pd.DataFrame) -> str:
        values = table[column].dropna().unique()
        if table[column].dtype == float:
            return ", ".join(f"{value:.{digits}f}" for value in sorted(values))
        return ", ".join(dict.fromkeys(style.task_name(style.dtype_name(str(value))) for value in values))

    return told


def _span(column: str) -> Told:
    def told(run: Run, table: pd.DataFrame) -> str:
        low, high = table[column].min(), table[column].max()
        return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"

    return told


def _option(experiment: str, *names: str) -> Told:
    """Options of the profile, as recorded."""

    def told(run: Run, table: pd.DataFrame) -> str:
        entry = run.provenance.get(experiment, {})
        settings: dict[str, Any] = entry.get("settings") or {}
        options = settings.get("options") or {}
        source = (settings.get("data") or {}).get("source")
        wanted = names or tuple(options)
        said = [f"{name.replace('_', ' ')} {options[name]}" for name in wanted if name in options]
        return "; ".join(([f"text: {source}"] if source else []) + said)

    return told


def _zero_shot_items(run: Run, table: pd.DataFrame) -> str:
    part = table[table["metric"] == "acc"]
    return f"{part['task'].nunique()} tasks: {_values('task')(run, part)}; {_span('items')(run, part)} items each"


def _steps(run: Run, table: pd.DataFrame) -> str:
    part = table[table["accuracy"].notna()]
    rates = ", ".join(f"{rate:g}" for rate in sorted(part["learning_rate"].dropna().unique()))
    return f"steps {_values('step')(run, part)}; {part['seed'].nunique()} seeds; learning rate {rates}"


def _timing(run: Run, table: pd.DataFrame) -> str:
    return "; ".join(
        filter(None, [f"{_span('rounds')(run, table)} rounds, geometric mean", _option("e05")(run, table)])
    )


PROTOCOL: dict[str, tuple[str, list[tuple[str, str, Told]]]] = {
    "e01": ("e01_thresholds", [
        ("models", "Llama2-7B, Mistral-7B", _values("model")),
        ("calibration", "500 samples of RefinedWeb (the authors' code: 100)", _option("e01")),
    ]),
    "e02": ("e02_zero_shot", [
        ("models", "Mistral-7B, Llama2-7B (13B: averages)", _values("model")),
        ("tasks", "openbookqa, arc_easy, winogrande, hellaswag, arc_challenge, piqa, boolq, sciq; lm-eval's acc, "
         "0-shot, all items", _zero_shot_items),
        ("calibration", "500 samples of RefinedWeb", _option("e02")),
    ]),
    "e03": ("e03_finetuning", [
        ("models", "Mistral-7B, Llama2-7B", _values("model")),
        ("training", "RefinedWeb; LoRA on 1 % of the parameters (query, key, gate, down); bfloat16, 8 x L40S, batch 16",
         _option("e03")),
        ("evaluation", "every 250 steps from 350 to 2600, eight tasks, one seed", _steps),
    ]),
    "e04": ("e04_task_finetuning", [
        ("models", "Mistral-7B", _values("model")),
        ("tasks", "CoLA, SST-2, BoolQ", _values("task")),
        ("training", "10 epochs (the authors' script: 1)", _option("e04")),
        ("items", "the tasks' validation sets", _span("items")),
    ]),
    "e05": ("e05_mlp_latency", [
        ("machine", "one L40S", _values("machine")),
        ("shapes", "Mistral-7B 4096 x 14336, Llama2-7B 4096 x 11008", _values("shape")),
        ("dtype", "float32", _values("dtype")),
        ("timing", "20 warm-ups, 80 rounds, geometric mean, 256 MB cleared between rounds",
         _timing),
    ]),
    "e06": ("e06_throughput", [
        ("machine", "one L40S", _values("machine")),
        ("model", "Mistral-7B and Llama2-7B, whole (32 layers)",
         lambda run, table: f"{_values('model')(run, table)}; layers: {_values('layers')(run, table)}"),
        ("dtype, loop", "float32, eager generate",
         lambda run, table: f"{_values('dtype')(run, table)}; {_values('loop')(run, table)}"),
        ("prompts", "50 of RefinedWeb, batch 1",
         lambda run, table: f"{table['prompt'].nunique()}, of {_values('prompt_tokens')(run, table)} tokens; "
         f"batch {_values('batch')(run, table)}"),
        ("generated tokens", "256, 512, 1024, 2048", _values("generated_tokens")),
    ]),
    "e07": ("e07_attention", [
        ("models", "Mistral-7B, after 2000 batches of 16 of general fine-tuning", _values("model")),
        ("tasks", "the eight of Table 1", _zero_shot_items),
        ("training", "as for Figure 2", _option("e07")),
    ]),
}  # fmt: skip


def protocol(experiment: str, runs: list[Run]) -> pd.DataFrame:
    """A row an aspect: the paper's, then each run's."""
    name, aspects = PROTOCOL[experiment]
    rows = []
    for aspect, paper, told in aspects:
        cells = {"": aspect, "The paper": escape(paper)}
        for run in runs:
            said = told(run, run.tables[name]) if name in run.tables else ""
            cells[escape(run.label)] = escape(said) or "not recorded"
        rows.append(cells)
    return pd.DataFrame(rows)
