"""Intervals for means, paired differences and medians; an error that is unknown is NaN and never 0.

Intervals are 95 %. Items, blocks of text and rounds of a timing are resampled (percentile bootstrap, a fixed seed);
a few training seeds, prompts or repeats get Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import bdtr, stdtrit

RESAMPLES = 4000
Z95 = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A measured number with the ends of its 95 % interval (NaN where unknown), and how they were obtained."""

    value: float
    low: float = math.nan
    high: float = math.nan
    how: str = ""

    @property
    def known(self) -> bool:
        """Whether the number and its interval are known."""
        return all(map(math.isfinite, (self.value, self.low, self.high)))

    def shifted(self, by: float) -> Estimate:
        """The same with ``by`` added."""
        return Estimate(self.value + by, self.low + by, self.high + by, self.how)

    def negative(self) -> Estimate:
        """Minus the number."""
        return Estimate(-self.value, -self.high, -self.low, self.how)

    def scaled(self, by: float) -> Estimate:
        """The same times ``by``, which is positive."""
        return Estimate(self.value * by, self.low * by, self.high * by, self.how)

    def widened(self, by: float) -> Estimate:
        """The same with an interval that is longer by ``by`` at each end."""
        return Estimate(self.value, self.low - by, self.high + by, self.how)

    def exponential(self) -> Estimate:
        """e to the number: from a log ratio to a ratio."""
        return Estimate(math.exp(self.value), math.exp(self.low), math.exp(self.high), self.how)


def t_quantile(count: int) -> float:
    """Half-width of a 95 % interval in standard errors, for the mean of ``count`` values; NaN for a single one."""
    return float(stdtrit(count - 1, 0.975)) if count > 1 else math.nan


def standard_error(values: np.ndarray) -> float:
    """Of the mean; NaN for a single value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def mean_estimate(values: np.ndarray, how: str) -> Estimate:
    """Mean of a few independent values with Student's t; the interval of a single value is unknown."""
    mean, half = float(np.mean(values)), t_quantile(len(values)) * standard_error(values)
    return Estimate(mean, mean - half, mean + half, how)


def normal_estimate(value: float, stderr: float, how: str) -> Estimate:
    """From a standard error over many items; a standard error of NaN gives an unknown interval."""
    return Estimate(value, value - Z95 * stderr, value + Z95 * stderr, how)


def quadrature(errors: pd.Series | np.ndarray) -> float:
    """sqrt(sum of squares); NaN when any is unknown."""
    return float(np.sqrt(np.sum(np.square(np.asarray(errors, dtype=float)))))


def bootstrap_means(values: np.ndarray, generator: np.random.Generator, resamples: int = RESAMPLES) -> np.ndarray:
    """Means of ``resamples`` samples drawn with replacement. Drawing n items is one draw of how often each value comes,
    so that the thousands of items of a task cost no more than their few distinct values."""
    distinct, counts = np.unique(values, return_counts=True)
    drawn = generator.multinomial(len(values), counts / len(values), size=resamples)
    return drawn @ distinct / len(values)


def paired_difference(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> Estimate:
    """Mean over tasks of the mean difference over their items, each item paired with itself.

    Items are resampled within their tasks. The interval is at least what the rule of three allows to differ unseen,
    3 items, so that no difference seen is not taken for none.

    Args:
        first, second: task -> one number per item (0 or 1, or a mean over seeds), the same items in the same order.

    Raises:
        ValueError: tasks or items differ.
    """
    if set(first) != set(second) or not first:
        raise ValueError("the two variants were measured on different tasks")
    if any(len(first[task]) != len(second[task]) or not len(first[task]) for task in first):
        raise ValueError("the two variants were measured on different items")
    differences = {task: first[task] - second[task] for task in sorted(first)}
    generator = np.random.default_rng(0)
    draws = np.mean([bootstrap_means(one, generator) for one in differences.values()], axis=0)
    value = float(np.mean([one.mean() for one in differences.values()]))
    low, high = np.quantile(draws, [0.025, 0.975])
    unseen = 3 / (len(differences) * min(map(len, differences.values())))
    how = f"paired over {sum(map(len, differences.values()))} items"
    return Estimate(value, min(low, value - unseen), max(high, value + unseen), how)


def paired_ratio(numerator: np.ndarray, denominator: np.ndarray) -> Estimate:
    """Median over rounds of the ratio of two times taken side by side; rounds are resampled.

    Raises:
        ValueError: the numbers of rounds differ.
    """
    if len(numerator) != len(denominator) or not len(numerator):
        raise ValueError("the two were timed in different rounds")
    ratios = numerator / denominator
    if len(ratios) < 2:
        return Estimate(float(ratios[0]), how="one round")
    chosen = np.random.default_rng(0).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[chosen], axis=1), [0.025, 0.975])
    return Estimate(float(np.median(ratios)), float(low), float(high), f"paired over {len(ratios)} rounds")


def median_estimate(values: np.ndarray) -> Estimate:
    """Median with its interval from order statistics, which supposes nothing about the distribution."""
    ordered, count = np.sort(values), len(values)
    below = np.flatnonzero(bdtr(np.arange(count // 2), count, 0.5) <= 0.025)
    how = f"median of {count}"
    if not len(below):
        return Estimate(float(np.median(ordered)), how=how)
    rank = int(below[-1])
    return Estimate(float(np.median(ordered)), float(ordered[rank]), float(ordered[count - 1 - rank]), how)


def unpack_flags(text: str) -> np.ndarray:
    """`experiments.framework.tables.ItemSample.correct` as zeros and ones."""
    return (np.frombuffer(text.encode(), dtype=np.uint8) - ord("0")).astype(float)


def unpack_numbers(text: str) -> np.ndarray:
    """What `experiments.framework.tables.pack_numbers` wrote."""
    return np.array([float(number) for number in text.split(";")]) if text else np.array([])
