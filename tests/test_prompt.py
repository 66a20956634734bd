"""Ids on a GPU are checked where the host is anyway. Here a CPU stands in: `on_host` says that looking would wait."""

import pytest
import torch

import cats
from cats.generation import prompt
from tests.conftest import tiny_model

OUTSIDE = "input_ids must lie in 0 to 63, this model's vocabulary"
BAD = [[[1, 64]], [[1, -1]], [[1, 2**40]]]


class Streamer:
    def __init__(self):
        self.calls = []

    def put(self, tokens):
        self.calls.append(tokens)

    def end(self):
        self.calls.append("end")


@pytest.fixture
def elsewhere(monkeypatch):
    """Ids that only the device sees; how often the host has looked since."""
    looked = []
    check = prompt.Outside.check
    monkeypatch.setattr(prompt, "on_host", lambda _ids: False)
    monkeypatch.setattr(prompt.Outside, "check", lambda self: looked.append(1) or check(self))
    return looked


@pytest.mark.parametrize("ids", BAD)
@pytest.mark.parametrize("loop", ["eager", "transformers"])
def test_ids_outside_are_refused_after_the_model_has_run_on_others(elsewhere, ids, loop):
    model = tiny_model()
    seen = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    for options in ({}, {"eos_token_id": None}):
        with pytest.raises(ValueError, match=OUTSIDE):
            cats.generate(model, torch.tensor(ids), 3, loop=loop, **options)
    assert seen and all(int(each.min()) >= 0 and int(each.max()) < 64 for each in seen)


@pytest.mark.parametrize("ids", BAD)
def test_nothing_is_streamed_of_them(elsewhere, ids):
    model, streamer, seen = tiny_model(), Streamer(), []
    for listener in (streamer, seen.append):
        with pytest.raises(ValueError, match=OUTSIDE):
            cats.generate(model, torch.tensor(ids), 3, streamer=listener)
    assert streamer.calls == seen == []


def test_ids_inside_give_the_same_tokens_and_nobody_looks_before_the_prompt_has_been_given(elsewhere):
    model, ids = tiny_model(), torch.tensor([[0, 63, 5], [7, 8, 9]])
    order = []
    model.register_forward_pre_hook(lambda *_: order.append(len(elsewhere)))
    tokens = cats.generate(model, ids, 4, eos_token_id=None)
    assert order[0] == 0 and len(elsewhere) == 1
    prompt.on_host = lambda _ids: True
    assert torch.equal(cats.generate(model, ids, 4, eos_token_id=None), tokens)
    assert torch.equal(tokens[:, :3], ids)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("ids", BAD)
def test_a_gpu_can_be_used_afterwards(ids):
    model = tiny_model().cuda()
    with pytest.raises(ValueError, match=OUTSIDE):
        cats.generate(model, torch.tensor(ids).cuda(), 3, loop="eager")
    assert cats.generate(model, torch.tensor([[1, 2]]).cuda(), 3, loop="eager").shape[0] == 1
