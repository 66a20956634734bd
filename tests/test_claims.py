"""How a number becomes a verdict, and all claims together, on made-up tables."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from reports.core.claims import CLAIMS, counts, findings_of, judge, rules_of, verdict_in
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
from reports.rules import e02, e03
from tests import make_results as made
from tests.claim_cases import timed
from tests.make_accuracy import criterion

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


def test_what_was_measured_again_later_decides() -> None:
    def run(day: int, gain: float, **options: int) -> Run:
        table = made.throughput(machine="NVIDIA H200", speedup=gain, loops=("eager", "graph-tuned"), **options)
        entry = {"started": f"2001-01-0{day}T00:00:00+00:00"} if day else {}
        return replace(made.loaded(e06_throughput=table), label=f"day {day}", provenance={"e06": entry})

    def verdicts(*runs: Run) -> dict[str, set[str]]:
        judged = judge(list(runs), discover())
        c9 = judged[(judged["claim"] == "C9") & (judged["column"] == GPU)]
        return {label: set(of["verdict"]) for label, of in c9.groupby("run")}

    assert verdicts(run(1, 1.1), run(2, 1.4)) == {"day 1": {NOT_TESTED}, "day 2": {HOLDS}}
    assert verdicts(run(3, 1.1), run(2, 1.4)) == {"day 3": {FAILS}, "day 2": {NOT_TESTED}}
    assert verdicts(run(1, 1.1), run(2, 1.4, prompts=1)) == {"day 1": {FAILS}, "day 2": {UNDECIDED}}
    assert verdicts(run(0, 1.1), run(0, 1.4))["day 0"] == {FAILS, HOLDS}  # when is not recorded
    elsewhere = run(2, 1.4)
    elsewhere.tables["e06_throughput"]["machine"] = "NVIDIA H100"
    assert verdicts(run(1, 1.1), elsewhere) == {"day 1": {FAILS}, "day 2": {HOLDS}}


def test_a_run_of_a_single_prompt_does_not_blur_what_another_decides() -> None:
    claim = CLAIMS[6]
    columns = {"claim": claim.id, "column": GPU, "aspect": "", "condition": np.nan, "run": ""}
    findings = [
        ("one", UNDECIDED, "a single repeat: unknown"), ("one", HOLDS, ""), ("one", UNDECIDED, "within the error"),
        ("two", UNDECIDED, "a single prompt"), ("three", HOLDS, np.nan), ("three", FAILS, ""),
    ]  # fmt: skip
    rows = [{**columns, "model": model, "verdict": verdict, "reason": why} for model, verdict, why in findings]
    kept = findings_of(pd.DataFrame(rows), claim, GPU)
    assert list(kept.index) == [1, 2, 3, 4, 5]


def test_the_papers_own_numbers_pass_the_rules_except_where_the_report_says_so() -> None:
    """C5: the paper's own sparsity is up to 9.9 points off, as its rule says."""
    table1 = paper_table("table1_zero_shot").query("task != 'average' and model in ['Mistral-7B', 'Llama2-7B']")
    table = table1.rename(columns={"accuracy": "value"}).assign(
        criterion=table1["variant"].map(criterion), sparsity_target=np.nan, sparsity_measured=np.nan,
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
