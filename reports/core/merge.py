"""Runs of different models as one run, so that a section has one figure and one table for all of them."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from experiments.framework.tables import Row
from reports.core.load import Run
from reports.core.verdicts import POCKET_MODEL

Identity = tuple[str, str, str]


def together(runs: list[Run], row_types: Iterable[type[Row]]) -> list[Run]:
    """Runs that hold some of these tables, joined where no model was measured twice; real models before the pocket one.

    A run that measured a model which another run has measured as well, on the same machine where the table names one,
    begins a run of its own: nothing is averaged over runs.
    """
    names = [row_type.table for row_type in row_types]
    groups: list[tuple[list[Run], set[Identity]]] = []
    for run in sorted(runs, key=_is_pocket):
        identities = {identity for name in names if name in run.tables for identity in _identities(name, run)}
        if not identities:
            continue
        for members, known in groups:
            if not known & identities:
                members.append(run)
                known |= identities
                break
        else:
            groups.append(([run], identities))
    return [_joined(members, names) for members, _ in groups]


def of_model(run: Run, model: str) -> Run:
    """A run with the rows of one model only, in the tables that name models."""
    tables = {name: table[table["model"] == model] if "model" in table else table for name, table in run.tables.items()}
    return Run(run.label, run.path, {name: table for name, table in tables.items() if len(table)}, {}, run.provenance)


def models(run: Run, row_type: type[Row]) -> list[str]:
    """The models of one table, in its order."""
    table = run.table(row_type)
    return [] if table is None or "model" not in table else [str(model) for model in table["model"].unique()]


def _identities(name: str, run: Run) -> set[Identity]:
    table = run.tables[name]
    columns = [table[column].astype(str) if column in table else None for column in ("model", "machine")]
    parts = [column if column is not None else pd.Series("", table.index) for column in columns]
    return {(name, str(model), str(machine)) for model, machine in zip(*parts, strict=True)}


def _is_pocket(run: Run) -> bool:
    """Whether it measured the pocket model and no other."""
    named = {str(model) for table in run.tables.values() if "model" in table for model in table["model"].unique()}
    return POCKET_MODEL in named


def _joined(members: list[Run], names: list[str]) -> Run:
    if len(members) == 1:
        return members[0]
    tables = {}
    for name in names:
        parts = [run.tables[name].dropna(axis=1, how="all") for run in members if name in run.tables]
        if parts:
            columns = next(run.tables[name].columns for run in members if name in run.tables)
            tables[name] = pd.concat(parts, ignore_index=True).reindex(columns=columns)
    return Run(", ".join(run.label for run in members), members[0].path, tables)
