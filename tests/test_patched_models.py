"""What may come upon a patched model: peft, torch.compile, accelerate, hooks, other weights, copies, training."""

import copy
import io

import accelerate
import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from torch import nn

import cats

from .conftest import masked_reference_logits, tiny_model


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


def test_blocks_compiled_one_by_one(llama: nn.Module, batches: list, operator_calls: list) -> None:
    """torch.compile puts a module around each that has its attributes too."""
    ids = batches[0]["input_ids"][:1, :4]
    thresholds = cats.calibrate(llama, batches)
    with torch.no_grad():
        dense = llama(ids, use_cache=False).logits
        for layer in llama.model.layers:
            layer.mlp = torch.compile(layer.mlp, backend="eager", fullgraph=True)
        assert torch.allclose(llama(ids, use_cache=False).logits, dense, atol=1e-5)
        assert list(cats.gated_mlps(llama)) == list(thresholds.gate)
        cats.apply(llama, thresholds)
        sparse = llama(ids, use_cache=False).logits
        assert operator_calls and not torch.allclose(sparse, dense, atol=1e-3)
        assert list(cats.measure_sparsity(llama, batches)) == list(thresholds.gate)
        cats.apply(llama, thresholds, "reference")
        assert torch.allclose(llama(ids, use_cache=False).logits, sparse, atol=1e-5)
        cats.remove(llama)
        assert torch.allclose(llama(ids, use_cache=False).logits, dense, atol=1e-5)


def test_deepcopy_of_a_patched_model_is_independent(llama: nn.Module, batches: list) -> None:
    cats.apply(llama, cats.calibrate(llama, batches, 0.9))
    twin = copy.deepcopy(llama)
    cats.remove(llama)
    assert all(s > 0.85 for s in cats.measure_sparsity(twin, batches).values())
    cats.remove(twin)
    assert twin.model.layers[0].mlp.down_proj.weight.is_contiguous()


def test_accelerate_hooks(llama: nn.Module, batches: list) -> None:
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


def test_accelerate_hooks_that_go_before_the_patch(llama: nn.Module, batches: list) -> None:
    ids = batches[0]["input_ids"]
    thresholds, dense = cats.calibrate(llama, batches, 0.7), llama(ids).logits
    for mlp in cats.gated_mlps(llama).values():
        add_hook_to_module(mlp, AlignDevicesHook(execution_device="cpu"))
    cats.apply(llama, thresholds)
    remove_hook_from_submodules(llama)
    cats.apply(llama, thresholds)
    assert not torch.allclose(llama(ids).logits, dense)
    cats.remove(llama)
    assert torch.equal(llama(ids).logits, dense)


def test_a_patched_model_that_is_offloaded_takes_the_dense_path(
    llama: nn.Module, batches: list, operator_calls: list
) -> None:
    ids = batches[0]["input_ids"][:1, :2]
    thresholds = cats.calibrate(llama, batches, 0.7)
    expected = masked_reference_logits(llama, ids, thresholds)
    cats.apply(llama, thresholds)
    accelerate.cpu_offload(llama, execution_device="cpu")
    with torch.no_grad():
        assert (llama(ids).logits.double() - expected).norm() / expected.norm() < 1e-5
    assert operator_calls == []
    cats.remove(llama)
    remove_hook_from_submodules(llama)
    assert all(torch.equal(a, b) for a, b in zip(llama.parameters(), tiny_model().parameters(), strict=True))


def test_weights_put_in_place_of_a_transposed_one(llama: nn.Module, batches: list, operator_calls: list) -> None:
    ids = batches[0]["input_ids"][:1, :2]
    thresholds = cats.calibrate(llama, batches, 0.6)
    other = tiny_model(seed=1)
    expected = masked_reference_logits(other, ids, thresholds)
    cats.apply(llama, thresholds)
    llama.load_state_dict(other.state_dict(), assign=True)
    for calls in (0, 3):  # the dense path, and after another apply the kernel
        with torch.no_grad():
            assert (llama(ids).logits.double() - expected).norm() / expected.norm() < 1e-5
        assert len(operator_calls) == calls
        cats.apply(llama, thresholds)


@pytest.mark.parametrize("part", ["gate_proj", "up_proj"])
def test_a_weight_that_the_kernel_cannot_take(llama: nn.Module, batches: list, operator_calls: list, part: str) -> None:
    ids = batches[0]["input_ids"][:1, :2]
    thresholds = cats.calibrate(llama, batches, 0.6)
    expected = masked_reference_logits(llama, ids, thresholds)
    cats.apply(llama, thresholds)
    linear = getattr(llama.model.layers[1].mlp, part)
    linear.weight.data = linear.weight.data.t().contiguous().t()
    with torch.no_grad():
        assert (llama(ids).logits.double() - expected).norm() / expected.norm() < 1e-5
    assert len(operator_calls) == 2


@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj", "act_fn"])
def test_hooks_see_and_change_what_they_would(llama: nn.Module, batches: list, operator_calls: list, part: str) -> None:
    ids = batches[0]["input_ids"][:1, :2]
    thresholds = cats.calibrate(llama, batches, 0.6)

    def logits(kernel: str) -> torch.Tensor:
        cats.apply(llama, thresholds, kernel)
        with torch.no_grad():
            return llama(ids).logits

    before = logits("auto")
    assert len(operator_calls) == 3
    handle = getattr(llama.model.layers[1].mlp, part).register_forward_hook(lambda _module, _args, y: 2 * y + 1)
    hooked = logits("auto")
    assert len(operator_calls) == 3 + 2
    assert torch.allclose(hooked, logits("reference"), atol=1e-5) and not torch.allclose(hooked, before, atol=1e-2)
    handle.remove()
    assert torch.allclose(logits("auto"), before, atol=1e-5)


def test_a_block_called_by_keyword_takes_the_dense_path(batches: list) -> None:
    model = tiny_model("Phi3")
    cats.apply(model, cats.calibrate(model, batches))
    mlp, x = model.model.layers[0].mlp, torch.randn(1, 1, 32)
    with torch.no_grad():
        assert torch.allclose(mlp(hidden_states=x), mlp(x), atol=1e-5)


def test_training_never_takes_the_kernel(llama: nn.Module, batches: list, operator_calls: list) -> None:
    """Reentrant checkpointing runs forward without gradients first, and once more in backward."""
    cats.apply(llama, cats.calibrate(llama, batches))
    llama.train()
    llama.gradient_checkpointing_enable({"use_reentrant": True})
    llama.enable_input_require_grads()
    ids = batches[0]["input_ids"][:1, :4]
    llama(ids, labels=ids).loss.backward()
    assert llama.model.layers[0].mlp.down_proj.weight.grad.any()
    assert operator_calls == []


def test_a_patched_model_can_be_pickled(llama: nn.Module, batches: list, operator_calls: list) -> None:
    ids = batches[0]["input_ids"][:1, :2]
    cats.apply(llama, cats.calibrate(llama, batches, 0.7, sites=("gate", "attention_input", "mlp_input")))
    file = io.BytesIO()
    torch.save(llama, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, llama(ids).logits)
    assert len(operator_calls) == 6
    assert type(loaded.model.layers[0].mlp) is type(llama.model.layers[0].mlp)
    cats.remove(loaded)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), tiny_model().parameters(), strict=True))


def test_compiled_code_notices_attention_thresholds(llama: nn.Module, batches: list) -> None:
    thresholds = cats.calibrate(llama, batches, 0.7, sites=("gate", "attention_input"))
    gate_only = cats.Thresholds(0.7, thresholds.gate)
    ids = batches[0]["input_ids"]
    cats.apply(llama, gate_only)
    compiled = torch.compile(llama, backend="eager")
    with torch.no_grad():
        expected = compiled(ids, use_cache=False).logits
        cats.apply(llama, thresholds)
        assert torch.allclose(compiled(ids, use_cache=False).logits, llama(ids).logits, atol=1e-5)
        cats.apply(llama, gate_only)
        assert torch.allclose(compiled(ids, use_cache=False).logits, expected, atol=1e-5)
