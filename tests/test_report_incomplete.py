"""Reports of a run that has not ended, and of one whose machine is not recorded: said wherever the run is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.framework.tables import CriterionRow, TaskFinetuningRow
from reports.__main__ import main
from reports.core import document, provenance, style
from reports.core.appendix import appendix, recorded
from reports.core.claims import judge
from reports.core.load import Run, load_run
from reports.core.protocol import protocol
from reports.core.section import discover, row_types
from reports.e04 import accuracy_table
from reports.e07 import SECTION as ATTENTION
from reports.e08.figures import frontier_figure
from reports.leaderboard import leaderboard
from reports.rules.e04 import c6_task_finetuning
from reports.rules.e07 import c10_attention
from tests import make_results as made
from tests.make_results import text_of

ROOT = Path(__file__).parents[1]
LACKS = "incomplete: 2 of 5 units missing"
UNRECORDED = {"hardware": None, "versions": None, "command": None, "peak_memory_gib": None, "started": None}


def entry(**more: Any) -> dict[str, Any]:
    settings = {"profile": "small", "options": {"length": 64}}
    known = {"commit": "a" * 40, "dirty": False, "started": "2001-01-01T00:00:00+00:00", "seconds": 60.0}
    return {**known, "settings": settings, "versions": {"torch": "2.11.0"}, **more}


def run_of(folder: Path, tables: dict[str, pd.DataFrame], **entries: dict[str, Any]) -> Path:
    made.write_run(folder, tables)
    (folder / "provenance.json").write_text(json.dumps({"experiments": entries}))
    return folder


INCOMPLETE = {"incomplete": {"finished": 3, "missing": ["d", "e"]}}


def test_an_incomplete_run_is_named_so_in_every_place(tmp_path: Path) -> None:
    tables = {"e02_zero_shot": made.zero_shot(), "e01_thresholds": made.thresholds()}
    run = run_of(tmp_path / "run", tables, e01=entry(), e02=entry(**INCOMPLETE, **UNRECORDED))
    assert main([str(run)]) == 0
    text = text_of(run)
    first, rest = text.split("## Runs shown", 1)
    assert f"**Runs that have not ended:** run: e02 {LACKS}." in first
    shown, rest = rest.split("## Claims in detail", 1)
    assert f"e02 {LACKS}" in shown
    details, rest = rest.split("## Zero-shot accuracy", 1)
    rows = [line for line in details.splitlines() if line.startswith(("| C2 | made-up", "| C3 | made-up"))]
    assert len(rows) == 2 and all(LACKS in line for line in rows)
    assert not any(LACKS in line for line in details.splitlines() if line.startswith("| C1 "))
    section = rest.split("\n## ")[0]
    assert f"| run ({LACKS}) |" in section and f"*Provenance:* {LACKS}, measured unknown" in section
    assert "versions not recorded, hardware not recorded" in section
    log = rest.split("## Appendix")[1]
    assert f"e02 1 min 00 s ({LACKS})" in log and "versions not recorded" in log
    facts = rest.split("## Appendix")[0]
    assert "finished 3; missing d, e" in facts
    for name in ("command", "versions", "hardware"):
        assert any(line.startswith(f"| {name} ") and "not recorded" in line for line in facts.splitlines()), name


def test_a_whole_run_is_nowhere_called_incomplete(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", {"e02_zero_shot": made.zero_shot()}, e02=entry())
    loaded = load_run(run, made.types_read())
    sections = discover()
    text = document.to_markdown("T", [*recorded([loaded]), *appendix([loaded], sections)])
    judged = judge([loaded], sections)
    said = [text, *provenance.run_lines([loaded]), *judged["reason"], str(protocol(sections[1], [loaded]).columns)]
    assert not any("ncomplete" in words or "not recorded" in words for words in said)


def test_a_machine_is_unknown_or_not_recorded() -> None:
    assert provenance.machine(Run("r", Path(), provenance={"e04": {"hardware": None}})) == "machine not recorded"
    assert provenance.machine(Run("r", Path(), provenance={"e04": {}})) == "unknown machine"
    one = Run("r", Path(), provenance={"e04": {"hardware": None}, "e05": {"hardware": {"gpus": ["H100"]}}})
    assert provenance.machine(one) == "H100" and provenance.processor(one, "H100") == "GPU"
    assert provenance.processor(Run("r", Path(), provenance={"e05": {"hardware": None}}), "NVIDIA H100") == "GPU"


def test_attempts_that_differ_are_shown_one_by_one() -> None:
    each = {"hardware_by_attempt": [None, {"gpus": ["H100"]}], "hardware": {"gpus": ["H100"]}}
    shown = document.to_markdown("T", recorded([Run("r", Path(), provenance={"e05": entry(**each)})]))
    assert "not recorded, gpus H100" in shown


def test_the_leaderboard_says_what_is_incomplete(tmp_path: Path) -> None:
    run_of(tmp_path / "machine" / "model", {"e08_criteria": made.criteria()}, e08=entry(**INCOMPLETE, **UNRECORDED))
    page = leaderboard(tmp_path)
    assert f"unknown, {LACKS}" in page and "machine not recorded" in page and "| unknown |" in page


@pytest.fixture
def two_seeds() -> pd.DataFrame:
    """e04 with two seeds, the second 10 points worse in all that it measures."""
    first = made.task_finetuning().query("seed == 0")
    second = first.assign(seed=1.0, accuracy=first["accuracy"] - 0.1)
    return pd.concat([first, second], ignore_index=True)


def test_a_missing_seed_does_not_move_the_difference_from_base(two_seeds: pd.DataFrame) -> None:
    model = str(two_seeds["model"].iloc[0])
    whole = accuracy_table(two_seeds, model).set_index("")["Against base, points"]
    lacking = two_seeds[~((two_seeds["variant"] == "cats-50") & (two_seeds["seed"] == 1))]
    part = accuracy_table(lacking, model).set_index("")["Against base, points"]
    assert part["CATS-50"] == whole["CATS-50"] != style.DASH and part.equals(whole)
    (finding,) = (one for one in c6_task_finetuning(made.loaded(e04_task_finetuning=lacking)) if one.model == model)
    numbers = finding.ours.split(";")[0]
    ours, base = numbers.removeprefix("CATS-50 ").split(" (")[0].split(" / ")
    points = float(numbers.split("(")[1].split()[0].replace(style.MINUS, "-"))
    assert 100 * (float(ours) - float(base)) == pytest.approx(points, abs=0.02)


def test_no_variant_is_best_of_a_column_whose_variants_had_other_seeds(two_seeds: pd.DataFrame) -> None:
    model = str(two_seeds["model"].iloc[0])
    lacks = (two_seeds["variant"] == "cats-50") & (two_seeds["seed"] == 1) & (two_seeds["task"] == "polarity")
    bold = accuracy_table(two_seeds[~lacks], model).set_index("").apply(lambda column: column.str.contains(r"\*").any())
    assert list(bold.index[bold]) == ["acceptability", "yes no"]


def test_a_task_of_the_hub_has_the_share_of_its_commoner_answer_beside_it() -> None:
    run = load_run(ROOT / "results/h100/qwen2.5-coder-0.5b-instruct", row_types(discover()))
    table = run.table(TaskFinetuningRow)
    shown = accuracy_table(table, table["model"].iloc[0]).set_index("")
    assert shown.loc["One answer to all", "CoLA"] == "0.6913"
    assert shown.loc["One answer to all", "Average"] == f"{(0.69128 + 0.62171 + 0.50917) / 3:.4f}"
    some = table.assign(items=table["items"].where(table["task"] != "instruct_cola", 100))
    assert "One answer to all" not in set(accuracy_table(some, table["model"].iloc[0])[""])
    of_boolq = (table["variant"] == "dense") == (table["task"] == "instruct_boolq")  # no variant has every task
    assert not accuracy_table(table[of_boolq], table["model"].iloc[0]).isna().any(axis=None)


def test_parts_of_experiments_are_shown_without_what_they_lack() -> None:
    """Found by dropping units one by one: e07 fine-tuned alone, e08 with speed but without dense perplexity."""
    tuned = made.loaded(e07_attention=made.attention(finetuned=True))
    assert {finding.verdict for finding in c10_attention(tuned) if finding.aspect == "without fine-tuning"} == {
        "not tested"
    }
    document.to_markdown("T", ATTENTION.contents(tuned))
    table = made.criteria()
    tables = {"e08_criteria": table[table["criterion"] != "dense"], "e08_speed": made.all_tables()["e08_speed"]}
    lacking = made.loaded(**tables)
    assert CriterionRow.table in lacking.tables and frontier_figure(lacking) is None


@pytest.mark.parametrize("place", [{"gpus": ["H100"]}, None])
def test_a_run_that_has_ended_counts_before_a_later_one_that_has_not(place: dict[str, Any] | None) -> None:
    """On one machine; two runs of machines that are not recorded are not known to be of the same."""
    tables = {"e02_zero_shot": made.zero_shot()}
    whole = entry(hardware=place, started="2001-01-01T00:00:00")
    part = entry(hardware=place, started="2001-02-01T00:00:00", **INCOMPLETE)
    older, newer = (Run(name, Path(), tables, provenance={"e02": of}) for name, of in (("old", whole), ("new", part)))
    judged = judge([older, newer], discover()).query("claim == 'C2'").set_index("run")
    assert judged["verdict"]["old"] != "not tested" and LACKS in judged["reason"]["new"]
    if place:
        assert judged["verdict"]["new"] == "not tested" and "measured to its end in old" in judged["reason"]["new"]
        later = Run("later", Path(), tables, provenance={"e02": {**part, "incomplete": None, "started": "2001-03-01"}})
        judged = judge([older, newer, later], discover()).query("claim == 'C2'").set_index("run")
        assert list(judged["verdict"] == "not tested") == [True, True, False]
        assert "measured again later, in later" in judged["reason"]["old"]
    else:
        assert judged["verdict"]["new"] == judged["verdict"]["old"]
