"""The rules of C1 to C3 and C11 on made-up tables: both sides of each bound, errors unknown."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from reports.core.verdicts import FAILS, HOLDS, NOT_TESTED, UNDECIDED
from reports.rules import e01, e02
from tests import make_results as made
from tests.claim_cases import Table, only, verdict
from tests.make_accuracy import ACCURACY

# --- C1


def spread(share: float, weights: str, layer: int = 0) -> Table:
    """A histogram with `share` of its mass below a tenth of its 99.9 % quantile, which is 1."""
    counts = [1000 * share, 999 - 1000 * share, 1]
    return pd.DataFrame(
        {"model": "m", "weights": weights, "layer": "l", "layer_index": layer, "bin_left": [0.0, 0.1, 1.0],
         "bin_right": [0.1, 1.0, 2.0], "count": counts}
    )  # fmt: skip


@pytest.mark.parametrize(
    "share, expected", [(0.53, HOLDS), (0.51, UNDECIDED), (0.49, UNDECIDED), (0.47, FAILS), (0.40, FAILS)]
)
def test_c1_compares_with_the_same_model_at_random_weights(share: float, expected: str) -> None:
    table = pd.concat([spread(share, "pretrained"), spread(0.40, "random")])
    finding = only(e01.c1_concentration(made.loaded(e01_histogram=table)))
    assert finding.verdict == expected
    assert f"{100 * share:.1f} % / control 40.0 %" in finding.ours


def test_c1_without_a_control_is_not_tested() -> None:
    finding = only(e01.c1_concentration(made.loaded(e01_histogram=spread(0.99, "pretrained"))))
    assert finding.verdict == NOT_TESTED and "no control" in finding.reason
    other_layer = pd.concat([spread(0.99, "pretrained"), spread(0.1, "random", layer=3)])
    assert verdict(e01.c1_concentration, e01_histogram=other_layer) == NOT_TESTED


def test_c1_a_random_network_does_not_pass() -> None:
    """What SiLU alone makes of normal inputs passed the rule of release 0.1."""
    inputs = 1.28 * np.random.default_rng(0).standard_normal(200_000)
    counts, edges = np.histogram(np.abs(inputs / (1 + np.exp(-inputs))), bins=800, range=(0, 8))
    rows = [
        pd.DataFrame({"model": "m", "weights": weights, "layer": "l", "layer_index": 0, "bin_left": edges[:-1],
                      "bin_right": edges[1:], "count": counts.astype(float)})
        for weights in ("pretrained", "random")
    ]  # fmt: skip
    assert verdict(e01.c1_concentration, e01_histogram=pd.concat(rows)) == FAILS


def test_c1_needs_every_layer() -> None:
    table = pd.concat(
        [spread(0.9, "pretrained", 0), spread(0.4, "pretrained", 1), spread(0.4, "random", 0), spread(0.4, "random", 1)]
    )
    assert verdict(e01.c1_concentration, e01_histogram=table) == FAILS


@pytest.mark.parametrize(
    "trained_open, control_open, share, expected",
    [
        (True, False, 0.53, HOLDS),  # known from below: it is larger still
        (True, False, 0.45, UNDECIDED),
        (False, True, 0.45, FAILS),  # the control is larger still
        (False, True, 0.53, UNDECIDED),
        (True, True, 0.53, UNDECIDED),
    ],
)
def test_c1_does_not_judge_a_tail_that_was_not_measured(
    trained_open: bool, control_open: bool, share: float, expected: str
) -> None:
    parts = []
    for weights, of, opened in (("pretrained", share, trained_open), ("random", 0.40, control_open)):
        part = spread(of, weights)
        if opened:  # 0.1 % and a little more lies beyond 1
            part.loc[2, "bin_right"] = math.inf
            part["count"] = [1000 * of, 998.9 - 1000 * of, 1.1]
        parts.append(part)
    finding = only(e01.c1_concentration(made.loaded(e01_histogram=pd.concat(parts))))
    assert finding.verdict == expected
    if expected == UNDECIDED:
        assert finding.settings.startswith("--set e01.largest=8 --set e01.bins=")


# --- C2, C3


def accuracy(**values: float) -> Table:
    names = {"dense": 0.70, **{name.replace("_", "-"): value for name, value in values.items()}}
    return made.with_item_values(made.zero_shot(accuracy=names))


def differing(table: Table) -> Table:
    """Samples in which each variant but dense is wrong about other items than dense: the noisiest pairing."""
    samples = made.items(table)
    mirrored = samples["correct"].str[::-1]
    return samples.assign(correct=samples["correct"].where(samples["variant"] == "dense", mirrored))


@pytest.mark.parametrize(
    "value, expected", [(0.75, HOLDS), (0.692, HOLDS), (0.682, UNDECIDED), (0.678, UNDECIDED), (0.66, FAILS)]
)
def test_c2_allows_two_points(value: float, expected: str) -> None:
    finding = only(e02.c2_near_base(made.loaded(e02_zero_shot=accuracy(cats_50=value))))
    assert finding.verdict == expected  # a paired error of 0.01 / sqrt(8), 0.35 points, and twice that decides
    assert "from the table's errors" in finding.uncertainty


@pytest.mark.parametrize(
    "value, nested, noisy", [(0.69, HOLDS, UNDECIDED), (0.67, FAILS, UNDECIDED), (0.60, FAILS, FAILS)]
)
def test_c2_pairs_over_the_items_that_were_kept(value: float, nested: str, noisy: str) -> None:
    table = accuracy(cats_50=value)
    for samples, expected in ((made.items(table), nested), (differing(table), noisy)):
        finding = only(e02.c2_near_base(made.loaded(e02_zero_shot=table, e02_items=samples)))
        assert finding.verdict == expected and "paired over 4000 items" in finding.uncertainty
        assert "table's" not in finding.uncertainty


def test_c2_with_an_unknown_error_is_undecided() -> None:
    table = accuracy(cats_50=0.70).assign(difference_stderr=np.nan)
    assert verdict(e02.c2_near_base, e02_zero_shot=table) == UNDECIDED


def test_a_base_model_at_chance_tests_nothing() -> None:
    table = made.zero_shot(accuracy={**ACCURACY, "dense": 0.31})  # chance is 0.30, the mean's error 0.007
    for rule in (e02.c2_near_base, e02.c3_beats_relufication):
        finding = only(rule(made.loaded(e02_zero_shot=table)))
        assert finding.verdict == NOT_TESTED and "chance" in finding.reason


def test_an_unmeasured_task_is_not_averaged_over() -> None:
    table = made.zero_shot()
    table.loc[(table["variant"] == "cats-50") & (table["task"] == "keyword"), "value"] = np.nan
    finding = only(e02.c2_near_base(made.loaded(e02_zero_shot=table)))
    assert (finding.verdict, finding.reason) == (NOT_TESTED, "CATS-50 not measured on all tasks")


@pytest.mark.parametrize("level", ["cats-50", "cats-70", "cats-90"])
@pytest.mark.parametrize("lead, expected", [(0.03, HOLDS), (0.005, UNDECIDED), (-0.005, UNDECIDED), (-0.03, FAILS)])
def test_c3_needs_every_level(level: str, lead: float, expected: str) -> None:
    table = made.zero_shot(accuracy={**ACCURACY, level: ACCURACY["relufication"] + lead})
    assert verdict(e02.c3_beats_relufication, e02_zero_shot=table) == expected


def test_c3_pairs_over_items_where_they_were_kept() -> None:
    table = made.with_item_values(made.zero_shot(accuracy={**ACCURACY, "cats-90": 0.41}))
    assert verdict(e02.c3_beats_relufication, e02_zero_shot=table) == UNDECIDED  # unpaired: 1 point of 2 x 0.7
    samples = made.items(table)
    assert verdict(e02.c3_beats_relufication, e02_zero_shot=table, e02_items=samples) == HOLDS
    foreign = samples.assign(correct=samples["correct"].str[:100])  # of another run: not those of the table
    assert verdict(e02.c3_beats_relufication, e02_zero_shot=table, e02_items=foreign) == UNDECIDED


def test_c3_without_a_level_is_not_tested() -> None:
    table = made.zero_shot()
    finding = only(e02.c3_beats_relufication(made.loaded(e02_zero_shot=table[table["variant"] != "cats-90"])))
    assert (finding.verdict, finding.reason) == (NOT_TESTED, "CATS-90 not measured on all tasks")


# --- C11


def perplexities(cats_50: float, relu: float) -> Table:
    return made.zero_shot(perplexity={"dense": 10.0, "cats-50": cats_50, "relufication": relu})


@pytest.mark.parametrize(
    "cats_50, relu, expected",
    [
        (10.1, 14.0, HOLDS),
        (10.2, 14.0, UNDECIDED),
        (10.4, 14.0, FAILS),
        (10.1, 11.0, UNDECIDED),
        (10.1, 10.5, FAILS),
    ],
)
@pytest.mark.parametrize("kept", [True, False])
def test_c11_has_two_bounds(cats_50: float, relu: float, expected: str, kept: bool) -> None:
    table = perplexities(cats_50, relu)
    tables = {"e02_zero_shot": table} | ({"e02_blocks": made.blocks(table)} if kept else {})
    finding = only(e02.c11_perplexity(made.loaded(**tables)))
    assert finding.verdict == expected
    assert ("from the table's errors" in finding.uncertainty) is not kept


def test_c11_with_an_unknown_error_is_undecided_and_without_relufication_not_tested() -> None:
    table = perplexities(10.1, 14.0)
    assert verdict(e02.c11_perplexity, e02_zero_shot=table.assign(difference_stderr=np.nan)) == UNDECIDED
    assert verdict(e02.c11_perplexity, e02_zero_shot=table.assign(difference=np.nan)) == UNDECIDED
    assert verdict(e02.c11_perplexity, e02_zero_shot=table[table["variant"] != "relufication"]) == NOT_TESTED
