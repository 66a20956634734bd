"""Figure 1: histograms of |SiLU(x W_gate)| in the first, middle and last layer, with the 50 % threshold.

Also the thresholds of every layer at each target, and the sparsity they give on text that calibration has not seen.
Cost: two passes over a few hundred blocks of text; a quarter of a minute for the pocket model on two cores.

    nox -s experiment -- e01 --model PATH_OR_HUB_ID
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from cats.calibration import Thresholds, fingerprint, histograms
from cats.models import load_model
from experiments.data import batches
from experiments.framework.config import Config
from experiments.framework.results import Row
from experiments.framework.subject import check_models, fractions_below


@dataclass(frozen=True)
class HistogramRow(Row):
    """One bar of Figure 1: how many of a layer's |gate activations| fell into [bin_left, bin_right)."""

    table: ClassVar[str] = "e01_histogram"
    model: str
    layer: str
    layer_index: int
    bin_left: float
    bin_right: float
    count: int


@dataclass(frozen=True)
class ThresholdRow(Row):
    """A layer's threshold at one target, and the sparsity it gives on the calibration text and on held-out text."""

    table: ClassVar[str] = "e01_thresholds"
    model: str
    layer: str
    layer_index: int
    sparsity_target: float
    threshold: float
    sparsity_calibration: float
    sparsity_heldout: float


def run(config: Config) -> Iterable[Row]:
    """Measure histograms and thresholds of each model in ``config.models``."""
    check_models(config, config.options["targets"])
    for model in config.models:
        yield from config.unit(model, partial(measure, config, model), (HistogramRow, ThresholdRow))


def measure(config: Config, name: str) -> list[Row]:
    """Rows of one model. Options: blocks, length (tokens), targets, bins, largest (where the open last bin begins)."""
    options = config.options
    model, tokenizer = load_model(name, config.dtype, config.device)
    assert tokenizer is not None  # check_models refuses models without one
    blocks, length = options["blocks"], options["length"]
    text = {p: batches(config, tokenizer, p, blocks, length, options["batch_size"]) for p in ("train", "heldout")}
    found, tokens = histograms(model, config.progress(text["train"], f"{name} calibration"))
    targets = options["targets"]
    made = {
        target: Thresholds(
            target,
            {layer: h.threshold(target) for (_, layer), h in found.items()},
            model=fingerprint(model),
            tokens=tokens,
        )
        for target in targets
    }
    below = fractions_below(model, config.progress(text["heldout"], f"{name} held-out"), made)
    rows: list[Row] = []
    edges = torch.cat([torch.linspace(0, options["largest"], options["bins"] + 1), torch.tensor([math.inf])])
    shown = {0, len(found) // 2, len(found) - 1}
    for index, ((_, layer), histogram) in enumerate(found.items()):
        if index in shown:
            counts = histogram.rebinned(edges).tolist()
            bars = zip(edges[:-1].tolist(), edges[1:].tolist(), counts, strict=True)
            rows += [HistogramRow(name, layer, index, left, right, count) for left, right, count in bars]
        for target, thresholds in made.items():
            threshold = float(thresholds.gate[layer])
            calibration = histogram.fraction_below(threshold)
            rows.append(ThresholdRow(name, layer, index, target, threshold, calibration, below[target, "gate", layer]))
    config.notes["calibration_tokens"] = tokens
    return rows
