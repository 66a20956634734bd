"""The report's section on criteria, on made-up rows: nothing here was measured."""

from dataclasses import replace

import pandas as pd
import pytest

from experiments.framework.tables import CriterionTextSample, pack_numbers
from reports import e08
from reports.core import style
from reports.core.merge import of_model, together
from reports.measures.frontier import accuracy_points, affords, fastest, text_points
from tests import make_results as made


@pytest.fixture
def table() -> pd.DataFrame:
    return made.criteria()


def test_best_first_with_errors_and_missed_targets(table) -> None:
    shown = e08.criteria_table(table, "a/model")
    assert list(shown[""]) == ["TEAL, model", "made-up", "CATS", "random (floor)"]
    assert shown["50 %"].iloc[1] == "+10.0 ± 1.1 %"
    assert shown["50 %"].iloc[0].endswith("(52.0 %)")  # beside the target
    assert shown["30 %"].iloc[3] == "over +1000 %"
    assert shown["Against CATS"].iloc[1] == "0.917 ± 0.009"
    assert shown["Against CATS"].iloc[2] == style.DASH


def kept(ratios: dict[float, tuple[float, float]], **changes: object) -> str:
    """What a criterion affords whose perplexity is so many times dense's, with so large an error, at each level."""
    rows = [made.criterion_row("dense", None, 1.0)]
    rows += [made.criterion_row("up", level, ratio, error=error) for level, (ratio, error) in ratios.items()]
    table = made.frame([replace(row, **changes) if row.criterion == "up" else row for row in rows])
    words = affords(text_points(table, None)[("a/model", "up", "mlp")])
    return words.words if words else "nothing"


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({0.3: (1.001, 0.001), 0.5: (1.005, 0.001), 0.7: (1.2, 0.01)}, "50 %"),
        ({0.3: (1.001, 0.001), 0.5: (1.009, 0.001), 0.7: (1.2, 0.01)}, "30 % (undecided to 50 %)"),
        ({0.3: (1.001, 0.001), 0.5: (1.05, 0.001), 0.7: (1.001, 0.001)}, "30 %"),  # what lies above a loss is no gain
        ({0.3: (1.009, 0.001), 0.5: (1.001, 0.001)}, "at least 50 %"),  # what is undecided below refutes nothing
        ({0.3: (1.05, 0.001), 0.5: (1.2, 0.001)}, "under 30 %"),
        ({0.3: (1.009, 0.001), 0.5: (1.011, 0.002), 0.7: (1.3, 0.01)}, "undecided at 30 to 50 %"),
        ({0.3: (1.009, 0.001), 0.5: (1.3, 0.002)}, "undecided at 30 %"),
        ({0.3: (0.99, 0.001), 0.5: (0.99, 0.001)}, "at least 50 %"),
        ({0.3: (1.001, float("nan"))}, "nothing"),
    ],
)
def test_what_a_criterion_affords(ratios, expected) -> None:
    assert kept(ratios) == expected


def test_a_level_that_skips_less_than_it_says_is_not_kept() -> None:
    assert kept({0.3: (1.001, 0.001)}) == "at least 30 %"
    assert kept({0.3: (1.001, 0.001)}, sparsity_measured=0.28) == "undecided at 30 %"


def test_the_samples_decide_where_they_were_kept() -> None:
    table = made.frame([made.criterion_row("dense", None, 1.0), made.criterion_row("up", 0.5, 1.0005, error=0.5)])
    assert affords(text_points(table, None)[("a/model", "up", "mlp")]).words == "undecided at 50 %"
    samples = made.frame(
        CriterionTextSample("a/model", name, variant, "mlp", 128, pack_numbers([3 + shift, 2 + shift, 2.5 + shift]))
        for name, variant, shift in (("dense", "dense", 0.0), ("up", "up-50", 0.0005))
    )
    (point,) = text_points(table, samples)[("a/model", "up", "mlp")]
    assert point.keeps and point.change.how == "paired over blocks of text"
    others = samples.assign(prompt="dense")  # another question: not taken for the answer
    assert not text_points(table, others)[("a/model", "up", "mlp")][0].keeps


def test_accuracy_is_judged_against_99_percent_of_dense() -> None:
    changes = {0.3: -0.002, 0.5: -0.0049, 0.7: -0.02}  # of 0.5: 0.005 is one per cent
    rows = [made.criterion_accuracy("dense", None, 0.0)]
    rows += [made.criterion_accuracy("up", level, change) for level, change in changes.items()]
    points = accuracy_points(made.frame(rows), None)[("a/model", "up", "mlp")]
    assert [(point.keeps, point.loses) for point in points] == [(True, False), (False, False), (False, True)]
    assert affords(points).words == "30 % (undecided to 50 %)"


def everything() -> dict[str, pd.DataFrame]:
    rows = [made.criterion_row("dense", None, 1.0), made.criterion_accuracy("dense", None, 0.0)]
    for level, loss in ((0.3, 1.002), (0.5, 1.005), (0.7, 1.3)):
        rows += [made.criterion_row("up", level, loss, error=0.001), made.criterion_row("cats", level, 1.2)]
        rows += [made.criterion_accuracy("up", level, -0.001), made.criterion_accuracy("cats", level, -0.1)]
        rows += [made.criterion_row("oracle", level, 1.0, error=0.001)]
    for prompt, loss in (("masked", 1.04), ("dense", 1.01)):
        more = {"metric": "continuation_perplexity", "prompt": prompt}
        rows += [replace(made.criterion_row("up", 0.5, loss), **more)]
    rows += [replace(made.criterion_row("dense", None, 1.0), metric="continuation_perplexity")]
    speeds = [
        made.criterion_speed("up", 0.5, 1.2),
        made.criterion_speed("up", 0.5, 1.4, loop="eager"),  # the ratio is larger, and so is the time
        made.criterion_speed("up", 0.7, 1.5),
        made.criterion_speed("up", 0.5, 1.1, "mlp", "Imaginary CPU"),
    ]
    slow = replace(speeds[1], value=70.0, dense_value=50.0)
    return {"e08_criteria": made.frame(rows), "e08_speed": made.frame([speeds[0], slow, *speeds[2:]])}


def test_the_table_says_what_each_affords_and_how_fast_it_is_there() -> None:
    shown = e08.affordable_table(made.loaded(**everything())).set_index("")
    assert list(shown.index) == ["oracle (ceiling)", "up", "CATS"]
    up = shown.loc["up"]
    assert up["Keeps 99 % of perplexity"] == "50 %" and up["Keeps 99 % of accuracy"] == "at least 70 %"
    assert up["Speed there (perplexity)"] == "1.20x token, NVIDIA Imaginary; 1.10x MLPs, Imaginary CPU"
    assert up["Speed there (accuracy)"] == "1.50x token, NVIDIA Imaginary"
    assert up["Speed at 50 %"] == up["Speed there (perplexity)"]
    assert shown.loc["CATS", "Keeps 99 % of perplexity"] == "under 30 %"
    assert shown.loc["CATS", "Speed there (perplexity)"] == style.DASH


def test_the_fastest_loop_is_the_one_in_which_the_variant_itself_is_fastest() -> None:
    speed = fastest(everything()["e08_speed"])
    at = speed[(speed["variant"] == "up-50") & (speed["what"] == "token")]
    assert list(at["loop"]) == ["graph"]


def test_accuracy_at_one_level_is_drawn_by_criterion() -> None:
    tables = everything()
    rows = tables["e08_criteria"]
    at_half = (rows["metric"] != "acc") | rows["sparsity_target"].isna() | (rows["sparsity_target"] == 0.5)
    figure = e08.frontier_figure(made.loaded(e08_criteria=rows[at_half]))
    accuracy = figure.axes[1]
    assert accuracy.get_xlabel() == "at 50 %"
    assert [tick.get_text() for tick in accuracy.get_xticklabels()] == ["up", "CATS"]


def test_a_dense_prompt_is_shown_beside_the_masked_one() -> None:
    shown = e08.prompts_table(everything()["e08_criteria"])
    assert shown.iloc[0].tolist()[:4] == ["a/model", "perplexity of continuations", "20.0", "up, 50 %"]
    assert shown.iloc[0].tolist()[4:] == ["+4.0 ± 1.0 %", "+1.0 ± 1.0 %"]


def test_the_figure_has_a_panel_per_question_and_leaves_out_what_is_beyond_use(table) -> None:
    figure = e08.frontier_figure(made.loaded(e08_criteria=table))
    mlps, whole = figure.axes
    assert (mlps.get_xlabel(), whole.get_xlabel()) == (
        "bytes of the MLPs, % of dense",
        "bytes of the model, % of dense",
    )
    assert len(mlps.lines) == 2 + 1  # neither random nor the scope "model"; and the line of 99 %
    assert len(whole.lines) == 3 + 1
    figure = e08.frontier_figure(made.loaded(**everything()))
    assert [ax.get_xlabel() for ax in figure.axes] == [
        "bytes of the MLPs, % of dense",
        "bytes of the MLPs, % of dense",
        "speed-up on GPU, whole token",
        "speed-up on CPU, MLPs",
    ]
    speed = figure.axes[2]
    (up,) = [line for line in speed.lines if len(line.get_xdata()) == 2 and line.get_xdata()[0] == 1.2]
    assert list(up.get_xdata()) == [1.2, 1.5]  # only what was measured: nothing at 30 %


def test_runs_of_different_models_are_one_and_of_the_same_model_two() -> None:
    a, b = (made.loaded(e08_criteria=made.criteria().assign(model=name)) for name in ("a", "b"))
    speed = made.loaded(e08_speed=everything()["e08_speed"].assign(model="a"))
    types = e08.SECTION.tables
    (joined,) = together([a, b, speed], types)
    assert list(joined.tables["e08_criteria"]["model"].unique()) == ["a", "b"] and len(joined.tables["e08_speed"]) == 4
    again = made.loaded(e08_criteria=a.tables["e08_criteria"].assign(value=1.0))
    assert len(together([a, again], types)) == 2, "nothing is averaged over runs"
    table = a.tables["e08_criteria"]
    dense = table["criterion"] == "dense"
    parts = [made.loaded(e08_criteria=table[dense | (table["criterion"] == name)]) for name in ("cats", "teal")]
    (whole,) = together(parts, types)
    assert list(whole.tables["e08_criteria"]["criterion"]) == ["dense", *["cats"] * 3, *["teal"] * 3], "dense once"
    one = of_model(joined, "b")
    assert set(one.tables) == {"e08_criteria"} and set(one.tables["e08_criteria"]["model"]) == {"b"}
