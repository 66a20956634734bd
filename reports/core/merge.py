"""Runs of different models, or of parts of one experiment, as one run: one figure and one table for all of them."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from experiments.framework.tables import Row
from reports.core.load import Run
from reports.core.provenance import commits, machine
from reports.core.verdicts import POCKET_MODEL

ORIGIN = "origin"
"""Column that `joined` adds: the commit of a row's run where it is another than that of the latest run on the same
machine, else nothing."""


def together(runs: list[Run], row_types: Iterable[type[Row]]) -> list[Run]:
    """Runs that hold some of these tables, joined as `grouped` says."""
    row_types = list(row_types)
    return [joined(members, row_types) for members in grouped(runs, row_types)]


def grouped(runs: list[Run], row_types: Iterable[type[Row]]) -> list[list[Run]]:
    """Runs that hold some of these tables, in groups that contradict each other nowhere; the pocket model's come last.

    A run that measured what another has measured too (the same row, with another result) is in a group of its own:
    nothing is averaged over runs.
    """
    row_types = list(row_types)
    groups: list[list[Run]] = []
    for run in sorted(runs, key=_is_pocket):
        if not any(row_type.table in run.tables for row_type in row_types):
            continue
        home = next((members for members in groups if not _contradict([*members, run], row_types)), None)
        if home is None:
            groups.append([run])
        else:
            home.append(run)
    return groups


def joined(members: list[Run], row_types: Iterable[type[Row]]) -> Run:
    """Runs of one group as one; what several measured alike, such as the dense model, stands in it once."""
    if len(members) == 1:
        return members[0]
    tables = {}
    for row_type in row_types:
        own = [run for run in members if row_type.table in run.tables]
        origins = _origins(own, row_type.table.split("_")[0])
        parts = [
            run.tables[row_type.table].assign(**{ORIGIN: origin}) for run, origin in zip(own, origins, strict=True)
        ]
        if parts:
            tables[row_type.table] = _concatenated(parts).drop_duplicates(_keys(row_type, parts[0]), ignore_index=True)
    return Run(", ".join(run.label for run in members), members[0].path, tables)


def _origins(runs: list[Run], experiment: str) -> list[str]:
    """For each run the commit at which it measured an experiment, nothing where that is the latest run's on its
    machine."""
    latest: dict[str, tuple[str, str]] = {}
    own = []
    for run in runs:
        entry, where = run.provenance.get(experiment, {}), machine(run)
        own.append((where, " and ".join(commits(entry))))
        latest[where] = max(latest.get(where, ("", "")), (str(entry.get("started") or ""), own[-1][1]))
    return ["" if commit == latest[where][1] else commit for where, commit in own]


def at_commit(rows: pd.DataFrame) -> str:
    """`, at 0123456789` for rows of other commits than the latest run's, `, in part at ...` where some are."""
    if ORIGIN not in rows:
        return ""
    names = list(rows[ORIGIN].unique())
    others = ", ".join(filter(None, names))
    return f", {'in part ' * ('' in names)}at {others}" if others else ""


def of_model(run: Run, model: str) -> Run:
    """A run with the rows of one model only, in the tables that name models."""
    tables = {name: table[table["model"] == model] if "model" in table else table for name, table in run.tables.items()}
    return Run(run.label, run.path, {name: table for name, table in tables.items() if len(table)}, {}, run.provenance)


def models(run: Run, row_type: type[Row]) -> list[str]:
    """The models of one table, in its order."""
    table = run.table(row_type)
    return [] if table is None or "model" not in table else [str(model) for model in table["model"].unique()]


def _contradict(members: list[Run], row_types: list[type[Row]]) -> bool:
    """Whether some row, by its key, has different results in two of them."""
    for row_type in row_types:
        parts = [run.tables[row_type.table] for run in members if row_type.table in run.tables]
        if len(parts) < 2:
            continue
        whole = _concatenated(parts)
        distinct = whole.astype(str).drop_duplicates()
        if distinct.duplicated(_keys(row_type, whole)).any():
            return True
    return False


def _keys(row_type: type[Row], table: pd.DataFrame) -> list[str]:
    return [column for column in row_type.key if column in table]


def _concatenated(parts: list[pd.DataFrame]) -> pd.DataFrame:
    filled = [part.dropna(axis=1, how="all") for part in parts]  # a column without a value has no type to keep
    return pd.concat(filled, ignore_index=True).reindex(columns=parts[0].columns)


def _is_pocket(run: Run) -> bool:
    """Whether it measured the pocket model."""
    return any(table["model"].eq(POCKET_MODEL).any() for table in run.tables.values() if "model" in table)
