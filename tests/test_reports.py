"""The report from made-up runs: what it shows, what it says is missing, that it needs neither torch nor the kernels."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from reports.__main__ import main
from reports.core import document, style
from reports.core import render as rendering
from reports.core.appendix import recorded
from reports.core.load import load_run, load_runs
from reports.core.report import Report, build
from reports.core.section import discover
from tests import make_results as made
from tests.make_results import judged, text_of

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
    left_out = ("figures/e05_ablation.png", "The learning-rate sweep", "### What the runs recorded", "## Appendix")
    for secondary in left_out:
        assert secondary in web and secondary not in printed
    for primary in ("figures/e08_frontier.png", "## Claims in detail"):
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
