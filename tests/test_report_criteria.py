"""The report's section on criteria, on made-up rows: nothing here was measured."""

import math

import pytest

from experiments.framework.tables import CriterionRow
from reports import e08
from tests import make_results as made


def row(criterion: str, level: float | None, ratio: float, scope: str = "mlp", on_target: bool | None = True):
    dense = level is None
    variant = criterion if dense else f"{criterion}-{100 * level:g}"
    skipped = 0.0 if dense else level
    return CriterionRow(
        "a/model", criterion, variant, scope, "dense masked", level, None if dense else level + 0.02 * (not on_target),
        None if dense else on_target, None, 1 - 2 * skipped / 3, 1 - skipped / 3, "heldout_text", "perplexity",
        20 * ratio, None, math.log(ratio), 0.01, None if dense else math.log(ratio / 1.2), 0.01, 48, None,
    )  # fmt: skip


@pytest.fixture
def table():
    rows = [row("dense", None, 1.0)]
    for level in (0.3, 0.5, 0.7):
        rows += [row("cats", level, 1.2), row("made-up", level, 1.1), row("teal", level, 1.05, "model", False)]
        rows.append(row("random", level, 300.0))
    return made.frame(rows)


def test_best_first_with_errors_and_missed_targets(table) -> None:
    shown = e08.criteria_table(table, "a/model")
    assert list(shown[""]) == ["TEAL, model", "made-up", "CATS", "random"]
    assert shown["50 %"].iloc[1] == "+10.0 ± 1.1 %"
    assert shown["50 %"].iloc[0].endswith("(52.0 %)")  # beside the target
    assert shown["30 %"].iloc[3] == "over +1000 %"
    assert shown["Against CATS"].iloc[1] == "0.917 ± 0.009"
    assert shown["Against CATS"].iloc[2] == "–"


def test_figure_leaves_out_what_is_beyond_use(table) -> None:
    run = made.loaded(e08_criteria=table)
    axes = e08.criteria_figure(run).axes
    assert [ax.get_title() for ax in axes] == ["a/model"]
    assert len(axes[0].lines) == 2  # neither random nor the dense model nor the scope "model"
