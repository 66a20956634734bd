"""Load run directories: tables, samples and provenance, with what is missing or broken said in words.

A run directory holds ``results/*.csv``, ``results/samples/*.csv.gz`` and ``provenance.json``, or the same without the
folder ``results``. Columns and their types are those of `experiments.framework.tables`. A table that is absent, of
another schema, or broken never becomes zeros: it lands in `Run.problems` with the reason and is left out of
`Run.tables`. A CSV that no section of the report reads lands in `Run.unclaimed`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.framework.tables import SCHEMA_VERSION, Row, columns, file_name

PAPER = Path(__file__).parents[1] / "paper"
OWN_FILES = ("claims.csv",)  # the report's own, beside the tables of a run directory without the folder results
SINCE_SCHEMA_2 = {"criterion", "condition", "path", "weights", "active_neurons"}
LATER = {("e07", "seed"): "0", ("e08", "prompt"): "masked", ("e08_blocks", "metric"): "perplexity"}
"""Columns that schema 2 gained, by experiment, and what a table without them means: nothing else was measured then."""

_TRUE, _FALSE = {"true", "1", "1.0", "yes"}, {"false", "0", "0.0", "no", ""}


@dataclass(frozen=True)
class Run:
    """One run directory: its tables (samples too) by name, and the reason for each table that is not among them;
    ``beside``: the other runs of a report."""

    label: str
    path: Path
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, dict[str, Any]] = field(default_factory=dict)
    unclaimed: tuple[str, ...] = ()
    beside: tuple[Run, ...] = field(default=(), repr=False, compare=False)

    def table(self, row_type: type[Row]) -> pd.DataFrame | None:
        """The table of one row type, or None when it is missing or broken (`problems` says which)."""
        return self.tables.get(row_type.table)

    @property
    def profiles(self) -> list[str]:
        """The profiles that its experiments ran with, as far as recorded."""
        entries = self.provenance.values()
        names = [(entry.get("settings") or {}).get("profile") or entry.get("profile") for entry in entries]
        return sorted({str(name) for name in names if name})

    def broken(self, experiment: str) -> list[str]:
        """Sentences about tables of one experiment that are present but cannot be read."""
        return [f"{name}.csv: {why}" for name, why in self.problems.items() if name.startswith(experiment)]


def command(experiment: str, run: Run | None = None) -> str:
    """The command that measures what is missing, with the profile of the run that misses it."""
    profile = run.profiles[0] if run and run.profiles else "pocket"
    return f"nox -s experiment -- {experiment}" + (f" --profile {profile}" if profile != "pocket" else "")


def read_table(path: Path, row_type: type[Row]) -> pd.DataFrame:
    """Read one CSV; numbers as floats, with NaN for what was not measured.

    Raises:
        ValueError: a sentence without a subject: the schema, a column that is missing, or a cell of another type.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (
        OSError,
        EOFError,
        zlib.error,
        UnicodeDecodeError,
        pd.errors.ParserError,
        pd.errors.EmptyDataError,
    ) as error:
        raise ValueError(f"unreadable ({str(error).strip()})") from error
    expected = columns(row_type)
    for (experiment, column), value in LATER.items():
        if row_type.table.startswith(experiment) and column in expected and column not in table:
            table[column] = value
    missing = [column for column in expected if column not in table.columns]
    new = SINCE_SCHEMA_2 & set(expected)
    if new and new <= set(missing):
        raise ValueError(
            f"it has schema 1 (no column {sorted(new)[0]}), this report reads schema {SCHEMA_VERSION}: measure again"
        )
    if missing:
        raise ValueError(f"column{'s' * (len(missing) > 1)} {', '.join(missing)} missing")
    if table.empty:
        raise ValueError("it has a header and no rows")
    for column, (kind, _) in expected.items():
        if kind is bool:
            table[column] = _flags(table[column])
        elif kind is not str:
            table[column] = _numbers(table[column])
    return table


def _numbers(column: pd.Series) -> pd.Series:
    values = pd.to_numeric(column, errors="coerce")
    wrong = column[values.isna() & ~column.str.strip().str.lower().isin(["", "nan"])]
    if len(wrong):
        raise ValueError(f"column {column.name} holds {wrong.iloc[0]!r} in row {wrong.index[0] + 2}, not a number")
    return values.astype(float)


def _flags(column: pd.Series) -> pd.Series:
    text = column.str.strip().str.lower()
    wrong = column[~text.isin(_TRUE | _FALSE)]
    if len(wrong):
        raise ValueError(f"column {column.name} holds {wrong.iloc[0]!r} in row {wrong.index[0] + 2}, not True or False")
    return text.isin(_TRUE)


def load_run(path: Path, row_types: Iterable[type[Row]], label: str | None = None) -> Run:
    """Load the tables of ``row_types`` from one run directory.

    Raises:
        ValueError: it is no directory, holds none of these tables, or only tables that cannot be read.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory; give a run directory, for example runs/pocket")
    known = {row_type.table: row_type for row_type in row_types}
    folder = path / "results" if _csv_files(path / "results") else path
    tables: dict[str, pd.DataFrame] = {}
    problems: dict[str, str] = {}
    for name, row_type in known.items():
        file = folder / file_name(row_type)
        if not file.exists():
            continue
        try:
            tables[name] = read_table(file, row_type)
        except ValueError as error:
            problems[name] = str(error)
    unclaimed = tuple(file.name for file in _csv_files(folder) if _table_name(file) not in known)
    if not tables and not unclaimed:
        why = [f"{name}.csv: {problem}" for name, problem in problems.items()]
        raise ValueError(f"{path} holds no results that can be read ({why[0] if why else 'no table of an experiment'})")
    provenance, problem = _read_provenance(path)
    if problem:
        problems["provenance"] = problem
    return Run(label or path.name, path, tables, problems, provenance, unclaimed)


def _csv_files(folder: Path) -> list[Path]:
    files = [*folder.glob("*.csv"), *folder.glob("samples/*.csv.gz")]
    return sorted(file for file in files if file.name not in OWN_FILES)


def _table_name(file: Path) -> str:
    return file.name.removesuffix(".gz").removesuffix(".csv")


def _read_provenance(path: Path) -> tuple[dict[str, dict[str, Any]], str]:
    file = next((f for f in (path / "provenance.json", path / "results" / "provenance.json") if f.exists()), None)
    if file is None:
        return {}, "provenance.json is missing: commit, versions and hardware are unknown"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        experiments = content["experiments"]
        if not isinstance(experiments, dict) or not all(isinstance(entry, dict) for entry in experiments.values()):
            raise TypeError("experiments is not a table of tables")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {}, f"provenance.json is broken ({error}): commit, versions and hardware are unknown"
    common = {key: value for key, value in content.items() if key != "experiments"}
    return {name: {**common, **entry} for name, entry in experiments.items()}, ""


def load_runs(paths: list[Path], row_types: Iterable[type[Row]]) -> list[Run]:
    """Load several run directories under short labels that differ: the last parts of their paths."""
    if not paths:
        raise ValueError("no run directory given; give at least one, for example runs/pocket")
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise ValueError("the same run directory is given twice")
    for depth in range(1, max(map(len, parts)) + 1):
        labels = [" ".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(labels):
            break
    labels = [
        " ".join(part[-2:]) if part[-3:-2] == ("results",) else label for part, label in zip(parts, labels, strict=True)
    ]
    row_types = list(row_types)
    return [load_run(path, row_types, label) for path, label in zip(paths, labels, strict=True)]


def paper_table(name: str) -> pd.DataFrame:
    """One CSV of the paper's own numbers, by file name without suffix."""
    return pd.read_csv(PAPER / f"{name}.csv")


def paper_model(model: str) -> str | None:
    """The paper's model that a profile's name means, such as `mistralai/Mistral-7B-v0.1`; None for another model."""
    flat = model.lower().replace("-", "").replace("_", "")
    known = {"mistral7b": "Mistral-7B", "llama27b": "Llama2-7B", "llama213b": "Llama2-13B"}
    return next((name for key, name in known.items() if key in flat), None)


def paper_models(model: str, available: Mapping[str, Any] | pd.Series) -> list[str]:
    """The paper's models to show beside `model`: the same one where the paper has it, else its two 7B models."""
    names, same = list(dict.fromkeys(available)), paper_model(model)
    if same is not None and same in names:
        return [same]
    return [name for name in names if name in ("Mistral-7B", "Llama2-7B")]
