"""The report's section on quantised weights and its rule, on made-up rows: nothing here was measured."""

import numpy as np
import pytest

from experiments.framework.tables import QuantizationSpeedSample
from reports import e09
from reports.core import style
from reports.core.verdicts import FAILS, HOLDS, NOT_TESTED, UNDECIDED
from reports.e09 import generation, summary
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
    others = shown["ms"] == "not measured"
    assert (shown.loc[~others, "Of the bound"] != style.DASH).all()
    assert list(shown.loc[others, "Kernel"]) == ["llama.cpp", "gpt-fast", "Marlin", "GemLite", "bitsandbytes"]


def test_fraction_of_the_bound_is_of_the_geometric_mean_of_the_rounds() -> None:
    """Two slow rounds of five: it is 2^(2/5) times the median, and what the row says, of a median, is not read."""
    tables = made.quantization()
    speed = tables["e09_speed"].assign(bound_ms=1.0, fraction_of_bound=0.5)
    keys = list(QuantizationSpeedSample.key)
    rounds = speed.loc[speed["error"] == "", keys].assign(milliseconds="2.0;4.0;2.0;4.0;2.0")
    for kept, expected in ((rounds, "38 %"), (rounds.iloc[:0], "50 %")):
        run = made.loaded(**{**tables, "e09_speed": speed, "e09_rounds": kept})
        ((_, part),) = e09.groups(run.tables["e09_speed"])
        shown = e09.speed_table(run, part)
        assert set(shown.loc[shown["ms"] != "not measured", "Of the bound"]) == {expected}


def test_generation_is_compared_with_dense_of_the_same_format_and_with_unquantised() -> None:
    run = made.loaded(**made.quantization())
    ((bench, part),) = generation.groups(run.tables["e09_generation"])
    shown = generation.generation_table(part)
    measured = shown[shown["Tokens/s"] != "not measured"]
    assert list(measured["Over dense"]) == [style.DASH, "1.20x ± 0.001", style.DASH, "1.50x ± 0.001"]
    assert list(measured["Over unquantised"]) == ["1.00x", "1.00x", "3.00x", "3.75x"]
    assert measured["Over unquantised dense"].iloc[-1] == "4.50x"
    assert list(measured["GB"]) == ["14.5", "14.5", "6.00", "6.00"] and set(measured["Peak"]) == {"1.05x"}
    assert "gpt-fast" in set(shown["Variant"]) and "loop graph-tuned, 256 tokens" in generation.title(bench)
    figure = generation.generation_figure(run)
    assert figure is not None and len(figure.axes[0].patches) == 4
    assert any("not measured" in text.get_text() for text in figure.axes[0].texts)


def test_figures_and_what_was_not_measured() -> None:
    run = made.loaded(**made.quantization())
    assert e09.quality_figure(run).axes[0].get_title() == "a/model"
    figure = e09.speed_figure(run)
    assert figure is not None and figure.axes[0].get_title() == "Mistral-7B, bfloat16"
    assert any("llama.cpp" in text.get_text() for text in figure.axes[0].texts)
    text = " ".join(str(block) for block in (*e09.contents(run), *e09.more(run)))
    assert "llama.cpp" in text and "not measured" in text
    assert "takes one scale per row" in text  # why a case was not timed


def test_effects_are_per_block() -> None:
    from reports.rules.e09 import effects

    blocks = {("none", "dense"): 1.0, ("none", "s"): 1.2, ("q", "dense"): 1.1, ("q", "s"): 1.35}
    together, apart = effects({key: np.array([value, value]) for key, value in blocks.items()}, "q", "s")
    assert together == pytest.approx([0.35, 0.35]) and apart == pytest.approx([0.3, 0.3])


def test_speed_memory_and_quality_stand_side_by_side() -> None:
    tables = made.quantization()
    run = made.loaded(**tables)
    shown = summary.summary_table(run)
    (perplexity, block, generated) = shown.columns[3:]
    assert perplexity.startswith("Perplexity") and block.startswith("Block, Mistral-7B") and "graph-tuned" in generated
    row = shown[(shown["Weights"] == "int4, groups of 128") & (shown["Sparsity"] == "50 %")].iloc[0]
    assert row["Memory"] == "26.6 %" and row[block] == "2.50x" and row[generated] == "4.50x"
    assert row[perplexity].startswith("+")
    assert shown["Weights"].iloc[-1] == "bitsandbytes: not measured"
    figure = summary.summary_figure(run)
    assert figure is not None and figure.axes[0].get_title().startswith("a/model; Mistral-7B, bfloat16")
    assert "not measured" in figure.axes[0].get_xlabel()
    alone = made.loaded(e09_speed=tables["e09_speed"])
    assert summary.summary_figure(alone) is None and summary.summary_table(alone).empty


def test_formats_of_all_layers_are_named_and_said() -> None:
    table = made.quantization_generation()
    ((bench, part),) = generation.groups(table)[:1]
    assert "all layers" not in generation.table_caption(bench, part)
    wider = part.assign(format=part["format"].replace("int4-128", "int4-128-all"))
    assert "Where it says “all layers”, attention" in generation.table_caption(bench, wider)
    assert "int4, groups of 128, all layers" in list(generation.generation_table(wider)["Weights"])
    assert summary.format_name("int8-row-all") == "int8, one scale per row, all layers"
