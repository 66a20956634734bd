"""Single tables, figures and words of the report, on made-up tables."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from reports import e02, e04, e05, e06, e07
from reports.core import document, provenance, style, tables
from reports.core.appendix import appendix, recorded
from reports.core.load import Run, load_run
from reports.core.protocol import protocol
from reports.core.section import discover
from reports.e02 import figures as e02_figures
from reports.e06 import figures as e06_figures
from reports.measures.generation import generation_speedups
from tests import make_results as made
from tests.make_accuracy import ACCURACY


def test_a_foreign_criterion_is_shown_by_its_own_name() -> None:
    table = made.zero_shot(accuracy={**ACCURACY, "gate-norm-50": 0.695, "gate-norm-70": 0.68})
    shown = tables.zero_shot(table, "made-up")
    assert "gate-norm-50" in list(shown[""])
    figure = e02.accuracy_figure(made.loaded(e02_zero_shot=table))
    figure.draw_without_rendering()
    lines = {line.get_color() for line in figure.axes[0].lines}
    assert style.OTHER_COLOURS[0] in lines
    assert style.variant_name("gate-norm-50") == "gate-norm-50"
    assert style.variant_name("cats-50-attention-finetuned") == "CATS-50, attention too, fine-tuned"


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


@pytest.mark.parametrize("missing", ["stderr", "difference_stderr", "sparsity_measured", "chance"])
def test_accuracy_without_some_numbers_still_renders(missing: str) -> None:
    run = made.loaded(e02_zero_shot=made.zero_shot().assign(**{missing: np.nan}))
    text = document.to_markdown("T", e02.contents(run))
    assert "CATS-50" in text and not re.search(r"\bnan\b", text)
    e02.accuracy_figure(run).draw_without_rendering()


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
    assert "profile paper (changed)" in provenance.run_origin(run)
    assert "differs from its profile in prompts 50, 3" in provenance.provenance_line(run, "e06")


def test_runs_of_one_machine_day_and_commit_share_a_line() -> None:
    entry = {"started": "2001-01-07", "commit": "b" * 40, "dirty": False, "hardware": "Imaginary GPU"}
    runs = [Run(name, Path(), {}, {}, {"e06": entry}) for name in ("one", "two")]
    runs.insert(1, Run("old", Path(), {}, {}, {"e06": {**entry, "commit": "a" * 40}}))
    assert provenance.run_lines(runs) == [
        f"one, two: Imaginary GPU; measured 2001-01-07; commit {'b' * 10}, clean",
        f"old: Imaginary GPU; measured 2001-01-07; commit {'a' * 10}, clean",
    ]


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
    assert row["Over dense"] == "1.35x (1.35 to 1.36x)"  # of rounds with noise, around 1.5 * 0.95 / 1.05
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


def test_tables_of_generation_name_the_commit_of_rows_of_other_code() -> None:
    joined = {
        "e06_throughput": made.throughput().assign(origin="0123456789"),
        "e06_amdahl": pd.concat([made.amdahl().assign(origin=origin) for origin in ("", "0123456789")]),
    }
    blocks = [block for block in e06.more(made.loaded(**joined)) if isinstance(block, document.Table)]
    assert len(blocks) == 3
    for block in blocks:
        assert "“Commit”: of rows of other code" in block.caption and "0123456789" in set(block.frame["Commit"])
    assert set(blocks[0].frame["Commit"]) == {style.DASH, "0123456789"}
    for block in e06.more(made.loaded(e06_amdahl=made.amdahl(), e06_throughput=made.throughput())):
        assert "Commit" not in block.frame and "Commit" not in block.caption


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
