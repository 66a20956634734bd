"""Pages that a command writes from results/: the committed ones are up to date, and a third party's run adds rows."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from reports import arbiter, leaderboard
from reports.core.statistics import Estimate
from tests import make_results as made
from tests.test_report_criteria import everything

ROOT = Path(__file__).parents[1]


def test_the_committed_leaderboard_is_what_the_command_writes() -> None:
    assert leaderboard.main(["--check"]) == 0


def test_the_committed_arbiter_is_what_the_command_writes() -> None:
    assert arbiter.main(["--check"]) == 0


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A copy of the committed results that e08 wrote."""
    for name in ("h100/gemma-3-270m", "cpu/pocket"):
        shutil.copytree(ROOT / "results" / name, tmp_path / "results" / name)
    return tmp_path / "results"


def test_a_third_partys_run_adds_rows(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert leaderboard.main([str(results)]) == 0
    before = (results / leaderboard.NAME).read_text()
    assert leaderboard.main([str(results), "--check"]) == 0
    made.write_run(results / "their machine" / "a-model", everything())
    assert leaderboard.main([str(results), "--check"]) == 1
    assert "run `python -m reports.leaderboard`" in capsys.readouterr().err
    assert (results / leaderboard.NAME).read_text() == before, "checking writes nothing"
    assert leaderboard.main([str(results)]) == 0
    after = (results / leaderboard.NAME).read_text()
    new = [line for line in after.splitlines() if line not in before.splitlines() and not line.startswith("|:")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in new]
    assert [row[1] for row in rows[:3]] == ["oracle (ceiling)", "up", "CATS"]
    assert rows[1] == [
        "a/model", "up", "at least 70 %", "50 %", "1.50x token, NVIDIA Imaginary, at 70 %", "+0.5 %",
        "1.20x token, NVIDIA Imaginary; 1.10x MLPs, Imaginary CPU",
        "NVIDIA Imaginary", "0123456789, clean", "[their machine/a-model](their%20machine/a-model)",
    ]  # fmt: skip
    assert rows[-1] == ["their machine/a-model", "2001-01-08", "0123456789, clean", "`run e08`"]
    assert all(line in after for line in before.splitlines() if not line.startswith("|:"))


def test_a_run_that_cannot_be_read_is_one_sentence(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = results / "theirs" / "model" / "results"
    broken.mkdir(parents=True)
    (broken / "e08_criteria.csv").write_text("model,criterion\na,cats\n")
    assert leaderboard.main([str(results)]) == 1
    said = capsys.readouterr().err
    assert "theirs/model" in said and "missing" in said and said.count("\n") == 1


def test_contributing_says_how_a_result_is_added() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert "**A result.**" in text and "python -m reports.leaderboard" in text and "python -m reports.arbiter" in text


def test_k_and_model_wide_sparsity_are_converted_by_the_mlps_share() -> None:
    """The shares of 22, 31 and 40 % (Llama2-7B) and 27, 38 and 48 % (Mistral-7B) that later papers count."""
    wide = {name: [round(100 * 2 / 3 * k * arbiter.share_of(name)) for k in (0.5, 0.7, 0.9)] for name in arbiter.BLOCKS}
    assert wide == {"Llama2-7B": [22, 31, 40], "Mistral-7B": [27, 38, 48], "Llama3-8B": [27, 38, 48]}
    table = arbiter.conversion_table([]).set_index("Model")
    assert table.loc["Llama2-7B", "“40 %” is"] == "k = 90 %" and table.loc["Mistral-7B", "“40 %” is"] == "k = 74 %"


def point(level: float, low: float, value: float, high: float) -> arbiter.Point:
    """A level at which perplexity rises to so many times dense's."""
    change = Estimate(*(math.log(1 + x) for x in (value, low, high)))
    return arbiter.Point(level, f"cats-{100 * level:g}", level, 1.0, 1.0, change, change)


def test_ours_is_never_read_off_between_levels() -> None:
    model = arbiter.Model("m", 0.7, [point(0.4, 0.08, 0.1, 0.12), point(0.5, 0.2, 0.25, 0.3)], {}, "")
    words, at = arbiter.bracket(model, 0.46)
    assert words == "+10.0 % at 40 % and +25.0 % at 50 %"
    assert (at.low, at.high) == (pytest.approx(0.08), pytest.approx(0.3))
    assert arbiter.compared(0.19, at) == arbiter.BETWEEN
    assert arbiter.compared(0.05, at) == "larger" and arbiter.compared(0.4, at) == "smaller"
    words, at = arbiter.bracket(model, 0.5)
    assert words == "+25.0 % at 50 %" and arbiter.compared(0.22, at) == arbiter.WITHIN
    assert arbiter.bracket(model, 0.9) is None and arbiter.bracket(model, 0.3) is None


def test_every_printed_number_has_its_row() -> None:
    page = arbiter.PAGE.read_text()
    others = (
        "5.52 of 5.07",
        "43.8 of 5.07",
        "28000 of 4.92",
        "+19.0 %",
        "0.463",
        "0.496",
        "40 %: sparsity of",
    )
    own = ("0.6890 of 0.6994", "0.6709 of 0.6994", "0.4764 of 0.6589", "+1.1 %", "+1.2 %")
    assert [printed for printed in (*others, *own) if printed not in page] == []
