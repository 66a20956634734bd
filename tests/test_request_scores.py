"""Scores of lm-eval's requests in this project's batches, against lm-eval's own loop."""

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from cats.language_model import LanguageModel
from cats.models import load_tokenizer
from cats.request_scores import batches_of, inputs_of, only_positions, output_matrix
from tests.accuracy_world import build_world

POSITIONS = 40


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=101)
    return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=POSITIONS)).eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    build_world(folder)
    return load_tokenizer(str(folder / "model"))


def made_up_requests():
    """Contexts that are shared, of one to 49 tokens where the model has 40, and continuations of one to six tokens."""
    draw = torch.Generator().manual_seed(1)
    requests = []
    for number in range(60):
        context = torch.randint(1, 101, (int(torch.randint(1, 50, (1,), generator=draw)),), generator=draw).tolist()
        for one in range(3):
            length = 1 if number % 2 else int(torch.randint(1, 7, (1,), generator=draw))
            continuation = torch.randint(1, 101, (length,), generator=draw).tolist()
            requests.append(((f"context {number}", f" option {one}"), context, continuation))
    return [*requests, (None, requests[0][1], [3])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sequences", [1, 3, 16])
def test_scores_are_those_of_lm_evals_own_loop(model, tokenizer, sequences, dtype):
    own = LanguageModel(model.to(dtype), tokenizer, sequences, {})
    requests = made_up_requests()
    expected = HFLM._loglikelihood_tokens(own, requests, disable_tqdm=True)
    scores = own._loglikelihood_tokens(requests, disable_tqdm=True)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.26}[dtype]  # a step of bfloat16 at 32 to 64
    assert [score for score, _ in scores] == pytest.approx([score for score, _ in expected], abs=tolerance)
    if dtype == torch.float32:
        assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
    model.float()


def test_greedy_continuations_are_recognised(model, tokenizer):
    context = [5, 6, 7]
    ids = torch.tensor([context])
    for _ in range(3):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    greedy = ids[0, 3:].tolist()
    other = [*greedy[:-1], (greedy[-1] + 1) % 101]
    own = LanguageModel(model, tokenizer, 4, {})
    scores = own._loglikelihood_tokens([(None, context, greedy), (None, context, other)])
    assert [equal for _, equal in scores] == [True, False]
    assert scores[0][0] > scores[1][0]


def test_one_input_serves_continuations_that_begin_at_different_places(model, tokenizer):
    """lm-eval 0.4.12 takes the logits of the longest's first token for each of them."""
    own = LanguageModel(model, tokenizer, 4, {})
    requests = [(None, [5, 6], [7, 8, 9]), (None, [5, 6, 7, 8], [9]), (None, [5, 6, 7], [8, 4])]
    scores = own._loglikelihood_tokens(requests)
    logp = model(torch.tensor([[5, 6, 7, 8]])).logits[0].detach().log_softmax(-1)
    wanted = [logp[1, 7] + logp[2, 8] + logp[3, 9], logp[3, 9], logp[2, 8] + logp[3, 4]]
    assert [score for score, _ in scores] == pytest.approx([float(one) for one in wanted], abs=1e-5)
    assert len(inputs_of(requests[:2], POSITIONS)) == 1


def test_inputs_that_are_cut_are_said_once(model, tokenizer, caplog):
    LanguageModel(model, tokenizer, 4, {})._loglikelihood_tokens(made_up_requests())
    cut = [record for record in caplog.records if "positions" in record.getMessage()]
    assert len(cut) == 1
    assert "of 181 requests are longer than the model's 40 positions" in cut[0].getMessage()


def test_an_input_that_requests_share_is_run_once_and_batches_hold_as_many_tokens(model, tokenizer):
    own = LanguageModel(model, tokenizer, 4, {})
    requests, seen = made_up_requests(), []
    handle = model.get_input_embeddings().register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape))
    own._loglikelihood_tokens(requests)
    handle.remove()
    inputs = inputs_of(requests, POSITIONS)
    assert sum(rows for rows, _ in seen) == len(inputs) < len(requests)
    longest = max(len(one.ids) for one in inputs)
    assert longest == POSITIONS
    assert all(rows * width <= 4 * longest for rows, width in seen)
    assert max(rows for rows, _ in seen) > 4


def test_the_number_of_scored_positions_bounds_a_batch():
    inputs = inputs_of([(None, [1] * 9, [token, token]) for token in range(10)], POSITIONS)
    assert [len(batch) for batch in batches_of(inputs, 100, 6)] == [3, 3, 3, 1]
    assert [len(batch) for batch in batches_of(inputs, 100, 1)] == [1] * 10
    assert list(batches_of([], 100, 6)) == []


def test_the_output_matrix_sees_the_chosen_positions_and_is_left_as_it_was(model):
    ids = torch.randint(1, 101, (2, 8))
    whole = model(ids).logits
    head = output_matrix(model)
    with only_positions(head, torch.tensor([0, 1, 1]), torch.tensor([7, 0, 3]), 8):
        some = model(ids).logits
    assert torch.allclose(some, whole[[0, 1, 1], [7, 0, 3]], atol=1e-6)
    assert torch.equal(model(ids).logits, whole)


def test_a_model_whose_logits_cannot_be_chosen_has_none():
    assert output_matrix(nn.Linear(2, 2)) is None
    assert output_matrix(torch.compile(LlamaForCausalLM(LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=10
    )), backend="eager")) is None  # fmt: skip


def test_virtual_tokens_come_before_the_positions():
    """As peft's prompt tuning puts them there."""
    head, seen = nn.Linear(1, 1), torch.arange(10.0).reshape(1, 10, 1)
    taken = []
    head.register_forward_hook(lambda _module, arguments, _output: taken.append(arguments[0]))
    with only_positions(head, torch.tensor([0, 0]), torch.tensor([2, 6]), 7):
        head(seen)
    assert taken[0].flatten().tolist() == [5.0, 9.0]


@pytest.mark.parametrize("length", [0, POSITIONS + 1])
def test_a_continuation_that_no_position_can_score_is_refused(length: int):
    with pytest.raises(ValueError, match=f"a continuation has {length} tokens, and the model {POSITIONS} positions"):
        inputs_of([(("a", "b"), [1], [2] * length)], POSITIONS)
