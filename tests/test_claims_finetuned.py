"""The rules of C4, C5, C6, C10 and fine-tuned C11 on made-up tables: both sides of each bound, single seeds."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from reports.core.verdicts import FAILS, HOLDS, NOT_TESTED, UNDECIDED
from reports.rules import e03, e04, e07
from tests import make_results as made
from tests.claim_cases import Table, only, verdict
from tests.make_accuracy import ITEMS
from tests.make_finetuning import FINAL, LOSS, TASK_ACCURACY

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


@pytest.mark.parametrize("loss, seeds, expected", [(1.305, 3, HOLDS), (1.34, 3, FAILS), (1.305, 1, UNDECIDED)])
def test_c11_fine_tuned_is_judged_over_seeds(loss: float, seeds: int, expected: str) -> None:
    table = made.finetuning(seeds=seeds)
    at = (table["variant"] == "cats-50") & (table["step"] == 400)
    table.loc[at, "eval_loss"] += loss - LOSS["cats-50"]
    assert verdict(e03.c11_finetuned_perplexity, e03_finetuning=table) == expected
