"""e02, e03, e04 and e07 in a tiny world: complete tables, resumable, and refusing bad input before any work."""

import csv
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

import cats
from cats.evaluation import evaluate, perplexity
from cats.models import load_model
from experiments import e01_activations, e03_finetuning
from experiments.e04_task_finetuning import IGNORED, TaskSubject, answer_loss
from experiments.framework import subject as variants
from experiments.framework.profiles import load_profile, make_config
from experiments.framework.runner import run_experiment
from tests.accuracy_world import build_world, profile


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = build_world(tmp_path_factory.mktemp("world"))
    (root / "tiny.toml").write_text(profile(root))
    return root


def config_of(world, experiment, output, **changes):
    settings = load_profile(str(world / "tiny.toml"))
    settings[experiment] |= changes
    return make_config(experiment, "tiny", settings, output)


def table(output, name):
    with (output / "results" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def zero_shot(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("e02")
    run_experiment(config_of(world, "e02", output))
    return table(output, "e02_zero_shot")


def test_e02_has_every_variant_on_every_task(zero_shot):
    order = list(dict.fromkeys(row["variant"] for row in zero_shot))
    assert order == ["dense", "cats-50", "cats-90", "relufication", "cats-matched"]
    for variant in order:
        rows = [row for row in zero_shot if row["variant"] == variant]
        assert [row["task"] for row in rows] == ["tiny_words", "tiny_yes", "heldout_text"]
        assert [row["items"] for row in rows] == ["20", "20", ""]
        assert [row["chance"] for row in rows] == ["0.25", "0.5", ""]
        assert [row["metric"] for row in rows] == ["acc", "acc", "perplexity"]


def test_e02_matches_a_measurement_by_hand(world, zero_shot):
    """CATS at 90 %: patched from scratch here, thresholds from the same text, evaluated and measured alone."""
    model, tokenizer = load_model(str(world / "model"), "float32")
    subject = variants.Subject(config_of(world, "e02", world / "unused"), str(world / "model"))
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


def test_e02_matches_cats_to_relufication(zero_shot):
    by_variant = {row["variant"]: row for row in zero_shot}
    target = float(by_variant["relufication"]["sparsity_measured"])
    assert by_variant["relufication"]["sparsity_target"] == ""
    assert float(by_variant["cats-matched"]["sparsity_target"]) == pytest.approx(target, abs=1e-6)
    assert float(by_variant["cats-matched"]["sparsity_measured"]) == pytest.approx(target, abs=0.05)


def test_e03_has_every_step_seed_and_layer(world, tmp_path):
    run_experiment(config_of(world, "e03", tmp_path))
    rows = table(tmp_path, "e03_finetuning")
    found = {(row["variant"], row["seed"], row["step"]) for row in rows}
    assert found == {(v, s, t) for v in ("dense", "cats-50", "relufication") for s in "01" for t in "025"}
    assert all(math.isfinite(float(row["eval_loss"])) for row in rows)
    assert all((row["train_loss"] == "") == (row["step"] == "0") for row in rows)
    sweep = table(tmp_path, "e03_sweep")
    assert [(row["variant"], row["learning_rate"]) for row in sweep] == [
        (v, rate) for v in ("cats-70", "relufication") for rate in ("0.001", "0.01")
    ]
    for variant, trained in (("cats-70", ("dense", "cats-50")), ("relufication", ("relufication",))):
        runs = [row for row in sweep if row["variant"] == variant]
        best = min(runs, key=lambda row: float(row["eval_loss"]))
        assert [row["chosen"] for row in runs] == [str(row is best) for row in runs]
        assert {row["learning_rate"] for row in rows if row["variant"] in trained} == {best["learning_rate"]}
    sparsity = table(tmp_path, "e03_sparsity")
    found = {(r["variant"], r["seed"], r["step"], r["layer_index"], r["recalibrated"]) for r in sparsity}
    before_and_after = {(s, t, i, "False") for s in "01" for t in "05" for i in "01"}
    recalibrated = {(s, "5", i, "True") for s in "01" for i in "01"}
    assert found == {("cats-50", *x) for x in before_and_after | recalibrated} | {
        ("relufication", *x) for x in before_and_after
    }


def test_e03_killed_in_the_middle_ends_with_the_same_tables(world, tmp_path, monkeypatch):
    names = ("e03_finetuning", "e03_sparsity", "e03_sweep")
    options = {"seeds": [0], "steps": [2, 4, 6]}
    run_experiment(config_of(world, "e03", tmp_path / "whole", **options))
    measure, calls = e03_finetuning.measure, []

    def mortal(*arguments):
        calls.append(1)
        if len(calls) == 8:  # in the second variant's run, after its first checkpoint
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(e03_finetuning, "measure", mortal)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config_of(world, "e03", tmp_path / "killed", **options))
    checkpoints = {path.name for path in (tmp_path / "killed").rglob("checkpoint-*")}
    assert "checkpoint-2" in checkpoints
    before = len(calls)
    run_experiment(config_of(world, "e03", tmp_path / "killed", **options))
    monkeypatch.undo()
    for name in names:
        texts = [(tmp_path / run / "results" / f"{name}.csv").read_bytes() for run in ("whole", "killed")]
        assert texts[0] == texts[1]
    total = 3 * 4 + 1  # three variants at four steps, and CATS once more recalibrated
    assert len(calls) - before == total - before + 1, "what was measured before is not measured again"


def test_e04_trains_and_measures_each_variant(world, tmp_path):
    run_experiment(config_of(world, "e04", tmp_path))
    rows = table(tmp_path, "e04_task_finetuning")
    assert [row["variant"] for row in rows] == ["dense", "cats-50", "relufication"]
    assert all(row["items"] == "24" and row["chance"] == "0.5" for row in rows)
    assert float(rows[0]["sparsity_measured"]) < 0.01
    assert float(rows[1]["sparsity_measured"]) == pytest.approx(0.5, abs=0.1)
    sweep = table(tmp_path, "e04_sweep")
    assert [(row["variant"], row["learning_rate"], row["step"]) for row in sweep] == [
        (v, rate, "3") for v in ("cats-70", "relufication") for rate in ("0.0001", "0.01")
    ]
    for runs in (sweep[:2], sweep[2:]):
        best = min(runs, key=lambda row: float(row["eval_loss"]))
        assert [row["chosen"] for row in runs] == [str(row is best) for row in runs]


def test_e04_with_one_rate_sweeps_nothing(world, tmp_path):
    run_experiment(config_of(world, "e04", tmp_path, learning_rates=[1e-3], sweep_items=0, epochs=1))
    assert len(table(tmp_path, "e04_task_finetuning")) == 3
    assert not (tmp_path / "results" / "e04_sweep.csv").exists()


def test_e04_chooses_the_rate_on_items_that_are_neither_trained_nor_tested_on(world, tmp_path):
    subject = TaskSubject(config_of(world, "e04", tmp_path, length=64), str(world / "model"))
    task = subject.tasks["tiny_yes"]
    sweep, train, test = ([tuple(item["input_ids"]) for item in subject.items(task, split, 10**6)]
                          for split in ("sweep", "train", "test"))  # fmt: skip
    assert len(sweep) == 12 and len(sweep) + len(train) == len(list(task.training_docs()))
    assert not set(sweep) & {*train, *test}


def test_answer_loss_is_the_mean_over_the_tokens_of_all_answers():
    """Against log-softmax by hand: three answer tokens in one batch, one in the other."""
    logits = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0))

    class Model(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, labels):
            chosen = logits[input_ids[:, 0]]
            loss = torch.nn.functional.cross_entropy(
                chosen[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
            )
            return SimpleNamespace(loss=loss)

    batches = [
        {"input_ids": torch.zeros(1, 4, dtype=torch.long), "labels": torch.tensor([[IGNORED, 3, 2, 5]])},
        {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.tensor([[IGNORED, IGNORED, IGNORED, 6]])},
    ]
    logs = logits.log_softmax(-1)
    expected = -(logs[0, 0, 3] + logs[0, 1, 2] + logs[0, 2, 5] + logs[1, 2, 6]) / 4
    assert answer_loss(Model(), batches) == pytest.approx(float(expected), rel=1e-6)


def test_e04_trains_on_the_answer_alone(world, tmp_path):
    subject = TaskSubject(config_of(world, "e04", tmp_path, length=64), str(world / "model"))
    task = subject.tasks["tiny_yes"]
    items = subject.items(task, "test", 5)
    for item, document in zip(items, task.test_docs(), strict=False):
        answer = " " + document["options"][document["gold"]]
        trained = [i for i, label in enumerate(item["labels"]) if label != IGNORED]
        assert subject.tokenizer.decode(item["input_ids"]) == document["text"] + answer
        assert subject.tokenizer.decode([item["input_ids"][i] for i in trained]) == answer
        assert trained[-1] == len(item["input_ids"]) - 1
    batch = subject.collate(items)
    lengths = [len(item["input_ids"]) for item in items]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert ((batch["labels"] == IGNORED) | (batch["attention_mask"] == 1)).all()


def test_e07_shows_attention_beside_mlp_only_before_and_after_training(world, tmp_path):
    run_experiment(config_of(world, "e07", tmp_path))
    rows = table(tmp_path, "e07_attention")
    plain = ["dense", "cats-50", "cats-50-attention"]
    assert list(dict.fromkeys(row["variant"] for row in rows)) == plain + [f"{name}-finetuned" for name in plain]
    sites = {(r["variant"], r["metric"]): float(r["value"]) for r in rows if r["metric"].startswith("sparsity_")}
    for site in ("gate", "attention_input", "mlp_input"):
        assert sites["cats-50-attention", f"sparsity_{site}"] == pytest.approx(0.5, abs=0.1)
    assert ("cats-50", "sparsity_attention_input") not in sites
    loss = {row["variant"]: float(row["value"]) for row in rows if row["metric"] == "perplexity"}
    assert loss["cats-50-attention"] != loss["cats-50"]


def test_e07_without_training_needs_no_training_options(world, tmp_path):
    config = config_of(world, "e07", tmp_path, steps=0)
    for key in ("train_batch_size", "learning_rate", "weight_decay", "warmup_steps"):
        del config.options[key]
    run_experiment(config)
    found = {row["variant"] for row in table(tmp_path, "e07_attention")}
    assert found == {"dense", "cats-50", "cats-50-attention"}


@pytest.mark.parametrize(
    ("experiment", "changes", "message"),
    [
        ("e02", {"tasks": ["tiny_words", "no_such_task"]}, "unknown task no_such_task"),
        ("e02", {"tasks": []}, "e02.tasks is missing"),
        ("e02", {"levels": [0.5, 1.0]}, r"sparsity must be a number in \[0, 1\), not 1.0"),
        ("e02", {"calibration_blocks": 0}, "calibration_blocks must be at least 1"),
        ("e02", {"models": ["shape:small"]}, "needs real weights and a tokenizer"),
        ("e02", {"models": ["./nowhere"]}, "does not exist"),
        ("e03", {"levels": [-0.1]}, "sparsity must be a number"),
        ("e03", {"lora": "best"}, "unknown LoRA settings 'best'"),
        ("e03", {"steps": [0, 5]}, "e03.steps must be rising and positive"),
        ("e03", {"seeds": []}, "must each have at least one entry"),
        ("e04", {"tasks": ["instruct_nothing"]}, "unknown task instruct_nothing"),
        ("e04", {"train_items": 0}, "train_items must be at least 1"),
        ("e04", {"sweep_level": 1.5}, "sparsity must be a number"),
        ("e04", {"learning_rates": []}, "must each have at least one entry"),
        ("e01", {"targets": [0.5, 1.0]}, r"sparsity must be a number in \[0, 1\), not 1.0"),
        ("e01", {"models": ["shape:small"]}, "needs real weights and a tokenizer"),
        ("e07", {"levels": [2]}, "sparsity must be a number"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(world, tmp_path, monkeypatch, experiment, changes, message):
    def never(*_arguments, **_options):
        raise AssertionError("a model was loaded")

    for module in (variants, e01_activations):
        monkeypatch.setattr(module, "load_model", never)
    with pytest.raises(ValueError, match=message):
        run_experiment(config_of(world, experiment, tmp_path, **changes))


def test_a_model_without_gated_mlps_is_refused_before_it_is_loaded(world, tmp_path, monkeypatch):
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    monkeypatch.setattr(variants, "load_model", None)
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no gated MLP"):
        run_experiment(config_of(world, "e02", tmp_path, models=[str(tmp_path / "gpt2")]))


def test_thresholds_of_another_model_are_refused(world):
    model, _ = load_model(str(world / "model"), "float32")
    thresholds = cats.calibrate(model, [torch.arange(20)[None]], 0.5)
    other = cats.Thresholds(0.5, thresholds.gate, model={**thresholds.model, "hidden_size": 4096})
    with pytest.raises(ValueError, match="made for another model"):
        variants.put(model, variants.cats_variant(0.5), other)


def test_local_instruction_tasks_are_known(tmp_path):
    from cats.evaluation import check_tasks
    from experiments.e04_task_finetuning import instruction_folder

    config = make_config("e04", "paper", load_profile("paper"), tmp_path)
    config.options.pop("include_path", None)
    check_tasks(["instruct_cola", "instruct_sst2", "instruct_boolq"], instruction_folder(config))
