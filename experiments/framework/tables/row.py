"""What the row of any table is, its columns, and how rows become a file. Free of torch."""

import csv
import gzip
import io
import typing
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

SCHEMA_VERSION = 2
"""1: the columns of release 0.1, without criterion, condition, path, active_neurons and samples."""
CONDITIONS = ("figure", "growth", "check")
PATHS = ("sparse kernel", "dense masked", "dense")
WEIGHTS = ("pretrained", "random")


@dataclass(frozen=True)
class Row:
    """Base of every table's row.

    Subclasses name their ``table`` (the CSV's name) and the columns that identify a row (``key``). ``samples`` marks a
    table of raw samples, which is kept compressed in ``results/samples/``.
    """

    table: ClassVar[str]
    key: ClassVar[tuple[str, ...]]
    samples: ClassVar[bool] = False


def row_types() -> dict[str, type[Row]]:
    """Table name -> row class, for every class that has been defined, a third party's included."""
    types: dict[str, type[Row]] = {}
    pending = list(Row.__subclasses__())
    while pending:
        row_type = pending.pop(0)
        pending += row_type.__subclasses__()
        if "table" in vars(row_type):
            types[row_type.table] = row_type
    return types


def columns(row_type: type[Row]) -> dict[str, tuple[type, bool]]:
    """Column name -> (str, int, float or bool; whether it may be empty), in the CSV's order."""
    hints = typing.get_type_hints(row_type)
    described = {}
    for column in fields(row_type):
        alternatives = typing.get_args(hints[column.name]) or (hints[column.name],)
        (kind,) = (one for one in alternatives if one is not type(None))
        described[column.name] = kind, type(None) in alternatives
    return described


def schema() -> dict[str, Any]:
    """All tables as JSON: version; per table what a row is, its key, and its columns with their types."""
    own = {
        name: row_type
        for name, row_type in sorted(row_types().items())
        if row_type.__module__.startswith("experiments.framework.tables.")
    }
    return {
        "version": SCHEMA_VERSION,
        "tables": {
            name: {
                "row": " ".join((row_type.__doc__ or "").split()),
                "file": f"results/{file_name(row_type)}",
                "key": list(row_type.key),
                "columns": {
                    column: {"type": kind.__name__, "nullable": nullable}
                    for column, (kind, nullable) in columns(row_type).items()
                },
            }
            for name, row_type in own.items()
        },
    }


def file_name(row_type: type[Row]) -> str:
    """Where a table lies, relative to the directory ``results``."""
    return f"samples/{row_type.table}.csv.gz" if row_type.samples else f"{row_type.table}.csv"


def to_csv(rows: Sequence[Row]) -> bytes:
    """Rows of one table as the content of its file; a table of samples is compressed, the same bytes every time."""
    row_type = type(rows[0])
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns(row_type)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in asdict(row).items()} for row in rows)
    content = text.getvalue().encode()
    return gzip.compress(content, mtime=0) if row_type.samples else content


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.7g}" if isinstance(value, float) else value


def pack_flags(correct: Iterable[float]) -> str:
    """Whether items were answered correctly, as `ItemSample.correct`."""
    return "".join("1" if flag else "0" for flag in correct)


def pack_numbers(values: Iterable[float]) -> str:
    """Measurements in one cell, six significant digits, ``;`` between them."""
    return ";".join(f"{value:.6g}" for value in values)
