"""The report from made-up runs: what it shows, what it says is missing, that it needs neither torch nor the kernels."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from reports import document, figures_accuracy, figures_throughput, style, tables, tables_speed
from reports.__main__ import main
from reports.figures import FIGURES
from reports.load import TABLES, load_run, load_runs, read_table
from reports.protocol import protocol
from reports.sections import CAPTIONS, FIGURES_OF
from tests import make_results as made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One report of a run in which everything was measured, in a directory with a space in its name."""
    run = made.write_run(tmp_path_factory.mktemp("runs here") / "pocket")
    assert main([str(run)]) == 0
    return run


def test_every_file_is_there(whole: Path) -> None:
    assert (whole / "report.pdf").read_bytes().startswith(b"%PDF")
    for name in [*FIGURES, "headline"]:
        assert (whole / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        svg = (whole / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        assert "<path" in svg and "<text" not in svg, "text is drawn as paths, so that no font is missing"
    judged = pd.read_csv(whole / "claims.csv")
    assert list(dict.fromkeys(judged["claim"])) == [f"C{i}" for i in range(1, 11)]
    left = [path.name for path in whole.rglob("*") if ".part" in path.name or path.suffix == ".typ"]
    assert not left


def test_markdown_opens_with_the_claims_and_shows_everything(whole: Path) -> None:
    text = (whole / "report.md").read_text(encoding="utf-8")
    assert text.index("## Claims") < text.index("## Activation histograms")
    assert set(re.findall(r"figures/(\w+)\.png", text)) == {*FIGURES, "headline"}
    judged = pd.read_csv(whole / "claims.csv", keep_default_na=False)
    for verdict in judged["verdict"].unique():
        assert text.count(f"**{verdict}**") == (judged["verdict"] == verdict).sum()
    assert "0.6900 ± 0.0071 / 0.7000" in text  # C2, from the fixture's own mean and error
    assert "| CATS-50 " in text
    assert "0.6994" in text  # the paper's average stands beside
    assert "took 2 min 03 s" in text
    assert "with uncommitted changes" in text  # e03 in the made-up provenance
    assert not re.search(r"\bnan\b", text)


def test_every_table_keeps_its_columns(whole: Path) -> None:
    lines = (whole / "report.md").read_text(encoding="utf-8").splitlines()
    widths = {}
    for number, line in enumerate(lines):
        if line.startswith("|"):
            cells = len(re.findall(r"(?<!\\)\|", line))
            previous = widths.get(number - 1, cells)
            assert cells == previous, line
            widths[number] = cells
    assert len(widths) > 50


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    pocket = made.write_run(tmp_path / "pocket", {"e02_zero_shot": made.zero_shot()})
    gpu = made.write_run(
        tmp_path / "results" / "imaginary" / "paper",
        {"e05_mlp_latency": made.latency("Imaginary GPU", rows=(1,))},
        flat=True,
    )
    assert main([str(pocket), str(gpu), "--output", str(tmp_path / "both")]) == 0
    judged = pd.read_csv(tmp_path / "both" / "claims.csv", keep_default_na=False)
    assert set(judged.loc[judged["claim"] == "C2", "run"]) == {"pocket"}
    assert set(judged.loc[judged["claim"] == "C7", "run"]) == {"imaginary paper"}
    assert list(judged.loc[judged["claim"] == "C9", "verdict"]) == ["not tested here"]
    text = (tmp_path / "both" / "report.md").read_text(encoding="utf-8")
    assert "imaginary paper: Imaginary GPU" in text
    assert "Not measured here; run `nox -s experiment -- e06`." in text
    assert (tmp_path / "both" / "figures" / "e05_latency_imaginary-paper.svg").exists()
    assert not (pocket / "report.md").exists()


def test_missing_and_broken_are_said_and_never_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made.write_run(
        tmp_path / "run",
        {
            "e02_zero_shot": made.zero_shot().drop(columns=["stderr", "chance"]),
            "e04_task_finetuning": made.task_finetuning()
            .astype({"accuracy": str})
            .replace({"accuracy": {"0.87": "oops"}}),
            "e01_thresholds": made.thresholds(),
        },
    )
    (run / "results" / "e03_sweep.csv").write_bytes(b"\xff\xfe\x00")
    (run / "results" / "e06_shares.csv").write_text(",".join(TABLES["e06_shares"]) + "\n")
    (run / "provenance.json").write_text("{")
    assert main([str(run)]) == 0
    said = capsys.readouterr().err
    for sentence in (
        "e02_zero_shot: columns stderr, chance missing",
        "e04_task_finetuning: column accuracy holds",
        "e03_sweep: unreadable",
        "e06_shares: it has a header and no rows",
        "provenance.json is broken",
    ):
        assert sentence in said
    text = (run / "report.md").read_text(encoding="utf-8")
    assert "e02\\_zero\\_shot.csv: columns stderr, chance missing" in text
    assert "| e05\\_mlp\\_latency | not measured here | `nox -s experiment -- e05` |" in text
    assert "| e01\\_histogram | not measured here | `nox -s experiment -- e01` |" in text
    judged = pd.read_csv(run / "claims.csv", keep_default_na=False)
    assert set(judged["verdict"]) == {"not tested here"}
    assert "missing" in judged.set_index("claim").loc["C2", "ours"]


def test_what_several_runs_lack_is_said_once(tmp_path: Path) -> None:
    runs = [
        made.write_run(tmp_path / name, {"e01_thresholds": made.thresholds(), **more})
        for name, more in (("a", {}), ("b", {"e06_greedy": made.greedy()}))
    ]
    assert main([*map(str, runs), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    (both,) = [line for line in text.splitlines() if "| e05\\_mlp\\_latency |" in line]
    assert both.startswith("| ") and "a, " in both and both.count("not measured here") == 1
    assert len([line for line in text.splitlines() if "| e06\\_throughput, e06\\_shares" in line]) == 2


def test_unmeasured_cells_stay_unmeasured(tmp_path: Path) -> None:
    table = made.zero_shot()
    table.loc[(table["variant"] == "cats-70") & (table["task"] == "keyword"), ["value", "stderr"]] = np.nan
    run = made.write_run(tmp_path / "run", {"e02_zero_shot": table})
    loaded = load_run(run).tables["e02_zero_shot"]
    shown = tables.zero_shot(loaded, "made-up").set_index("")
    assert shown.loc["CATS-70", "keyword"] == style.DASH
    assert shown.loc["CATS-70", "Average"] == style.DASH
    assert main([str(run)]) == 0


@pytest.mark.parametrize("missing", ["stderr", "difference_stderr", "sparsity_measured", "chance"])
def test_accuracy_without_some_numbers_still_renders(tmp_path: Path, missing: str) -> None:
    table = made.zero_shot()
    table[missing] = np.nan
    run = made.write_run(tmp_path / "run", {"e02_zero_shot": table})
    assert main([str(run)]) == 0
    assert not re.search(r"\bnan\b", (run / "report.md").read_text(encoding="utf-8"))


def test_bad_arguments_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for argument, sentence in ((tmp_path / "absent", "is not a directory"), (tmp_path / "empty", "holds no results")):
        assert main([str(argument)]) == 1
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == 1
    run = made.write_run(tmp_path / "run", {"e01_thresholds": made.thresholds()})
    with pytest.raises(ValueError, match="given twice"):
        load_runs([run, run])


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    one = {"e01_thresholds": made.thresholds()}
    paths = [made.write_run(tmp_path / name / "pocket", one) for name in ("a", "b")]
    assert [run.label for run in load_runs(paths)] == ["a pocket", "b pocket"]
    published = made.write_run(tmp_path / "results" / "h200" / "paper", one, flat=True)
    assert [run.label for run in load_runs([published])] == ["h200 paper"]


def test_read_table_names_the_row(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("machine,batch,chosen\nm,1,True\nm,two,no\n")
    with pytest.raises(ValueError, match="column batch holds 'two' in row 3, not a number"):
        read_table(path, ("machine", "batch"))
    path.write_text("machine,batch,chosen,more\nm,,maybe,x\n")
    with pytest.raises(ValueError, match="column chosen holds 'maybe' in row 2"):
        read_table(path, ("machine", "chosen"))
    assert np.isnan(read_table(path, ("machine", "batch"))["batch"].iloc[0])


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
    paper = tables.zero_shot_paper("made-up").set_index(["Model", ""])
    assert paper.loc[("Mistral-7B", "Base"), "ARC-c"] == "0.5034"
    bold = paper["ARC-c"][paper["ARC-c"].str.startswith("**")]
    assert list(bold) == ["**0.5043**", "**0.4121**"]
    assert tables.task_finetuning_paper().set_index("").loc["CATS-70", "SST-2"] == "**0.9702** (68.7 %)"


def test_latency_names_the_bound_that_its_share_refers_to() -> None:
    shown = tables_speed.latency({"e05_mlp_latency": made.latency(dtypes=("float32",), rows=(1,))})
    row = shown[(shown["Shape"] == "Mistral-7B") & (shown["Sparsity"] == "50 %")].iloc[0]
    # made-up CATS costs 1.05 of the bytes of dense, the bound 0.98 of them: 1.5 / 1.05, 1.5 / 0.98 and their ratio
    assert row["Ours"].startswith("1.43x (")
    assert (row["At the bound"], row["Of the bound"]) == ("1.53x", "93 %")
    assert row["Paper"] == "1.49x at 53.9 %"


def test_rows_are_told_with_the_sparsity_of_their_union() -> None:
    table = made.latency(dtypes=("bfloat16",), rows=(1, 4))
    active = 13440  # 93.75 % of 14336, what four independent rows of 50 % keep
    table["bytes_moved"] = 2 * 4096 * (14336 + 2 * active)
    shown = tables_speed.latency_rows({"e05_mlp_latency": table[table["shape"] == "Mistral-7B"]})
    assert list(shown["Rows"]) == ["4"] * 3
    assert set(shown["Of the union"]) == {style.percent(1 / 16)}
    assert list(shown["Sparsity of a row"]) == ["50.1 %", "70.1 %", "90.1 %"]
    assert shown["Ours"].iloc[0] == "1.43x"


def test_settings_are_written_in_words(tmp_path: Path) -> None:
    run = made.write_run(tmp_path / "run", {"e02_zero_shot": made.zero_shot()})
    options = {"calibration_blocks": 256, "length": 128, "levels": [0.5, 0.7]}
    settings = {"profile": "laptop", "data": {"source": "hub", "path": "some/text"}, "options": options}
    provenance = {"experiments": {"e02": {"settings": settings}}}
    (run / "provenance.json").write_text(json.dumps(provenance), encoding="utf-8")
    loaded = load_run(run)
    shown = protocol("e02", [loaded]).set_index("")["run"]
    assert shown["calibration"] == "256 blocks of 128 tokens, text: some/text"
    assert main([str(run)]) == 0
    text = (run / "report.md").read_text(encoding="utf-8")
    assert "levels 0.5, 0.7" in text
    assert not re.search(r"\\\[(?!unlabel)[\d']", text), "no list as Python writes it"
    assert "`nox -s experiment -- e06 --profile laptop`" in text


def test_components_that_add_to_more_than_the_token_are_not_drawn_backwards(tmp_path: Path) -> None:
    table = made.shares()
    table["share"] = [0.7, 0.3, 0.2, -0.2]
    figure = figures_throughput.e06_shares({"e06_shares": table})
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == pytest.approx([70, 30, 20])
    assert figure.axes[0].get_xlim()[1] > 120


def test_the_attention_figure_shows_ours_the_papers_and_each_site() -> None:
    figure = figures_accuracy.e07_attention({"e07_attention": made.attention()})
    ours, paper, sites = figure.axes
    assert [text.get_text() for text in ours.texts] == ["0.700", "0.690", "0.670"]
    assert [text.get_text() for text in paper.texts] == ["0.699", "0.692", "0.668"]
    assert [tick.get_text() for tick in sites.get_xticklabels()] == ["gate", "attention\ninput", "MLP\ninput"]
    heights = [bar.get_height() for bar in sites.patches]
    assert heights == pytest.approx([50.3, np.nan, np.nan, 50.3, 49.8, 49.9], nan_ok=True)


def test_growth_varies_one_thing_only() -> None:
    speedups = figures_throughput.generation_speedups(made.throughput())
    batch = figures_throughput.growth(speedups, "batch")
    assert sorted(batch["batch"]) == [1, 2, 4, 8]
    assert batch[["layers", "prompt_tokens", "generated_tokens", "sparsity_target"]].drop_duplicates().shape[0] == 1
    assert sorted(figures_throughput.growth(speedups, "prompt_tokens")["prompt_tokens"]) == [16, 128, 512]
    assert sorted(figures_throughput.growth(speedups, "sparsity_target")["sparsity_target"]) == [0, 0.5, 0.7, 0.9]
    assert sorted(figures_throughput.growth(speedups, "layers")["layers"]) == [2, 4]


def test_the_throughput_table_is_of_figure_4s_conditions_and_the_growth_table_of_the_others() -> None:
    table = made.throughput()
    first = (table["batch"] == 1) & (table["prompt_tokens"] == 16) & (table["layers"] == 2)
    table.loc[~first, "prefill_s"] = 9.0
    again = table[first & table["variant"].eq("dense")].assign(prompt=99, peak_memory_bytes=9e9)
    table = pd.concat([table, again])
    shown = tables_speed.throughput(table)
    assert set(shown["Prefill, s"]) == {"0.100"} and set(shown["Memory"]) == {"1.00x"}
    grown = tables_speed.growth(table).set_index(["Layers", "Batch", "Prompt", "Target"])
    assert len(grown) == 9 and set(grown.index) == {
        *(("2", "1", "16", target) for target in ("0 %", "70 %", "90 %")),
        *(("2", "1", prompt, "50 %") for prompt in ("128", "512")),
        *(("2", batch, "16", "50 %") for batch in ("2", "4", "8")),
        ("4", "1", "16", "50 %"),
    }
    two = table[(table["batch"] == 2)].groupby(["variant", "prompt"])["tokens_per_second"].mean().unstack(0)
    ratio = (two["cats-50"] / two["dense"]).prod() ** (1 / len(two))
    assert grown.loc[("2", "2", "16", "50 %"), "Speed-up"].startswith(f"{ratio:.2f}x")


def test_every_figure_has_a_caption_and_a_place() -> None:
    placed = {name for names in FIGURES_OF.values() for name in names}
    assert placed == set(FIGURES) <= set(CAPTIONS)


def test_numbers_are_written_one_way() -> None:
    assert style.plus_minus(0.689, 0.0043) == "0.6890 ± 0.0043"
    assert style.times(1.5234) == "1.52x"
    assert [style.significant(x) for x in (34.739, 0.18312, 149.05, 0.0806, 0)] == [
        "34.7",
        "0.183",
        "149",
        "0.0806",
        "0",
    ]
    assert [style.times_range(1.551, 1.572), style.times_range(1.341, 1.342)] == ["1.55 to 1.57x", "1.34x"]
    assert [style.ratio_error(x) for x in (0.654, 0.0049, 1e-5, float("nan"))] == [
        " ± 0.65",
        " ± 0.005",
        " ± 0.001",
        "",
    ]
    assert style.listed({"float32": [0.5, 0.7], "empty": {}, "n": 1e-5}) == "float32 0.5, 0.7; n 1e-05"
    assert [style.model_name(x) for x in ("shape:llama2-7b", "pocket")] == ["Llama2-7B", "pocket"]
    assert style.percent(0.5) == "50.0 %"
    assert style.points(-0.0104) == f"{style.MINUS}1.04"
    assert style.number(float("nan")) == style.times(float("nan")) == style.DASH
    assert [style.duration(s) for s in (42, 200, 7500)] == ["42 s", "3 min 20 s", "2 h 05 min"]


def test_coloured_letters_have_contrast() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in {*style.VARIANT_COLOURS.values(), *style.IMPLEMENTATION_COLOURS.values(), style.PURPLE}:
        contrast = 1.05 / (luminance(style.INK.get(colour, colour)) + 0.05)  # WCAG 2
        assert contrast >= 3.4, (colour, contrast)
    assert all(1.05 / (luminance(ink) + 0.05) >= 4.5 for ink in style.INK.values())


REFUSED = ("torch", "transformers", "cats", "cats_kernels", "experiments", "numba")


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
    assert (run / "report.pdf").exists()
