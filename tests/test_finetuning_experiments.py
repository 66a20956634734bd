"""e03 and e04 in a tiny world: complete tables, a learning rate for each kind of variant, resumable."""

import math
from types import SimpleNamespace

import pytest
import torch

from experiments import e03_finetuning, e04_task_finetuning
from experiments.e04_task_finetuning import answer_loss
from experiments.e04_task_finetuning.subject import IGNORED, TaskSubject, instruction_folder
from experiments.framework.profiles import load_profile, make_config
from experiments.framework.runner import run_experiment
from experiments.framework.samples import flags
from experiments.framework.tables import SweepRow, TaskSweepRow
from experiments.framework.training import FinetuningSubject
from experiments.framework.variants import DENSE
from tests.accuracy_world import build_world, config_of, profile, samples, table


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = build_world(tmp_path_factory.mktemp("world"))
    (root / "tiny.toml").write_text(profile(root))
    return root


def test_e03_has_every_step_seed_and_layer(world, tmp_path):
    run_experiment(config_of(world, "e03", tmp_path))
    rows = table(tmp_path, "e03_finetuning")
    found = {(row["variant"], row["seed"], row["step"]) for row in rows}
    assert found == {(v, s, t) for v in ("dense", "cats-50", "relufication") for s in "01" for t in "025"}
    assert all(math.isfinite(float(row["eval_loss"])) for row in rows)
    assert all((row["train_loss"] == "") == (row["step"] == "0") for row in rows)
    sweep = table(tmp_path, "e03_sweep")
    assert [(row["variant"], row["learning_rate"]) for row in sweep] == [
        (v, rate) for v in ("dense", "cats-70", "relufication") for rate in ("0.001", "0.01")
    ]
    for variant, trained in (("dense", "dense"), ("cats-70", "cats-50"), ("relufication", "relufication")):
        runs = [row for row in sweep if row["variant"] == variant]
        best = min(runs, key=lambda row: float(row["eval_loss"]))
        assert [row["chosen"] for row in runs] == [str(row is best) for row in runs]
        assert {row["learning_rate"] for row in rows if row["variant"] == trained} == {best["learning_rate"]}
    sparsity = table(tmp_path, "e03_sparsity")
    found = {(r["variant"], r["seed"], r["step"], r["layer_index"], r["recalibrated"]) for r in sparsity}
    before_and_after = {(s, t, i, "False") for s in "01" for t in "05" for i in "01"}
    recalibrated = {(s, "5", i, "True") for s in "01" for i in "01"}
    assert found == {("cats-50", *x) for x in before_and_after | recalibrated} | {
        ("relufication", *x) for x in before_and_after
    }

    items = samples(tmp_path, "e03_items")
    accuracy = {tuple(row[k] for k in ("variant", "seed", "step")): float(row["accuracy"]) for row in rows}
    assert len(items) == len(accuracy) == len(rows)
    for row in items:
        own = flags(row["correct"])
        assert accuracy[row["variant"], row["seed"], row["step"]] == pytest.approx(sum(own) / len(own), abs=1e-6)


@pytest.mark.parametrize(
    ("losses", "chosen"),
    [
        ((math.nan, 2.0, 1.0), 2),
        ((1.0, math.nan, math.inf), 0),
        ((math.inf, 3.0, math.nan), 1),
    ],
)
def test_a_rate_that_diverged_is_not_chosen(world, tmp_path, monkeypatch, losses, chosen):
    config = config_of(world, "e03", tmp_path, learning_rates=[0.1, 0.2, 0.3])
    shared = {"model": "m", "criterion": "dense", "variant": "dense", "step": 2, "chosen": False}
    by_rate = dict(zip((0.1, 0.2, 0.3), losses, strict=True))

    def row(kind, more):
        return lambda *arguments: [
            kind(**shared, **more, learning_rate=arguments[-1], eval_loss=by_rate[arguments[-1]])
        ]

    monkeypatch.setattr(e03_finetuning, "_sweep_one", row(SweepRow, {}))
    made = e03_finetuning.sweep(FinetuningSubject(config, "m", 2, 2), DENSE)
    monkeypatch.setattr(
        e04_task_finetuning, "_sweep_one", lambda *arguments: row(TaskSweepRow, {"task": "t"})(arguments[3])
    )
    of_task = e04_task_finetuning.sweep(TaskSubject(config, "m"), "t", DENSE)
    expected = [index == chosen for index in range(3)]
    assert [one.chosen for one in made] == [one.chosen for one in of_task] == expected


def test_e03_with_one_rate_sweeps_nothing(world, tmp_path):
    run_experiment(config_of(world, "e03", tmp_path, learning_rates=[1e-3], seeds=[0], steps=[2]))
    assert {row["learning_rate"] for row in table(tmp_path, "e03_finetuning")} == {"0.001"}
    assert not (tmp_path / "results" / "e03_sweep.csv").exists()


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
        (v, rate, "3") for v in ("dense", "cats-70", "relufication") for rate in ("0.0001", "0.01")
    ]
    for row, item in zip(rows, samples(tmp_path, "e04_items"), strict=True):
        assert float(row["accuracy"]) == pytest.approx(sum(flags(item["correct"])) / 24, abs=1e-6)
    for runs in (sweep[:2], sweep[2:4], sweep[4:]):
        best = min(runs, key=lambda row: float(row["eval_loss"]))
        assert [row["chosen"] for row in runs] == [str(row is best) for row in runs]


@pytest.mark.parametrize("experiment", ["e03", "e04"])
def test_a_rate_that_diverges_is_not_chosen_and_all_that_do_are_refused(world, tmp_path, experiment):
    run_experiment(config_of(world, experiment, tmp_path / "one", learning_rates=[1e30, 1e-3]))
    sweep = table(tmp_path / "one", f"{experiment}_sweep")
    assert [(row["learning_rate"], row["chosen"]) for row in sweep] == 3 * [("1e+30", "False"), ("0.001", "True")]
    assert all(math.isnan(float(row["eval_loss"] or "nan")) for row in sweep[::2])
    with pytest.raises(ValueError, match=r"dense diverged at every learning rate \(1e\+30, 1e\+29\): give lower ones"):
        run_experiment(config_of(world, experiment, tmp_path / "all", learning_rates=[1e30, 1e29]))


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


def test_local_instruction_tasks_are_known(tmp_path):
    from cats.evaluation import check_tasks

    config = make_config("e04", "paper", load_profile("paper"), tmp_path)
    assert config.options.include_path is None
    check_tasks(["instruct_cola", "instruct_sst2", "instruct_boolq"], instruction_folder(config))
