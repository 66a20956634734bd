"""Reading runs: committed ones, labels, types of columns, samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.framework.tables import (
    AttentionRow,
    CriterionRow,
    HistogramRow,
    ItemSample,
    ThresholdRow,
    ZeroShotRow,
)
from reports.core.load import load_run, load_runs, read_table
from reports.core.section import discover, row_types
from tests import make_results as made
from tests.make_accuracy import ITEMS


def test_every_committed_run_can_be_read() -> None:
    results = Path(__file__).parents[1] / "results"
    runs = [file.parent for file in results.glob("*/*/provenance.json")]
    assert runs
    for path in runs:
        run = load_run(path, made.types_read())
        assert run.tables and not run.problems and not run.unclaimed, path


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    one, types = {"e01_thresholds": made.thresholds()}, made.types_read()
    paths = [made.write_run(tmp_path / name / "pocket", one) for name in ("a", "b")]
    assert [run.label for run in load_runs(paths, types)] == ["a pocket", "b pocket"]
    published = made.write_run(tmp_path / "results" / "h200" / "paper", one, flat=True)
    assert [run.label for run in load_runs([published], types)] == ["h200 paper"]


def test_read_table_names_the_row(tmp_path: Path) -> None:
    made.write_table(tmp_path, "e03_sweep", made.sweep())
    text = (tmp_path / "e03_sweep.csv").read_text()
    file = tmp_path / "changed.csv"
    (sweep,) = [row_type for row_type in row_types(discover()) if row_type.table == "e03_sweep"]
    file.write_text(text.replace("100", "a hundred", 1))
    with pytest.raises(ValueError, match=r"column step holds 'a hundred\.0' in row 2, not a number"):
        read_table(file, sweep)
    file.write_text(text.replace("True", "maybe", 1))
    with pytest.raises(ValueError, match="column chosen holds 'maybe' in row 3, not True or False"):
        read_table(file, sweep)
    file.write_text(text.replace("100.0", "", 1).replace("100.0", "nan", 1))
    assert read_table(file, sweep)["step"].isna().sum() == 2


def test_columns_and_samples_are_read_as_the_row_types_say(tmp_path: Path) -> None:
    made.write_table(tmp_path, "e02_items", made.items(made.zero_shot()))
    table = read_table(tmp_path / "samples" / "e02_items.csv.gz", ItemSample)
    assert set(table["correct"].str.len()) == {ITEMS}, "a long string of digits is no number"
    made.write_table(tmp_path, "e01_histogram", made.histogram())
    assert set(read_table(tmp_path / "e01_histogram.csv", HistogramRow)["weights"]) == {"pretrained", "random"}


def test_the_row_types_read_exist_once() -> None:
    names = [row_type.table for row_type in row_types(discover())]
    assert len(names) == len(set(names)) and ThresholdRow.table in names


def test_columns_that_came_later_mean_what_was_measured_then(tmp_path: Path) -> None:
    """Tables of schema 2 from before those columns load as they are."""
    made.write_table(tmp_path, "e07_attention", made.attention().drop(columns="seed"))
    assert set(read_table(tmp_path / "e07_attention.csv", AttentionRow)["seed"]) == {0.0}
    made.write_table(tmp_path, "e08_criteria", made.criteria().drop(columns="prompt"))
    assert set(read_table(tmp_path / "e08_criteria.csv", CriterionRow)["prompt"]) == {"masked"}
    made.write_table(tmp_path, "e02_zero_shot", made.zero_shot().drop(columns="task"))
    with pytest.raises(ValueError, match="column task missing"):
        read_table(tmp_path / "e02_zero_shot.csv", ZeroShotRow)
