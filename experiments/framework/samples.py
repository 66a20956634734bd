"""Differences between two models on the same items or blocks of text, from the samples that rows keep."""

import math
from collections.abc import Sequence
from itertools import accumulate
from statistics import fmean, median, stdev

from experiments.framework.tables import pack_flags, pack_numbers


def flags(correct: str) -> list[float]:
    """What `pack_flags` packed, as 1.0 and 0.0."""
    return [float(flag) for flag in correct]


def numbers(packed: str) -> list[float]:
    """What `pack_numbers` packed."""
    return [float(value) for value in packed.split(";")]


def paired(values: Sequence[float], base: Sequence[float]) -> tuple[float, float | None]:
    """Mean difference of ``values`` from ``base``, and its standard error (paired, n - 1; None for a single pair).

    Raises:
        ValueError: the two are not of the same items.
    """
    if len(values) != len(base):
        raise ValueError(f"{len(values)} measurements cannot be paired with {len(base)}")
    differences = [a - b for a, b in zip(values, base, strict=True)]
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return fmean(differences), error


def median_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Median, and its 95 % interval from order statistics; None where the values are too few for one (under six)."""
    ordered, count = sorted(values), len(values)
    chances = list(accumulate(math.comb(count, below) / 2**count for below in range(count // 2)))
    ranks = [rank for rank, chance in enumerate(chances) if chance <= 0.025]
    if not ranks:
        return median(ordered), None, None
    return median(ordered), ordered[ranks[-1]], ordered[count - 1 - ranks[-1]]


__all__ = ["flags", "median_interval", "numbers", "pack_flags", "pack_numbers", "paired"]
