"""Made-up activations and accuracies (e01, e02), for `tests.make_results`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from experiments.framework.tables import (
    HistogramRow,
    ItemSample,
    TextSample,
    ThresholdRow,
    ZeroShotRow,
    pack_flags,
    pack_numbers,
)
from tests.make_timings import NAN, frame

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
