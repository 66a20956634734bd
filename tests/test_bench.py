"""The floors of the speed guard, on made-up ratios: a machine without a baseline notices a kernel without its gain."""

import json

import pytest

from tests.bench_cpu import BASELINE, SPARSITIES, floors_by_bytes, gain_by_bytes, regressions


def made_up(gain_kept: float) -> dict[str, float]:
    """Ratios of a kernel that keeps so much of the gain that the bytes promise."""
    ratios = {"dense/0.0": 1.0}
    for sparsity in SPARSITIES[1:]:
        speed = 1 + gain_kept * (gain_by_bytes(sparsity) - 1)
        ratios |= {f"dense/{sparsity}": speed, f"self/{sparsity}": speed}
    return ratios


def test_the_gain_by_bytes():
    assert [gain_by_bytes(s) for s in (0.0, 0.5, 1.0)] == [1.0, 1.5, 3.0]
    assert floors_by_bytes()["dense/0.5"] == floors_by_bytes()["self/0.5"] == 1.25


def test_without_a_baseline_half_of_the_gain_must_be_there():
    assert regressions(made_up(1.0), {}) == regressions(made_up(0.51), {}) == []
    names = {line.split()[0] for line in regressions(made_up(0.49), {})}
    assert names == set(made_up(1.0)) - {"dense/0.0"}
    assert regressions({**made_up(1.0), "dense/0.0": 0.96}, {}) == ["dense/0.0 is 0.96, allowed 0.97"]


@pytest.mark.parametrize(("slower", "caught"), [(1.0, False), (2.0, True)])
def test_the_committed_ratios_pass_and_half_of_them_do_not(slower: float, caught: bool):
    """The floors are robust: what was measured on the machines of the baseline passes, a kernel half as fast fails."""
    for machine in json.loads(BASELINE.read_text()).values():
        for measured in machine.values():
            ratios = {name: value / (slower if name.startswith("dense") else 1) for name, value in measured.items()}
            assert bool(regressions(ratios, {})) == caught
            assert bool(regressions(ratios, measured)) == caught
