"""Made-up results of fine-tuning, and of thresholds at the attention (e03, e04, e07), for `tests.make_results`."""

from __future__ import annotations

import numpy as np
import pandas as pd

from experiments.framework.tables import (
    AttentionRow,
    AttentionSample,
    AttentionTextSample,
    FinetuningRow,
    FinetuningSample,
    SparsityRow,
    SweepRow,
    TaskFinetuningRow,
    TaskFinetuningSample,
    TaskSweepRow,
    pack_numbers,
)
from tests.make_accuracy import ACCURACY, ITEMS, TARGET, TASKS, bits, criterion, zero_shot
from tests.make_timings import frame

OTHER_SITES = {"attention_input": 0.498, "mlp_input": 0.499}
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
