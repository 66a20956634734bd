"""The report's section on criteria, on made-up rows: nothing here was measured."""

import pandas as pd
import pytest

from reports import e08
from reports.core import style
from tests import make_results as made


@pytest.fixture
def table() -> pd.DataFrame:
    return made.criteria()


def test_best_first_with_errors_and_missed_targets(table) -> None:
    shown = e08.criteria_table(table, "a/model")
    assert list(shown[""]) == ["TEAL, model", "made-up", "CATS", "random"]
    assert shown["50 %"].iloc[1] == "+10.0 ± 1.1 %"
    assert shown["50 %"].iloc[0].endswith("(52.0 %)")  # beside the target
    assert shown["30 %"].iloc[3] == "over +1000 %"
    assert shown["Against CATS"].iloc[1] == "0.917 ± 0.009"
    assert shown["Against CATS"].iloc[2] == style.DASH


def test_figure_leaves_out_what_is_beyond_use(table) -> None:
    run = made.loaded(e08_criteria=table)
    axes = e08.criteria_figure(run).axes
    assert [ax.get_title() for ax in axes] == ["a/model"]
    assert len(axes[0].lines) == 2  # neither random nor the dense model nor the scope "model"
