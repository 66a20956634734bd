"""Applying and removing CATS on live models of every supported family."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import cats

from .conftest import FAMILIES, tiny_model


def masked_reference_logits(model: nn.Module, ids: torch.Tensor, thresholds: cats.Thresholds) -> torch.Tensor:
    """Logits in float64 with each MLP replaced by equation 1 and 4 written out on plain weights."""
    reference = copy.deepcopy(model).double()
    for name, mlp in cats.gated_mlps(reference).items():
        original = mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn

        def forward(x, mlp=mlp, original=original, t=thresholds.gate[name]):
            if hasattr(mlp, "gate_up_proj"):
                gate_weight, up_weight = mlp.gate_up_proj.weight.chunk(2)
            else:
                gate_weight, up_weight = mlp.gate_proj.weight, mlp.up_proj.weight
            v = original(x @ gate_weight.T)
            v = v * (v.abs() >= t)
            return (v * (x @ up_weight.T)) @ mlp.down_proj.weight.T

        mlp.forward = forward
    with torch.no_grad():
        return reference(ids).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 6, 40], ids=["sparse, 1 row", "sparse, 6 rows", "dense masked"])
def test_patched_model_computes_the_masked_function(family: str, length: int, batches: list) -> None:
    model = tiny_model(family)
    thresholds = cats.calibrate(model, batches, 0.6)
    ids = batches[0]["input_ids"][:1, :length]
    expected = masked_reference_logits(model, ids, thresholds)
    cats.apply(model, thresholds)
    with torch.no_grad():
        actual = model(ids).logits.double()
    assert (actual - expected).norm() / expected.norm() < 1e-5
    dense = copy.deepcopy(model)
    cats.remove(dense)
    with torch.no_grad():
        assert (dense(ids).logits.double() - expected).norm() / expected.norm() > 1e-2  # the threshold matters


@pytest.mark.parametrize("family", FAMILIES)
def test_remove_restores_every_bit(family: str, batches: list) -> None:
    model = tiny_model(family)
    ids = batches[0]["input_ids"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    strides = {name: p.stride() for name, p in model.named_parameters()}
    modules = {name: type(module) for name, module in model.named_modules()}
    parameters = {name: id(p) for name, p in model.named_parameters()}
    with torch.no_grad():
        logits = model(ids).logits
    for _ in range(2):
        cats.apply(model, cats.calibrate(model, batches, 0.5, sites=("gate", "attention_input", "mlp_input")))
        cats.remove(model)
    assert {name: p.stride() for name, p in model.named_parameters()} == strides
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._state_dict_hooks for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)


def test_state_dict_and_save_pretrained_are_as_before(tmp_path, llama: nn.Module, batches: list) -> None:
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    cats.apply(llama, cats.calibrate(llama, batches))
    state = llama.state_dict()
    assert list(state) == list(before)
    assert all(value.is_contiguous() and torch.equal(value, before[name]) for name, value in state.items())
    llama.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in saved.items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(loaded.model.layers[0].mlp, "cats_state")
    llama.load_state_dict(before)
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())


def test_memory_does_not_grow(llama: nn.Module, batches: list) -> None:
    def resident(model: nn.Module) -> int:
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in (*model.parameters(), *model.buffers())
        }
        return sum(storages.values())

    before = resident(llama)
    cats.apply(llama, cats.calibrate(llama, batches), kernel="cpu")
    assert resident(llama) <= before * 1.01


def test_swapping_thresholds_keeps_the_patch(llama: nn.Module, batches: list) -> None:
    made = cats.calibrate(llama, batches, [0.5, 0.9])
    cats.apply(llama, made[0.5])
    weight = llama.model.layers[0].mlp.down_proj.weight.data_ptr()
    cats.apply(llama, made[0.9])
    assert llama.model.layers[0].mlp.down_proj.weight.data_ptr() == weight
    assert all(abs(s - 0.9) < 0.02 for s in cats.measure_sparsity(llama, batches).values())
    cats.apply(llama, made[0.5], kernel="reference")
    assert llama.model.layers[0].mlp.down_proj.weight.is_contiguous()


def test_sparsity_zero_generates_the_same_tokens(llama: nn.Module, batches: list) -> None:
    ids = batches[0]["input_ids"][:1, :8]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    dense = llama.generate(ids, **options)
    cats.apply(llama, cats.calibrate(llama, batches, 0.0))
    assert torch.equal(llama.generate(ids, **options), dense)
    thresholds = cats.calibrate(llama, batches, 0.5)
    cats.apply(llama, thresholds, kernel="cpu")
    sparse = llama.generate(ids, **options)
    cats.apply(llama, thresholds, kernel="reference")
    assert torch.equal(llama.generate(ids, **options), sparse)


def test_peft_over_a_patched_model_and_the_other_way(llama: nn.Module, batches: list) -> None:
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "gate_proj", "down_proj"], init_lora_weights=False)
    ids = batches[0]["input_ids"][:1, :5]
    thresholds = cats.calibrate(llama, batches)
    other = copy.deepcopy(llama)
    torch.manual_seed(0)
    cats.apply(llama, thresholds)
    first = peft.get_peft_model(llama, settings)
    torch.manual_seed(0)
    second = peft.get_peft_model(other, settings)
    with pytest.warns(UserWarning, match="dense masked path"):
        cats.apply(second, thresholds)
    with torch.no_grad():
        a, b = first(ids).logits, second(ids).logits
        assert torch.allclose(a, b, atol=1e-5)
        merged = first.merge_and_unload()
        assert torch.allclose(merged(ids).logits, a, atol=1e-4)
    cats.remove(second)
    assert not hasattr(second.base_model.model.model.layers[0].mlp, "cats_state")


def test_torch_compile_has_no_graph_break(llama: nn.Module, batches: list) -> None:
    cats.apply(llama, cats.calibrate(llama, batches))
    ids = batches[0]["input_ids"][:1, :4]
    with torch.no_grad():
        expected = llama(ids, use_cache=False).logits
        compiled = torch.compile(llama, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(ids, use_cache=False).logits, expected, atol=1e-5)


def test_relufication(llama: nn.Module, batches: list) -> None:
    ids = batches[0]["input_ids"]
    with torch.no_grad():
        dense = llama(ids).logits
    cats.relufy(llama)
    x = torch.randn(2, 32)
    mlp = llama.model.layers[0].mlp
    gate = (x @ mlp.gate_proj.weight.T).clamp(min=0)
    expected = (gate * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    assert torch.allclose(mlp(x), expected, atol=1e-6)
    assert all(0.3 < s < 0.7 for s in cats.measure_sparsity(llama, batches).values())
    with pytest.raises(ValueError, match=r"cats\.remove"):
        cats.relufy(llama)
    with pytest.raises(ValueError, match=r"cats\.remove"):
        cats.apply(llama, cats.calibrate(llama, batches))
    cats.remove(llama)
    with torch.no_grad():
        assert torch.equal(llama(ids).logits, dense)


def test_deepcopy_of_a_patched_model_is_independent(llama: nn.Module, batches: list) -> None:
    cats.apply(llama, cats.calibrate(llama, batches, 0.9))
    twin = copy.deepcopy(llama)
    cats.remove(llama)
    assert all(s > 0.85 for s in cats.measure_sparsity(twin, batches).values())
    cats.remove(twin)
    assert twin.model.layers[0].mlp.down_proj.weight.is_contiguous()


def test_accelerate_hooks(llama: nn.Module, batches: list) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    ids = batches[0]["input_ids"][:1, :3]
    for mlp in cats.gated_mlps(llama).values():
        add_hook_to_module(mlp, AlignDevicesHook(execution_device="cpu"))
    thresholds = cats.calibrate(llama, batches, 0.7)
    expected = masked_reference_logits(llama, ids, thresholds)
    cats.apply(llama, thresholds)
    with torch.no_grad():
        assert (llama(ids).logits.double() - expected).norm() / expected.norm() < 1e-5
    cats.remove(llama)
    assert llama.model.layers[0].mlp._old_forward.__func__ is type(llama.model.layers[0].mlp).forward


class ClippedMLP(nn.Module):
    """Has the attributes of a gated MLP but computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            nn.Linear(8, 16, False),
            nn.Linear(8, 16, False),
            nn.Linear(16, 8, False),
        )
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).clamp(-0.01, 0.01))


def test_refusals(llama: nn.Module, batches: list) -> None:
    thresholds = cats.calibrate(llama, batches)
    with pytest.raises(ValueError, match="no gated MLP"):
        cats.apply(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16)), thresholds)
    with pytest.raises(ValueError, match="another model"):
        cats.apply(tiny_model("Llama", intermediate_size=96), thresholds)
    with pytest.raises(ValueError, match="another model"):
        cats.apply(tiny_model("Mistral"), thresholds)
    with pytest.raises(ValueError, match="unknown kernel"):
        cats.apply(llama, thresholds, kernel="cuda")
    with pytest.raises(ValueError, match="cannot serve"):
        cats.apply(llama.to(torch.float16), thresholds, kernel="cpu")
    assert not hasattr(llama.model.layers[0].mlp, "cats_state")
    with pytest.warns(UserWarning, match="dense masked path"):
        cats.apply(llama, thresholds)
    model = nn.ModuleDict({"mlp": ClippedMLP()})
    with pytest.raises(ValueError, match="does not compute"):
        cats.apply(model, cats.Thresholds(0.5, {"mlp": 0.1}))
