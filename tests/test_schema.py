"""The schema of result tables: generated from the row types, and every committed table follows it."""

import csv
import gzip
import io
import json
from pathlib import Path

import pytest

from experiments.framework.tables import columns, row_types, schema

RESULTS = Path(__file__).parents[1] / "results"
COMMITTED = sorted([*RESULTS.glob("*/*/results/*.csv"), *RESULTS.glob("*/*/results/samples/*.csv.gz")])
PARSERS = {"str": str, "int": int, "float": float, "bool": {"True": True, "False": False}.__getitem__}


def test_the_schema_file_is_the_generated_one() -> None:
    assert json.loads((RESULTS / "results.schema.json").read_text()) == schema()


def test_there_are_committed_tables() -> None:
    assert len(COMMITTED) > 20 and any(path.suffix == ".gz" for path in COMMITTED)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: str(path.relative_to(RESULTS)))
def test_a_committed_table_follows_the_schema(path: Path) -> None:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    row_type = row_types()[path.name.partition(".")[0]]
    table = csv.DictReader(io.StringIO(content.decode()))
    assert table.fieldnames == list(columns(row_type))
    keys = set()
    for row in table:
        keys.add(tuple(row[name] for name in row_type.key))
        for name, (kind, nullable) in columns(row_type).items():
            if row[name] == "":
                assert nullable or kind is str, f"{name} is empty"
            else:
                PARSERS[kind.__name__](row[name])
    assert len(keys) == table.line_num - 1
