"""Parts of e08 on a model alone: losses of held-out text, the weights that a token reads, targets, intervals."""

import pytest
import torch

import cats
from cats.evaluation import block_losses
from experiments.e08_criteria.cases import Case, Weights, cases
from experiments.e08_criteria.heldout import continuation_losses, losses_and_skipped
from experiments.framework.samples import median_interval
from tests.conftest import tiny_model


def halves_by_decoding(model, ids):
    """Loss of the second half, fed token by token, with the prompt in one call: what generation does."""
    half, nats = ids.shape[1] // 2, []
    with torch.no_grad():
        out = model(ids[:, :half], use_cache=True)
        for place in range(half, ids.shape[1]):
            logp = out.logits[:, -1].log_softmax(-1)
            nats.append(-logp.gather(-1, ids[:, place, None]))
            out = model(ids[:, place, None], past_key_values=out.past_key_values, use_cache=True)
    return torch.cat(nats, 1).mean(1).tolist()


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
@pytest.mark.parametrize("criterion", ["cats", "up-norm", "teal"])
def test_continuations_are_those_of_decoding_token_by_token(family, criterion):
    extra = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]} if "3" in family else {}
    model = tiny_model(family, num_hidden_layers=2, max_position_embeddings=128, **extra).eval()
    ids = torch.randint(0, 64, (2, 48), generator=torch.Generator().manual_seed(0))
    thresholds = cats.calibrate(model, [ids], 0.7, criterion=criterion)
    seen = []
    for prefill in ("sparse", "dense"):
        cats.apply(model, thresholds, kernel="reference", prefill=prefill)
        expected = halves_by_decoding(model, ids)
        cats.apply(model, thresholds, kernel="reference")
        losses = continuation_losses(model, [ids], prefill == "dense")
        assert losses == pytest.approx(expected, rel=1e-5)
        seen.append(losses)
    assert seen[0] != pytest.approx(seen[1], rel=1e-4)
    with pytest.raises(ValueError, match="at least 18 tokens, not 12"):
        continuation_losses(model, [ids[:, :12]], True)


def test_the_single_pass_agrees_with_two():
    model = tiny_model(num_hidden_layers=2)
    generator = torch.Generator().manual_seed(0)
    text = list(torch.randint(0, 64, (6, 32), generator=generator).split(4))
    for criterion in ("cats", "up-norm", "teal", "oracle"):
        cats.remove(model)
        cats.apply(model, cats.calibrate(model, text, 0.4, criterion=criterion), kernel="reference")
        losses, skipped = losses_and_skipped(model, text)
        assert losses == pytest.approx(block_losses(model, text), rel=1e-5)
        assert skipped == pytest.approx(cats.measure_sparsity(model, text))
    cats.remove(model)
    assert losses_and_skipped(model, text)[1] == {}


def test_weights_that_a_token_reads():
    model = tiny_model(num_hidden_layers=2)
    weights = Weights(model)
    table = model.get_input_embeddings().weight.numel()
    assert sum(weights.mlp.values()) == 2 * 3 * 32 * 88
    assert weights.everything == sum(p.numel() for p in model.parameters()) - table
    model.lm_head.weight = model.model.embed_tokens.weight  # tied: the head reads the table
    assert Weights(model).everything == weights.everything


def test_targets_of_input_criteria():
    weights = Weights(tiny_model(num_hidden_layers=2))
    mlp, attention = sum(weights.mlp.values()), sum(weights.attention.values())
    assert Case("teal", "mlp", 0.6).target(weights) == pytest.approx(0.4)
    assert Case("teal", "model", 0.6).target(weights) == pytest.approx(0.4 * mlp / (mlp + attention))
    assert Case("cats", "mlp", 0.6).target(weights) == 0.6
    assert [case.variant for case in cases(["up", "cats"], [0.5])] == ["dense", "cats-50", "up-50"]


def test_the_interval_of_a_median_by_the_tables() -> None:
    assert median_interval([float(i) for i in range(80, 0, -1)]) == (40.5, 31, 50)  # 31st and 50th of 80
    assert median_interval([3.0, 1.0, 2.0, 6.0, 5.0, 4.0]) == (3.5, 1, 6)
    assert median_interval([3.0, 1.0, 2.0, 5.0, 4.0]) == (3, None, None)
