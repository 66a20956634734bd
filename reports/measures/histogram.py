"""What a histogram of one layer's |gate activations| says: its quantiles, and the share below a value."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd


def quantile(layer: pd.DataFrame, q: float) -> float:
    """Quantile of one layer's histogram, linear inside a bin; an open last bin counts as its left edge."""
    layer = layer.sort_values("bin_left")
    left, right, count = (layer[name].to_numpy(dtype=float) for name in ("bin_left", "bin_right", "count"))
    cumulative = np.cumsum(count) / count.sum()
    i = int(np.searchsorted(cumulative, q))
    if not np.isfinite(right[i]):
        return float(left[i])
    before = cumulative[i - 1] if i else 0.0
    return float(left[i] + (q - before) / (cumulative[i] - before) * (right[i] - left[i]))


def share_below(layer: pd.DataFrame, value: float) -> float:
    """Share of the activations with a magnitude below ``value``, linear inside a bin."""
    layer = layer.sort_values("bin_left")
    closed = layer[np.isfinite(layer["bin_right"])]
    edges = np.append(closed["bin_left"].to_numpy(), closed["bin_right"].iloc[-1])
    cumulative = np.append(0.0, np.cumsum(closed["count"].to_numpy())) / layer["count"].sum()
    return float(np.interp(value, edges, cumulative))


@dataclass(frozen=True)
class Concentration:
    """Share of a layer's activations that are small against its largest ones.

    Attributes:
        share: of |a| below a tenth of the 99.9 % quantile; a lower end where ``beyond``.
        beyond: the 99.9 % quantile lies beyond the histogram's last closed bin.
        edge: where that bin ends.
        bins: how many closed bins there are.
    """

    share: float
    beyond: bool
    edge: float
    bins: int


def concentration(layer: pd.DataFrame) -> Concentration:
    """Of one layer's histogram."""
    closed = layer[np.isfinite(layer["bin_right"])]
    edge = float(closed["bin_right"].max()) if len(closed) else math.nan
    reach = quantile(layer, 0.999)
    beyond = len(closed) < len(layer) and reach >= edge
    return Concentration(share_below(layer, reach / 10), beyond, edge, len(closed))
