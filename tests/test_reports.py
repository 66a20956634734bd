"""The report from made-up runs: what it shows, what it says is missing, that it needs neither torch nor the kernels."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import reports
from experiments.framework.tables import (
    ShareRow,
    ZeroShotRow,
    columns,
)
from reports.__main__ import main
from reports.core import document, style, tables
from reports.core import render as rendering
from reports.core.appendix import appendix, recorded
from reports.core.load import Run, load_run, load_runs, read_table
from reports.core.report import Report, build
from reports.core.section import discover
from tests import make_results as made

FIGURES = [drawing.name for section in discover() for drawing in section.figures]
FIGURES.remove("e02_size")  # of models whose names say their size


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """One report of a run in which everything was measured, in a directory with a space in its name."""
    run = made.write_run(tmp_path_factory.mktemp("runs here") / "pocket")
    built: list[Report] = []

    def keep(*arguments: Any) -> Report:
        built.append(build(*arguments))
        return built[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rendering, "build", keep)
        assert main([str(run)]) == 0
    return run, built[0]


@pytest.fixture(scope="module")
def whole(rendered: tuple[Path, Report]) -> Path:
    """Where `rendered` lies."""
    return rendered[0]


def text_of(run: Path) -> str:
    return (run / "report.md").read_text(encoding="utf-8")


def judged(run: Path) -> pd.DataFrame:
    return pd.read_csv(run / "claims.csv", keep_default_na=False)


# --- the whole report


def test_every_file_is_there(whole: Path) -> None:
    assert (whole / "report.pdf").read_bytes().startswith(b"%PDF")
    for name in [*FIGURES, "headline"]:
        assert (whole / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        svg = (whole / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        assert "<path" in svg and "<text" not in svg, "text is drawn as paths, so that no font is missing"
    assert list(dict.fromkeys(judged(whole)["claim"])) == [f"C{i}" for i in range(1, 12)]
    left = [path.name for path in whole.rglob("*") if path.name.startswith(".") or path.suffix == ".typ"]
    assert not left


def test_page_one_has_a_row_per_claim(whole: Path) -> None:
    lines = text_of(whole).splitlines()
    start = lines.index("**Table 1.** The paper's claims, one row each.")
    assert lines[start + 2] == "|  | Claim | Real models | Pocket model | GPU | CPU |"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 4 : start + 15]]
    assert [row[0] for row in rows] == [f"C{i}" for i in range(1, 12)]
    assert lines[start + 15] == ""
    by_claim = {row[0]: row[2:] for row in rows}
    assert by_claim["C2"] == ["**holds here** (made-up)", "not tested", style.DASH, style.DASH]
    assert by_claim["C7"][:2] == [style.DASH, style.DASH]
    assert by_claim["C9"][3].startswith("eager loop, as in the paper / fastest loop timed in the run: ")


def test_markdown_opens_with_the_claims_and_shows_everything(whole: Path) -> None:
    text = text_of(whole)
    assert text.index("## Claims") < text.index("## Claims in detail") < text.index("## Activation histograms")
    assert set(re.findall(r"figures/(\w+)\.png", text)) == {*FIGURES, "headline"}
    assert "0.6900 ± 0.0071 / 0.7000" in text  # C2, from the made-up mean and error
    assert "| CATS-50 " in text
    assert "0.6994" in text  # the paper's average stands beside
    assert "took 2 min 03 s" in text
    assert "with uncommitted changes" in text and "unknown whether it was clean" in text  # e03 and e04
    assert not re.search(r"\bnan\b", text)
    for section in discover():
        assert f"## {section.title}" in text


def test_every_table_keeps_its_columns(whole: Path) -> None:
    widths = {}
    for number, line in enumerate(text_of(whole).splitlines()):
        if line.startswith("|"):
            cells = len(re.findall(r"(?<!\\)\|", line))
            assert cells == widths.get(number - 1, cells), line
            widths[number] = cells
    assert len(widths) > 50


class Page(HTMLParser):
    """What of a page points elsewhere, how tables and pictures are boxed, and the ids of its headings."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes: list[bool] = []
        self.loose: list[str] = []
        self.sources: list[str] = []
        self.targets: set[str] = set()
        self.links: set[str] = set()
        self.coloured: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        at = {name: value or "" for name, value in attributes}
        if tag == "div":
            self.boxes.append("scroll" in at.get("class", "").split())
        if tag in ("table", "img") and not any(self.boxes):
            self.loose.append(tag)
        self.sources += [at["src"]] if "src" in at else []
        self.sources += [at["href"]] if tag == "link" else []
        if tag == "a":
            self.links.add(at.get("href", ""))
        if "id" in at:
            self.targets.add(at["id"])
        if tag == "span":
            self.coloured.append(at.get("class", ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "div":
            self.boxes.pop()


def test_the_html_is_one_file_that_a_phone_can_show(whole: Path) -> None:
    html = (whole / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(html)
    assert page.sources and all(source.startswith("data:") for source in page.sources)
    assert len([source for source in page.sources if source.startswith("data:image")]) == len(FIGURES) + 1
    assert "overflow-x: auto" in html and "width=device-width" in html
    assert not page.loose, "every table and picture scrolls in its own box"
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.targets
    assert "holds" in page.coloured and "fails" in page.coloured
    assert html.count("<table") == text_of(whole).count("**Table ")
    for claim in range(1, 12):
        assert f">C{claim}<" in html


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    pocket = made.write_run(tmp_path / "pocket", {"e02_zero_shot": made.zero_shot()})
    speed = made.latency("Imaginary GPU", rows=(1,))
    gpu = made.write_run(
        tmp_path / "results" / "imaginary" / "paper", {"e05_mlp_latency": speed, "e05_rounds": made.rounds(speed)}, True
    )
    assert main([str(pocket), str(gpu), "--output", str(tmp_path / "both")]) == 0
    at = judged(tmp_path / "both")
    assert set(at.loc[at["claim"] == "C2", "run"]) == {"pocket"}
    assert set(at.loc[at["claim"] == "C7", "run"]) == {"imaginary paper"}
    assert set(at.loc[at["claim"] == "C7", "column"]) == {"GPU"}
    assert list(at.loc[at["claim"] == "C9", "verdict"]) == ["not tested"]
    text = text_of(tmp_path / "both")
    assert "imaginary paper: Imaginary GPU" in text
    assert "Not measured here; run `nox -s experiment -- e06`." in text
    assert (tmp_path / "both" / "figures" / "e05_latency_imaginary-paper.svg").exists()
    assert not (pocket / "report.md").exists()


# --- sections and experiments that this project does not know


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


# --- what is missing, broken or old


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


def test_a_text_from_a_local_folder_is_not_said_to_be_the_hubs(tmp_path: Path) -> None:
    run = made.write_run(tmp_path / "run", {"e02_zero_shot": made.zero_shot()})
    data = {"source": "hub", "path": "some/text", "name": "raw", "column": "text", "folder": "my texts"}
    entry = {"settings": {"profile": "small", "data": data, "options": {}}, "inputs": {"text": {**data}}}
    (run / "provenance.json").write_text(json.dumps({"experiments": {"e02": entry}}))
    text = document.to_markdown("T", recorded([load_run(run, made.types_read())]))
    assert text.count("folder my texts") == 2 and "some/text" not in text and "raw" not in text
    assert "source a local folder" in text


def test_secondary_tables_are_on_the_web_and_not_in_print(rendered: tuple[Path, Report]) -> None:
    """The PDF is short; whatever it leaves out is in the two other forms."""
    report = rendered[1]
    printed, web = (document.to_markdown("T", blocks) for blocks in (report.printed, report.whole))
    for secondary in ("figures/e05_ablation.png", "The learning-rate sweep", "### What the runs recorded"):
        assert secondary in web and secondary not in printed
    for primary in ("figures/e08_frontier.png", "## Claims in detail", "## Appendix"):
        assert primary in web and primary in printed


def test_runs_of_several_models_share_figures_tables_and_the_first_page(tmp_path: Path) -> None:
    names = ("one-270m", "two-0.5b.Q4_K_M.gguf")
    runs = [
        made.write_run(tmp_path / name, {"e02_zero_shot": made.zero_shot(name), "e01_histogram": made.histogram(name)})
        for name in names
    ]
    assert main([*map(str, runs), "--output", str(tmp_path / "both")]) == 0
    text = text_of(tmp_path / "both")
    assert text.count("(figures/e02_accuracy") == text.count("(figures/e01_histogram") == 1
    assert "Real models, 270m: one-270m, 0.5b: two-0.5b." in text
    assert "| C2 | CATS-50 stays within 1-2 % of base without fine-tuning | **holds here** (270m, 0.5b) |" in text
    assert text.count("| one-270m | Base |") == text.count("| two-0.5b (Q4\\_K\\_M) | Base |") == 1
    assert (tmp_path / "both" / "figures" / "e02_size.png").exists()


def test_unmeasured_cells_stay_unmeasured(tmp_path: Path) -> None:
    table = made.zero_shot()
    table.loc[(table["variant"] == "cats-70") & (table["task"] == "keyword"), ["value", "stderr"]] = np.nan
    run = made.write_run(tmp_path / "run", {"e02_zero_shot": table})
    kept = load_run(run, made.types_read()).tables["e02_zero_shot"]
    shown = tables.zero_shot(kept, "made-up").set_index("")
    assert shown.loc["CATS-70", "keyword"] == style.DASH
    assert shown.loc["CATS-70", "Average"] == style.DASH


def test_bad_arguments_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for argument, sentence in ((tmp_path / "absent", "is not a directory"), (tmp_path / "empty", "holds no results")):
        assert main([str(argument)]) == 1
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == 1
    run = made.write_run(tmp_path / "run", {"e01_thresholds": made.thresholds()})
    with pytest.raises(ValueError, match="given twice"):
        load_runs([run, run], made.types_read())


def test_the_appendix_is_of_the_runs_shown_and_of_nobody_else(whole: Path) -> None:
    text = text_of(whole).split("### What the runs recorded")[1]
    assert "| command line (e05) | run e05 |" in text
    assert f"weights {'f' * 64}" in text
    assert "H200" not in text and "L40S" not in text


REFUSED = ("torch", "transformers", "cats_kernels", "numba", "triton")


def test_reports_import_neither_torch_nor_the_kernels(tmp_path: Path) -> None:
    """The whole way from CSV to PDF with those packages refused, in a fresh interpreter."""
    run = made.write_run(tmp_path / "run", {"e01_thresholds": made.thresholds()})
    code = (
        "import sys, json\n"
        f"for name in {REFUSED}: sys.modules[name] = None\n"
        "from reports.__main__ import main\n"
        f"sys.exit(main([{json.dumps(str(run))}]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (run / "report.pdf").exists() and (run / "report.html").exists()
