"""e01, e02 and e07 in a tiny world: complete tables, resumable, and refusing bad input before any work."""

import importlib
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

import cats
from cats import criteria
from cats.evaluation import evaluate, perplexity
from cats.models import load_model
from experiments import e01_activations, e02_zero_shot
from experiments.framework import subject as subjects
from experiments.framework import variants, zero_shot
from experiments.framework.profiles import EXPERIMENTS, PROFILES, load_profile, make_config
from experiments.framework.runner import run_experiment
from experiments.framework.samples import flags, numbers, paired
from tests.accuracy_world import build_world, config_of, leave_out_own_tasks, profile, samples, table


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = build_world(tmp_path_factory.mktemp("world"))
    (root / "tiny.toml").write_text(profile(root))
    return root


def test_e01_has_a_control_with_random_weights(world, tmp_path):
    """Both calibrated on the same text, each to its own thresholds."""
    run_experiment(config_of(world, "e01", tmp_path))
    rows = table(tmp_path, "e01_thresholds")
    key = ("weights", "layer_index", "sparsity_target")
    assert [tuple(row[k] for k in key) for row in rows] == [
        (w, i, t) for w in ("pretrained", "random") for i in "01" for t in ("0.5", "0.9")
    ]
    for row in rows:
        assert float(row["sparsity_calibration"]) == pytest.approx(float(row["sparsity_target"]), abs=0.01)
        assert float(row["sparsity_heldout"]) == pytest.approx(float(row["sparsity_target"]), abs=0.1)
    thresholds = [[float(r["threshold"]) for r in rows if r["weights"] == w] for w in ("pretrained", "random")]
    # the tiny model's weights are several times larger than those of a new one
    assert all(trained > 2 * new > 0 for trained, new in zip(*thresholds, strict=True))
    bars = table(tmp_path, "e01_histogram")
    counts = {w: sum(int(b["count"]) for b in bars if b["weights"] == w) for w in ("pretrained", "random")}
    assert counts["pretrained"] == counts["random"] == 2 * 4 * 32 * 88  # layers, blocks, tokens, neurons


def test_the_control_is_a_new_model_of_the_seed(world, tmp_path):
    path = str(world / "model")
    trained = load_model(path, "float32")[0]
    first, again = (e01_activations.random_model(config_of(world, "e01", tmp_path), path, torch.float32) for _ in "ab")
    other = e01_activations.random_model(config_of(world, "e01", tmp_path, seed=1), path, torch.float32)
    weights = [m.model.layers[1].mlp.gate_proj.weight for m in (first, again, other, trained)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[3])
    assert float(weights[0].std()) == pytest.approx(trained.config.initializer_range, rel=0.1)
    assert first.config.to_dict() | {"dtype": None} == trained.config.to_dict() | {"dtype": None}


@pytest.fixture(scope="module")
def zero_shot_run(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("e02")
    run_experiment(config_of(world, "e02", output))
    return output


@pytest.fixture(scope="module")
def zero_shot_rows(zero_shot_run):
    return table(zero_shot_run, "e02_zero_shot")


def test_e02_has_every_variant_on_every_task(zero_shot_rows):
    zero_shot = zero_shot_rows
    order = list(dict.fromkeys(row["variant"] for row in zero_shot))
    assert order == ["dense", "cats-50", "cats-90", "relufication", "cats-matched"]
    for variant in order:
        rows = [row for row in zero_shot if row["variant"] == variant]
        assert [row["task"] for row in rows] == ["tiny_words", "tiny_yes", "heldout_text"]
        assert [row["items"] for row in rows] == ["20", "20", "4"]
        assert [row["chance"] for row in rows] == ["0.25", "0.5", ""]
        assert [row["metric"] for row in rows] == ["acc", "acc", "perplexity"]
        assert {row["path"] for row in rows} == {"dense" if variant == "dense" else "dense masked"}
        criterion = variant if variant in ("dense", "relufication") else "cats"
        assert {row["criterion"] for row in rows} == {criterion}


def test_e02_keeps_every_item_and_every_block(zero_shot_run, zero_shot_rows):
    """Each row can be computed again from the samples: accuracy, perplexity, and both paired differences."""
    correct = {(r["variant"], r["task"]): flags(r["correct"]) for r in samples(zero_shot_run, "e02_items")}
    nats = {r["variant"]: numbers(r["nats"]) for r in samples(zero_shot_run, "e02_blocks")}
    assert {len(values) for values in correct.values()} == {20} and {len(values) for values in nats.values()} == {4}
    for row in zero_shot_rows:
        if row["metric"] == "acc":
            own, base = correct[row["variant"], row["task"]], correct["dense", row["task"]]
            assert float(row["value"]) == pytest.approx(sum(own) / 20, abs=1e-6)
        else:
            own, base = nats[row["variant"]], nats["dense"]
            assert float(row["value"]) == pytest.approx(math.exp(sum(own) / 4), rel=1e-4)
        difference, error = paired(own, base)
        assert float(row["difference"]) == pytest.approx(difference, abs=1e-6)
        assert float(row["difference_stderr"]) == pytest.approx(error, abs=1e-6)
    perplexity_rows = {r["variant"]: r for r in zero_shot_rows if r["metric"] == "perplexity"}
    dense, sparse = perplexity_rows["dense"], perplexity_rows["cats-90"]
    assert float(dense["difference"]) == float(dense["difference_stderr"]) == 0
    ratio = math.log(float(sparse["value"]) / float(dense["value"]))
    assert float(sparse["difference"]) == pytest.approx(ratio, abs=1e-4) and float(sparse["difference_stderr"]) > 0


def test_paired_differences_by_hand():
    """Differences 1, 0, -1, 1: mean 0.25, variance (0.5625 + 0.0625 + 1.5625 + 0.5625) / 3, over 4."""
    assert paired([1, 1, 0, 1], [0, 1, 1, 0]) == (0.25, pytest.approx((2.75 / 12) ** 0.5))
    assert paired([1.5], [1.0]) == (0.5, None)
    with pytest.raises(ValueError, match="2 measurements cannot be paired with 1"):
        paired([1, 0], [1])


def test_e02_resumes_with_the_dense_samples_of_before(world, tmp_path, zero_shot_run, monkeypatch):
    """Stopped after three variants: the others are paired with samples that the dense unit has left."""
    measure, calls = zero_shot.measure_as_is, []

    def mortal(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(e02_zero_shot, "measure_as_is", mortal)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config_of(world, "e02", tmp_path))
    run_experiment(config_of(world, "e02", tmp_path))
    assert len(calls) == 4 + 2
    for name in ("e02_zero_shot.csv", "samples/e02_items.csv.gz", "samples/e02_blocks.csv.gz"):
        whole, resumed = ((path / "results" / name).read_bytes() for path in (zero_shot_run, tmp_path))
        assert whole == resumed


@pytest.mark.parametrize("name", ["up-norm", "oracle", "made-up"])
def test_e02_measures_any_criterion_by_its_name(world, tmp_path, monkeypatch, name):
    """Also one that this test makes up, in one class: CATS of every second neuron."""

    class MadeUp(criteria.Criterion):
        name, title = "made-up", "Made up"

        def weights(self, layer):
            return torch.arange(len(layer.norms())) % 2 + 1e-3

    monkeypatch.setattr(criteria, "_registered", {})
    criteria.register(MadeUp())
    run_experiment(config_of(world, "e02", tmp_path, criteria=[name, "cats"], levels=[0.5], tasks=["tiny_yes"]))
    rows = table(tmp_path, "e02_zero_shot")
    order = list(dict.fromkeys(row["variant"] for row in rows))
    assert order == ["dense", f"{name}-50", "cats-50", "relufication", "cats-matched"]
    own = [row for row in rows if row["variant"] == f"{name}-50"]
    assert [(r["criterion"], r["path"], r["sparsity_target"]) for r in own] == [(name, "dense masked", "0.5")] * 2
    assert all(float(row["sparsity_measured"]) == pytest.approx(0.5, abs=0.05) for row in own)
    loss = {r["variant"]: r["nats"] for r in samples(tmp_path, "e02_blocks")}
    assert len(set(loss.values())) == 5, "each variant computes something else"


def test_e02_matches_a_measurement_by_hand(world, zero_shot_rows):
    zero_shot = zero_shot_rows
    """CATS at 90 %: patched from scratch here, thresholds from the same text, evaluated and measured alone."""
    model, tokenizer = load_model(str(world / "model"), "float32")
    subject = subjects.Subject(config_of(world, "e02", world / "unused"), str(world / "model"))
    dense = evaluate(model, tokenizer, ["tiny_words"], 20, include_path=world / "tasks")[0]
    cats.apply(model, cats.calibrate(model, subject.text("train", 8), 0.9))
    sparse = evaluate(model, tokenizer, ["tiny_words"], 20, include_path=world / "tasks")[0]
    rows = [row for row in zero_shot if row["variant"] == "cats-90"]
    heldout = subject.text("heldout", 4)
    sparsity = cats.measure_sparsity(model, heldout).values()
    assert float(rows[0]["value"]) == pytest.approx(sparse.accuracy, abs=1e-6)
    assert float(rows[0]["difference"]) == pytest.approx(sparse.accuracy - dense.accuracy, abs=1e-6)
    assert float(rows[2]["value"]) == pytest.approx(perplexity(model, heldout), rel=1e-5)
    assert float(rows[0]["sparsity_measured"]) == pytest.approx(sum(sparsity) / len(sparsity), abs=1e-6)
    assert float(rows[0]["sparsity_measured"]) == pytest.approx(0.9, abs=0.05)


def test_e02_matches_cats_to_relufication(zero_shot_rows):
    zero_shot = zero_shot_rows
    by_variant = {row["variant"]: row for row in zero_shot}
    target = float(by_variant["relufication"]["sparsity_measured"])
    assert by_variant["relufication"]["sparsity_target"] == ""
    assert float(by_variant["cats-matched"]["sparsity_target"]) == pytest.approx(target, abs=1e-6)
    assert float(by_variant["cats-matched"]["sparsity_measured"]) == pytest.approx(target, abs=0.05)


def test_e07_shows_attention_beside_mlp_only_before_and_after_training(world, tmp_path):
    run_experiment(config_of(world, "e07", tmp_path))
    rows = table(tmp_path, "e07_attention")
    assert list(dict.fromkeys((row["variant"], row["finetuned"], row["sites"]) for row in rows)) == [
        (name, finetuned, sites)
        for finetuned in ("False", "True")
        for name, sites in (
            ("dense", ""), ("cats-50", "gate"), ("cats-50-attention", "gate attention_input mlp_input")
        )
    ]  # fmt: skip
    for finetuned in ("False", "True"):  # differences are from the dense model that was trained as long
        pair = [r for r in rows if r["finetuned"] == finetuned and r["metric"] == "perplexity"]
        dense, sparse = (next(r for r in pair if r["variant"] == v) for v in ("dense", "cats-50"))
        ratio = math.log(float(sparse["value"]) / float(dense["value"]))
        assert float(sparse["difference"]) == pytest.approx(ratio, abs=1e-4) and float(dense["difference"]) == 0
    assert len(samples(tmp_path, "e07_items")) == len(samples(tmp_path, "e07_blocks")) == 6
    sites = {(r["variant"], r["metric"]): float(r["value"]) for r in rows if r["metric"].startswith("sparsity_")}
    for site in ("gate", "attention_input", "mlp_input"):
        assert sites["cats-50-attention", f"sparsity_{site}"] == pytest.approx(0.5, abs=0.1)
    assert ("cats-50", "sparsity_attention_input") not in sites
    loss = {row["variant"]: float(row["value"]) for row in rows if row["metric"] == "perplexity"}
    assert loss["cats-50-attention"] != loss["cats-50"]


def test_e07_trains_once_per_seed_and_pairs_within_a_seed(world, tmp_path):
    run_experiment(config_of(world, "e07", tmp_path, seeds=[0, 1]))
    rows = [r for r in table(tmp_path, "e07_attention") if r["metric"] == "perplexity"]
    assert [(r["variant"], r["finetuned"], r["seed"]) for r in rows] == [
        (name, str(finetuned), seed)
        for finetuned, seed in ((False, "0"), (True, "0"), (True, "1"))
        for name in ("dense", "cats-50", "cats-50-attention")
    ]
    for seed in "01":
        dense, sparse, _ = (float(r["value"]) for r in rows if r["finetuned"] == "True" and r["seed"] == seed)
        (row,) = [r for r in rows if (r["finetuned"], r["seed"], r["variant"]) == ("True", seed, "cats-50")]
        assert float(row["difference"]) == pytest.approx(math.log(sparse / dense), abs=1e-4)
    values = {r["value"] for r in rows if r["variant"] == "cats-50" and r["finetuned"] == "True"}
    assert len(values) == 2, "another seed trains another model"


def test_e07_without_training_needs_no_training_options(world, tmp_path):
    settings = load_profile(str(world / "tiny.toml"))
    for key in ("train_batch_size", "learning_rate", "weight_decay", "warmup_steps", "steps"):
        del settings["e07"][key]
    run_experiment(make_config("e07", "tiny", settings, tmp_path))
    found = {row["variant"] for row in table(tmp_path, "e07_attention")}
    assert found == {"dense", "cats-50", "cats-50-attention"}


@pytest.mark.parametrize(
    ("experiment", "changes", "message"),
    [
        ("e02", {"tasks": ["tiny_words", "no_such_task"]}, "unknown task no_such_task"),
        ("e02", {"tasks": []}, "e02.tasks must be a list of at least one"),
        ("e02", {"levels": [0.5, 1.0]}, r"e02.levels must be .* in \[0, 1\), not \[0.5, 1.0\]"),
        ("e02", {"criteria": ["kats"]}, "e02.criteria must be .* one of auto, cats, chess"),
        ("e02", {"calibration_blocks": 0}, "calibration_blocks must be a whole number, 1 or more"),
        ("e02", {"models": ["shape:small"]}, "needs real weights and a tokenizer"),
        ("e02", {"models": ["./nowhere"]}, "does not exist"),
        ("e03", {"levels": [-0.1]}, r"e03.levels must be .* in \[0, 1\)"),
        ("e03", {"lora": "best"}, "e03.lora must be one of paper"),
        ("e03", {"steps": [0, 5]}, "e03.steps must be .* 1 or more, rising"),
        ("e03", {"steps": [5, 2]}, "e03.steps must be .* rising"),
        ("e03", {"seeds": []}, "e03.seeds must be a list of at least one"),
        ("e04", {"tasks": ["instruct_nothing"]}, "unknown task instruct_nothing"),
        ("e04", {"train_items": 0}, "e04.train_items must be a whole number, 1 or more"),
        ("e04", {"sweep_level": 1.5}, r"e04.sweep_level must be a number in \[0, 1\)"),
        ("e04", {"sweep_items": 0}, "e04.sweep_items must be at least 1 with several learning_rates"),
        ("e04", {"learning_rates": []}, "e04.learning_rates must be a list of at least one"),
        ("e01", {"targets": [0.5, 1.0]}, r"e01.targets must be .* in \[0, 1\)"),
        ("e01", {"models": ["shape:small"]}, "needs real weights and a tokenizer"),
        ("e07", {"levels": [2]}, r"e07.levels must be .* in \[0, 1\)"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(world, tmp_path, monkeypatch, experiment, changes, message):
    def never(*_arguments, **_options):
        raise AssertionError("a model was loaded")

    for module in (subjects, e01_activations):
        monkeypatch.setattr(module, "load_model", never)
    leave_out_own_tasks(monkeypatch)
    with pytest.raises(ValueError, match=message):
        run_experiment(config_of(world, experiment, tmp_path, **changes))


def test_a_model_without_gated_mlps_is_refused_before_it_is_loaded(world, tmp_path, monkeypatch):
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    monkeypatch.setattr(subjects, "load_model", None)
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no gated MLP"):
        run_experiment(config_of(world, "e02", tmp_path, models=[str(tmp_path / "gpt2")]))


def test_thresholds_of_another_model_are_refused(world):
    model, _ = load_model(str(world / "model"), "float32")
    thresholds = cats.calibrate(model, [torch.arange(20)[None]], 0.5)
    other = cats.Thresholds(0.5, thresholds.gate, model={**thresholds.model, "hidden_size": 4096})
    with pytest.raises(ValueError, match="made for another model"):
        variants.make(model, variants.variant("cats", 0.5), other)


@pytest.mark.parametrize("name", sorted(path.stem for path in PROFILES.glob("*.toml")))
def test_every_experiment_of_every_profile_states_its_cost(name, tmp_path):
    profile = load_profile(name)
    for experiment in EXPERIMENTS.keys() & profile.keys():
        config = make_config(experiment, name, profile, tmp_path)
        cost = importlib.import_module(EXPERIMENTS[experiment]).cost(config)
        work = (cost.work.operations, cost.bytes_read, cost.fixed_seconds)
        assert all(math.isfinite(part) for part in work) and sum(work) > 0
        assert cost.memory + cost.fixed_memory > 0 and cost.uses_models == (experiment != "e05")


def test_cost_counts_what_is_run(world, tmp_path):
    """e02, by hand: 6 evaluations of 2 tasks of 20 items of 2 inputs of 50 tokens, each with two passes over held-out
    text; calibration twice."""
    cost = e02_zero_shot.cost(config_of(world, "e02", tmp_path, levels=[0.5, 0.7, 0.9]))
    tokens = 6 * (2 * 20 * 2 * 50 + 2 * 32 * 4) + 2 * 32 * 8
    assert cost.work.operations == 2 * tokens and cost.work.items == 6 * 2 * 20
