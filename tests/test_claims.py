"""Every verdict rule on made-up tables, on both sides of its bound, with errors unknown and single seeds."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from reports.core.claims import CLAIMS, counts, judge, rules_of, verdict_in
from reports.core.load import Run, paper_table
from reports.core.section import discover
from reports.core.statistics import Estimate
from reports.core.verdicts import (
    CPU,
    FAILS,
    GPU,
    HOLDS,
    NOT_TESTED,
    POCKET,
    REAL,
    UNDECIDED,
    Finding,
    combined,
    decide,
)
from reports.rules import e01, e02, e03, e04, e05, e06, e07
from tests import make_results as made

Table = pd.DataFrame


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1
    return findings[0]


def verdict(rule: Callable[[Run], list[Finding]], **tables: Table) -> str:
    return only(rule(made.loaded(**tables))).verdict


# --- how a number becomes a verdict


@pytest.mark.parametrize(
    "intervals, expected",
    [
        ([(0.1, 0.2)], HOLDS),
        ([(0.0, 0.2)], HOLDS),
        ([(-0.2, -0.1)], FAILS),
        ([(-0.1, 0.1)], UNDECIDED),
        ([(0.1, 0.2), (-0.1, 0.1)], UNDECIDED),
        ([(0.1, 0.2), (-0.2, -0.1)], FAILS),
        ([(-0.1, 0.1), (-0.2, -0.1)], FAILS),
        ([(math.nan, math.nan)], UNDECIDED),
        ([(0.1, 0.2), (math.nan, math.nan)], UNDECIDED),
        ([(-0.2, -0.1), (math.nan, math.nan)], FAILS),
        ([], NOT_TESTED),
    ],
)
def test_only_a_whole_interval_decides(intervals: list[tuple[float, float]], expected: str) -> None:
    margins = [("x", Estimate((low + high) / 2, low, high)) for low, high in intervals]
    assert decide(margins)[0] == expected


def test_an_unknown_error_never_counts_as_none() -> None:
    assert decide([("lead", Estimate(0.9, math.nan, math.nan, "1 seed"))]) == (
        UNDECIDED,
        "error unknown: lead (1 seed)",
    )


def test_a_claim_holds_in_a_column_only_where_it_holds_everywhere() -> None:
    assert combined([HOLDS, HOLDS, NOT_TESTED]) == HOLDS
    assert combined([HOLDS, UNDECIDED]) == UNDECIDED
    assert combined([HOLDS, UNDECIDED, FAILS]) == FAILS
    assert combined([NOT_TESTED]) == combined([]) == NOT_TESTED


def test_the_pocket_model_has_its_own_words() -> None:
    assert Finding("pocket", POCKET, HOLDS).words == "holds on the pocket model"
    assert Finding("pocket", POCKET, FAILS).words == "does not hold on the pocket model"
    assert Finding("other", REAL, HOLDS).words == HOLDS
    judged = judge([made.loaded(e02_zero_shot=made.zero_shot("pocket"))], discover())
    assert "holds here" not in set(judged["verdict"]) and "holds on the pocket model" in set(judged["verdict"])


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
        assert finding.verdict == expected and "paired over items" in finding.uncertainty
        assert "table's" not in finding.uncertainty


def test_c2_with_an_unknown_error_is_undecided() -> None:
    table = accuracy(cats_50=0.70).assign(difference_stderr=np.nan)
    assert verdict(e02.c2_near_base, e02_zero_shot=table) == UNDECIDED


def test_a_base_model_at_chance_tests_nothing() -> None:
    table = made.zero_shot(accuracy={**made.ACCURACY, "dense": 0.31})  # chance is 0.30, the mean's error 0.007
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
    table = made.zero_shot(accuracy={**made.ACCURACY, level: made.ACCURACY["relufication"] + lead})
    assert verdict(e02.c3_beats_relufication, e02_zero_shot=table) == expected


def test_c3_pairs_over_items_where_they_were_kept() -> None:
    table = made.with_item_values(made.zero_shot(accuracy={**made.ACCURACY, "cats-90": 0.41}))
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
    values = {**made.FINAL, **{name.replace("_", "-"): value for name, value in final.items()}}
    table = made.finetuning(final=values, seeds=seeds)
    table["accuracy"] = (table["accuracy"] * made.ITEMS).round() / made.ITEMS
    return {"e03_finetuning": table, "e03_items": made.finetuning_items(table)}


@pytest.mark.parametrize("end, expected", [(0.72, HOLDS), (0.685, UNDECIDED), (0.675, UNDECIDED), (0.64, FAILS)])
def test_c4_compares_cats_70_with_the_base_before_fine_tuning(end: float, expected: str) -> None:
    tables = tuned(cats_70=end, dense=0.80)  # what base gains by fine-tuning does not count
    tables = {name: of[of["step"].isin([0, 400])] for name, of in tables.items()}
    assert verdict(e03.c4_finetuned, **tables) == expected


@pytest.mark.parametrize("end, expected", [(0.62, HOLDS), (0.551, UNDECIDED), (0.50, FAILS)])
def test_c4_needs_every_level_at_every_step(end: float, expected: str) -> None:
    assert verdict(e03.c4_finetuned, **tuned(cats_70=0.72, cats_90=end)) == expected


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
    table = made.task_finetuning(accuracy={**made.TASK_ACCURACY, **named}, seeds=seeds)
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


# --- C7


def timed(half: float, more: float, compiled: float | None = 0.95, machine: str = "made-up machine") -> Table:
    """Latency in which CATS is `half` and `more` times as fast as the fastest dense at 50 and 70 %."""
    table = made.latency(machine, dtypes=("float32",), rows=(1,), compiled=compiled)
    for shape, part in table.groupby("shape"):
        dense = part.loc[part["implementation"].isin(["dense", "dense-compiled"]), "geomean_ms"].min()
        for target, speedup in ((0.5, half), (0.7, more)):
            at = (table["shape"] == shape) & (table["implementation"] == "cats") & (table["sparsity_target"] == target)
            table.loc[at, "geomean_ms"] = dense / speedup
    return table


def c7(table: Table, noise: float = 0.01, kept: bool = True) -> Finding:
    samples = {"e05_rounds": made.rounds(table, noise)} if kept else {}
    findings = e05.c7_kernel_speed(made.loaded(e05_mlp_latency=table, **samples))
    assert [finding.model for finding in findings] == ["Mistral-7B", "Llama2-7B"]
    assert len({finding.verdict for finding in findings}) == 1
    return findings[0]


@pytest.mark.parametrize(
    "half, more, expected",
    [(1.45, 1.75, HOLDS), (1.40, 1.75, UNDECIDED), (1.45, 1.70, UNDECIDED), (1.35, 1.75, FAILS), (1.45, 1.65, FAILS)],
)
def test_c7_needs_both_sparsities(half: float, more: float, expected: str) -> None:
    assert c7(timed(half, more)).verdict == expected


def test_c7_is_judged_over_the_fastest_dense_and_shows_the_other_two_ratios() -> None:
    table = timed(1.45, 1.75, compiled=0.5)
    finding = c7(table)
    assert finding.verdict == HOLDS
    own = table[(table["shape"] == "Mistral-7B") & (table["implementation"] == "cats")]
    own = own.set_index("sparsity_target")["geomean_ms"]
    words = f"1.45x over the compiled MLP, 2.90x over torch's, {own[0.0] / own[0.5]:.2f}x over our kernel at 0 %"
    assert words in finding.ours
    assert "over torch's MLP" in c7(timed(1.45, 1.75, compiled=1.2)).ours  # slower: torch's own is the stronger


def test_c7_without_the_compiled_dense_or_without_rounds_is_undecided() -> None:
    finding = c7(timed(1.9, 2.9, compiled=None))
    assert finding.verdict == UNDECIDED and "compiled MLP" in finding.reason
    finding = c7(timed(1.9, 2.9), kept=False)
    assert finding.verdict == UNDECIDED and "no rounds were kept" in finding.reason
    failed = timed(1.9, 2.9)
    at = failed["implementation"] == "dense-compiled"
    failed.loc[at, ["error", "geomean_ms"]] = ["no C++ compiler", np.nan]
    assert "no C++ compiler" in c7(failed).reason


def test_c7_pairs_the_rounds() -> None:
    """Rounds drift by 30 % together: that is in no ratio; noise of their own is."""
    assert c7(timed(1.45, 1.75), noise=0.01).verdict == HOLDS
    assert c7(timed(1.45, 1.75), noise=0.5).verdict == UNDECIDED


def test_c7_without_the_sparsities_or_with_failures_is_not_tested() -> None:
    table = made.latency(dtypes=("float32",), rows=(1,))
    assert c7(table[table["sparsity_target"] < 0.6]).verdict == NOT_TESTED
    at = table["implementation"] == "cats"
    table.loc[at, ["error", "geomean_ms"]] = ["out of memory", np.nan]
    assert c7(table).verdict == NOT_TESTED


def test_c7_is_not_judged_on_a_threshold_per_neuron_or_another_decider() -> None:
    table = timed(1.35, 1.65)
    for column, value in (("threshold", "vector"), ("decider", "up")):
        faster = table[table["implementation"] == "cats"].assign(**{column: value})
        faster["geomean_ms"] /= 2
        assert c7(pd.concat([faster, table])).verdict == FAILS


def test_quantised_weights_are_no_condition_of_the_paper() -> None:
    slow = timed(1.2, 1.4).assign(dtype="int8")
    assert c7(pd.concat([timed(1.45, 1.75), slow])).verdict == HOLDS
    assert e05.c7_kernel_speed(made.loaded(e05_mlp_latency=slow)) == []
    table = made.throughput(speedup=1.05).assign(dtype="int4")
    assert e06.c9_generation(made.loaded(e06_throughput=table)) == []


def test_c7_counts_a_dense_that_was_timed_for_another_reason() -> None:
    table = timed(1.45, 1.75)
    at = table["implementation"] == "dense-compiled"
    assert c7(table.assign(condition=table["condition"].where(~at, "growth"))).verdict == HOLDS
    growth = table.assign(condition="growth")
    assert e05.c7_kernel_speed(made.loaded(e05_mlp_latency=growth))[0].verdict == NOT_TESTED


def test_c7_finds_the_rounds_where_no_threads_are_counted() -> None:
    assert c7(timed(1.45, 1.75, machine="NVIDIA H200").assign(threads=np.nan)).verdict == HOLDS


@pytest.mark.parametrize("machine, column", [("NVIDIA H200", GPU), ("AMD EPYC, 2 cores", CPU)])
def test_c7_stands_in_the_column_of_its_processor(machine: str, column: str) -> None:
    assert c7(timed(1.45, 1.75, machine=machine)).column == column


# --- C8

H100 = "NVIDIA H100 80GB HBM3"


def paper_kernels(own: float = 1.0, **cost: float) -> Table:
    """Our versions of the paper's kernels on the authors' machine, at `own` times the authors' time."""
    authors = paper_table("authors_kernels_h100")
    table = made.latency(H100, dtypes=("float32",), rows=(1,))
    table = table[table["shape"] == "Mistral-7B"]
    theirs = authors[(authors["shape"] == "Mistral-7B") & (authors["dtype"] == "float32")]
    for kernel in ("fused-mask", "fused-compact"):
        at = table["implementation"] == kernel
        times = theirs[theirs["implementation"] == kernel].sort_values("sparsity")
        interpolated = np.interp(table.loc[at, "sparsity_target"], times["sparsity"], times["latency_ms"])
        table.loc[at, "geomean_ms"] = own * cost.get(kernel.replace("-", "_"), 1.0) * interpolated
    mask = table[table["implementation"] == "fused-mask"].set_index("sparsity_target")["geomean_ms"]
    at = table["implementation"] == "gather"
    unfused = cost.get("gather", 1.5) * mask.reindex(table.loc[at, "sparsity_target"]).to_numpy()
    table.loc[at, "geomean_ms"] = unfused
    return table


def c8(table: Table) -> Finding:
    return only(e05.c8_fused_mask(made.loaded(e05_mlp_latency=table, e05_rounds=made.rounds(table))))


def test_c8_is_tested_only_with_kernels_as_fast_as_the_authors_own() -> None:
    assert c8(paper_kernels(1.0)).verdict == HOLDS
    assert c8(paper_kernels(1.04)).verdict == HOLDS
    slow = c8(paper_kernels(1.07))
    assert slow.verdict == NOT_TESTED
    assert "fused-mask takes up to 1.07x" in slow.reason and "fused-compact takes up to 1.07x" in slow.reason
    elsewhere = paper_kernels().assign(machine="NVIDIA L4")
    assert "not compared with the authors' own kernels on NVIDIA L4" in c8(elsewhere).reason


def test_c8_needs_both_rivals_beaten() -> None:
    assert c8(paper_kernels(gather=0.9)).verdict == FAILS
    assert c8(paper_kernels(gather=1.0)).verdict == UNDECIDED
    assert c8(paper_kernels(fused_compact=0.8)).verdict == FAILS
    unkept = e05.c8_fused_mask(made.loaded(e05_mlp_latency=paper_kernels()))
    assert only(unkept).verdict == UNDECIDED


@pytest.mark.parametrize("kernel", ["fused-mask", "fused-compact", "gather"])
def test_c8_nothing_stands_in_for_a_kernel_of_the_paper(kernel: str) -> None:
    table = paper_kernels()
    finding = c8(table[table["implementation"] != kernel])
    assert finding.verdict == NOT_TESTED and kernel in finding.reason


# --- C9


def c9(**options: float) -> dict[str, Finding]:
    table = made.throughput(**options)  # type: ignore[arg-type]
    table = table[table["dtype"] == "float32"]
    findings = e06.c9_generation(made.loaded(e06_throughput=table))
    return {finding.aspect: finding for finding in findings}


@pytest.mark.parametrize(
    "model, ratio, expected",
    [
        ("mistral-7b", 1.23, HOLDS),
        ("mistral-7b", 1.21, UNDECIDED),
        ("mistral-7b", 1.19, FAILS),
        ("llama2-7b", 1.20, HOLDS),
        ("llama2-7b", 1.16, FAILS),
        ("mistralai/Mistral-7B-v0.1", 1.23, HOLDS),
        ("mistralai/Mistral-7B-v0.1", 1.19, FAILS),
        ("meta-llama/Llama-2-7b-hf", 1.20, HOLDS),
        ("llama2-13b", 1.50, NOT_TESTED),
    ],
)
def test_c9_has_the_papers_own_bars(model: str, ratio: float, expected: str) -> None:
    assert {finding.verdict for finding in c9(speedup=ratio, model=model).values()} == {expected}


def test_c9_judges_the_papers_loop_and_the_fastest_apart() -> None:
    table = made.throughput(speedup=1.3)
    table = table[table["dtype"] == "float32"]
    eager = (table["loop"] == "eager") & (table["criterion"] == "cats")
    table.loc[eager, "tokens_per_second"] *= 0.8
    findings = {f.aspect: f for f in e06.c9_generation(made.loaded(e06_throughput=table))}
    assert findings[e06.EAGER_ASPECT].verdict == FAILS
    assert findings[e06.FASTEST_ASPECT].verdict == HOLDS
    assert "loop compiled" in findings[e06.FASTEST_ASPECT].ours


def test_c9_needs_the_strongest_form_of_dense() -> None:
    gpu = c9(machine="NVIDIA H200", loops=("eager", "graph"))
    assert gpu[e06.EAGER_ASPECT].verdict == HOLDS
    assert gpu[e06.FASTEST_ASPECT].verdict == UNDECIDED and "graph-tuned" in gpu[e06.FASTEST_ASPECT].reason
    tuned_too = c9(machine="NVIDIA H200", loops=("eager", "graph", "graph-tuned"))
    assert tuned_too[e06.FASTEST_ASPECT].verdict == HOLDS and "loop graph-tuned" in tuned_too[e06.FASTEST_ASPECT].ours
    without = c9(machine="NVIDIA H200", loops=("graph", "graph-tuned"))
    assert without[e06.EAGER_ASPECT].verdict == NOT_TESTED


def test_c9_takes_the_attention_with_which_dense_is_fastest() -> None:
    table = made.throughput(speedup=1.3)
    slower = table.assign(attention="eager", tokens_per_second=table["tokens_per_second"] * 0.5)
    slower.loc[slower["criterion"] == "cats", "tokens_per_second"] *= 0.5
    findings = e06.c9_generation(made.loaded(e06_throughput=pd.concat([slower, table])))
    assert {finding.verdict for finding in findings} == {HOLDS}


@pytest.mark.parametrize("options", [{"prompts": 1}, {"repeats": 1}, {"prompts": 1, "repeats": 1}])
def test_c9_with_a_single_prompt_or_repeat_is_undecided(options: dict[str, int]) -> None:
    for finding in c9(speedup=1.6, **options).values():
        assert finding.verdict == UNDECIDED and "single" in finding.reason


def test_c9_is_undecided_where_prompts_disagree() -> None:
    assert {finding.verdict for finding in c9(speedup=1.25, noise=0.1).values()} == {UNDECIDED}


def test_c9_counts_lengths_of_one_generation_once() -> None:
    """Sixteen lengths read from each generation decide no more than one: prompts differ by 10 %."""
    table = made.throughput(speedup=1.25, noise=0.1)
    one = table[(table["condition"] == "figure") & (table["generated_tokens"] == 16)]
    many = pd.concat([one.assign(generated_tokens=n) for n in range(16, 32)])
    shown = [{f.uncertainty for f in e06.c9_generation(made.loaded(e06_throughput=of))} for of in (one, many)]
    assert shown[0] == shown[1]
    assert all(
        "1.11 to 1.39x" in words for words in shown[0]
    )  # sd 0.105 of 6 logs, t(5) = 2.57: 1.25 times e to +-0.11


def test_c9_a_part_of_a_model_decides_nothing() -> None:
    findings = c9(speedup=1.9, layers=2)
    assert {finding.verdict for finding in findings.values()} == {NOT_TESTED}
    assert all("2 of 32 layers" in finding.reason for finding in findings.values())


def test_c9_takes_figure_4s_rows_only() -> None:
    table = made.throughput(speedup=1.3).assign(condition="growth")
    assert e06.c9_generation(made.loaded(e06_throughput=table)) == []


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
    table.loc[at, "eval_loss"] += loss - made.LOSS["cats-50"]
    assert verdict(e03.c11_finetuned_perplexity, e03_finetuning=table) == expected


# --- all claims together


def test_a_foreign_criterion_changes_no_verdict() -> None:
    """Another criterion in every table, better or worse than CATS, at the same levels."""
    sections = discover()
    tables = made.all_tables()
    before = judge([made.loaded(**tables)], sections).drop(columns="rule")
    for factor in (0.5, 1.5):
        changed = {}
        for name, table in tables.items():
            if "variant" not in table or "criterion" not in table:
                changed[name] = table
                continue
            foreign = table[table["criterion"] == "cats"].copy()
            foreign["variant"] = foreign["variant"].str.replace("cats", "teal")
            foreign["criterion"] = "teal"
            for column in ("value", "accuracy", "tokens_per_second", "eval_loss", "sparsity_measured"):
                if column in foreign:
                    foreign[column] *= factor
            if "correct" in foreign:
                foreign["correct"] = foreign["correct"].str.replace("0" if factor > 1 else "1", "0")
            changed[name] = pd.concat([foreign, table, foreign], ignore_index=True)
        after = judge([made.loaded(**changed)], sections).drop(columns="rule")
        pd.testing.assert_frame_equal(before, after)


def test_judge_names_the_command_for_what_is_missing_or_broken() -> None:
    run = Run("made-up", made.Path(), {"e05_mlp_latency": made.latency()}, {"e02_zero_shot": "column stderr missing"})
    judged = judge([run], discover())
    words = "claim statement paper run column model condition aspect ours uncertainty verdict reason rule command"
    assert list(judged.columns) == words.split()
    assert list(dict.fromkeys(judged["claim"])) == [f"C{i}" for i in range(1, 12)]
    by_claim = judged.drop_duplicates("claim").set_index("claim")
    assert by_claim.loc["C9", ["verdict", "command"]].tolist() == [NOT_TESTED, "nox -s experiment -- e06"]
    assert by_claim.loc["C2", "reason"] == "e02_zero_shot.csv is broken: column stderr missing"
    assert judged["rule"].str.match(r"Holds here .*if.*\w.*[.)]$").all()


def test_every_claim_has_a_rule_and_every_rule_a_claim() -> None:
    sections = discover()
    assert all(rules_of(claim, sections) for claim in CLAIMS)
    names = {name for section in sections for name, _ in section.rules}
    assert names == {claim.id for claim in CLAIMS}


def test_counts_are_by_claim_and_not_by_row() -> None:
    judged = judge([made.loaded(e05_mlp_latency=timed(1.45, 1.75), e06_throughput=made.throughput())], discover())
    assert (judged["claim"] == "C7").sum() == 2 and (judged["claim"] == "C9").sum() == 4
    by_column = counts(judged)
    assert sum(by_column[REAL].values()) == sum(by_column[POCKET].values()) == 8
    assert sum(by_column[GPU].values()) == sum(by_column[CPU].values()) == 3
    c9_claim = next(claim for claim in CLAIMS if claim.id == "C9")
    assert verdict_in(judged, c9_claim, CPU) == HOLDS and verdict_in(judged, c9_claim, GPU) == NOT_TESTED


def test_the_papers_own_numbers_pass_the_rules_except_where_the_report_says_so() -> None:
    """C5: the paper's own sparsity is up to 9.9 points off, as its rule says."""
    table1 = paper_table("table1_zero_shot").query("task != 'average' and model in ['Mistral-7B', 'Llama2-7B']")
    table = table1.rename(columns={"accuracy": "value"}).assign(
        criterion=table1["variant"].map(made.criterion), sparsity_target=np.nan, sparsity_measured=np.nan,
        metric="acc", stderr=0.005, difference=np.nan, difference_stderr=0.0005, items=1000, chance=0.3,
    )  # fmt: skip
    for rule in (e02.c2_near_base, e02.c3_beats_relufication):
        assert [finding.verdict for finding in rule(made.loaded(e02_zero_shot=table))] == [HOLDS, HOLDS]
    figure5 = paper_table("figure5_finetuned_sparsity")
    sparsity = pd.concat(
        figure5.assign(
            criterion="cats", seed=seed, step=2600, layer="all", layer_index=0, recalibrated=False,
            accuracy_mean=np.nan, sparsity_measured=figure5["average_sparsity_percent"] / 100,
            sparsity_target=figure5["variant"].str[-2:].astype(float) / 100,
        )
        for seed in range(3)
    )  # fmt: skip
    findings = e03.c5_sparsity_kept(made.loaded(e03_sparsity=sparsity))
    assert [finding.verdict for finding in findings] == [FAILS, FAILS]
    v4 = paper_table("table3_v4_perplexity")
    increases = v4.set_index(["variant", "fine_tuned"])["perplexity_increase_percent"]
    assert increases["cats-50"].max() < 2 and increases["relufication"].min() > 10
