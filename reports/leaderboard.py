"""results/LEADERBOARD.md: what each criterion affords on each model, a row per criterion and run.

    python -m reports.leaderboard            # write it from results/
    python -m reports.leaderboard --check    # say whether the file is what would be written

A run is a folder results/MACHINE/NAME with the tables of e08 and their provenance.json; whoever adds one adds its rows.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.framework.tables import CriterionRow, CriterionSample, CriterionSpeedRow, CriterionTextSample
from reports.core import style
from reports.core.document import escape, pipe_table
from reports.core.load import Run, load_run
from reports.core.merge import grouped, joined, models, of_model
from reports.core.page import filled, write_or_check
from reports.core.provenance import commit, incomplete, machine
from reports.core.verdicts import POCKET_MODEL
from reports.e08.figures import HIGHEST, title
from reports.e08.tables import ROLES, speed_words, text_rows
from reports.measures.frontier import Kept, accuracy_points, affords, fastest, speed_at, text_points

RESULTS = Path(__file__).parents[1] / "results"
NAME = "LEADERBOARD.md"
TYPES = (CriterionRow, CriterionSample, CriterionTextSample, CriterionSpeedRow)


def runs_in(results: Path) -> list[Run]:
    """Every run below ``results`` that has a table of e08.

    Raises:
        ValueError: one cannot be read; the sentence says which and why.
    """
    runs = []
    for path in sorted(folder for folder in results.glob("*/*") if folder.is_dir()):
        files = [path / "results" / f"{t.table}.csv" for t in (CriterionRow, CriterionSpeedRow)]
        if not any(file.exists() for file in files):
            continue
        run = load_run(path, TYPES, path.relative_to(results).as_posix())
        if run.problems:
            name, why = next(iter(run.problems.items()))
            raise ValueError(f"{path}: {name}: {why}")
        runs.append(run)
    return runs


def leaderboard(results: Path) -> str:
    """The page as Markdown."""
    runs = runs_in(results)
    speeds = [table for run in runs if (table := run.table(CriterionSpeedRow)) is not None]
    speed = fastest(pd.concat(speeds, ignore_index=True) if speeds else None)
    rows = [row for model in _models(runs) for members in _groups(runs, model) for row in _rows(model, members, speed)]
    rows.sort(key=lambda row: row[0])
    frame = pd.DataFrame([cells for _, cells in rows])
    named = pd.DataFrame([_source(run) for run in runs])
    return filled("leaderboard.md", {"rows": pipe_table(frame), "runs": pipe_table(named)})


def _models(runs: list[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in models(run, CriterionRow)))


def _groups(runs: list[Run], model: str) -> list[list[Run]]:
    """The runs that measured parts of one model's quality, in groups that contradict each other nowhere."""
    parts = [of_model(run, model) for run in runs if model in models(run, CriterionRow)]
    return grouped(parts, (CriterionRow, CriterionSample, CriterionTextSample))


def _rows(model: str, members: list[Run], speed: pd.DataFrame) -> list[tuple[tuple[bool, str, float], dict[str, str]]]:
    """The rows of one model, measured in these runs, each with what they are ordered by."""
    run = joined(members, (CriterionRow, CriterionSample, CriterionTextSample))
    table = run.tables[CriterionRow.table]
    accuracy = accuracy_points(table, run.table(CriterionSample))
    text = text_points(table, run.table(CriterionTextSample))
    halves = text_rows(table)
    halves = halves[np.isclose(halves["sparsity_target"], 0.5)].set_index(["model", "criterion", "scope"])
    losses = halves["increase"].to_dict()
    rows = []
    for key in dict.fromkeys([*accuracy, *text]):
        _, criterion, scope = key
        by_accuracy, by_text = affords(accuracy.get(key, [])), affords(text.get(key, []))
        loss = float(losses.get(key, math.inf))
        cells = {
            "Model": escape(style.model_name(model)),
            "Criterion": escape(title(criterion) + ROLES.get(criterion, "") + ", model" * (scope == "model")),
            "Keeps 99 % of accuracy": by_accuracy.words if by_accuracy else style.DASH,
            "Keeps 99 % of perplexity": by_text.words if by_text else style.DASH,
            "Speed there": _speed(by_accuracy or by_text, speed, model),
            "Perplexity at 50 %": increase_words(loss),
            "Speed at 50 %": speed_words(speed_at(speed, model, f"{criterion}-50") if scope == "mlp" else []),
            "Machine": _all(escape(machine(part)) for part in members),
            "Commit": _all(escape(commit(part.provenance.get("e08", {}))) for part in members),
            "Run": _all(f"[{escape(part.label)}]({part.label.replace(' ', '%20')})" for part in members),
        }
        rows.append(((model == POCKET_MODEL, model, loss), cells))
    return rows


def _all(words: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(words))


def increase_words(increase: float) -> str:
    """`+6.4 %`, or that it is beyond use."""
    return style.signed_percent(increase) if not increase > HIGHEST else f"over +{100 * HIGHEST:.0f} %"


def _speed(kept: Kept | None, speed: pd.DataFrame, model: str) -> str:
    if kept is None or kept.point is None:
        return style.DASH
    at = speed_at(speed, model, kept.point.variant)
    return f"{speed_words(at)}, at {100 * kept.point.level:g} %" if at else style.DASH


def _source(run: Run) -> dict[str, str]:
    entry = run.provenance.get("e08", {})
    command = entry.get("command") or " ".join(map(str, entry.get("argv", [])))
    command = re.sub(r" --output \S+", "", command)  # where the run lay changes nothing
    return {
        "Run": escape(run.label),
        "Measured": escape(", ".join(filter(None, [str(entry.get("started") or "unknown")[:10], incomplete(entry)]))),
        "Commit": escape(commit(entry)),
        "Command": f"`{command}`" if command else "unknown",
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line. Returns 0, or 1 after one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="python -m reports.leaderboard", description="Write or check LEADERBOARD.md.")
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS, metavar="DIR", help="default: results/")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the file would change")
    given = parser.parse_args(arguments)
    return write_or_check(given.results / NAME, lambda: leaderboard(given.results), given.check, "reports.leaderboard")


if __name__ == "__main__":
    sys.exit(main())
