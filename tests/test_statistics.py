"""The numbers of the statistics, worked by hand or against theory."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from reports.core import statistics
from reports.measures import accuracy, finetuning, generation, histogram, latency
from tests import make_results as made


def test_the_error_of_a_single_value_is_unknown() -> None:
    assert math.isnan(statistics.standard_error(np.array([0.5])))
    assert not statistics.mean_estimate(np.array([0.5]), "").known
    assert math.isnan(statistics.quadrature(np.array([0.1, math.nan])))


def test_a_mean_of_few_values_has_students_interval() -> None:
    estimate = statistics.mean_estimate(np.array([1.0, 2.0, 3.0]), "")
    assert estimate.value == 2
    assert estimate.high - 2 == pytest.approx(4.302653 / math.sqrt(3))  # t(2) at 97.5 %, sd 1


def test_bootstrap_of_a_mean_has_its_standard_error() -> None:
    generator = np.random.default_rng(1)
    values = generator.standard_normal(400)
    draws = statistics.bootstrap_means(values, generator)
    assert draws.std() == pytest.approx(values.std() / 20, rel=0.05)
    assert draws.mean() == pytest.approx(values.mean(), abs=0.01)


def test_paired_items_share_what_makes_them_hard() -> None:
    """A and B are right about the same items but for 10 of 1000: the difference is known to a point."""
    right = np.zeros(1000)
    right[:600] = 1
    better = right.copy()
    better[600:610] = 1
    estimate = statistics.paired_difference({"t": better}, {"t": right})
    assert estimate.value == pytest.approx(0.01)
    assert 0.003 < estimate.low < 0.006 and 0.014 < estimate.high < 0.018  # 10 +- 2 sqrt(10) of 1000
    shuffled = np.random.default_rng(0).permutation(right)
    wide = statistics.paired_difference({"t": better}, {"t": shuffled})
    assert wide.high - wide.low > 3 * (estimate.high - estimate.low)


def test_no_difference_seen_is_not_no_difference() -> None:
    same = {"t": np.ones(100)}
    estimate = statistics.paired_difference(same, same)
    assert (estimate.low, estimate.high) == (-0.03, 0.03)  # the rule of three


def test_pairing_other_items_is_refused() -> None:
    with pytest.raises(ValueError, match="different items"):
        statistics.paired_difference({"t": np.ones(3)}, {"t": np.ones(4)})
    with pytest.raises(ValueError, match="different tasks"):
        statistics.paired_difference({"t": np.ones(3)}, {"u": np.ones(3)})
    with pytest.raises(ValueError, match="different rounds"):
        statistics.paired_ratio(np.ones(3), np.ones(4))


def test_a_drift_shared_by_both_is_in_no_ratio() -> None:
    drift = np.linspace(1, 2, 80)
    estimate = statistics.paired_ratio(3 * drift, 2 * drift)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((1.5, 1.5, 1.5))


def test_a_ratio_has_the_95_percent_interval_of_a_median() -> None:
    estimate = statistics.paired_ratio(np.arange(1.0, 802.0), np.ones(801))
    half = 1.959964 * math.sqrt(801) / 2  # 28 ranks; 23 at 90 %, 36 at 99 %
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((401, 401 - half, 401 + half), abs=2)


def test_the_median_has_the_interval_of_its_order_statistics() -> None:
    estimate = statistics.median_estimate(np.arange(1.0, 81.0))
    assert (estimate.value, estimate.low, estimate.high) == (40.5, 31, 50)  # tables: 31st and 50th of 80
    assert not statistics.median_estimate(np.array([1.0, 2.0, 3.0])).known


def test_the_interval_of_the_median_covers_it() -> None:
    generator = np.random.default_rng(2)
    covered = [
        (at := statistics.median_estimate(generator.exponential(size=25))).low <= math.log(2) <= at.high
        for _ in range(1000)
    ]
    assert 0.94 < np.mean(covered) < 0.985


def test_samples_are_read_as_they_were_packed() -> None:
    assert list(statistics.unpack_flags("0110")) == [0, 1, 1, 0]
    assert list(statistics.unpack_numbers("1.5;2")) == [1.5, 2]
    assert len(statistics.unpack_numbers("")) == 0


def test_means_by_hand() -> None:
    table = made.zero_shot(accuracy={"dense": 0.7, "cats-50": 0.69})
    table.loc[table["metric"] == "acc", "stderr"] = np.tile([0.03, 0.04, 0, 0, 0, 0, 0, 0], 2)
    row = accuracy.zero_shot_means(table).set_index("variant").loc["dense"]
    assert row["value"] == pytest.approx(0.7)
    assert row["stderr"] == pytest.approx(0.05 / 8)

    tuned = finetuning.finetuning_means(made.finetuning()).set_index(["variant", "step"]).loc[("dense", 400)]
    # item error: sqrt(4) * 0.02 / 4 = 0.01; seeds 0.004 apart: sd 0.004, error 0.004 / sqrt(3)
    assert tuned["stderr"] == pytest.approx(math.hypot(0.01, 0.004 / math.sqrt(3)))
    assert (tuned["high"] - tuned["low"]) == pytest.approx(0.008)
    single = finetuning.finetuning_means(made.finetuning(seeds=1)).set_index(["variant", "step"])
    assert math.isnan(single.loc[("dense", 400), "stderr"])
    assert single.loc[("dense", 0), "stderr"] == pytest.approx(0.01)  # nothing was trained yet


def test_a_lead_after_fine_tuning_joins_both_errors() -> None:
    table = made.finetuning()
    samples = pd.DataFrame(columns=["task", "seed", "correct"])
    at = {v: table[(table["variant"] == v) & (table["step"] == 400)] for v in ("cats-50", "dense")}
    trained = {v: finetuning.Trained(rows, samples) for v, rows in at.items()}
    estimate = finetuning.lead(trained["cats-50"], trained["dense"])
    # differences of seeds are 0.0004 apart: t(2) * 0.0004 / sqrt(3); items unpaired: sqrt(2) * 0.01
    half = math.hypot(statistics.Z95 * math.sqrt(2) * 0.01, 4.302653 * 0.0004 / math.sqrt(3))
    assert estimate.high - estimate.value == pytest.approx(half, rel=1e-4)
    one = {v: finetuning.Trained(rows[rows["seed"] == 0], samples) for v, rows in at.items()}
    assert not finetuning.lead(one["cats-50"], one["dense"]).known


def test_generation_ratio_is_paired_by_prompt_and_repeat() -> None:
    table = made.throughput(speedup=1.2, noise=0.01)
    one = table[(table["dtype"] == "float32") & (table["loop"] == "eager") & (table["generated_tokens"] == 32)]
    row = generation.generation_speedups(one).iloc[0]
    gains = np.log([(1 + 0.2) * (1 + 0.01 * p + 0.005 * r) for p in (-1, 0, 1) for r in (-1, 1)])
    assert row["speedup"] == pytest.approx(math.exp(gains.mean()))
    assert row["log_stderr"] == pytest.approx(gains.std(ddof=1) / math.sqrt(6))
    assert (row["prompts"], row["repeats"]) == (3, 2)


def test_a_condition_with_another_cache_is_another_condition() -> None:
    table = made.throughput()
    longer = table.assign(cache_tokens=512)
    longer.loc[longer["criterion"] == "cats", "tokens_per_second"] *= 2
    both = generation.generation_speedups(pd.concat([table, longer]))
    assert len(both) == 2 * len(generation.generation_speedups(table))


def test_speedups_name_their_baseline() -> None:
    table = made.latency(dtypes=("float32",), rows=(1,), compiled=0.8)
    at = latency.kernel_speedups(table).query("shape == 'Mistral-7B' and implementation == 'cats'")
    row = latency.near(at, 0.5)
    assert row is not None and row["baseline"] == "dense-compiled"
    assert row["over_torch"] == pytest.approx(1.5 / 1.05)
    assert row["speedup"] == pytest.approx(0.8 * 1.5 / 1.05)
    assert row["over_own"] == pytest.approx(1.5)
    assert latency.near(at[at["sparsity_target"] < 0.3], 0.5) is None


def test_bytes_bound() -> None:
    assert [round(float(latency.bytes_bound_speedup(s)), 2) for s in (0, 0.5, 0.7, 0.9)] == [1.0, 1.5, 1.88, 2.5]


def test_histogram_quantile_and_share_against_the_exponential() -> None:
    layer = made.histogram(scale=0.05, layers=(0,), control=None)
    for q in (0.1, 0.5, 0.9, 0.999):
        assert histogram.quantile(layer, q) == pytest.approx(-0.05 * math.log(1 - q), rel=2e-3)
    for value in (0.01, 0.05, 0.2):
        assert histogram.share_below(layer, value) == pytest.approx(1 - math.exp(-value / 0.05), rel=2e-3)
    opened = pd.concat([layer, layer.tail(1).assign(bin_left=1.0, bin_right=math.inf, count=5e6)])
    assert histogram.quantile(opened, 0.9) == 1.0
    assert histogram.share_below(opened, 1.0) == pytest.approx(1 / 6, rel=1e-3)
    assert histogram.concentration(opened).beyond and not histogram.concentration(layer).beyond
