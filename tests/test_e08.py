"""e08 in a tiny world: equal bytes whatever the criterion, paired differences, resuming, foreign criteria."""

import json
import math

import pytest
import torch

import cats
from cats import criteria
from cats.criteria.base import Criterion
from cats.evaluation import block_losses
from cats.models import load_model
from experiments import e08_criteria
from experiments.e08_criteria.cases import Case, Weights, cases
from experiments.e08_criteria.heldout import losses_and_skipped
from experiments.framework.runner import run_experiment
from experiments.framework.samples import flags, numbers, paired
from tests.accuracy_world import build_world, config_of, profile, samples, table

E08 = """[e08]
include_path = "{world}/tasks"
tasks = ["tiny_words"]
limit = 20
criteria = ["up-norm", "cats", "auto", "teal", "oracle", "random", "relufication"]
levels = [0.3, 0.6]
batch_size = 4
calibration_blocks = 32
heldout_blocks = 32
length = 32
"""


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
    assert len(of(run, metric="acc", task="tiny_words")) == len(keys)


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
    blocks = {(row["variant"], row["scope"]): numbers(row["nats"]) for row in samples(run, "e08_blocks")}
    items = {(row["variant"], row["scope"]): flags(row["correct"]) for row in samples(run, "e08_items")}
    for row in of(run):
        stored = blocks if row["metric"] == "perplexity" else items
        own = stored[row["variant"], row["scope"]]
        difference, error = paired(own, stored["dense", "mlp"])
        assert number(row, "difference") == pytest.approx(difference, abs=1e-6)
        assert number(row, "difference_stderr") == pytest.approx(error, abs=1e-6)
        if row["sparsity_target"] == "":
            assert row["cats_difference"] == ""
            continue
        difference, error = paired(own, stored[f"cats-{100 * number(row, 'sparsity_target'):g}", "mlp"])
        assert number(row, "cats_difference") == pytest.approx(difference, abs=1e-6)
        assert number(row, "cats_difference_stderr") == pytest.approx(error, abs=1e-6)


def test_the_single_pass_agrees_with_two(world):
    model = load_model(str(world / "model"), "float32")[0]
    generator = torch.Generator().manual_seed(0)
    text = list(torch.randint(0, 200, (6, 32), generator=generator).split(4))
    for criterion in ("cats", "up-norm", "teal", "oracle"):
        cats.remove(model)
        cats.apply(model, cats.calibrate(model, text, 0.4, criterion=criterion), kernel="reference")
        losses, skipped = losses_and_skipped(model, text)
        assert losses == pytest.approx(block_losses(model, text), rel=1e-5)
        assert skipped == pytest.approx(cats.measure_sparsity(model, text))
    cats.remove(model)
    assert losses_and_skipped(model, text)[1] == {}


def test_weights_that_a_token_reads(world):
    model = load_model(str(world / "model"), "float32")[0]
    weights = Weights(model)
    table = model.get_input_embeddings().weight.numel()
    assert sum(weights.mlp.values()) == 2 * 3 * 32 * 88
    assert weights.everything == sum(p.numel() for p in model.parameters()) - table
    model.lm_head.weight = model.model.embed_tokens.weight  # tied: the head reads the table
    assert Weights(model).everything == weights.everything


def test_an_interrupted_run_goes_on(world, tmp_path, monkeypatch):
    options = {"criteria": ["cats", "random"], "tasks": [], "levels": [0.5]}
    measured, real = [], e08_criteria.measure

    def until_third(subject, case, *others):
        measured.append(case.key)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return real(subject, case, *others)

    monkeypatch.setattr(e08_criteria, "measure", until_third)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config_of(world, "e08", tmp_path, **options))
    run_experiment(config_of(world, "e08", tmp_path, **options))
    assert measured == ["dense", "cats-50", "random-50", "random-50"]
    assert [row["variant"] for row in table(tmp_path, "e08_criteria")] == ["dense", "cats-50", "random-50"]


def test_a_registered_criterion_is_measured_by_name(world, tmp_path, monkeypatch):
    monkeypatch.setattr(criteria, "_registered", {"first-half": FirstHalf()})
    assert "first-half" in e08_criteria.Options(levels=(0.5,)).criteria
    run_experiment(config_of(world, "e08", tmp_path, criteria=["first-half", "cats"], tasks=[], levels=[0.5]))
    rows = {row["variant"]: row for row in table(tmp_path, "e08_criteria")}
    assert list(rows) == ["dense", "cats-50", "first-half-50"]
    assert rows["first-half-50"]["value"] == rows["cats-50"]["value"] != rows["dense"]["value"]


def test_targets_of_input_criteria(world):
    weights = Weights(load_model(str(world / "model"), "float32")[0])
    mlp, attention = sum(weights.mlp.values()), sum(weights.attention.values())
    assert Case("teal", "mlp", 0.6).target(weights) == pytest.approx(0.4)
    assert Case("teal", "model", 0.6).target(weights) == pytest.approx(0.4 * mlp / (mlp + attention))
    assert Case("cats", "mlp", 0.6).target(weights) == 0.6
    assert [case.variant for case in cases(["up", "cats"], [0.5])] == ["dense", "cats-50", "up-50"]


def test_wrong_options_and_models_are_refused(world, tmp_path):
    with pytest.raises(ValueError, match=r"e08\.criteria must be"):
        config_of(world, "e08", tmp_path, criteria=["nonsense"])
    with pytest.raises(ValueError, match="unknown task"):
        run_experiment(config_of(world, "e08", tmp_path, tasks=["tiny_nothing"]))
    cost = e08_criteria.cost(config_of(world, "e08", tmp_path, tasks=[]))
    assert cost.flops > 0 and math.isfinite(cost.memory)
    assert json.dumps(e08_criteria.Options(levels=(0.5,)).criteria)
