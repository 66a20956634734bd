"""Applying and removing CATS on live models of every supported family."""

import copy
from types import MethodType

import peft
import pytest
import torch
import transformers
from cats_kernels.dispatch import choose_backend
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import cats

from .conftest import FAMILIES, TINY, masked_reference_logits, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("length", [1, 6, 40])
def test_patched_model_computes_the_masked_function(
    family: str, length: int, kernel: str, batches: list, operator_calls: list
) -> None:
    model = tiny_model(family)
    thresholds = cats.calibrate(model, batches, 0.6)
    ids = batches[0]["input_ids"][:1, :length]
    expected = masked_reference_logits(model, ids, thresholds)
    cats.apply(model, thresholds, kernel)
    with torch.no_grad():
        actual = model(ids).logits.double()
    assert operator_calls == (["auto"] * 3 if kernel == "auto" else [])  # on a CPU any number of rows
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


def test_a_failed_apply_leaves_the_patch_that_was_there(llama: nn.Module, batches: list) -> None:
    made = cats.calibrate(llama, batches, [0.5, 0.9])
    cats.apply(llama, made[0.5])
    wrapped = peft.get_peft_model(llama, peft.LoraConfig(r=2, target_modules=["down_proj"]))
    with pytest.raises(ValueError, match=r"is a peft\.tuners\.lora\.layer\.Linear, not torch's nn\.Linear"):
        cats.apply(wrapped, made[0.9], kernel="cpu")
    assert all(abs(s - 0.5) < 0.02 for s in cats.measure_sparsity(wrapped, batches).values())
    assert all(mlp.cats_state.kernel == "auto" for mlp in cats.gated_mlps(wrapped).values())


def test_an_apply_that_is_cut_short_leaves_the_model_as_it_was(llama: nn.Module, batches: list, monkeypatch) -> None:
    thresholds = cats.calibrate(llama, batches)
    types = [type(module) for module in llama.modules()]

    def interrupt(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(llama.model.layers[1].mlp.down_proj, "_register_state_dict_hook", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cats.apply(llama, thresholds)
    assert [type(module) for module in llama.modules()] == types
    assert all(parameter.is_contiguous() for parameter in llama.parameters())


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


class HardCodedMLP(ClippedMLP):
    """Equation 1 without a call of the activation module, as fused blocks do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class ScaledMLP(ClippedMLP):
    """Three times equation 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_blocks_on_which_cats_would_do_nothing_are_refused(llama: nn.Module, batches: list) -> None:
    model = nn.ModuleDict({"mlp": HardCodedMLP()})
    with pytest.raises(ValueError, match=r"mlp \(HardCodedMLP\) does not call its act_fn"):
        cats.apply(model, cats.Thresholds(0.5, {"mlp": 0.1}))
    with pytest.raises(ValueError, match="does not call its act_fn"):
        cats.relufy(model)
    assert isinstance(model["mlp"].act_fn, nn.SiLU)
    thresholds = cats.calibrate(llama, batches)
    for patched in (False, True):
        mlp = llama.model.layers[1].mlp
        mlp.forward = MethodType(HardCodedMLP.forward, mlp)  # as Liger does
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp .* has had its forward replaced"):
            cats.apply(llama, thresholds)
        assert hasattr(mlp, "cats_state") == patched
        del mlp.forward
        cats.apply(llama, thresholds)


def test_small_weights_do_not_hide_another_function() -> None:
    model = nn.ModuleDict({"mlp": ScaledMLP()})
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.02)
    with pytest.raises(ValueError, match="does not compute"):
        cats.apply(model, cats.Thresholds(0.5, {"mlp": 0.1}))


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("Qwen2Moe", {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}),
        ("Mixtral", {"num_local_experts": 4}),
    ],
)
def test_mixtures_of_experts_are_refused_whole(family: str, extra: dict, batches: list) -> None:
    config = getattr(transformers, f"{family}Config")(**{**TINY, **extra})
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=f"{family}ForCausalLM is a mixture of experts"):
        cats.calibrate(model, batches)
    with pytest.raises(ValueError, match=f"{family}ForCausalLM is a mixture of experts"):
        cats.apply(model, cats.Thresholds(0.5, {}))


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
    layers = "model.layers.0.mlp, model.layers.1.mlp, model.layers.2.mlp"
    with pytest.raises(ValueError, match=f"they lack {layers} of its layers, and it lacks other"):
        cats.apply(llama, cats.Thresholds(0.5, {"other": 0.1}, model=thresholds.model))
    for site in ("attention_input", "mlp_input"):
        with pytest.raises(ValueError, match="they lack none of its layers, and it lacks typo"):
            cats.apply(llama, cats.Thresholds(0.5, thresholds.gate, **{site: {"typo": 0.1}}))
    with pytest.raises(ValueError, match=r"cannot serve model.layers.0.mlp: backend 'triton' needs CUDA"):
        cats.apply(llama, thresholds, kernel="triton")
    with pytest.raises(ValueError, match=r"'triton' takes float32, float16 or bfloat16, not torch\.float64"):
        choose_backend("triton", "cuda", torch.float64)
    with pytest.raises(ValueError, match="cannot serve"):
        cats.apply(llama.to(torch.float16), thresholds, kernel="cpu")
    assert not hasattr(llama.model.layers[0].mlp, "cats_state")
    with pytest.warns(UserWarning, match="dense masked path"):
        cats.apply(llama, thresholds)
    model = nn.ModuleDict({"mlp": ClippedMLP()})
    with pytest.raises(ValueError, match="does not compute"):
        cats.apply(model, cats.Thresholds(0.5, {"mlp": 0.1}))


def test_weights_with_nan_are_named(llama, batches):
    thresholds = cats.calibrate(llama, batches)
    llama.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight has NaN or infinite numbers"):
        cats.apply(llama, thresholds)
