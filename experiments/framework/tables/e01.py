"""Tables of e01: activations and thresholds."""

from dataclasses import dataclass
from typing import ClassVar

from experiments.framework.tables.row import Row


@dataclass(frozen=True)
class HistogramRow(Row):
    """One bar of Figure 1: how many of a layer's |gate activations| fell into [bin_left, bin_right)."""

    table: ClassVar[str] = "e01_histogram"
    key: ClassVar[tuple[str, ...]] = ("model", "weights", "layer", "bin_left")
    model: str
    weights: str
    layer: str
    layer_index: int
    bin_left: float
    bin_right: float
    count: int


@dataclass(frozen=True)
class ThresholdRow(Row):
    """A layer's threshold at one target, and the sparsity it gives on the calibration text and on held-out text."""

    table: ClassVar[str] = "e01_thresholds"
    key: ClassVar[tuple[str, ...]] = ("model", "weights", "criterion", "layer", "sparsity_target")
    model: str
    weights: str
    criterion: str
    layer: str
    layer_index: int
    sparsity_target: float
    threshold: float
    sparsity_calibration: float
    sparsity_heldout: float
