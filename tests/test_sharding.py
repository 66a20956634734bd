"""Models whose layers accelerate spreads over devices: its hooks wrap every module's forward."""

from pathlib import Path

import cats_kernels
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

import cats
from cats.models import load_model

from .hub_content import save_model


class Passed(AlignDevicesHook):
    """accelerate's hook, counting the calls that go through it."""

    calls = 0

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        Passed.calls += 1
        return super().pre_forward(module, *args, **kwargs)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_a_sharded_model_is_patched_like_any_other(tmp_path: Path, kernel: str, monkeypatch) -> None:
    operator, operator_calls = cats_kernels.sparse_gated_mlp, []
    monkeypatch.setattr(cats_kernels, "sparse_gated_mlp", lambda *a: (operator_calls.append(a[6]), operator(*a))[1])
    model, tokenizer = load_model(str(save_model(tmp_path, "Llama")), "float32", "sharded")
    plain, _ = load_model(str(tmp_path), "float32", "cpu")
    device = str(model.device)
    for module in cats.gated_mlps(model).values():  # as device_map leaves them; on one device it leaves none
        add_hook_to_module(module, Passed(execution_device=device))
    assert tokenizer is not None
    ids = tokenizer("some text to calibrate on", return_tensors="pt")["input_ids"]
    thresholds = cats.calibrate(plain, [ids])
    cats.apply(model, thresholds, kernel)
    cats.apply(plain, thresholds, kernel)
    layers = len(thresholds.gate)
    for step in (ids, ids[:, :1]):
        before = Passed.calls
        with torch.no_grad():
            assert (model(step.to(device)).logits.cpu() - plain(step).logits).abs().max() < 1e-4
        assert Passed.calls == before + layers
    if kernel == "reference":
        assert operator_calls == []
    elif device == "cpu":  # there any number of rows goes to the operator
        assert operator_calls == ["auto"] * 4 * layers
    cats.remove(model)
    cats.remove(plain)
    with torch.no_grad():
        assert (model(ids.to(device)).logits.cpu() - plain(ids).logits).abs().max() < 1e-4


def test_random_weights_cannot_be_sharded() -> None:
    with pytest.raises(ValueError, match="random weights, which cannot be sharded"):
        load_model("shape:small", device="sharded")
