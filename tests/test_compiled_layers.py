"""Training with compiled decoder layers: the same adapters, and a model that is afterwards as it was."""

import dataclasses
import functools

import accelerate
import pytest
import torch

from cats import finetuning
from cats.compiled_layers import compiled_layers, decoder_layers
from cats.finetuning import finetune
from tests.finetuning_cases import SETTINGS, adapters, data, patched


def collate(items):
    width = max(len(item["input_ids"]) for item in items)
    return {
        key: torch.stack([torch.nn.functional.pad(item[key], (0, width - len(item[key])), value=0) for item in items])
        for key in ("input_ids", "labels")
    }


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_compiled_layers_train_to_the_same_adapters_and_leave_nothing_behind(tmp_path, monkeypatch, family):
    """Items of several lengths; what is measured meanwhile runs as it is. Traced, not compiled by C++."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    ran, counts = {}, []
    items = [{key: row[: 9 + 3 * (i // 4 % 3)] for key, row in item.items()} for i, item in enumerate(data(24))]
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = patched(family)
        base = model.get_base_model()
        before = {name: dict(vars(module)) for name, module in base.named_modules()}

        def measure(model=model):
            model(torch.zeros(1, 17 + len(counts), dtype=torch.long))
            counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            return {}

        settings = dataclasses.replace(SETTINGS, steps=6, batch_size=4, learning_rate=1e-3, compiled=compiled)
        records = finetune(model, items, settings, tmp_path / str(compiled), [2, 4], measure, collate)
        ran[compiled] = [record["train_loss"] for record in records], adapters(model)
        after = {name: vars(module) for name, module in base.named_modules()}
        assert {name: set(old) ^ set(after[name]) for name, old in before.items() if set(old) != set(after[name])} == {}
    assert counts[:3] == [0, 0, 0] and 0 < counts[-1] <= 10
    assert ran[True][0] == pytest.approx(ran[False][0], rel=1e-4)
    for name, value in ran[False][1].items():
        assert torch.allclose(ran[True][1][name], value, rtol=1e-3, atol=1e-4), name


def test_layers_are_compiled_on_a_gpu_alone_and_of_long_runs(monkeypatch, tmp_path):
    compiled = []
    monkeypatch.setattr(finetuning, "compiled_layers", compiled.append)
    model = patched()

    def ask(device, steps, micro_batch_size, asked=None):
        monkeypatch.setattr(type(model), "device", torch.device(device), raising=False)
        changes = {"steps": steps, "micro_batch_size": micro_batch_size, "compiled": asked}
        settings = dataclasses.replace(SETTINGS, **changes)
        compiled.clear()
        finetuning._compiled(model, settings, finetuning._arguments(model, settings, tmp_path))
        return compiled == [model.get_base_model()]

    assert not ask("cpu", 500, 2) and not ask("cuda", 24, 2) and not ask("cuda", 500, 2, False)
    assert ask("cuda", 25, 2) and ask("cuda", 1, 2, True)
    assert ask("cuda", 100, 16), "a micro batch larger than the batch of 8 is one pass a step"


def test_a_layer_that_accelerate_has_hooked_keeps_its_hook():
    model = patched().get_base_model()
    layer = decoder_layers(model)[0]
    accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
    hooked = layer.forward
    with compiled_layers(model):
        assert layer.forward is not hooked
    assert layer.forward is hooked
    assert all("forward" not in vars(other) for other in decoder_layers(model)[1:])
