"""The rules of C1 to C6, C10 and C11 on made-up tables: both sides of each bound, errors unknown, single seeds."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from reports.core.verdicts import (
    FAILS,
    HOLDS,
    NOT_TESTED,
    UNDECIDED,
)
from reports.rules import e01, e02, e03, e04, e07
from tests import make_results as made
from tests.claim_cases import Table, only, verdict
from tests.make_accuracy import ACCURACY, ITEMS
from tests.make_finetuning import FINAL, LOSS, TASK_ACCURACY

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


# --- C4, C5


def tuned(seeds: int = 3, **final: float) -> dict[str, Table]:
    values = {**FINAL, **{name.replace("_", "-"): value for name, value in final.items()}}
    table = made.finetuning(final=values, seeds=seeds)
    table["accuracy"] = (table["accuracy"] * ITEMS).round() / ITEMS
    return {"e03_finetuning": table, "e03_items": made.finetuning_items(table)}


@pytest.mark.parametrize("end, expected", [(0.72, HOLDS), (0.685, UNDECIDED), (0.675, UNDECIDED), (0.64, FAILS)])
def test_c4_compares_cats_70_with_the_base_before_fine_tuning(end: float, expected: str) -> None:
    tables = tuned(cats_70=end, dense=0.80)  # what base gains by fine-tuning does not count
    tables = {name: of[of["step"].isin([0, 400])] for name, of in tables.items()}
    assert verdict(e03.c4_finetuned, **tables) == expected


@pytest.mark.parametrize("end, expected", [(0.62, HOLDS), (0.551, UNDECIDED), (0.50, FAILS)])
def test_c4_needs_every_level_at_every_step(end: float, expected: str) -> None:
    assert verdict(e03.c4_finetuned, **tuned(cats_70=0.72, cats_90=end)) == expected


@pytest.mark.parametrize("end, expected", [(0.62, NOT_TESTED), (0.551, NOT_TESTED), (0.50, FAILS)])
def test_without_a_level_c4_is_not_tested_unless_another_fails(end: float, expected: str) -> None:
    tables = {name: of[of["variant"] != "cats-90"] for name, of in tuned(cats_70=0.72, cats_50=end).items()}
    finding = only(e03.c4_finetuned(made.loaded(**tables)))
    assert finding.verdict == expected and "comparisons won" in finding.ours
    assert finding.reason.endswith("CATS-90 not measured") == (expected == NOT_TESTED)


@pytest.mark.parametrize("drift, expected", [(0.01, NOT_TESTED), (0.09, FAILS)])
def test_without_a_level_c5_is_not_tested_unless_another_fails(drift: float, expected: str) -> None:
    sparsity = made.finetuned_sparsity()
    sparsity = sparsity[sparsity["variant"] != "cats-90"]
    sparsity.loc[sparsity["variant"] == "cats-50", "sparsity_measured"] = 0.5 - drift
    finding = only(e03.c5_sparsity_kept(made.loaded(e03_sparsity=sparsity)))
    assert finding.verdict == expected and "CATS-70" in finding.ours and "CATS-90" not in finding.ours


@pytest.mark.parametrize("last, expected", [(500, HOLDS), (501, FAILS)])
def test_c4_looks_for_cats_70_within_the_first_500_steps(last: int, expected: str) -> None:
    """It is near the base model at the last step alone."""
    table = tuned(cats_70=0.72)["e03_finetuning"]
    table = table[table["step"].isin([0, 200, 400])].assign(step=table["step"].replace({400: last}))
    table.loc[table["variant"].eq("cats-70") & (table["step"] == 200), "accuracy"] -= 0.08
    assert verdict(e03.c4_finetuned, e03_finetuning=table, e03_items=made.finetuning_items(table)) == expected


def test_c4_with_a_single_seed_is_undecided() -> None:
    finding = only(e03.c4_finetuned(made.loaded(**tuned(cats_70=0.72, seeds=1))))
    assert finding.verdict == UNDECIDED and "1 seed" in finding.reason
    assert verdict(e03.c4_finetuned, **tuned(cats_70=0.72, seeds=2)) in (HOLDS, UNDECIDED)


def test_c4_without_samples_takes_the_unpaired_error() -> None:
    tables = tuned(cats_70=0.72)
    finding = only(e03.c4_finetuned(made.loaded(e03_finetuning=tables["e03_finetuning"])))
    assert "items not paired" in finding.uncertainty
    unknown = tables["e03_finetuning"].assign(stderr=np.nan)
    assert verdict(e03.c4_finetuned, e03_finetuning=unknown) == UNDECIDED


def test_c4_takes_the_last_step_within_500_and_needs_every_comparison() -> None:
    tables = tuned()
    late = tables["e03_finetuning"].assign(step=lambda at: at["step"].replace(400, 2600))
    assert "CATS-70 at step 200 " in only(e03.c4_finetuned(made.loaded(e03_finetuning=late))).ours
    table = tables["e03_finetuning"]
    gone = table[~((table["variant"] == "cats-90") & (table["step"] == 100))]
    assert verdict(e03.c4_finetuned, e03_finetuning=gone) == NOT_TESTED


@pytest.mark.parametrize(
    "drift, expected",
    [(-0.045, HOLDS), (0.045, HOLDS), (-0.0499, UNDECIDED), (0.051, UNDECIDED), (-0.06, FAILS), (0.06, FAILS)],
)
def test_c5_allows_five_points_either_way(drift: float, expected: str) -> None:
    assert verdict(e03.c5_sparsity_kept, e03_sparsity=made.finetuned_sparsity(drift=drift)) == expected


def test_c5_with_a_single_seed_is_undecided() -> None:
    assert verdict(e03.c5_sparsity_kept, e03_sparsity=made.finetuned_sparsity(drift=0.0, seeds=1)) == UNDECIDED


# --- C6


def by_task(seeds: int = 3, **values: float) -> dict[str, Table]:
    named = {name.replace("_", "-"): value for name, value in values.items()}
    table = made.task_finetuning(accuracy={**TASK_ACCURACY, **named}, seeds=seeds)
    table["accuracy"] = table["accuracy"].round(3)
    return {"e04_task_finetuning": table, "e04_items": made.task_items(table)}


@pytest.mark.parametrize(
    "cats_50, relu, expected",
    [
        (0.910, 0.72, HOLDS),
        (0.898, 0.72, HOLDS),
        (0.895, 0.72, UNDECIDED),
        (0.885, 0.72, FAILS),
        (0.900, 0.799, UNDECIDED),
        (0.900, 0.85, FAILS),
        (0.885, 0.799, FAILS),  # one condition is missed for certain
    ],
)
def test_c6_needs_both_conditions(cats_50: float, relu: float, expected: str) -> None:
    assert verdict(e04.c6_task_finetuning, **by_task(cats_50=cats_50, relufication=relu)) == expected


def test_c6_with_a_single_seed_or_no_error_is_undecided() -> None:
    finding = only(e04.c6_task_finetuning(made.loaded(**by_task(seeds=1))))
    assert finding.verdict == UNDECIDED and "1 seed" in finding.reason
    table = by_task()["e04_task_finetuning"].assign(stderr=np.nan)
    assert verdict(e04.c6_task_finetuning, e04_task_finetuning=table) in (UNDECIDED, NOT_TESTED)


def test_c6_at_chance_tests_nothing() -> None:
    table = by_task()["e04_task_finetuning"].assign(chance=0.9)
    assert verdict(e04.c6_task_finetuning, e04_task_finetuning=table) == NOT_TESTED


# --- C10, C11


@pytest.mark.parametrize("wide, expected", [(0.69, HOLDS), (0.665, HOLDS), (0.66, UNDECIDED), (0.64, FAILS)])
def test_c10_compares_with_the_mlp_only_variant(wide: float, expected: str) -> None:
    table = made.with_item_values(made.attention(accuracy={"dense": 0.70, "cats-50": 0.69, "cats-50-attention": wide}))
    tables = {"e07_attention": table, "e07_items": made.attention_items(table)}
    assert verdict(e07.c10_attention, **tables) == expected


def test_c10_without_items_is_decided_by_the_unpaired_error_only_where_that_suffices() -> None:
    for wide, expected in ((0.69, HOLDS), (0.67, UNDECIDED), (0.60, FAILS)):
        table = made.attention(accuracy={"dense": 0.70, "cats-50": 0.69, "cats-50-attention": wide})
        assert verdict(e07.c10_attention, e07_attention=table) == expected


def test_c10_one_fine_tuning_decides_nothing() -> None:
    table = pd.concat([made.attention(), made.attention(finetuned=True)])
    before, after = e07.c10_attention(made.loaded(e07_attention=made.with_item_values(table)))
    assert (before.aspect, after.aspect) == ("without fine-tuning", "fine-tuned")
    assert after.verdict == UNDECIDED and "a single training seed" in after.reason


def finetuned_attention(costs: list[float]) -> dict[str, pd.DataFrame]:
    """e07 before training, and fine-tuned once per seed, where the attention variant costs so much."""
    tables = [made.attention()]
    for seed, cost in enumerate(costs):
        accuracy = {"dense": 0.70, "cats-50": 0.69 + 0.01 * seed, "cats-50-attention": 0.69 + 0.01 * seed - cost}
        tables.append(made.attention(accuracy=accuracy, finetuned=True, seed=seed))
    table = made.with_item_values(pd.concat(tables, ignore_index=True))
    return {"e07_attention": table, "e07_items": made.attention_items(table)}


@pytest.mark.parametrize(
    ("costs", "expected"),
    [([0.005, 0.004, 0.006], HOLDS), ([0.06, 0.061, 0.059], FAILS), ([0.0, 0.06, 0.03], UNDECIDED),
     ([0.0], UNDECIDED)],
)  # fmt: skip
def test_c10_after_fine_tuning_is_judged_by_pairs_of_seeds(costs: list[float], expected: str) -> None:
    _, after = e07.c10_attention(made.loaded(**finetuned_attention(costs)))
    assert after.aspect == "fine-tuned" and after.verdict == expected
    if len(costs) > 1:  # the seeds differ by a point each, which the pairs do not see
        assert "3 seeds, items paired" in after.uncertainty


def test_c10_after_fine_tuning_needs_both_variants() -> None:
    tables = finetuned_attention([0.01, 0.01])
    table = tables["e07_attention"]
    without = table[~(table["finetuned"] & table["variant"].eq("cats-50-finetuned"))]
    _, after = e07.c10_attention(made.loaded(e07_attention=without))
    assert after.verdict == NOT_TESTED and "cats-50 not measured" in after.reason


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


@pytest.mark.parametrize("loss, seeds, expected", [(1.305, 3, HOLDS), (1.34, 3, FAILS), (1.305, 1, UNDECIDED)])
def test_c11_fine_tuned_is_judged_over_seeds(loss: float, seeds: int, expected: str) -> None:
    table = made.finetuning(seeds=seeds)
    at = (table["variant"] == "cats-50") & (table["step"] == 400)
    table.loc[at, "eval_loss"] += loss - LOSS["cats-50"]
    assert verdict(e03.c11_finetuned_perplexity, e03_finetuning=table) == expected
