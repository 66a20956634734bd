"""What is drawn, on made-up tables: no name over a line, and bars of other code than the latest run's say so."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from reports.core import style
from reports.core.load import Run
from reports.core.merge import ORIGIN, at_commit, joined
from reports.e02 import figures as e02_figures
from reports.e05 import figures as e05_figures
from reports.e06 import SECTION
from reports.e06.figures import ratio_figure
from tests import make_results as made


def covered(figure: Figure) -> list[str]:
    """Names that a line of the same axes runs through, as saved."""
    renderer = figure.canvas.get_renderer()
    hit = []
    for ax in figure.axes:
        paths = [line.get_path().transformed(line.get_transform()) for line in ax.lines if len(line.get_xdata()) > 1]
        for text in ax.texts:
            box = Annotation.get_window_extent(text, renderer)
            if any(path.intersects_bbox(box, filled=False) for path in paths):
                hit.append(text.get_text())
    return hit


def labelled(ends: list[style.End], in_a_column: bool) -> list[str]:
    figure, ax = plt.subplots(figsize=(4, 2))
    for x, y, _, colour in ends:
        ax.plot([0, x], [0, y], color=colour)
    style.label_ends(ax, ends, in_a_column=in_a_column)
    style._place_labels(figure)
    figure.canvas.draw()
    hit = covered(figure)
    plt.close(figure)
    return hit


def test_no_name_is_written_over_a_longer_line() -> None:
    ends = [(90.0, 2.0, "a shorter line", style.BLUE), (100.0, 2.2, "the longest", style.GREEN)]
    assert labelled(ends, in_a_column=False) == ["a shorter line"]
    assert labelled(ends, in_a_column=True) == []


def test_the_first_figure_has_no_name_over_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """ReLUfication at chance, and machines that were timed up to different sparsities."""
    scores = made.zero_shot(accuracy={"dense": 0.6, "cats-50": 0.58, "cats-90": 0.42, "relufication": 0.345})
    scores = scores.assign(chance=0.35)
    latency = made.latency("one", dtypes=("float32", "bfloat16"), rows=(1,))
    latency = latency[(latency["dtype"] != "float32") | (latency["sparsity_target"].fillna(0) < 0.85)]
    runs = [made.loaded(e02_zero_shot=scores), made.loaded(e05_mlp_latency=latency)]
    figure, axes = plt.subplots(1, 2, figsize=(style.WIDTH, 1.9))
    for ax, glance in zip(axes, (e02_figures.glance, e05_figures.glance), strict=True):
        painter = glance(runs)
        assert painter is not None
        painter(ax)
    style._place_labels(figure)
    figure.canvas.draw()
    assert {"ReLU", "chance", "ratio of bytes"} <= {text.get_text() for ax in axes for text in ax.texts}
    assert covered(figure) == []
    plt.close(figure)


def of_commit(commit: str, started: str, length: int) -> Run:
    table = made.throughput()
    table = table[(table["condition"] == "figure") & (table["generated_tokens"] == length)]
    return Run(commit, Path(), {"e06_throughput": table}, {}, {"e06": {"commit": commit, "started": started}})


def test_bars_of_other_code_than_the_latest_runs_name_its_commit() -> None:
    lengths = sorted(made.throughput().query("condition == 'figure'")["generated_tokens"].unique())
    old, new = (
        of_commit("aaaaaaa", "2001-01-01T00:00", lengths[0]),
        of_commit("bbbbbbb", "2001-01-02T00:00", lengths[1]),
    )
    run = joined([old, new], SECTION.tables)
    table = run.tables["e06_throughput"]
    assert dict(zip(table["generated_tokens"], table[ORIGIN], strict=True)) == {lengths[0]: "aaaaaaa", lengths[1]: ""}
    assert at_commit(table) == ", in part at aaaaaaa"
    assert at_commit(table[table[ORIGIN] == ""]) == "" and at_commit(old.tables["e06_throughput"]) == ""
    figure = ratio_figure(run)
    assert figure is not None
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ours = [name for name in names if "paper" not in name]
    assert sum("at aaaaaaa" in name for name in ours) == len(ours) / 2 and not any("bbbbbbb" in name for name in names)
    pale = [bar for bar in figure.axes[0].patches if bar.get_alpha() != 1]
    assert len(pale) == len(ours) / 2
    plt.close(figure)
    same = joined([of_commit("bbbbbbb", "2001-01-01T00:00", lengths[0]), new], SECTION.tables)
    assert same.tables["e06_throughput"][ORIGIN].eq("").all()


def test_commits_are_compared_on_one_machine() -> None:
    """A later run on another machine makes no code old."""
    lengths = sorted(made.throughput().query("condition == 'figure'")["generated_tokens"].unique())
    first, second = of_commit("aaaaaaa", "2001-01-01", lengths[0]), of_commit("bbbbbbb", "2001-01-02", lengths[1])
    for table in second.tables.values():
        table["machine"] = "another machine"
    assert joined([first, second], SECTION.tables).tables["e06_throughput"][ORIGIN].eq("").all()
