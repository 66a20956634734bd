"""The paper's protocol beside what a run did, read off its tables and provenance: deviations are seen at once."""

from __future__ import annotations

from collections.abc import Callable
from string import Formatter
from typing import Any

import pandas as pd

from reports import style
from reports.document import escape
from reports.load import Run
from reports.stats import generation_speedups, throughput_conditions

Told = Callable[[Run, pd.DataFrame], str]


def _values(column: str) -> Told:
    """The distinct values of a column; numbers are whole ones."""

    def told(run: Run, table: pd.DataFrame) -> str:
        values = table[column].dropna().unique()
        if table[column].dtype == float:
            return ", ".join(f"{value:.0f}" for value in sorted(values))
        names = (style.model_name(style.task_name(style.dtype_name(str(value)))) for value in values)
        return ", ".join(dict.fromkeys(names))

    return told


def _span(column: str) -> Told:
    def told(run: Run, table: pd.DataFrame) -> str:
        low, high = table[column].min(), table[column].max()
        return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"

    return told


def _options(run: Run, experiment: str) -> dict[str, Any]:
    """The options of the profile, as recorded, and where the text came from (`source`)."""
    settings: dict[str, Any] = run.provenance.get(experiment, {}).get("settings") or {}
    data = settings.get("data") or {}
    return {"source": data.get("path") or data.get("source"), **(settings.get("options") or {})}


def _phrases(experiment: str, *phrases: str) -> Told:
    """Phrases with the options filled in, `{length} tokens`; those whose options were not recorded are left out."""

    def told(run: Run, table: pd.DataFrame) -> str:
        options = {name: style.listed(value) for name, value in _options(run, experiment).items()}
        wanted = [(phrase, [name for _, name, _, _ in Formatter().parse(phrase) if name]) for phrase in phrases]
        return "; ".join(phrase.format(**options) for phrase, names in wanted if all(options.get(n) for n in names))

    return told


def _zero_shot_items(run: Run, table: pd.DataFrame) -> str:
    part = table[table["metric"] == "acc"]
    return f"{part['task'].nunique()} tasks: {_values('task')(run, part)}; {_span('items')(run, part)} items each"


def _steps(run: Run, table: pd.DataFrame) -> str:
    part = table[table["accuracy"].notna()]
    rates = ", ".join(f"{rate:g}" for rate in sorted(part["learning_rate"].dropna().unique()))
    items = f"{part['task'].nunique()} tasks of {_span('items')(run, part)} items"
    return f"steps {_values('step')(run, part)}; {items}; {part['seed'].nunique()} seeds; learning rate {rates}"


def _task_rates(run: Run, table: pd.DataFrame) -> str:
    swept = len(_options(run, "e04").get("learning_rates", ())) > 1
    best = "the best of {learning_rates} on {sweep_items} items, swept for CATS and ReLUfication"
    return _phrases("e04", best if swept else "{learning_rates}")(run, table)


def _seeds(run: Run, table: pd.DataFrame) -> str:
    return str(table["seed"].nunique())


def _optimal(run: Run, table: pd.DataFrame) -> str:
    part = table[table["implementation"] == "optimal-all-three-shrunk"]
    widths = (part["m"] * (1 - part["sparsity"])).round()
    return "the same, to a multiple of 128" if (widths % 128 == 0).all() else "the same; odd widths are slow on a GPU"


def _weights(run: Run, table: pd.DataFrame) -> str:
    """Models named `shape:...` have random weights, and no tokenizer: their prompts and calibration are random too."""
    models = [str(name) for name in (run.provenance.get("e06", {}).get("settings") or {}).get("models", [])]
    random = [name.startswith("shape:") for name in models]
    if not any(random):
        return "the models' own" if models else ""
    return "random, and random tokens for prompts and calibration" + ("" if all(random) else " (shape: models)")


def _shapes(run: Run, table: pd.DataFrame) -> str:
    sizes = table[["shape", "d", "m"]].drop_duplicates().itertuples(index=False)
    return ", ".join(f"{shape} {d:.0f} x {m:.0f}" for shape, d, m in sizes)


def _figure_4(run: Run, table: pd.DataFrame, what: str) -> str:
    """`what` with the layers and prompts of Figure 4's rows filled in; what grows beside them is not meant."""
    fixed = throughput_conditions(generation_speedups(table))
    names = ("model", "layers", "prompts", "prompt_tokens")
    fixed = fixed.astype({"prompts": float})
    return "" if fixed.empty else what.format(**{name: _values(name)(run, fixed) for name in names})


CALIBRATION = ("{calibration_blocks} blocks of {length} tokens, text: {source}",)
TRAINING = (
    "LoRA with the {lora}'s settings",
    "batch {train_batch_size}",
    "weight decay {weight_decay}",
    "{warmup_steps} warm-up steps",
)

PROTOCOL: dict[str, tuple[str, list[tuple[str, str, Told]]]] = {
    "e01": ("e01_thresholds", [
        ("models", "Llama2-7B, Mistral-7B", _values("model")),
        ("calibration", "500 samples of RefinedWeb (the authors' code: 100)",
         _phrases("e01", "{blocks} blocks of {length} tokens, text: {source}")),
    ]),
    "e02": ("e02_zero_shot", [
        ("models", "Mistral-7B, Llama2-7B (13B: averages)", _values("model")),
        ("tasks", "openbookqa, arc_easy, winogrande, hellaswag, arc_challenge, piqa, boolq, sciq; lm-eval's acc, "
         "0-shot, all items", _zero_shot_items),
        ("calibration", "500 samples of RefinedWeb", _phrases("e02", *CALIBRATION)),
    ]),
    "e03": ("e03_finetuning", [
        ("models", "Mistral-7B, Llama2-7B", _values("model")),
        ("training", "RefinedWeb; LoRA on 1 % of the parameters (query, key, gate, down); bfloat16, 8 x L40S, batch 16",
         _phrases("e03", *TRAINING, "sequences of {length} tokens, text: {source}")),
        ("learning rate", "1e-5 (the authors' code)",
         _phrases("e03", "the best of {learning_rates} at {sweep_steps} steps, swept for CATS and ReLUfication")),
        ("evaluation", "every 250 steps from 350 to 2600, eight tasks, one seed", _steps),
    ]),
    "e04": ("e04_task_finetuning", [
        ("models", "Mistral-7B", _values("model")),
        ("tasks", "CoLA, SST-2, BoolQ", _values("task")),
        ("training", "10 epochs (the authors' script: 1)",
         _phrases("e04", "epochs: {epochs}, of {train_items} items", *TRAINING)),
        ("learning rate", "1e-5 (the authors' code)",
         _task_rates),
        ("seeds", "one", _seeds),
        ("calibration", "1000 samples of the task (the authors' code)",
         _phrases("e04", "{calibration_items} items of the task")),
        ("items", "the tasks' validation sets", _span("items")),
    ]),
    "e05": ("e05_mlp_latency", [
        ("machine", "one L40S", _values("machine")),
        ("shapes", "Mistral-7B 4096 x 14336, Llama2-7B 4096 x 11008", _shapes),
        ("dtype", "float32", _values("dtype")),
        ("weights", "random, uniform in [-0.5, 0.5] (the authors' code)",
         lambda run, table: "random, normal with variance 1 / fan-in; thresholds are quantiles of their activations"),
        ("“Optimal”", "dense with m (1 - s) neurons", _optimal),
        ("timing", "20 warm-ups, 80 rounds, geometric mean, 256 MB cleared between rounds",
         _phrases("e05", "{warmups} warm-ups", "{rounds} rounds, interleaved", "geometric mean", "cold cache")),
    ]),
    "e06": ("e06_throughput", [
        ("machine", "one L40S", _values("machine")),
        ("model", "Mistral-7B and Llama2-7B, whole (32 layers)",
         lambda run, table: _figure_4(run, table, "{model}; layers: {layers}")),
        ("dtype, loop", "float32, eager generate",
         lambda run, table: f"{_values('dtype')(run, table)}; {_values('loop')(run, table)}"),
        ("attention", "",
         _phrases("e06", "{attention}", "inductor's dependent launches in the graph loop: {dependent_launch}")),
        ("weights", "the models' own", _weights),
        ("prompts", "50 of RefinedWeb, batch 1",
         lambda run, table: _figure_4(run, table, "{prompts} of {prompt_tokens} tokens, batch 1")),
        ("generated tokens", "256, 512, 1024, 2048", _values("generated_tokens")),
    ]),
    "e07": ("e07_attention", [
        ("models", "Mistral-7B, after 2000 batches of 16 of general fine-tuning", _values("model")),
        ("tasks", "the eight of Table 1", _zero_shot_items),
        ("calibration", "as for Table 1", _phrases("e07", *CALIBRATION)),
        ("training", "as for Figure 2", _phrases("e07", "{steps} steps of general fine-tuning")),
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
            cells[escape(run.label)] = escape(said) or style.DASH
        rows.append(cells)
    return pd.DataFrame(rows)
