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

import numpy as np
import pandas as pd
import pytest

import reports
from experiments.framework.tables import (
    AttentionRow,
    CriterionRow,
    HistogramRow,
    ItemSample,
    ShareRow,
    ThresholdRow,
    ZeroShotRow,
    columns,
)
from reports import e02, e04, e05, e06, e07
from reports.__main__ import main
from reports.core import document, provenance, style, tables
from reports.core.appendix import appendix, recorded
from reports.core.claims import judge
from reports.core.load import Run, load_run, load_runs, read_table
from reports.core.protocol import protocol
from reports.core.report import build
from reports.core.section import discover, row_types
from reports.e02 import figures as e02_figures
from reports.e06 import figures as e06_figures
from reports.measures.generation import generation_speedups
from tests import make_results as made

FIGURES = [drawing.name for section in discover() for drawing in section.figures]
FIGURES.remove("e02_size")  # of models whose names say their size


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One report of a run in which everything was measured, in a directory with a space in its name."""
    run = made.write_run(tmp_path_factory.mktemp("runs here") / "pocket")
    assert main([str(run)]) == 0
    return run


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
    assert by_claim["C9"][3].startswith("eager loop, as in the paper / fastest loop: ")


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


def test_a_foreign_criterion_is_shown_by_its_own_name() -> None:
    table = made.zero_shot(accuracy={**made.ACCURACY, "gate-norm-50": 0.695, "gate-norm-70": 0.68})
    shown = tables.zero_shot(table, "made-up")
    assert "gate-norm-50" in list(shown[""])
    figure = e02.accuracy_figure(made.loaded(e02_zero_shot=table))
    figure.draw_without_rendering()
    lines = {line.get_color() for line in figure.axes[0].lines}
    assert style.OTHER_COLOURS[0] in lines
    assert style.variant_name("gate-norm-50") == "gate-norm-50"
    assert style.variant_name("cats-50-attention-finetuned") == "CATS-50, attention too, fine-tuned"


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


def test_secondary_tables_are_on_the_web_and_not_in_print(whole: Path) -> None:
    """The PDF is short; whatever it leaves out is in the two other forms."""
    loaded = load_runs([whole], made.types_read())
    report = build(loaded, discover(), judge(loaded, discover()), whole / "figures")
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


def test_the_cost_of_cats_50_against_size_holds_ours_and_the_papers() -> None:
    table = pd.concat([made.zero_shot("a-270m"), made.zero_shot("b-1.5b-instruct"), made.zero_shot("pocket")])
    points = e02_figures.size_points(made.loaded(e02_zero_shot=table))
    ours = points[~points["paper"]].set_index(["model", "metric"])
    assert sorted(set(ours.index.get_level_values(0))) == ["a-270m", "b-1.5b"]
    assert ours.loc[("a-270m", "acc"), "value"] == pytest.approx(-1.0)
    assert ours.loc[("a-270m", "acc"), "low"] < -1.0 < ours.loc[("a-270m", "acc"), "high"]
    paper = points[points["paper"]].set_index(["model", "metric"])["value"]
    assert paper["Mistral-7B", "perplexity"] == 1.21 and paper["Llama2-13B", "acc"] == pytest.approx(-0.65)
    assert points.loc[points["paper"], "low"].isna().all(), "the paper gives no interval"
    sizes = points.groupby("model")["parameters"].first()
    assert (sizes["a-270m"], sizes["b-1.5b"], sizes["Llama2-13B"]) == (270e6, 1.5e9, 13e9)
    assert e02_figures.size_figure(made.loaded(e02_zero_shot=made.zero_shot())) is None


def test_unmeasured_cells_stay_unmeasured(tmp_path: Path) -> None:
    table = made.zero_shot()
    table.loc[(table["variant"] == "cats-70") & (table["task"] == "keyword"), ["value", "stderr"]] = np.nan
    run = made.write_run(tmp_path / "run", {"e02_zero_shot": table})
    kept = load_run(run, made.types_read()).tables["e02_zero_shot"]
    shown = tables.zero_shot(kept, "made-up").set_index("")
    assert shown.loc["CATS-70", "keyword"] == style.DASH
    assert shown.loc["CATS-70", "Average"] == style.DASH


@pytest.mark.parametrize("missing", ["stderr", "difference_stderr", "sparsity_measured", "chance"])
def test_accuracy_without_some_numbers_still_renders(missing: str) -> None:
    run = made.loaded(e02_zero_shot=made.zero_shot().assign(**{missing: np.nan}))
    text = document.to_markdown("T", e02.contents(run))
    assert "CATS-50" in text and not re.search(r"\bnan\b", text)
    e02.accuracy_figure(run).draw_without_rendering()


def test_bad_arguments_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for argument, sentence in ((tmp_path / "absent", "is not a directory"), (tmp_path / "empty", "holds no results")):
        assert main([str(argument)]) == 1
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == 1
    run = made.write_run(tmp_path / "run", {"e01_thresholds": made.thresholds()})
    with pytest.raises(ValueError, match="given twice"):
        load_runs([run, run], made.types_read())


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
    assert set(table["correct"].str.len()) == {made.ITEMS}, "a long string of digits is no number"
    made.write_table(tmp_path, "e01_histogram", made.histogram())
    assert set(read_table(tmp_path / "e01_histogram.csv", HistogramRow)["weights"]) == {"pretrained", "random"}


# --- provenance


def test_unknown_is_never_clean() -> None:
    commit = "0123456789abcdef"
    assert provenance.commit({"commit": commit, "dirty": False}) == "0123456789, clean"
    assert provenance.commit({"commit": commit, "dirty": True}) == "0123456789, with uncommitted changes"
    for dirty in ({"dirty": None}, {"dirty": "unknown"}, {}):
        assert provenance.commit({"commit": commit, **dirty}) == "0123456789, unknown whether it was clean"
    assert provenance.commit({}) == "unknown, unknown whether it was clean"


def test_a_run_over_two_commits_says_both_and_all_attempts_count() -> None:
    for commits in (["a" * 40, "b" * 40], {"a" * 40: 3, "b" * 40: 1}, [{"commit": "a" * 40}, {"commit": "b" * 40}]):
        assert provenance.commits({"commits": commits, "commit": "c"}) == ["a" * 10, "b" * 10]
    assert provenance.seconds({"attempts": [10, 5.5], "seconds": 5.5}) == 15.5
    assert provenance.seconds({"attempts": [{"seconds": 10}, {"seconds": 5}]}) == 15
    assert np.isnan(provenance.seconds({"attempts": [10, None]})) and np.isnan(provenance.seconds({}))
    entry = {"commit": "a", "differs_from_profile": {"prompts": [50, 3]}, "started": "2001-01-01T00:00:00Z"}
    run = Run("r", Path(), {}, {}, {"e06": {**entry, "settings": {"profile": "paper"}}})
    assert "profile paper (changed)" in provenance.run_line(run)
    assert "differs from its profile in prompts 50, 3" in provenance.provenance_line(run, "e06")


def test_the_appendix_is_of_the_runs_shown_and_of_nobody_else(whole: Path) -> None:
    text = text_of(whole).split("### What the runs recorded")[1]
    assert "| command line (e05) | run e05 |" in text
    assert f"weights {'f' * 64}" in text
    assert "H200" not in text and "L40S" not in text


def test_settings_are_written_in_words(tmp_path: Path) -> None:
    run = made.write_run(tmp_path / "run", {"e02_zero_shot": made.zero_shot()})
    options = {"calibration_blocks": 256, "length": 128, "levels": [0.5, 0.7]}
    settings = {"profile": "laptop", "data": {"source": "hub", "path": "some/text"}, "options": options}
    (run / "provenance.json").write_text(json.dumps({"experiments": {"e02": {"settings": settings}}}))
    loaded = load_run(run, made.types_read())
    shown = protocol(e02.SECTION, [loaded]).set_index("")["run"]
    assert shown["calibration"] == "256 blocks of 128 tokens, text: some/text"
    text = document.to_markdown("T", [*recorded([loaded]), *appendix([loaded], discover())])
    assert "levels 0.5, 0.7" in text
    assert not re.search(r"\\\[(?!unlabel)[\d']", text), "no list as Python writes it"
    assert "`nox -s experiment -- e06 --profile laptop`" in text


def test_the_learning_rate_of_dense_is_said() -> None:
    aspect = next(aspect for aspect in e04.PROTOCOL if aspect.name == "learning rate")
    assert "favours CATS" in aspect.ours(made.loaded(e04_sweep=made.task_sweep()))
    own = made.task_sweep().assign(variant=lambda at: at["variant"].replace("relufication", "dense"))
    assert aspect.ours(made.loaded(e04_sweep=own)) == "swept for CATS-70, Base"


def test_the_choice_of_the_pocket_checkpoint_is_said() -> None:
    assert "held-out modules" in e02.note([made.loaded(e02_zero_shot=made.zero_shot("pocket"))])
    assert e02.note([made.loaded(e02_zero_shot=made.zero_shot())]) == ""


# --- tables and figures


def test_data_cannot_become_markup() -> None:
    assert document.escape("a|b *c* [d](e) $f$\n<g>") == r"a\|b \*c\* \[d\](e) \$f\$ \<g\>"
    frame = pd.DataFrame({"Model": [document.escape("x|y")], "Value": ["1.0"]})
    written = document.to_markdown("T", [document.Table(frame, "Caption.")])
    assert "**Table 1.** Caption.\n\n| Model | Value |\n|:---|:---:|\n| x\\|y | 1.0 |" in written


def test_the_best_sparse_variant_of_each_column_is_bold() -> None:
    table = made.zero_shot(accuracy={"dense": 0.7, "cats-50": 0.69, "cats-70": 0.69, "relufication": 0.5})
    table.loc[(table["variant"] == "relufication") & (table["task"] == "keyword"), "value"] = 0.9
    shown = tables.zero_shot(table, "made-up").set_index("")
    assert shown.loc["CATS-50", "Average"] == shown.loc["CATS-70", "Average"] == "**0.6900 ± 0.0071**"
    assert shown.loc["ReLUfication", "keyword"].startswith("**0.9000")
    assert not shown.loc["CATS-50", "keyword"].startswith("**")
    assert not shown.loc["Base"].str.contains(r"\*").any()
    paper = e02.paper_table_1(["made-up"]).set_index(["Model", ""])
    assert paper.loc[("Mistral-7B", "Base"), "ARC-c"] == "0.5034"
    bold = paper["ARC-c"][paper["ARC-c"].str.startswith("**")]
    assert list(bold) == ["**0.5043**", "**0.4121**"]
    assert e04.paper_tables_2_and_3().set_index("").loc["CATS-70", "SST-2"] == "**0.9702** (68.7 %)"
    assert e02.paper_perplexity().iloc[0].tolist() == ["Llama2-7B", "CATS-50", "+1.1 %", "+0.6 %"]


def test_latency_names_each_baseline_and_the_bound() -> None:
    table = made.latency(dtypes=("float32",), rows=(1,))
    run = made.loaded(e05_mlp_latency=table, e05_rounds=made.rounds(table))
    shown = e05.latency_table(run)
    row = shown[(shown["Shape"] == "Mistral-7B") & (shown["Sparsity"] == "50 %")].iloc[0]
    # CATS costs 1.05 of the bytes of dense, the bound 0.98 of them, the compiled dense 0.95 of torch's: 1.5 / 1.05 ...
    assert re.fullmatch(r"1\.36x \(1\.3\d to 1\.3\dx\)", row["Over dense"])
    assert (row["Over torch"], row["Over 0 %"], row["At the bound"]) == ("1.43x", "1.50x", "1.45x")
    assert row["Paper"] == "1.49x at 53.9 %"
    assert "Dense is" not in shown  # the compiled one everywhere


def test_several_rows_have_the_sparsity_of_their_union() -> None:
    table = made.latency(dtypes=("bfloat16",), rows=(1, 4))
    shown = e05.rows_table(table[table["shape"] == "Mistral-7B"])
    assert list(shown["Rows"]) == ["4"]
    assert shown["Union of 50 %"].iloc[0] == style.percent(1 / 16)  # from the column active_neurons
    assert shown["Path"].iloc[0] == "sparse kernel"


def test_components_that_add_to_more_than_the_token_are_not_drawn_backwards() -> None:
    table = made.shares()
    table["share"] = [0.7, 0.3, 0.2, -0.2]
    figure = e06_figures.shares_figure(made.loaded(e06_shares=table))
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx([70, 30, 20])
    assert figure.axes[0].get_xlim()[1] > 120


def test_the_attention_figure_shows_ours_the_papers_and_each_site() -> None:
    figure = e07.attention_figure(made.loaded(e07_attention=made.attention()))
    ours, paper, sites = figure.axes
    assert [text.get_text() for text in ours.texts] == ["0.700", "0.690", "0.680"]
    assert [text.get_text() for text in paper.texts] == ["0.699", "0.692", "0.668"]
    assert [tick.get_text() for tick in sites.get_xticklabels()] == ["gate", "attention\ninput", "MLP\ninput"]
    heights = [bar.get_height() for bar in sites.patches]
    assert heights == pytest.approx([50.3, np.nan, np.nan, 50.3, 49.8, 49.9], nan_ok=True)


def test_growth_varies_one_thing_only() -> None:
    speedups = generation_speedups(made.throughput())
    batch = e06_figures.growth(speedups, "batch")
    assert sorted(batch["batch"]) == [1, 2, 4, 8]
    assert batch[["layers", "prompt_tokens", "generated_tokens", "sparsity_target"]].drop_duplicates().shape[0] == 1
    assert sorted(e06_figures.growth(speedups, "prompt_tokens")["prompt_tokens"]) == [16, 128, 512]
    assert sorted(e06_figures.growth(speedups, "sparsity_target")["sparsity_target"]) == [0, 0.5, 0.7, 0.9]


def test_the_throughput_table_is_of_figure_4_and_the_growth_table_of_the_rest() -> None:
    table = made.throughput()
    table.loc[table["condition"] == "growth", "prefill_s"] = 9.0
    speedups = generation_speedups(table)
    shown = e06.throughput_table(speedups, table)
    assert len(shown) == 12 and set(shown["Prefill, s"]) == {"0.100"} and set(shown["Memory"]) == {"1.00x"}
    grown = e06.growth_table(speedups).set_index(["Batch", "Prompt", "Variant"])
    assert set(grown.index) == {
        *(("1", "16", name) for name in ("CATS-0", "CATS-70", "CATS-90")),
        *(("1", prompt, "CATS-50") for prompt in ("128", "512")),
        *((batch, "16", "CATS-50") for batch in ("2", "4", "8")),
    }
    two = table[(table["batch"] == 2)].groupby(["variant", "prompt"])["tokens_per_second"].mean().unstack(0)
    ratio = (two["cats-50"] / two["dense"]).prod() ** (1 / len(two))
    assert grown.loc[("2", "16", "CATS-50"), "Speed-up"].startswith(f"{ratio:.2f}x")


def test_a_loop_that_nobody_knows_is_drawn_too() -> None:
    table = made.throughput(loops=("eager", "graph-tuned", "some-loop", "other-loop"))
    figure = e06_figures.ratio_figure(made.loaded(e06_throughput=table))
    assert figure is not None
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert any("some-loop" in label for label in labels)


def test_numbers_are_written_one_way() -> None:
    assert style.plus_minus(0.689, 0.0043) == "0.6890 ± 0.0043"
    assert style.plus_minus(0.689, np.nan) == "0.6890"
    assert style.times(1.5234) == "1.52x"
    significant = [style.significant(x) for x in (34.739, 0.18312, 149.05, 0.0806, 0)]
    assert significant == ["34.7", "0.183", "149", "0.0806", "0"]
    assert [style.times_range(1.551, 1.572), style.times_range(1.341, 1.342)] == ["1.55 to 1.57x", "1.34x"]
    errors = [style.ratio_error(x) for x in (0.654, 0.0049, 1e-5, float("nan"))]
    assert errors == [" ± 0.65", " ± 0.005", " ± 0.001", ""]
    assert style.listed({"float32": [0.5, 0.7], "empty": {}, "n": 1e-5}) == "float32 0.5, 0.7; n 1e-05"
    assert style.model_name("a-1b.Q4_K_M.gguf") == "a-1b (Q4_K_M)"
    assert [style.model_name(x) for x in ("shape:llama2-7b", "pocket", "/a/b/c")] == ["Llama2-7B", "pocket", "c"]
    assert style.percent(0.5) == "50.0 %"
    assert [style.signed_percent(x) for x in (0.0121, -0.5)] == ["+1.2 %", f"{style.MINUS}50.0 %"]
    assert style.points(-0.0104) == f"{style.MINUS}1.04"
    assert style.number(float("nan")) == style.times(float("nan")) == style.DASH
    assert [style.duration(s) for s in (42, 200, 7500)] == ["42 s", "3 min 20 s", "2 h 05 min"]


def test_coloured_letters_have_contrast() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    used = {*style.VARIANT_COLOURS.values(), *style.IMPLEMENTATION_COLOURS.values(), *style.OTHER_COLOURS}
    for colour in used:
        contrast = 1.05 / (luminance(style.INK.get(colour, colour)) + 0.05)  # WCAG 2
        assert contrast >= 3.4, (colour, contrast)
    assert all(1.05 / (luminance(ink) + 0.05) >= 4.5 for ink in style.INK.values())


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
