"""e08 in a tiny world: equal bytes whatever the criterion, paired differences, resuming, foreign criteria."""

import itertools
import json
import math
import shutil
from statistics import median

import pytest
import torch

import cats
from cats import criteria
from cats.criteria.base import Criterion
from experiments import e08_criteria
from experiments.e08_criteria.cases import DENSE_CASE
from experiments.e08_criteria.measures import Comparison
from experiments.e08_criteria.speed import timed_blocks, token_rows
from experiments.framework.runner import run_experiment
from experiments.framework.samples import flags, numbers, paired
from tests.accuracy_world import build_world, config_of, leave_out_own_tasks, profile, samples, table

pytestmark = pytest.mark.usefixtures("little_to_flush")
E08 = """[e08]
include_path = "{world}/tasks"
tasks = ["tiny_words"]
limit = 20
criteria = ["up-norm", "cats", "auto", "teal", "oracle", "random", "relufication"]
levels = [0.3, 0.6]
task_levels = [0.6]
continuation_levels = [0.6]
generation_tasks = ["tiny_answer"]
generation_levels = [0.6]
generation_items = 4
generation_batch_size = 2
speed_levels = [0.6]
speed_tokens = 2
speed_rounds = 6
speed_generations = 6
speed_prompt_tokens = 12
speed_length = 4
batch_size = 4
calibration_blocks = 32
heldout_blocks = 32
length = 32
"""


PERPLEXITY_ALONE = {
    "tasks": [], "task_levels": [], "continuation_levels": [], "generation_tasks": [], "speed_levels": [],
}  # fmt: skip


class FirstHalf(Criterion):
    """Thresholds as cats, under another name: what a third party registers."""

    name, title = "first-half", "first half"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = build_world(tmp_path_factory.mktemp("world"))
    (root / "tiny.toml").write_text(profile(root) + E08.format(world=root))
    return root


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("e08")
    run_experiment(config_of(world, "e08", output))
    return output


def number(row, column):
    return float(row[column])


def of(run, **wanted):
    rows = [row for row in table(run, "e08_criteria") if all(row[key] == value for key, value in wanted.items())]
    assert rows
    return rows


def test_every_case_is_there_once(run):
    rows = of(run, metric="perplexity")
    keys = [(row["variant"], row["scope"]) for row in rows]
    assert len(set(keys)) == len(keys)
    assert keys[:3] == [("dense", "mlp"), ("cats-30", "mlp"), ("cats-60", "mlp")]
    assert ("relufication", "mlp") in keys and ("teal-60", "model") in keys and ("up-norm-60", "model") not in keys
    assert len(keys) == 16
    at_60 = {(variant, scope) for variant, scope in keys if not variant.endswith("-30")}
    accuracy = of(run, metric="acc", task="tiny_words")
    assert {(row["variant"], row["scope"]) for row in accuracy} == at_60 and len(accuracy) == 9
    assert {(row["variant"], row["scope"]) for row in of(run, metric="continuation_perplexity")} == at_60
    plain = {row["variant"] for row in of(run, metric="continuation_perplexity", prompt="masked")}
    prompts = {row["variant"] for row in of(run, metric="continuation_perplexity", prompt="dense")}
    assert plain - prompts == {"dense", "relufication"}, "these have no unmasked prompt of their own"
    for metric in ("exact_match", "exact_match_flexible"):
        answers = {(row["variant"], row["prompt"]) for row in of(run, metric=metric, task="tiny_answer", items="4")}
        variants = [("cats-60", "up-norm-60", "auto-60"), ("masked", "dense")]
        assert answers == {("dense", "masked"), *itertools.product(*variants)}


def test_levels_read_the_same_bytes(run):
    """Of the MLP (1 + 2 (1 - k)) / 3 whatever decides; over attention too, the bytes of the model."""
    for row in of(run, metric="perplexity", scope="mlp"):
        if row["criterion"] == "dense":
            assert number(row, "mlp_bytes") == number(row, "model_bytes") == 1 and row["sparsity_measured"] == ""
            continue
        k = number(row, "sparsity_measured")
        assert number(row, "mlp_bytes") == pytest.approx((1 + 2 * (1 - k)) / 3, abs=1e-6)
        assert (row["input_sparsity"] != "") == (row["criterion"] == "teal")
        if row["criterion"] == "teal":
            assert number(row, "input_sparsity") == pytest.approx(2 * k / 3, abs=1e-6)
        if row["criterion"] != "relufication":
            assert k == pytest.approx(number(row, "sparsity_target"), abs=0.06)  # little text
    for row in of(run, metric="perplexity", scope="model"):
        (same,) = of(run, metric="perplexity", scope="mlp", variant=row["variant"])
        assert number(row, "model_bytes") == pytest.approx(number(same, "model_bytes"), abs=0.03)
        assert number(row, "mlp_bytes") > number(same, "mlp_bytes")


def test_a_missed_target_is_said(run):
    rows = of(run, metric="perplexity")
    for row in rows:
        if row["sparsity_target"] == "":
            assert row["on_target"] == ""
        else:
            missed = abs(number(row, "sparsity_measured") - number(row, "sparsity_target"))
            assert row["on_target"] == str(missed <= 0.01)


def test_differences_are_paired(run):
    stored = {}
    for row in samples(run, "e08_blocks"):
        stored[row["variant"], row["scope"], row["prompt"], "heldout_text", row["metric"]] = numbers(row["nats"])
    for row in samples(run, "e08_items"):
        stored[row["variant"], row["scope"], row["prompt"], row["task"], row["metric"]] = flags(row["correct"])
    assert len(stored) == len(of(run))
    for row in of(run):
        what = row["task"], row["metric"]
        own = stored[row["variant"], row["scope"], row["prompt"], *what]
        difference, error = paired(own, stored["dense", "mlp", "masked", *what])
        assert number(row, "difference") == pytest.approx(difference, abs=1e-6)
        assert number(row, "difference_stderr") == pytest.approx(error, abs=1e-6)
        if row["sparsity_target"] == "":
            assert row["cats_difference"] == ""
            continue
        versus = f"cats-{100 * number(row, 'sparsity_target'):g}", "mlp", row["prompt"]
        difference, error = paired(own, stored[(*versus, *what)])
        assert number(row, "cats_difference") == pytest.approx(difference, abs=1e-6)
        assert number(row, "cats_difference_stderr") == pytest.approx(error, abs=1e-6)


def test_dense_prompts_change_continuations_and_nothing_else(run):
    """After masked prompts a continuation is the second half of the block in one pass."""
    for row in of(run, metric="continuation_perplexity", prompt="dense", scope="mlp"):
        (masked,) = of(run, metric="continuation_perplexity", prompt="masked", scope="mlp", variant=row["variant"])
        assert row["value"] != masked["value"]
        same = ("sparsity_measured", "mlp_bytes", "sparsity_target", "items")
        assert [row[column] for column in same] == [masked[column] for column in same]


def test_speed_rows_are_of_the_rounds(run):
    """Each variant that a kernel serves, against dense in the same rounds; the medians are those of the samples."""
    rounds = {(row["what"], row["variant"]): numbers(row["milliseconds"]) for row in samples(run, "e08_rounds")}
    rows = table(run, "e08_speed")
    assert [(row["what"], row["variant"]) for row in rows] == [
        (what, variant) for what in ("mlp", "token") for variant in ("cats-60", "up-norm-60", "auto-60")
    ]
    for row in rows:
        own, dense = rounds[row["what"], row["variant"]], rounds[row["what"], "dense"]
        assert len(own) == len(dense) == int(row["rounds"]) == {"mlp": 6, "token": 6}[row["what"]]
        ratios = [base / ms for base, ms in zip(dense, own, strict=True)]
        assert number(row, "speedup") == pytest.approx(median(ratios), rel=1e-4)
        assert number(row, "speedup_low") == pytest.approx(min(ratios), rel=1e-4)  # of six, 1 in 32 lies outside
        assert number(row, "speedup_high") == pytest.approx(max(ratios), rel=1e-4)
        expected = median(own) if row["unit"] == "ms" else 1e3 / median(own)
        assert number(row, "value") == pytest.approx(expected, rel=1e-4)
        assert (row["unit"], row["backend"], row["path"]) == (
            {"mlp": "ms", "token": "tokens/s"}[row["what"]], "cpu", "sparse kernel",
        )  # fmt: skip
        assert 0.3 < number(row, "sparsity") < 0.9
        if row["what"] == "token":
            (text,) = of(run, metric="perplexity", variant=row["variant"])
            assert number(row, "sparsity") == pytest.approx(number(text, "sparsity_measured"), abs=1e-6)


def test_token_speed_leaves_the_sliding_window_on(world):
    config = config_of(world, "e08", world, speed_levels=[0.6])
    subject = Comparison(config, str(world / "model"))
    subject.model.config.sliding_window = 64
    assert token_rows(subject) and subject.model.config.sliding_window == 64


def test_timed_blocks_are_the_patched_and_the_dense_ones(world):
    """What is timed gives the outputs of the model's own blocks, of all variants at once."""
    config = config_of(world, "e08", world, speed_levels=[0.6])
    subject = Comparison(config, str(world / "model"))
    x = torch.randn(1, 1, 32)
    with torch.no_grad():
        blocks = timed_blocks(subject.model, {case: subject.thresholds_of(case) for case in config.options.timed()})
        outputs = {case: {path: block(x) for path, block in own.items()} for case, own in blocks.items()}
        for case, own in outputs.items():
            cats.remove(subject.model)
            if case != DENSE_CASE:
                cats.apply(subject.model, subject.thresholds_of(case), kernel="reference")
            for path, mlp in cats.gated_mlps(subject.model).items():
                torch.testing.assert_close(own[path], mlp(x))
    assert len(outputs) == 4


def test_a_part_serves_the_whole(world, tmp_path, monkeypatch):
    """Units of two parts in directories of their own, put together in a third, are all that the whole run needs."""
    options = {"criteria": ["cats", "up"], "levels": [0.5], "task_levels": [], "continuation_levels": [0.5]}
    options |= {"generation_tasks": [], "speed_levels": []}
    parts = {"one": ["tasks/*"], "two": ["perplexity/*", "continuations/*"]}
    for name, only in parts.items():
        run_experiment(config_of(world, "e08", tmp_path / name, **options, only=only))
        shutil.copytree(tmp_path / name / "state", tmp_path / "whole" / "state", dirs_exist_ok=True)
    assert {row["metric"] for row in table(tmp_path / "one", "e08_criteria")} == {"acc"}
    monkeypatch.setattr(e08_criteria, "measure", None)
    run_experiment(config_of(world, "e08", tmp_path / "whole", **options))
    rows = table(tmp_path / "whole", "e08_criteria")
    assert {row["metric"] for row in rows} == {"acc", "perplexity", "continuation_perplexity"}
    assert all(row["difference"] for row in rows) and not (tmp_path / "whole" / "state" / "e08").exists()
    with pytest.raises(ValueError, match="only must match a unit, such as perplexity/dense"):
        config_of(world, "e08", tmp_path, only=["nonsense"])


def test_an_interrupted_run_goes_on(world, tmp_path, monkeypatch):
    options = {"criteria": ["cats", "random"], "levels": [0.5], **PERPLEXITY_ALONE}
    measured, real = [], e08_criteria.measure

    def until_third(subject, piece):
        measured.append(piece.key)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return real(subject, piece)

    monkeypatch.setattr(e08_criteria, "measure", until_third)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config_of(world, "e08", tmp_path, **options))
    run_experiment(config_of(world, "e08", tmp_path, **options))
    assert measured == [f"perplexity/{key}" for key in ("dense", "cats-50", "random-50", "random-50")]
    assert [row["variant"] for row in table(tmp_path, "e08_criteria")] == ["dense", "cats-50", "random-50"]


def test_a_registered_criterion_is_measured_by_name(world, tmp_path, monkeypatch):
    monkeypatch.setattr(criteria, "_registered", {"first-half": FirstHalf()})
    assert "first-half" in e08_criteria.Options(levels=(0.5,)).criteria
    run_experiment(config_of(world, "e08", tmp_path, criteria=["first-half", "cats"], levels=[0.5], **PERPLEXITY_ALONE))
    rows = {row["variant"]: row for row in table(tmp_path, "e08_criteria")}
    assert list(rows) == ["dense", "cats-50", "first-half-50"]
    assert rows["first-half-50"]["value"] == rows["cats-50"]["value"] != rows["dense"]["value"]


def test_wrong_options_and_models_are_refused(world, tmp_path, monkeypatch):
    leave_out_own_tasks(monkeypatch)
    with pytest.raises(ValueError, match=r"e08\.criteria must be"):
        config_of(world, "e08", tmp_path, criteria=["nonsense"])
    with pytest.raises(ValueError, match="unknown task"):
        run_experiment(config_of(world, "e08", tmp_path, tasks=["tiny_nothing"]))
    with pytest.raises(ValueError, match=r"speed_levels must be among levels, which lack 0.4"):
        config_of(world, "e08", tmp_path, speed_levels=[0.4])
    with pytest.raises(ValueError, match="length must be at least 18 with continuation_levels"):
        config_of(world, "e08", tmp_path, length=16)
    text = (world / "tasks" / "tiny_answer.yaml").read_text()
    (tmp_path / "long.yaml").write_text(text.replace("tiny_answer\n", "long\n").replace("toks: 8", "toks: 999"))
    own = {"generation_tasks": ["long"], "include_path": str(tmp_path), "only": ["answers/dense"]}
    with pytest.raises(ValueError, match=r"task long needs [0-9]+ positions .* the model has 128"):
        run_experiment(config_of(world, "e08", tmp_path, **own))
    cost = e08_criteria.cost(config_of(world, "e08", tmp_path))
    less = e08_criteria.cost(config_of(world, "e08", tmp_path, **PERPLEXITY_ALONE))
    assert cost.work.operations > less.work.operations > 0 and math.isfinite(cost.memory)
    assert cost.fixed_seconds > less.fixed_seconds == 0 and cost.bytes_read > less.bytes_read == 0
    assert json.dumps(e08_criteria.Options(levels=(0.5,)).criteria)
