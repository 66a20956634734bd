"""Made-up results and samples, built from the experiments' row types, for the tests of the report.

No number here was measured. Run `python -m tests.make_results DIR` to look at a report drawn from them.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.framework.tables import (
    CriterionRow,
    QuantizationRow,
    QuantizationTextSample,
    QuantizationThroughputRow,
    Row,
    file_name,
    pack_numbers,
    row_types,
)
from reports.core.load import Run
from reports.core.section import discover
from reports.core.section import row_types as read_types
from tests.make_accuracy import TASKS, blocks, histogram, items, thresholds, with_item_values, zero_shot
from tests.make_finetuning import (
    attention,
    attention_blocks,
    attention_items,
    finetuned_sparsity,
    finetuning,
    finetuning_items,
    sweep,
    task_finetuning,
    task_items,
    task_sweep,
)
from tests.make_timings import (
    amdahl,
    criterion_speed,
    frame,
    greedy,
    latency,
    quantization_speed,
    rounds,
    shares,
    throughput,
)


def criterion_row(
    name: str, level: float | None, ratio: float, scope: str = "mlp", on_target: bool | None = True,
    error: float = 0.01, model: str = "a/model",
) -> CriterionRow:  # fmt: skip
    """One criterion of e08 whose perplexity is `ratio` times the dense model's, and CATS's 1.2 times."""
    dense = level is None
    skipped = level or 0.0
    return CriterionRow(
        model, name, name if dense else f"{name}-{100 * skipped:g}", scope, "dense masked", level,
        None if dense else skipped + 0.02 * (not on_target), None if dense else on_target, None, 1 - 2 * skipped / 3,
        1 - skipped / 3, "heldout_text", "perplexity", 20 * ratio, None, math.log(ratio), error,
        None if dense else math.log(ratio / 1.2), 0.01, 48, None,
    )  # fmt: skip


def criteria() -> pd.DataFrame:
    """e08: CATS, a made-up criterion, one that skips inputs and misses its target, and one that destroys the model."""
    rows = [criterion_row("dense", None, 1.0)]
    for level in (0.3, 0.5, 0.7):
        rows += [
            criterion_row("cats", level, 1.2),
            criterion_row("made-up", level, 1.1),
            criterion_row("random", level, 300.0),
        ]
        rows.append(criterion_row("teal", level, 1.05, "model", False))
    return frame(rows)


def criterion_accuracy(name: str, level: float | None, change: float, error: float = 0.001) -> CriterionRow:
    """The accuracy of one criterion of e08 on its one task, `change` from the dense model's 0.5."""
    row = asdict(criterion_row(name, level, 1.0))
    changed = {"task": TASKS[0], "metric": "acc", "value": 0.5 + change, "stderr": 0.01, "difference": change,
               "difference_stderr": error, "chance": 0.25, "items": 1000}  # fmt: skip
    return CriterionRow(**{**row, **changed})


def quantization(interaction: float = 0.0, noise: float = 1e-3) -> dict[str, pd.DataFrame]:
    """e09: two formats at two levels, whose damages add up but for a share ``interaction`` of their sum; and speeds."""
    generator = np.random.default_rng(0)
    base = 2.0 + 0.1 * generator.standard_normal(48)
    formats = {"none": (None, None, 1.0, 0.0), "int8-row": (8, None, 0.501, 0.01), "int4-128": (4, 128, 0.266, 0.08)}
    rows, blocks = [], []
    for name, (bits, group, memory, damage) in formats.items():
        for level, skipped in ((None, 0.0), (0.5, 0.05), (0.7, 0.3)):
            both = damage > 0 and level is not None
            increase = (damage + skipped) * (1 + interaction * both)
            nats = base + increase + noise * generator.standard_normal(48) * bool(increase)
            variant, criterion = ("dense", "dense") if level is None else (f"cats-{100 * level:g}", "cats")
            rows.append(QuantizationRow(
                "a/model", name, bits, group, criterion, variant, "dense masked", level, level,
                memory * (1 - 2 * (level or 0.0) / 3), memory, "heldout_text", "perplexity", math.exp(nats.mean()),
                None, nats.mean() - base.mean(), 0.001, nats.mean() - base.mean() - damage, 0.001, 48, None,
            ))  # fmt: skip
            blocks.append(QuantizationTextSample("a/model", name, criterion, variant, 128, pack_numbers(nats)))
    made = {"e09_quantization": frame(rows), "e09_blocks": frame(blocks), "e09_speed": quantization_speed()}
    return {**made, "e09_generation": quantization_generation()}


def quantization_generation() -> pd.DataFrame:
    """Generation of e09: 100 tokens/s dense in bfloat16, 300 in int4; CATS-50 1.2 times that, 1.5 in int4."""
    rows = []
    for name, bits, group, gigabytes, rates in (
        ("none", None, None, 14.5, {"dense": 100.0, "cats-50": 120.0}),
        ("int4-128", 4, 128, 6.0, {"dense": 300.0, "cats-50": 450.0}),
    ):
        for (variant, rate), prompt, repeat in itertools.product(rates.items(), range(2), range(2)):
            target = None if variant == "dense" else 0.5
            rate *= 1 + 0.01 * repeat
            rows.append(QuantizationThroughputRow(
                "Imaginary GPU", "a/model", "random", 32, 32, "bfloat16", None, "cats", name, bits, group,
                variant.partition("-")[0], variant, "sparse kernel" if target else "dense", target, target,
                "graph-tuned", prompt, repeat, 64, 256, 0.1, 255 / rate, rate, 30.0, int(1.05e9 * gigabytes),
                int(1e9 * gigabytes),
            ))  # fmt: skip
    return frame(rows)


def all_tables() -> dict[str, pd.DataFrame]:
    """Every table once, samples included."""
    accuracy, tuned, speed = with_item_values(zero_shot()), finetuning(), latency(rows=(1, 4))
    tasks, wide = task_finetuning(), with_item_values(attention())
    return {
        "e01_histogram": histogram(),
        "e01_thresholds": thresholds(),
        "e02_zero_shot": accuracy,
        "e02_items": items(accuracy),
        "e02_blocks": blocks(accuracy),
        "e03_finetuning": tuned,
        "e03_items": finetuning_items(tuned),
        "e03_sparsity": finetuned_sparsity(),
        "e03_sweep": sweep(),
        "e04_sweep": task_sweep(),
        "e04_task_finetuning": tasks,
        "e04_items": task_items(tasks),
        "e05_mlp_latency": speed,
        "e05_rounds": rounds(speed),
        "e06_throughput": throughput(),
        "e06_shares": shares(),
        "e06_amdahl": amdahl(),
        "e06_greedy": greedy(),
        "e07_attention": wide,
        "e07_items": attention_items(wide),
        "e07_blocks": attention_blocks(wide),
        "e08_criteria": criteria(),
        "e08_speed": frame([criterion_speed("cats", 0.5, 1.2), criterion_speed("cats", 0.5, 1.4, "mlp")]),
        **quantization(),
    }


def provenance() -> dict[str, object]:
    """What the runner writes beside the tables, made up."""
    return {
        "profile": "pocket",
        "experiments": {
            f"e{i:02d}": {
                "commit": "0123456789abcdef0123456789abcdef01234567",
                "dirty": {3: True, 4: "unknown"}.get(i, False),
                "argv": ["run", f"e{i:02d}"],
                "versions": {"python": "3.12.0", "torch": "2.11.0", "transformers": "5.17.0"},
                "hardware": {"machine": "made-up machine", "cpu": "Imaginary CPU", "cores": 2, "memory_gib": 24},
                "seed": 0,
                "models": {"made-up": {"weights": "f" * 64}},
                "data": {"source": "made-up", "sha256": "e" * 64},
                "started": f"2001-01-0{i}T00:00:00+00:00",
                "seconds": 61.5 * i,
            }
            for i in range(1, 10)
        },
    }


def loaded(**tables: pd.DataFrame) -> Run:
    """A run that holds these tables, for rules and figures."""
    return Run("made-up", Path(), tables)


def write_table(folder: Path, name: str, table: pd.DataFrame) -> None:
    """A table as its experiment would write it; a name that no row type has becomes a plain CSV."""
    known = row_types().get(name)
    file = folder / (file_name(known) if known else f"{name}.csv")
    file.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(file, index=False)


def write_run(folder: Path, tables: dict[str, pd.DataFrame] | None = None, flat: bool = False) -> Path:
    """A run directory of these tables (default: all); `flat` puts the CSVs directly inside."""
    inside = folder if flat else folder / "results"
    for name, table in (all_tables() if tables is None else tables).items():
        write_table(inside, name, table)
    (folder / "provenance.json").write_text(json.dumps(provenance()), encoding="utf-8")
    return folder


def text_of(run: Path) -> str:
    """The report in Markdown."""
    return (run / "report.md").read_text(encoding="utf-8")


def judged(run: Path) -> pd.DataFrame:
    """The verdicts on the claims."""
    return pd.read_csv(run / "claims.csv", keep_default_na=False)


def types_read() -> list[type[Row]]:
    """The row types that the report's sections read."""
    return read_types(discover())


if __name__ == "__main__":
    write_run(Path(sys.argv[1]))
