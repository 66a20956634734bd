"""Typed options: what a profile's table becomes, and one sentence for everything that it must not hold."""

from dataclasses import dataclass
from typing import Annotated

import pytest

from experiments.framework.common_options import EvaluationOptions
from experiments.framework.options import (
    Count,
    MayBeEmpty,
    OneOf,
    Positive,
    Rising,
    Seed,
    Sparsity,
    Whole,
    parse,
    to_json,
)


@dataclass(frozen=True, kw_only=True)
class Growth:
    batches: tuple[Count, ...] = ()
    loop: Annotated[str, OneOf(("eager", "graph"))] = "eager"


@dataclass(frozen=True, kw_only=True)
class Options:
    levels: tuple[Sparsity, ...]
    lengths: dict[Annotated[str, OneOf(lambda: ("eager", "graph"))], tuple[Count, ...]]
    steps: Annotated[tuple[Count, ...], Rising()] = (10, 20)
    criteria: Annotated[tuple[str, ...], MayBeEmpty()] = ()
    growth: Growth = Growth()
    limit: Count | None = None
    warmups: Whole = 5
    rate: Positive = 0.1
    seed: Seed = 0
    tuned: bool = True

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < self.warmups:
            raise ValueError(f"limit must be at least warmups ({self.warmups}), not {self.limit}")


GIVEN = {"levels": [0, 0.5], "lengths": {"eager": [8, 16]}}


def test_a_table_becomes_typed_options() -> None:
    made = parse(Options, {**GIVEN, "growth": {"batches": [2]}, "rate": 1, "criteria": []}, "e90")
    assert made.levels == (0.0, 0.5) and isinstance(made.levels[0], float) and made.rate == 1.0
    assert made.growth == Growth(batches=(2,)) and made.limit is None and made.criteria == ()
    assert to_json(made)["lengths"] == {"eager": [8, 16]} and to_json(made)["growth"]["batches"] == [2]
    hash(made.levels)


BAD = {
    "unknown": ({"levls": [0.5]}, "e90 has no option levls: allowed are criteria, growth, "),
    "unknown below": ({"growth": {"batch": [1]}}, "e90.growth has no option batch: allowed are batches, loop"),
    "missing": ({"levels": None}, "e90.levels is missing: give a list of at least one, each a number in [0, 1)"),
    "a number for a list": ({"levels": 0.5}, "e90.levels must be a list of at least one, each a number in [0, 1), not"),
    "empty": ({"levels": []}, "e90.levels must be a list of at least one"),
    "out of range": ({"levels": [0.5, 1.0]}, "e90.levels must be a list of at least one, each a number in [0, 1), not"),
    "nan": ({"levels": [float("nan")]}, "not [nan]"),
    "twice": ({"levels": [0.5, 0.5]}, "e90.levels must give each value once, not [0.5, 0.5]"),
    "a string for a number": ({"limit": "abc"}, "e90.limit must be a whole number, 1 or more, not 'abc'"),
    "a fraction for a whole number": ({"limit": 2.5}, "e90.limit must be a whole number, 1 or more, not 2.5"),
    "too small": ({"limit": 0}, "e90.limit must be a whole number, 1 or more, not 0"),
    "true for a number": ({"warmups": True}, "e90.warmups must be a whole number, 0 or more, not True"),
    "a number for true": ({"tuned": 1}, "e90.tuned must be true or false, not 1"),
    "not above": ({"rate": 0.0}, "e90.rate must be a number above 0, not 0.0"),
    "infinite": ({"rate": float("inf")}, "e90.rate must be a number above 0, not inf"),
    "seed": ({"seed": 2**31}, "e90.seed must be a whole number in [0, 2147483647], not 2147483648"),
    "no choice": ({"growth": {"loop": "x"}}, "e90.growth.loop must be one of eager, graph, not 'x'"),
    "a key": ({"lengths": {"x": [1]}}, "a key of e90.lengths must be one of eager, graph, not 'x'"),
    "a table's value": ({"lengths": {"eager": [0]}}, "e90.lengths.eager must be a list of at least one, each a whole"),
    "an empty table": ({"lengths": {}}, "e90.lengths must be a table of at least one KEY = VALUE"),
    "no table": ({"growth": 3}, "e90.growth must be a table with batches, loop, not 3"),
    "falling": (
        {"steps": [20, 10]},
        "e90.steps must be a list of at least one, each a whole number, 1 or more, rising",
    ),
    "several": ({"limit": 2}, "e90.limit must be at least warmups (5), not 2"),
    "long": ({"limit": "a" * 10**6}, "e90.limit must be a whole number, 1 or more, not 'aaaaaaa"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_allowed_is_one_sentence(case: str) -> None:
    table, expected = BAD[case]
    given = {key: value for key, value in {**GIVEN, **table}.items() if value is not None}
    with pytest.raises(ValueError) as refused:
        parse(Options, given, "e90")
    assert expected in str(refused.value) and len(str(refused.value)) < 300 and "\n" not in str(refused.value)


def test_texts_that_no_memory_holds_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"e02\.heldout_blocks must be at most 1953125 with length = 512, not 99999999"
    ):
        parse(EvaluationOptions, {"tasks": ["a"], "levels": [0.5], "heldout_blocks": 99_999_999}, "e02")
