"""`cats.generate`: the tokens of transformers' `generate` in every loop, and what it is asked for."""

import logging
import warnings

import accelerate
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig

import cats
from cats.generation import loops

from .conftest import FAMILIES, tiny_model
from .generation_cases import DRAW, LOOPS, NEW, made, prompts, theirs


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "Phi3"])
def test_the_tokens_of_transformers(family: str, loop: str) -> None:
    model = made(family)
    for batch in (1, 3):
        ids, mask = prompts(batch)
        expected = theirs(model, ids, mask)
        assert torch.equal(cats.generate(model, ids, NEW, attention_mask=mask, loop=loop), expected)
        torch.manual_seed(7)
        drawn = theirs(model, ids, mask, do_sample=True, **DRAW)
        assert torch.equal(cats.generate(model, ids, NEW, attention_mask=mask, loop=loop, seed=7, **DRAW), drawn)
        assert not torch.equal(drawn, expected)


@pytest.mark.parametrize("length", [1, 2, 9, 40])
@pytest.mark.parametrize("loop", LOOPS)
def test_prompts_of_any_length_and_one_new_token(length: int, loop: str) -> None:
    model = made()
    ids, _ = prompts(1, length)
    for new in (1, 2, NEW):
        assert torch.equal(cats.generate(model, ids[0], new, loop=loop), theirs(model, ids, new=new))


@pytest.mark.parametrize("loop", ["eager", "captured", "transformers"])
def test_sequences_end_at_stop_tokens(loop: str) -> None:
    model = made()
    ids, mask = prompts(3)
    free = theirs(model, ids, mask)[:, ids.shape[1] :]
    stop = [int(free[0, 3]), int(free[1, 6])]
    expected = theirs(model, ids, mask, eos_token_id=stop, pad_token_id=1)
    tokens = cats.generate(model, ids, NEW, attention_mask=mask, eos_token_id=stop, pad_token_id=1, loop=loop)
    assert torch.equal(tokens, expected)
    first = cats.generate(model, ids[:1], NEW, attention_mask=mask[:1], eos_token_id=stop[0], loop=loop)
    assert first.shape[1] == ids.shape[1] + 1 + free[0].tolist().index(stop[0])
    model.generation_config.eos_token_id = stop[0]  # the model's own by default
    assert torch.equal(cats.generate(model, ids[:1], NEW, attention_mask=mask[:1], loop=loop), first)
    whole = cats.generate(model, ids[:1], NEW, attention_mask=mask[:1], eos_token_id=None, loop=loop)
    assert torch.equal(whole[0, ids.shape[1] :], free[0])


@pytest.mark.parametrize("loop", ["eager", "captured", "transformers"])
def test_tokens_are_streamed(loop: str) -> None:
    model = made()
    ids, mask = prompts(2)
    seen: list[Tensor] = []
    tokens = cats.generate(model, ids, NEW, attention_mask=mask, streamer=seen.append, loop=loop)
    assert torch.equal(torch.stack(seen, 1), tokens[:, ids.shape[1] :])

    class Streamer:
        def __init__(self) -> None:
            self.values: list[Tensor] = []

        def put(self, value: Tensor) -> None:
            self.values.append(value.reshape(-1))

        def end(self) -> None:
            self.values.append(torch.tensor([-1]))

    streamer = Streamer()
    tokens = cats.generate(model, ids[1:], NEW, streamer=streamer, loop=loop)
    assert torch.cat(streamer.values).tolist() == [*tokens[0].tolist(), -1]


OTHERS = {
    "an encoder": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2, vocab_size=64)
    ),
    "a state": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=1, vocab_size=64)
    ),
    "inputs in a way of its own": lambda: made("Phi3"),
}


@pytest.mark.parametrize("reason", OTHERS)
def test_other_models_fall_back_in_one_sentence(reason: str) -> None:
    torch.manual_seed(0)
    model = OTHERS[reason]().eval()
    ids, _ = prompts(1)
    model.generation_config.update(eos_token_id=None, pad_token_id=0, decoder_start_token_id=0)
    with pytest.warns(UserWarning, match="transformers' generate is used, since") as caught:
        tokens = cats.generate(model, ids, 5)
    ours = [str(w.message) for w in caught if "transformers' generate is used" in str(w.message)]
    assert len(ours) == 1 and "\n" not in ours[0]
    assert torch.equal(tokens, theirs(model, ids, new=5, do_sample=False))


def test_what_cannot_generate_is_refused_in_one_sentence() -> None:
    ids, _ = prompts(1)
    with pytest.raises(ValueError, match="LlamaModel is no causal language model of transformers, and has no generate"):
        cats.generate(made().model, ids, 5)


def test_transformers_has_nothing_to_warn_of(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = transformers.utils.logging.get_logger("transformers.generation")
    monkeypatch.setattr(logger, "parent", logging.getLogger())
    logger.warning_once.cache_clear()  # it says nothing twice in a process
    ids, _ = prompts(1)
    for options in ({}, {"temperature": 0.5, "seed": 1}, {"seed": 1, **DRAW}):
        cats.generate(made(), ids, 5, loop="transformers", **options)
    assert not caplog.records


def test_a_model_in_training_mode_falls_back() -> None:
    """Its dropout draws as in transformers' generate, and it stays in training mode."""
    model = made(attention_dropout=0.9).train()
    ids, _ = prompts(1)
    torch.manual_seed(5)
    expected = theirs(model, ids)
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match="LlamaForCausalLM is in training mode"):
        tokens = cats.generate(model, ids, NEW)
    assert torch.equal(tokens, expected) and model.training
    assert not torch.equal(cats.generate(model.eval(), ids, NEW), expected)


def test_an_offloaded_model_generates_where_it_computes() -> None:
    model, (ids, mask) = made(), prompts()
    expected = cats.generate(model, ids, 5, attention_mask=mask)
    drawn = cats.generate(model, ids, 5, attention_mask=mask, seed=1, **DRAW)
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.warns(UserWarning, match="LlamaForCausalLM is spread over several devices"):
        assert torch.equal(cats.generate(model, ids, 5, attention_mask=mask), expected)
        assert torch.equal(cats.generate(model, ids, 5, attention_mask=mask, seed=1, **DRAW), drawn)


def test_the_models_own_settings_do_not_count() -> None:
    model = made()
    ids, _ = prompts(1)
    expected = theirs(model, ids)
    model.generation_config = GenerationConfig(do_sample=True, temperature=3.0, repetition_penalty=9.0, pad_token_id=0)
    for loop in ("eager", "transformers"):
        assert torch.equal(cats.generate(model, ids, NEW, loop=loop), expected)
    assert model.generation_config.repetition_penalty == 9.0


def test_wrapped_models_are_served() -> None:
    model = made()
    ids, _ = prompts(1)
    expected = theirs(model, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(cats.generate(torch.compile(model, backend="eager"), ids, NEW), expected)


def test_draws() -> None:
    """Empirical frequencies against the probabilities that the settings ask for."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -5.0]])
    many = logits.expand(20000, -1)
    for options, allowed in (({}, 5), ({"top_k": 2}, 2), ({"top_p": 0.75}, 2), ({"top_k": 9}, 5)):
        sampling = cats.generation.Sampling(temperature=1.5, **options)
        torch.manual_seed(0)
        drawn = torch.bincount(sampling(many)[:, 0], minlength=5) / 20000
        kept = torch.where(torch.arange(5) < allowed, logits[0] / 1.5, -torch.inf).softmax(0)
        assert torch.allclose(drawn, kept, atol=0.012)


BAD = [
    ({"input_ids": [1, 2]}, TypeError, "input_ids must be an int64 tensor"),
    ({"input_ids": torch.zeros(1, 3)}, TypeError, r"not torch.float32 \(1, 3\)"),
    ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, ValueError, "input_ids has no tokens"),
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be a whole number, 1 or more, not 0"),
    ({"max_new_tokens": 2.5}, ValueError, "max_new_tokens must be a whole number"),
    ({"temperature": -1.0}, ValueError, "temperature must be 0 or more, not -1.0"),
    ({"temperature": float("nan")}, ValueError, "temperature must be 0 or more"),
    ({"temperature": 1.0, "top_k": 0}, ValueError, "top_k must be a whole number, 1 or more"),
    ({"temperature": 1.0, "top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\]"),
    ({"top_k": 4}, ValueError, "top_k and top_p need a temperature above 0"),
    ({"seed": -1}, ValueError, r"seed must be a whole number from 0 to 2\^63"),
    ({"loop": "fast"}, ValueError, "unknown loop 'fast': allowed are auto, transformers, eager"),
    ({"eos_token_id": "end"}, ValueError, 'eos_token_id must be a token, several, None or "model"'),
    ({"streamer": 3}, TypeError, "streamer must have put and end, or be a function"),
    ({"attention_mask": torch.ones(1, 3)}, ValueError, "attention_mask must be a tensor of the shape of input_ids"),
    ({"attention_mask": torch.tensor([[1, 1, 0, 0]])}, ValueError, "pad on the left"),
    ({"attention_mask": torch.ones(4, 1)}, ValueError, "attention_mask must be a tensor of the shape of input_ids"),
    ({"input_ids": torch.tensor([[1, 64]])}, ValueError, "input_ids must lie in 0 to 63, this model's vocabulary"),
    ({"input_ids": torch.tensor([[1, -1]])}, ValueError, "input_ids must lie in 0 to 63"),
    ({"temperature": 1.0, "top_k": 2.5}, ValueError, "top_k must be a whole number, 1 or more, or None, not 2.5"),
    ({"temperature": "1"}, ValueError, "temperature must be 0 or more, not '1'"),
    ({"temperature": 1.0, "top_p": "1"}, ValueError, r"top_p must be in \(0, 1\] or None, not '1'"),
    ({"temperature": 1.0, "seed": 1.5}, ValueError, r"seed must be a whole number from 0 to 2\^63, not 1.5"),
    ({"cache_tokens": 300.5}, ValueError, "cache_tokens must be a whole number, 0 or more, not 300.5"),
    ({"cache_tokens": -1}, ValueError, "cache_tokens must be a whole number, 0 or more, not -1"),
    ({"pad_token_id": "a"}, ValueError, "pad_token_id must be a whole number, not 'a'"),
    ({"eos_token_id": [1.5]}, ValueError, r"eos_token_id must be whole numbers, not \[1.5\]"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD)
def test_bad_input(options: dict, kind: type, message: str) -> None:
    given = {"input_ids": torch.arange(4)[None], "max_new_tokens": 2, **options}
    with pytest.raises(kind, match=message):
        cats.generate(made(), **given)


def test_whole_numbers_of_numpy_and_torch() -> None:
    model, (ids, mask) = made(), prompts()
    end = int(cats.generate(model, ids, 3, attention_mask=mask)[0, -1])
    expected = cats.generate(model, ids, 8, attention_mask=mask, eos_token_id=end, pad_token_id=1)
    given = {"eos_token_id": torch.tensor([end]), "pad_token_id": np.int64(1), "cache_tokens": np.int64(300)}
    assert torch.equal(cats.generate(model, ids, np.int64(8), attention_mask=mask, **given), expected)
    given["eos_token_id"] = torch.tensor(end)
    assert torch.equal(cats.generate(model, ids, torch.tensor(8), attention_mask=mask, **given), expected)
    draw = {"temperature": np.float32(0.5), "top_k": np.int64(5), "seed": np.int64(3)}
    plain = {"temperature": 0.5, "top_k": 5, "seed": 3}
    assert torch.equal(cats.generate(model, ids, 5, **draw), cats.generate(model, ids, 5, **plain))


@pytest.mark.parametrize(
    ("device", "batch", "expected"), [("cpu", 1, "eager"), ("cuda", 1, "graph-tuned"), ("cuda", 2, "graph")]
)
def test_the_loop_that_auto_takes(device: str, batch: int, expected: str) -> None:
    assert loops.default_loop(torch.device(device), batch) == expected


@pytest.mark.parametrize("loop", ["eager", "captured"])
def test_layers_that_leave_rotary_embedding_out(loop: str) -> None:
    """SmolLM3 does so in some layers: blocks of one class that compute different things."""
    model = tiny_model("SmolLM3", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0], pad_token_id=0)
    ids = torch.randint(1, 50, (1, 9), generator=torch.Generator().manual_seed(5))
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(cats.generate(model, ids, 8, loop=loop, eos_token_id=[]), expected)


@pytest.mark.parametrize("loop", ["eager", "captured"])
def test_inference_mode_leaves_nothing_behind(loop: str) -> None:
    model, ids = tiny_model(), torch.randint(1, 50, (1, 4), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        first = cats.generate(model, ids.clone(), 4, loop=loop)
    assert torch.equal(cats.generate(model, ids, 4, loop=loop), first)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
