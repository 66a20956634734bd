"""Differences between two models on the same items or blocks of text, from the samples that rows keep."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

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


__all__ = ["flags", "numbers", "pack_flags", "pack_numbers", "paired"]
