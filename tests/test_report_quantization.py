"""The report's section on quantised weights and its rule, on made-up rows: nothing here was measured."""

import numpy as np
import pytest

from reports import e09
from reports.core import style
from reports.core.verdicts import FAILS, HOLDS, NOT_TESTED, UNDECIDED
from reports.rules.e09 import damages_add_up
from tests import make_results as made


def findings(interaction: float = 0.0, noise: float = 1e-3, **changes: object) -> list:
    tables = made.quantization(interaction, noise)
    return damages_add_up(made.loaded(**{**tables, **changes}))


@pytest.mark.parametrize(
    ("interaction", "noise", "expected"),
    [
        (0.0, 1e-3, HOLDS),
        (0.5, 1e-3, FAILS),  # more than the sum
        (-0.5, 1e-3, FAILS),  # less than the sum
        (0.1, 1e-3, UNDECIDED),  # at the bound
        (0.0, 0.5, UNDECIDED),  # noise
    ],
)
def test_whether_the_damages_add_up(interaction: float, noise: float, expected: str) -> None:
    found = findings(interaction, noise)
    assert [one.condition for one in found] == ["int8-row", "int4-128"]
    assert {one.verdict for one in found} == {expected}
    assert all("together" in one.ours for one in found)


def test_without_losses_of_blocks_nothing_is_decided() -> None:
    tables = made.quantization()
    assert {one.verdict for one in findings(e09_blocks=tables["e09_blocks"].iloc[:0])} == {NOT_TESTED}
    short = tables["e09_blocks"].copy()
    short.loc[short["format"] == "none", "nats"] = "2.0;2.1"
    assert {one.verdict for one in findings(e09_blocks=short)} == {NOT_TESTED}
    single = tables["e09_blocks"].assign(nats="2.0")
    assert {one.verdict for one in findings(e09_blocks=single)} == {UNDECIDED}
    assert damages_add_up(made.loaded()) == []


def test_quality_table_has_a_row_per_format() -> None:
    shown = e09.quality_table(made.quantization()["e09_quantization"], "a/model")
    assert list(shown["Weights"]) == ["unquantised", "int8, one scale per row", "int4, groups of 128"]
    assert shown["Dense"].iloc[0] == style.DASH
    assert shown["50 %"].iloc[2].startswith("+")
    assert list(shown["Memory"]) == ["100.0 %", "50.1 %", "26.6 %"]


def test_speed_table_compares_with_the_fastest_dense_of_the_same_bits() -> None:
    run = made.loaded(**made.quantization())
    ((_, part),) = e09.groups(run.tables["e09_speed"])
    shown = e09.speed_table(run, part)
    half = shown[(shown["Weights"] == "int4, groups of 128") & (shown["Kernel"] == "ours, 50 %")].iloc[0]
    assert half["Over bfloat16"] == "2.00x"
    assert half["Over dense"] == "1.50x"
    assert (shown["Of the bound"] != style.DASH).all()


def test_figures_and_what_was_not_measured() -> None:
    run = made.loaded(**made.quantization())
    assert e09.quality_figure(run).axes[0].get_title() == "a/model"
    figure = e09.speed_figure(run)
    assert figure is not None and figure.axes[0].get_title() == "Mistral-7B, bfloat16"
    text = " ".join(str(block) for block in e09.contents(run))
    assert "llama.cpp" in text and "not measured" in text
    assert "takes one scale per row" in text  # why a case was not timed


def test_effects_are_per_block() -> None:
    from reports.rules.e09 import effects

    blocks = {("none", "dense"): 1.0, ("none", "s"): 1.2, ("q", "dense"): 1.1, ("q", "s"): 1.35}
    together, apart = effects({key: np.array([value, value]) for key, value in blocks.items()}, "q", "s")
    assert together == pytest.approx([0.35, 0.35]) and apart == pytest.approx([0.3, 0.3])
