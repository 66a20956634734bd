"""The tables that an experiment leaves behind: CSV files that are replaced atomically, with their checksums."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.framework.files import write_bytes_atomically
from experiments.framework.identity import file_hash
from experiments.framework.tables import Row, file_name, to_csv


def write_tables(rows: list[Row], directory: Path) -> list[Path]:
    """Write ``rows`` into ``directory``, one file per table, samples in a folder of their own.

    Raises:
        ValueError: there are none.
    """
    if not rows:
        raise ValueError("the experiment produced no rows: nothing was measured")
    by_table: dict[str, list[Row]] = {}
    for row in rows:
        by_table.setdefault(row.table, []).append(row)
    paths = []
    for group in by_table.values():
        paths.append(directory / file_name(type(group[0])))
        write_bytes_atomically(paths[-1], to_csv(group))
    return paths


def table_entries(paths: list[Path], directory: Path) -> dict[str, Any]:
    """What provenance says of tables: their ``tables`` (file names in ``directory``) and ``checksums`` (SHA-256)."""
    names = [path.relative_to(directory).as_posix() for path in paths]
    return {"tables": names, "checksums": {name: file_hash(directory / name) for name in names}}


def remove_tables(directory: Path, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Remove the tables that the provenance entry ``before`` lists and ``after`` does not: nobody vouches for them."""
    for name in set(before.get("tables", ())) - set(after["tables"]):
        (directory / name).unlink(missing_ok=True)


def damage(directory: Path, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with the tables of a provenance entry, or None."""
    for name in entry["tables"]:
        path = directory / name
        if not path.is_file():
            return f"{path} is missing"
        if entry.get("checksums", {}).get(name) != file_hash(path):
            return f"{path} is not what was written"
    return None
