"""Reports of runs that lack something, or hold what this project does not know: said, never guessed."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import reports
from experiments.framework.tables import ShareRow, ZeroShotRow, columns
from reports.__main__ import main
from reports.core import document, style, tables
from reports.core.appendix import appendix
from reports.core.load import Run, load_run, read_table
from reports.core.section import discover
from tests import make_results as made
from tests.make_results import judged, text_of

MADE_UP_SECTION = '''
"""What the report says of e99."""
from dataclasses import dataclass
from typing import ClassVar
import pandas as pd
from experiments.framework.tables import Row
from reports.core.document import Table
from reports.core.section import Aspect, Section

@dataclass(frozen=True)
class MadeUpRow(Row):
    """One animal."""
    table: ClassVar[str] = "e99_zoo"
    key: ClassVar[tuple[str, ...]] = ("animal",)
    animal: str
    legs: int | None

def contents(run):
    table = run.table(MadeUpRow)
    return [Table(pd.DataFrame({"Animal": table["animal"], "Legs": table["legs"].map("{:.0f}".format)}), "Legs.")]

SECTION = Section("e99", "A made-up experiment", (MadeUpRow,), (Aspect("place", "none", lambda run: "a zoo"),),
                  contents=contents)
'''


@pytest.fixture
def added_section(tmp_path: Path) -> Iterator[Path]:
    """A folder with one section more."""
    (tmp_path / "e99.py").write_text(MADE_UP_SECTION)
    reports.__path__.append(str(tmp_path))
    yield tmp_path
    reports.__path__.remove(str(tmp_path))
    sys.modules.pop("reports.e99", None)


def test_a_made_up_experiment_with_one_section_is_rendered(added_section: Path) -> None:
    run = added_section / "run"
    (run / "results").mkdir(parents=True)
    (run / "results" / "e99_zoo.csv").write_text("animal,legs\nspider,8\nsnake,0\n")
    assert main([str(run)]) == 0
    text = text_of(run)
    assert "## A made-up experiment" in text and "| place | none | a zoo |" in text
    assert "| spider | 8 |\n| snake | 0 |" in text


def test_a_section_without_its_object_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "e98.py").write_text("")
    reports.__path__.append(str(tmp_path))
    try:
        assert main([str(tmp_path)]) == 1
        assert "reports/e98 has no section" in capsys.readouterr().err
    finally:
        reports.__path__.remove(str(tmp_path))
        sys.modules.pop("reports.e98", None)


def test_a_csv_that_no_section_reads_is_said_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made.write_run(tmp_path / "run", {"e01_thresholds": made.thresholds(), "e77_new": made.greedy()})
    (run / "results" / "samples").mkdir()
    (run / "results" / "samples" / "e77_rounds.csv.gz").write_bytes(gzip.compress(b"a\n1\n"))
    assert main([str(run)]) == 0
    said = capsys.readouterr().err
    for name in ("e77_new.csv", "e77_rounds.csv.gz"):
        assert f"run: {name} is not shown: no section of the report reads it" in said
        assert document.escape(name) in text_of(run).split("## Claims in detail")[0]
    alone = made.write_run(tmp_path / "alone", {"e77_new": made.greedy()})
    assert main([str(alone)]) == 0 and "e77" in text_of(alone)


def test_missing_and_broken_are_said_and_never_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made.write_run(
        tmp_path / "run",
        {
            "e02_zero_shot": made.zero_shot().drop(columns=["stderr", "chance"]),
            "e04_task_finetuning": made.task_finetuning().astype({"accuracy": str, "items": str}).assign(items="oops"),
            "e01_thresholds": made.thresholds(),
        },
    )
    (run / "results" / "e03_sweep.csv").write_bytes(b"\xff\xfe\x00")
    (run / "results" / "e06_shares.csv").write_text(",".join(columns(ShareRow)) + "\n")
    (run / "results" / "samples").mkdir()
    (run / "results" / "samples" / "e02_items.csv.gz").write_bytes(b"no gzip")
    (run / "provenance.json").write_text("{")
    assert main([str(run)]) == 0
    said = capsys.readouterr().err
    for sentence in (
        "e02_zero_shot: columns stderr, chance missing",
        "e04_task_finetuning: column items holds 'oops' in row 2, not a number",
        "e03_sweep: unreadable",
        "e02_items: unreadable",
        "e06_shares: it has a header and no rows",
        "provenance.json is broken",
    ):
        assert sentence in said
    text = text_of(run)
    assert "e02\\_zero\\_shot.csv: columns stderr, chance missing" in text
    assert "| e05\\_mlp\\_latency | not measured here | `nox -s experiment -- e05` |" in text
    at = judged(run)
    assert set(at["verdict"]) == {"not tested"}
    assert "missing" in at.set_index("claim").loc["C2", "reason"]


def test_tables_of_schema_1_are_refused_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = made.zero_shot().drop(columns=["criterion", "path"])
    run = made.write_run(tmp_path / "run", {"e02_zero_shot": old, "e06_greedy": made.greedy()})
    assert main([str(run)]) == 0
    sentence = "e02_zero_shot: it has schema 1 (no column criterion), this report reads schema 2: measure again"
    assert sentence in capsys.readouterr().err
    assert "0.6900" not in text_of(run)
    alone = made.write_run(tmp_path / "alone", {"e02_zero_shot": old})
    assert main([str(alone)]) == 1
    said = capsys.readouterr().err
    assert "schema 1" in said and said.count("\n") == 1
    partly = made.zero_shot().drop(columns=["criterion"])
    made.write_table(tmp_path, "e02_zero_shot", partly)
    with pytest.raises(ValueError, match="column criterion missing"):
        read_table(tmp_path / "e02_zero_shot.csv", ZeroShotRow)


def test_what_no_run_has_is_said_once_and_what_one_has_is_not_missing(tmp_path: Path) -> None:
    runs = [
        Run(label, tmp_path, {"e01_thresholds": made.thresholds(), **more})
        for label, more in (("a", {}), ("b", {"e06_greedy": made.greedy()}))
    ]
    text = document.to_markdown("T", appendix(runs, discover()))
    (both,) = [line for line in text.splitlines() if "| e05\\_mlp\\_latency" in line]
    assert both.count("not measured here") == 1
    (throughput,) = [line for line in text.splitlines() if "e06\\_throughput, e06\\_shares" in line]
    assert "greedy" not in throughput and "thresholds" not in text


def test_unmeasured_cells_stay_unmeasured(tmp_path: Path) -> None:
    table = made.zero_shot()
    table.loc[(table["variant"] == "cats-70") & (table["task"] == "keyword"), ["value", "stderr"]] = np.nan
    run = made.write_run(tmp_path / "run", {"e02_zero_shot": table})
    kept = load_run(run, made.types_read()).tables["e02_zero_shot"]
    shown = tables.zero_shot(kept, "made-up").set_index("")
    assert shown.loc["CATS-70", "keyword"] == style.DASH
    assert shown.loc["CATS-70", "Average"] == style.DASH
