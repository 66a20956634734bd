"""Accuracy through lm-eval equals what is computed by hand, and perplexity equals exp of the cross-entropy."""

import logging
import math
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import tqdm
from cats_kernels.reference import sparse_gated_mlp_reference
from lm_eval.api.instance import Instance

import cats
from cats.evaluation import (
    TaskResult,
    block_losses,
    evaluate,
    load_tasks,
    paired_difference,
    perplexity,
)
from cats.language_model import LanguageModel
from cats.models import load_model
from tests.accuracy_world import ITEMS
from tests.accuracy_world import loaded as loaded
from tests.accuracy_world import world as world


def hand_loglikelihood(model, thresholds, ids, start):
    """Sum of log p(ids[i] | ids[:i]) for i >= start, in float64, the MLP of equations 1 and 4 written out."""
    for name, mlp in cats.gated_mlps(model).items():
        weights = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.t().contiguous())
        mlp.forward = lambda x, w=weights, t=thresholds.gate[name]: sparse_gated_mlp_reference(x, *w, t)
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(sum(logp[i - 1, ids[i]] for i in range(start, len(ids))))


def test_patched_model_in_lm_eval_equals_a_hand_computed_loglikelihood(world, loaded):
    model, tokenizer = loaded
    batches = [torch.randint(1, len(tokenizer), (4, 32), generator=torch.Generator().manual_seed(0))]
    thresholds = cats.calibrate(model, batches, 0.7)
    pairs = [("alpha beta gamma", " delta"), ("tau rho", " sigma pi nu"), ("mu", " mu")]
    cats.apply(model, thresholds)
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = LanguageModel(model, tokenizer, 2, {}).loglikelihood(requests, disable_tqdm=True)
    reference = load_model(str(world / "model"), "float32")[0].double()
    for (context, continuation), (loglikelihood, _) in zip(pairs, found, strict=True):
        ids = tokenizer.encode(context + continuation)
        start = len(tokenizer.encode(context))
        assert loglikelihood == pytest.approx(hand_loglikelihood(reference, thresholds, ids, start), abs=1e-4)


def test_accuracy_is_the_argmax_of_hand_computed_loglikelihoods(world, loaded):
    model, tokenizer = loaded
    (result,) = evaluate(model, tokenizer, ["tiny_words"], include_path=world / "tasks", batch_size=5)
    task = load_tasks(["tiny_words"], world / "tasks")["tiny_words"]
    correct = []
    for document in task.test_docs():
        scores = []
        for option in document["options"]:
            ids, start = tokenizer.encode(document["text"] + option), len(tokenizer.encode(document["text"]))
            logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(logp[i - 1, ids[i]]) for i in range(start, len(ids))))
        correct.append(float(np.argmax(scores) == document["gold"]))
    p, n = np.mean(correct), ITEMS
    assert result.correct == tuple(correct)
    assert (result.items, result.chance) == (n, 0.25)
    assert result.accuracy == pytest.approx(p)
    assert result.stderr == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))


def test_evaluating_again_gives_the_same_and_leaves_no_trace(world, loaded, capfd):
    model, tokenizer = loaded
    tasks = load_tasks(["tiny_words", "tiny_yes"], world / "tasks")
    model.train()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = evaluate(model, tokenizer, tasks, limit=10)
    again = evaluate(model, tokenizer, tasks, limit=10, batch_size=3)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert [r.task for r in first] == ["tiny_words", "tiny_yes"]
    assert [r.correct for r in first] == [r.correct for r in again]
    assert model.training
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])
    captured = capfd.readouterr()
    assert "it/s" not in captured.err and captured.out == ""


def test_perplexity_is_exp_of_the_mean_cross_entropy(loaded):
    model, tokenizer = loaded
    ids = torch.randint(0, len(tokenizer), (5, 20), generator=torch.Generator().manual_seed(1))
    logp = model.double()(ids).logits[:, :-1].log_softmax(-1)
    expected = math.exp(-float(logp.gather(-1, ids[:, 1:, None]).mean()))
    assert perplexity(model.float(), ids.split(2)) == pytest.approx(expected, rel=1e-5)
    model.lm_head.weight.data *= 1e6  # as training that diverged leaves it: e to so many nats is beyond a float
    assert perplexity(model, [ids]) == math.inf


def test_each_module_gets_its_own_mode_back(world, loaded):
    model, tokenizer = loaded
    model.train()
    model.model.layers[0].eval()  # frozen by its owner
    modes = [module.training for module in model.modules()]
    ids = torch.randint(0, len(tokenizer), (2, 20), generator=torch.Generator().manual_seed(1))
    perplexity(model, [ids])
    assert [module.training for module in model.modules()] == modes
    evaluate(model, tokenizer, load_tasks(["tiny_yes"], world / "tasks"), limit=4)
    assert [module.training for module in model.modules()] == modes
    model.eval()


def test_perplexity_counts_every_token_alike(loaded):
    """In blocks of different lengths too."""
    model, tokenizer = loaded
    long, short = torch.randint(0, len(tokenizer), (4, 20), generator=torch.Generator().manual_seed(1)).split((1, 3))
    short = short[:, :3]
    nats = [loss * (ids.shape[1] - 1) for ids in (long, short) for loss in block_losses(model, [ids])]
    assert perplexity(model, [long, short]) == pytest.approx(math.exp(sum(nats) / (19 + 3 * 2)))
    assert perplexity(model, [long, short]) != pytest.approx(math.exp(sum(block_losses(model, [long, short])) / 4))


def test_paired_difference_by_hand():
    # differences 1, 0, -1, 1: mean 0.25, variance (0.75^2 + 0.25^2 + 1.25^2 + 0.75^2) / 3 = 11/12
    a = TaskResult("t", 0.75, 0.0, 4, 0.5, (1.0, 1.0, 0.0, 1.0))
    b = TaskResult("t", 0.5, 0.0, 4, 0.5, (0.0, 1.0, 1.0, 0.0))
    difference, stderr = paired_difference(a, b)
    assert difference == 0.25
    assert stderr == pytest.approx(math.sqrt(11 / 12 / 4))
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference(a, TaskResult("other", 0.5, 0.0, 4, 0.5, b.correct))


def test_too_small_a_limit_and_no_text_are_refused(world, loaded):
    model, tokenizer = loaded
    with pytest.raises(ValueError, match="limit must be at least 2"):
        evaluate(model, tokenizer, ["tiny_yes"], limit=1, include_path=world / "tasks")
    with pytest.raises(ValueError, match="no text"):
        perplexity(model, [])


def test_warnings_and_errors_are_shown_and_progress_is_not(world, loaded, capfd, monkeypatch):
    model, tokenizer = loaded
    tasks = load_tasks(["tiny_yes"], world / "tasks")
    logged = logging.getLogger("lm_eval.models.huggingface")
    forward, handler = model.forward, logging.StreamHandler()
    logged.addHandler(handler)

    def noisy(*args, **kwargs):
        warnings.warn("the model says something", stacklevel=1)
        logged.warning("Left truncation applied.")
        logged.info("Model parallel was set to False.")
        print("from C, say", file=sys.stderr)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", noisy)
    with pytest.warns(UserWarning, match="the model says something"):
        evaluate(model, tokenizer, tasks, limit=2)
    logged.removeHandler(handler)
    shown = capfd.readouterr().err
    assert "Left truncation applied." in shown and "from C, say" in shown
    for noise in ("it/s", "100%", "Model parallel", "already-initialized", "model kwarg"):
        assert noise not in shown
    assert not logged.filters and logging.getLogger("lm_eval").level == logging.NOTSET

    def broken(*_args, **_kwargs):
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        evaluate(model, tokenizer, tasks, limit=2)
    from lm_eval.api import model as api

    assert api.tqdm is tqdm.tqdm  # as it was


@pytest.mark.parametrize(("module", "package"), [("evaluation", "lm_eval"), ("finetuning", "peft")])
def test_a_missing_extra_is_one_sentence(module, package):
    code = f"""
import sys
sys.modules[{package!r}] = None
import cats
cats.apply, cats.calibrate, cats.relufy, cats.measure_sparsity
try:
    import cats.{module}
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=400)
    expected = (
        f"needs the package {package}, which is not installed: pip install 'cats-sparsity[experiments]' brings it"
    )
    said = done.stdout.strip()
    assert said.startswith("cats.") and said.endswith(expected) and said.count("\n") == 0, done.stderr
