"""The figure of e08: a model's quality against the bytes that it reads, and against its measured speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from experiments.framework.tables import (
    CriterionRow,
    CriterionSample,
    CriterionSpeedRow,
    CriterionTextSample,
)
from reports.core import style
from reports.core.load import Run
from reports.core.provenance import processor
from reports.measures.frontier import Point, accuracy_points, fastest, text_points

TITLES = {"cats": "CATS", "chess": "CHESS", "teal": "TEAL", "wina": "WINA", "relufication": "ReLUfication"}
LOOKS = {  # colour, line
    "cats": (style.BLUE, "-"),
    "auto": (style.VERMILLION, "-"),
    "chess": (style.GREEN, "-"),
    "up-norm": (style.ORANGE, "-"),
    "teal": (style.PURPLE, "-"),
    "wina": (style.SKY, "-"),
    "oracle": (style.BLACK, "-"),
    "gate-norm": (style.GREY, "--"),
    "up": (style.GREY, "-."),
    "random": (style.GREY, ":"),
}
HIGHEST = 10.0  # an increase of perplexity by 1000 %: above it a model is of no use, and the figure ends
LOWEST = 1e-3
LEAST_SPAN = 0.06
"""Of a horizontal axis, over its middle."""

By = Mapping[str, list[Point]]
Place = Callable[[Point], float]


def title(criterion: str) -> str:
    """A criterion's name as its authors write it; ours in lower case."""
    return TITLES.get(criterion, criterion)


def look(criterion: str) -> tuple[str, str]:
    """Colour and line of a criterion; grey and dashed for one that the palette does not know. `NAME/model`, with the
    attention's layers too, is dashed."""
    plain, _, model = criterion.partition("/")
    colour, line = LOOKS.get(plain, (style.GREY, "--"))
    return colour, "--" if model else line


def frontier_figure(run: Run) -> Figure | None:
    """One model: increase of perplexity, and change of accuracy where tasks were measured, against the bytes of the
    MLPs; and the increase of perplexity against the measured speed-up of each machine, or else the bytes of the model.
    """
    table, speed = run.tables[CriterionRow.table], fastest(run.table(CriterionSpeedRow))
    everywhere = text_points(table, run.table(CriterionTextSample))
    text = _of_mlps(everywhere)
    accuracy = _of_mlps(accuracy_points(table, run.table(CriterionSample)))
    conditions = _conditions(speed) if text else []
    count = (len(text) > 0) + (len(accuracy) > 0) + len(conditions)
    if not count:
        return None
    whole_model = count == 1 and len(text) > 0
    figure, axes = plt.subplots(1, count + whole_model, figsize=(style.WIDTH, 2.5), squeeze=False)
    panels = iter(axes[0])
    if text:
        _text_panel(next(panels), text, lambda point: 100 * point.mlp_bytes, "bytes of the MLPs, % of dense")
    if whole_model:
        both = {f"{criterion}{'/model' * (scope == 'model')}": of for (_, criterion, scope), of in everywhere.items()}
        _text_panel(next(panels), both, lambda point: 100 * point.model_bytes, "bytes of the model, % of dense")
    if accuracy:
        _accuracy_panel(next(panels), accuracy)
    for machine, what in conditions:
        at = speed[(speed["machine"] == machine) & (speed["what"] == what)].set_index("variant")["speedup"]
        axis = f"speed-up on {processor(run, machine)}, {'whole token' if what == 'token' else 'MLPs'}"
        _text_panel(next(panels), text, _looked_up(at.to_dict()), axis)
    figure.suptitle(style.model_name(str(table["model"].iloc[0])), fontsize=9.5)
    shown = [name for name in LOOKS if name in text or name in accuracy]
    shown += [name for name in {**text, **accuracy} if name not in LOOKS]
    if whole_model:
        shown += [name for name in both if name.endswith("/model")]
    handles = [plt.Line2D([], [], color=look(name)[0], ls=look(name)[1], marker="o", ms=3) for name in shown]
    names = [title(name.removesuffix("/model")) + ", model" * name.endswith("/model") for name in shown]
    figure.legend(
        handles, names, loc="outside lower center", ncols=6, frameon=False, fontsize=7.5, handlelength=2.2,
        columnspacing=1.2,
    )  # fmt: skip
    return figure


def _of_mlps(points: dict[tuple[str, str, str], list[Point]]) -> dict[str, list[Point]]:
    """Of one model's criteria those whose scope is the MLPs, by criterion, ordered by level."""
    return {
        criterion: sorted(of, key=lambda point: point.level)
        for (_, criterion, scope), of in points.items()
        if scope == "mlp"
    }


def _conditions(speed: pd.DataFrame) -> list[tuple[str, str]]:
    """(machine, what) of each panel: the whole token where a machine timed it, else its MLPs."""
    machines = dict.fromkeys(speed["machine"])
    timed = {machine: set(speed.loc[speed["machine"] == machine, "what"]) for machine in machines}
    return [(machine, "token" if "token" in timed[machine] else "mlp") for machine in machines]


def _looked_up(speedups: dict[Hashable, float]) -> Place:
    return lambda point: float(speedups.get(point.variant, math.nan))


def _text_panel(ax: Axes, points: By, place: Place, axis: str) -> None:
    """Increase of perplexity in percent, log scale; points beyond use or without a place are left out."""
    for criterion, of in points.items():
        shown = [(place(point), math.expm1(point.change.value)) for point in of]
        shown = [(x, 100 * y) for x, y in shown if math.isfinite(x) and LOWEST <= y <= HIGHEST]
        if shown:
            colour, line = look(criterion)
            ax.plot(*zip(*shown, strict=True), ls=line, marker="o", color=colour, ms=2.8, lw=1.2)
    ax.axhline(100 * (1 / 0.99 - 1), color=style.GREY, lw=0.8, ls=(0, (1, 2)))
    ax.set(yscale="log", xlabel=axis, ylabel="increase of perplexity, %")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.ticklabel_format(axis="x", style="plain", useOffset=False)
    ax.xaxis.set_major_locator(MaxNLocator(3))
    low, high = ax.get_xlim()
    if high - low < (least := LEAST_SPAN * abs(high + low) / 2):  # what differs by less does not fill the panel
        ax.set_xlim((low + high - least) / 2, (low + high + least) / 2)


def _accuracy_panel(ax: Axes, points: By) -> None:
    """Change of mean accuracy against the bytes of the MLPs, or by criterion where one level was measured."""
    bound, lowest = math.nan, 0.0
    levels = {point.level for of in points.values() for point in of}
    for place, (criterion, of) in enumerate(points.items()):
        colour, line = look(criterion)
        x = [float(place)] if len(levels) == 1 else [100 * point.mlp_bytes for point in of]
        y = [100 * point.change.value for point in of]
        error: Any = [
            [100 * (point.change.value - point.change.low) for point in of],
            [100 * (point.change.high - point.change.value) for point in of],
        ]
        ax.errorbar(x, y, error, ls=line, marker="o", color=colour, ms=2.8, lw=1.2, elinewidth=0.5)
        bound = 100 * (of[0].change.value - of[0].margin.value)
        lowest = min(lowest, *(100 * point.change.low for point in of if point.change.known))
    ax.axhline(0, color=style.GREY, lw=0.6)
    ax.axhline(bound, color=style.GREY, lw=0.8, ls=(0, (1, 2)))
    ax.set(xlabel="bytes of the MLPs, % of dense", ylabel="accuracy, points")
    if len(levels) == 1:
        ax.set_xticks(range(len(points)), [title(criterion) for criterion in points], rotation=60, fontsize=7)
        ax.set_xlabel(f"at {100 * levels.pop():g} %")
        ax.margins(x=0.15)
    ax.set_ylim(bottom=max(1.1 * lowest, -25))
