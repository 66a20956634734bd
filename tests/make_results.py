"""Made-up results and samples, built from the experiments' row types, for the tests of the report.

No number here was measured. Run `python -m tests.make_results DIR` to look at a report drawn from them.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.framework.tables import (
    AttentionRow,
    AttentionSample,
    AttentionTextSample,
    CriterionRow,
    FinetuningRow,
    FinetuningSample,
    HistogramRow,
    ItemSample,
    QuantizationRow,
    QuantizationTextSample,
    QuantizationThroughputRow,
    Row,
    SparsityRow,
    SweepRow,
    TaskFinetuningRow,
    TaskFinetuningSample,
    TaskSweepRow,
    TextSample,
    ThresholdRow,
    ZeroShotRow,
    file_name,
    pack_flags,
    pack_numbers,
    row_types,
)
from reports.core.load import Run
from reports.core.section import discover
from reports.core.section import row_types as read_types
from tests.make_timings import (
    NAN,
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

ACCURACY = {
    "dense": 0.70,
    "cats-50": 0.69,
    "cats-70": 0.67,
    "cats-90": 0.50,
    "cats-matched": 0.52,
    "relufication": 0.40,
}
TARGET = {"dense": None, "cats-50": 0.5, "cats-70": 0.7, "cats-90": 0.9, "cats-matched": 0.88, "relufication": None}
TASKS = [
    "next_line",
    "docstring",
    "attribute_of_import",
    "keyword",
    "exception",
    "name_in_scope",
    "belongs",
    "operator",
]
ITEMS = 500
OTHER_SITES = {"attention_input": 0.498, "mlp_input": 0.499}
PERPLEXITY = {"dense": 10, "cats-50": 10.1, "cats-70": 12, "cats-90": 30, "cats-matched": 28, "relufication": 20}
BLOCKS = 64


def criterion(variant: str) -> str:
    """`gate-norm-50` -> `gate-norm`."""
    plain = variant.removesuffix("-finetuned").removesuffix("-attention")
    return plain if plain in ("dense", "relufication") else plain.rsplit("-", 1)[0]


def level(variant: str) -> float | None:
    """The target that a variant's name gives."""
    plain = variant.removesuffix("-finetuned").removesuffix("-attention")
    return TARGET[plain] if plain in TARGET else int(plain.rsplit("-", 1)[1]) / 100


def path(variant: str) -> str:
    """What runs on the accuracy path."""
    return "dense" if variant == "dense" else "dense masked"


def bits(share: float, count: int = ITEMS) -> str:
    """Items answered correctly, the wrong ones last, so that two variants differ in as few items as possible."""
    right = round(share * count)
    return pack_flags([1] * right + [0] * (count - right))


def histogram(
    model: str = "made-up", scale: float = 0.05, layers: Sequence[int] = (0, 2, 4), control: float | None = 2.0
) -> pd.DataFrame:
    """Activations in 400 bins over [0, 20 scale]: exponential ones of mean `scale`, raised to a power for a tail.

    `control` spreads the random weights' activations evenly over [0, control * scale]; None leaves the control out.
    """
    edges = np.linspace(0, 20 * scale, 401)
    mass = np.diff(-np.exp(-edges / scale)) * 1e6
    counts = {"pretrained": mass.round()}
    if control is not None:
        inside = np.clip(control * scale - edges[:-1], 0, np.diff(edges))
        counts["random"] = (1e6 * inside / inside.sum()).round()
    return frame(
        HistogramRow(model, weights, f"model.layers.{layer}.mlp", layer, left, right, count)
        for weights, of in counts.items()
        for layer in layers
        for left, right, count in zip(edges[:-1], edges[1:], of, strict=True)
    )


def thresholds(model: str = "made-up", scale: float = 0.05, layers: int = 5) -> pd.DataFrame:
    """The exponential's own quantiles."""
    return frame(
        ThresholdRow(
            *(model, "pretrained", "cats", f"model.layers.{i}.mlp", i, s, -np.log(1 - s) * scale, s),
            sparsity_heldout=s + 0.004 * (i - 2),
        )
        for i in range(layers)
        for s in (0.5, 0.7, 0.9)
    )


def measured_sparsity(variant: str) -> float:
    """Close to the target."""
    return {"relufication": 0.88, "dense": 0.0}.get(variant, (level(variant) or 0) + 0.003)


def zero_shot(
    model: str = "made-up", accuracy: dict[str, float] | None = None, stderr: float = 0.02,
    perplexity: dict[str, float] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Eight tasks around the given means (their mean is exact), and held-out perplexity."""
    accuracy, perplexity = accuracy or ACCURACY, PERPLEXITY if perplexity is None else perplexity
    rows = []
    for variant, mean in accuracy.items():
        common = {
            "model": model, "criterion": criterion(variant), "variant": variant, "path": path(variant),
            "sparsity_target": level(variant), "sparsity_measured": measured_sparsity(variant),
        }  # fmt: skip
        error = NAN if variant == "dense" else stderr / 2
        change = 0.0 if variant == "dense" else mean - accuracy["dense"]
        for task, offset in zip(TASKS, np.linspace(-0.1, 0.1, len(TASKS)), strict=True):
            rows.append(
                ZeroShotRow(**common, task=task, metric="acc", value=mean + offset, stderr=stderr, difference=change,
                            difference_stderr=error, items=ITEMS, chance=0.3)
            )  # fmt: skip
        if variant in perplexity:
            ratio = math.log(perplexity[variant] / perplexity["dense"])
            rows.append(
                ZeroShotRow(**common, task="heldout_text", metric="perplexity", value=perplexity[variant],
                            difference=ratio, difference_stderr=0.001, items=20000)
            )  # fmt: skip
    return frame(rows)


def items(table: pd.DataFrame) -> pd.DataFrame:
    """Samples that go with `zero_shot`: each task's share of items."""
    table = table[table["metric"] == "acc"]
    return frame(
        ItemSample(row["model"], row["criterion"], row["variant"], row["task"], bits(row["value"]))
        for row in table.to_dict("records")
    )


def with_item_values(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracies that whole items can have."""
    at = table["metric"] == "acc"
    return table.assign(value=table["value"].where(~at, (table["value"] * ITEMS).round() / ITEMS))


def blocks(table: pd.DataFrame, noise: float = 0.01) -> pd.DataFrame:
    """Losses of blocks that go with the perplexities of `zero_shot`."""
    table = table[table["metric"] == "perplexity"]
    text = np.linspace(-0.5, 0.5, BLOCKS)
    wave = noise * np.tile([1, -1], BLOCKS // 2)
    return frame(
        TextSample(row["model"], row["criterion"], row["variant"], 128,
                   pack_numbers(math.log(row["value"]) + text + (wave if row["variant"] != "dense" else 0)))
        for row in table.to_dict("records")
    )  # fmt: skip


FINAL = {"dense": 0.70, "cats-50": 0.70, "cats-70": 0.69, "cats-90": 0.62, "relufication": 0.55}
LOSS = {"dense": 1.30, "cats-50": 1.305, "cats-70": 1.35, "cats-90": 1.5, "relufication": 1.5}


def finetuning(
    model: str = "made-up", final: dict[str, float] | None = None, seeds: int = 3, spread: float = 0.004
) -> pd.DataFrame:
    """Curves from ACCURACY to `final`; seeds are `spread` apart, the same way for every variant but a tenth of it."""
    rows = []
    for variant, end in (final or FINAL).items():
        for seed in range(seeds):
            for step in (0, 50, 100, 200, 400):
                start = ACCURACY[variant]
                drift = spread * (seed - 1) * (1 if variant == "dense" else 1.1) if step else 0.0
                mean = start + (end - start) * (1 - 0.5 ** (step / 50)) + drift
                loss = LOSS[variant] + (400 - step) / 1000 + 0.0005 * seed * (variant != "dense")
                for task in TASKS[:4]:
                    rows.append(
                        FinetuningRow(model, criterion(variant), variant, seed, step, 1e-4, task, mean, 0.02, ITEMS,
                                      2 - step / 500 if step else None, loss)
                    )  # fmt: skip
    return frame(rows)


def finetuning_items(table: pd.DataFrame) -> pd.DataFrame:
    """Samples that go with `finetuning`."""
    return frame(
        FinetuningSample(*(row[name] for name in ("model", "criterion", "variant", "seed", "step", "task")),
                         bits(row["accuracy"]))
        for row in table.to_dict("records")
    )  # fmt: skip


def finetuned_sparsity(model: str = "made-up", drift: float = -0.03, layers: int = 5, seeds: int = 3) -> pd.DataFrame:
    """Every layer off its target by `drift` before recalibration, on it after; seeds 0.1 points apart."""
    return frame(
        SparsityRow(
            *(model, "cats", v, seed, 400, f"model.layers.{i}.mlp", i, TARGET[v]),
            sparsity_measured=TARGET[v] + (0 if again else drift + 0.01 * (i - 2) + 0.001 * (seed - 1)),
            recalibrated=again,
            accuracy_mean=0.69 + 0.002 * again,
        )
        for v in ("cats-50", "cats-70", "cats-90")
        for seed in range(seeds)
        for i in range(layers)
        for again in (False, True)
    )


def sweep(model: str = "made-up") -> pd.DataFrame:
    """Three learning rates each."""
    return frame(
        SweepRow(model, criterion(v), v, lr, 100, 2.0 + abs(np.log10(lr) + 3.5) / 9, lr == 3e-4)
        for v in ("dense", "cats-70", "relufication")
        for lr in (1e-4, 3e-4, 1e-3)
    )


def task_sweep(model: str = "made-up") -> pd.DataFrame:
    """Two learning rates for each task."""
    return frame(
        TaskSweepRow(model, criterion(v), v, task, lr, 16, 0.5 + lr, lr == 1e-4)
        for task in ("acceptability", "polarity", "yes_no")
        for v in ("cats-70", "relufication")
        for lr in (1e-4, 1e-3)
    )


TASK_ACCURACY = {"dense": 0.9, "cats-50": 0.898, "cats-70": 0.89, "cats-90": 0.85, "relufication": 0.72}


def task_finetuning(
    model: str = "made-up", accuracy: dict[str, float] | None = None, seeds: int = 3, stderr: float = 0.0005
) -> pd.DataFrame:
    """Three tasks; seeds differ by 0.1 points, the same way for every variant but a tenth of it."""
    return frame(
        TaskFinetuningRow(
            *(model, criterion(v), v, task, seed),
            accuracy=mean + offset + 0.001 * (seed - 1) * (1 if v == "dense" else 1.1),
            stderr=stderr,
            items=1000,
            sparsity_target=TARGET[v],
            sparsity_measured=(TARGET[v] or 0.9) - 0.01,
            chance=0.5,
        )
        for v, mean in (accuracy or TASK_ACCURACY).items()
        for task, offset in (("acceptability", -0.02), ("polarity", 0.02), ("yes_no", 0.0))
        for seed in range(seeds)
    )


def task_items(table: pd.DataFrame) -> pd.DataFrame:
    """Samples that go with `task_finetuning`."""
    return frame(
        TaskFinetuningSample(*(row[name] for name in ("model", "criterion", "variant", "task", "seed")),
                             bits(row["accuracy"], 1000))
        for row in table.to_dict("records")
    )  # fmt: skip


def attention(
    model: str = "made-up", accuracy: dict[str, float] | None = None, finetuned: bool = False, seed: int = 0
) -> pd.DataFrame:
    """e07 from the same maker as e02, with the share of zeros at each site."""
    accuracy = accuracy or {"dense": 0.70, "cats-50": 0.69, "cats-50-attention": 0.68}
    rows = []
    for row in zero_shot(model, accuracy, perplexity={}).to_dict("records"):
        wide = "attention" in row["variant"]
        sites = "" if row["criterion"] == "dense" else "gate attention_input mlp_input" if wide else "gate"
        name = row["variant"] + "-finetuned" * finetuned
        common = {**row, "variant": name, "sites": sites, "finetuned": finetuned, "seed": seed}
        rows.append(AttentionRow(**common))
        if row["criterion"] == "cats" and row["task"] == TASKS[0]:
            common |= {"task": "heldout_text", "stderr": None, "difference": None, "difference_stderr": None,
                       "chance": None}  # fmt: skip
            shown = {"gate": 0.503, **(OTHER_SITES if wide else {})}
            rows += [AttentionRow(**{**common, "metric": f"sparsity_{s}", "value": v}) for s, v in shown.items()]
    return frame(rows)


def attention_items(table: pd.DataFrame) -> pd.DataFrame:
    """Samples that go with `attention`."""
    table = table[table["metric"] == "acc"]
    return frame(
        AttentionSample(*(row[name] for name in ("model", "criterion", "variant", "finetuned", "task")),
                        bits(row["value"]), row["seed"])
        for row in table.to_dict("records")
    )  # fmt: skip


def attention_blocks(table: pd.DataFrame) -> pd.DataFrame:
    """Losses per block, one sample per variant of `attention`."""
    keys = ["model", "criterion", "variant", "finetuned"]
    return frame(
        AttentionTextSample(*(row[name] for name in keys), 128, pack_numbers([2.5, 2.6]), row["seed"])
        for row in table.drop_duplicates([*keys, "seed"]).to_dict("records")
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


def types_read() -> list[type[Row]]:
    """The row types that the report's sections read."""
    return read_types(discover())


if __name__ == "__main__":
    write_run(Path(sys.argv[1]))
