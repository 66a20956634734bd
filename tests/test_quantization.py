"""`cats.quantize` on whole models: what is computed, that it can be undone, and what goes with it."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from cats_kernels import dequantize, quantize
from cats_kernels.cpu import pieces
from cats_kernels.cpu_products import multiply
from torch import nn

import cats
from cats import quantized_linear
from cats.equation import check_equation_1
from cats.quantized_linear import QuantizedLinear
from cats.sparse_forward import SparseForward
from cats.structure import parts_of
from tests.conftest import FAMILIES, tiny_model

FORMATS = [(8, None), (8, 32), (4, 32), (4, 128)]
IDS = torch.arange(12).reshape(2, 6) % 64


def dequantised(model: nn.Module) -> nn.Module:
    """A copy of a quantised model with plain layers of the same values."""
    plain = copy.deepcopy(model)
    cats.dequantize(plain)
    return plain


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids, use_cache=False).logits


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", [(8, None), (4, 32)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_model_computes_with_what_its_weights_dequantise_to(family, form, symmetric):
    model = tiny_model(family)
    before = logits(model)
    cats.quantize(model, *form, symmetric=symmetric)
    plain = dequantised(model)
    assert not any("cats_quantized" in module.__dict__ for module in plain.modules())
    assert not any(isinstance(module, QuantizedLinear | SparseForward) for module in plain.modules())
    for length in (1, 6, 50):
        ids = torch.arange(2 * length).reshape(2, length) % 64
        assert close(logits(model, ids), logits(plain, ids))
    error = (logits(model) - before).norm() / before.norm()
    assert 0 < error < (0.05 if form[0] == 8 else 0.6)
    for name, mlp in cats.gated_mlps(model).items():
        check_equation_1(name, mlp)


def test_values_of_every_layer(llama):
    original = copy.deepcopy(llama)
    cats.quantize(llama, 8, 32)
    for name, mlp in cats.gated_mlps(llama).items():
        was = original.get_submodule(name)
        for part in parts_of(mlp).linears:
            weight = getattr(was, part).weight
            made = getattr(mlp, part)
            shape = weight.shape if part != "down_proj" else weight.t().shape
            assert made.quantized.shape == tuple(shape) and made.quantized.group_size == 32
            assert (made.out_features, made.in_features) == tuple(weight.shape)
            assert close(made.dense().weight, weight, 0.01)
            x = torch.randn(3, made.in_features)
            assert close(made(x), x @ made.dense().weight.t())


@pytest.mark.parametrize("patched", [False, True])
def test_undone_bit_for_bit_where_originals_are_kept(patched, llama, batches):
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    expected, classes = logits(llama), [type(module) for module in llama.modules()]
    if patched:
        cats.apply(llama, cats.calibrate(llama, batches, 0.5))
    cats.quantize(llama, 4, 32, keep=True)
    assert sum(isinstance(module, QuantizedLinear) for module in llama.modules()) == 9
    assert not any("original" in name for name, _ in llama.named_modules())
    cats.dequantize(llama)
    if patched:
        cats.remove(llama)
    after = llama.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(llama), expected) and [type(module) for module in llama.modules()] == classes


@pytest.mark.parametrize("criterion", ["cats", "chess", "up", "auto", "teal", "wina", "up-norm", "gate-norm"])
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_before_or_after_apply_is_the_same(criterion, kernel, batches, operator_calls):
    first, second = tiny_model(), tiny_model()
    cats.quantize(first, 4, 32)
    made = cats.calibrate(first, batches, 0.5, criterion=criterion)
    masks_only = criterion in ("teal", "wina")
    with pytest.warns(UserWarning, match="dense masked path") if masks_only and kernel == "auto" else nullcontext():
        cats.apply(first, made, kernel)
        cats.apply(second, made, kernel)
    cats.quantize(second, 4, 32)
    operator_calls.clear()
    expected = logits(first)
    assert len(operator_calls) == (3 if kernel == "auto" and not masks_only else 0)
    operator_calls.clear()
    assert torch.equal(logits(second), expected)
    assert len(operator_calls) == (3 if kernel == "auto" and not masks_only else 0)
    plain = dequantised(first)
    assert close(logits(plain), expected, 1e-4)
    sparsity = cats.measure_sparsity(first, batches)
    assert all(abs(value - 0.5) < 0.1 for value in sparsity.values())
    for model in (first, second):
        cats.remove(model)
    operator_calls.clear()
    assert torch.equal(logits(first), logits(second)) and len(operator_calls) == 6
    cats.dequantize(first)
    assert close(logits(first), logits(second))


def test_thresholds_are_calibrated_on_the_quantised_model(llama, batches):
    plain = cats.calibrate(llama, batches, 0.7)
    cats.quantize(llama, 4, 32)
    made = cats.calibrate(llama, batches, 0.7)
    assert made.gate.keys() == plain.gate.keys() and made != plain
    again = cats.calibrate(dequantised(llama), batches, 0.7)
    for name, value in made.gate.items():
        assert value == pytest.approx(again.gate[name], rel=1e-2)


def test_hooks_modes_and_another_activation_leave_the_operator_aside(llama, operator_calls):
    cats.quantize(llama, 4, 32)
    mlp, x = llama.model.layers[0].mlp, torch.randn(1, 2, 32)
    with torch.no_grad():
        expected = mlp(x)
        assert operator_calls == ["auto"]
        operator_calls.clear()
        seen: list[nn.Module] = []
        for module in (mlp.act_fn, mlp.gate_proj, mlp.down_proj):
            handle = module.register_forward_hook(lambda module, *_: seen.append(module))
            assert close(mlp(x), expected)
            handle.remove()
        assert seen == [mlp.act_fn, mlp.gate_proj, mlp.down_proj]
        mlp.act_fn, own = nn.ReLU(), mlp.act_fn
        assert not close(mlp(x), expected, 0.1)
        mlp.act_fn = own
    y = mlp(x.requires_grad_())
    y.sum().backward()
    assert close(y.detach(), expected) and x.grad is not None and x.grad.abs().sum() > 0
    assert not operator_calls


def test_casts_and_copies(llama):
    cats.quantize(llama, 4, 32, symmetric=False)
    before = {name: value.clone() for name, value in llama.state_dict().items() if ".mlp." in name}
    expected = logits(llama)
    file = io.BytesIO()
    torch.save(llama, file)
    file.seek(0)
    for other in (copy.deepcopy(llama), torch.load(file, weights_only=False)):
        assert torch.equal(logits(other), expected)
    llama.to(torch.bfloat16)
    after = llama.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    y = logits(llama)
    assert y.dtype == torch.bfloat16 and close(y.float(), expected, 0.1)
    assert llama.model.layers[0].mlp.down_proj.compute_dtype == torch.bfloat16
    cats.dequantize(llama)
    assert llama.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
    moved = tiny_model()
    cats.quantize(moved, 8)
    assert all(buffer.is_meta for buffer in moved.to("meta").buffers())


def test_generates_and_compiles(llama, batches):
    cats.quantize(llama, 4, 32)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = IDS[:1]
    assert torch.equal(llama.generate(ids, **options), dequantised(llama).generate(ids, **options))
    graphs = []

    def backend(graph, _inputs):
        graphs.append(str(graph.graph))
        return graph

    mlp, x = llama.model.layers[0].mlp, torch.randn(1, 2, 32)
    with torch.no_grad():
        expected = mlp(x)
        assert torch.allclose(torch.compile(mlp, backend=backend, fullgraph=True)(x), expected, atol=1e-6)
        assert "sparse_gated_mlp_quantized" in graphs[-1]
        cats.apply(llama, cats.calibrate(llama, batches, 0.5))
        sparse = mlp(x)
        assert not torch.allclose(sparse, expected)
        assert torch.allclose(torch.compile(mlp, backend=backend, fullgraph=True)(x), sparse, atol=1e-6)
        assert "sparse_gated_mlp_quantized" in graphs[-1]


def test_what_cannot_be_quantised(llama, batches):
    with pytest.raises(ValueError, match="bits is 5; allowed: 8 or 4"):
        cats.quantize(llama, 5)
    with pytest.raises(ValueError, match="group_size is 48"):
        cats.quantize(llama, 8, 48)
    assert not any(isinstance(module, QuantizedLinear) for module in llama.modules())
    with pytest.raises(ValueError, match="has no quantised MLP"):
        cats.dequantize(llama)
    cats.quantize(llama)
    with pytest.raises(ValueError, match=r"layers.0.mlp.gate_proj is quantised already"):
        cats.quantize(llama)
    other = tiny_model()
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj cannot be quantised: weight has NaN or infinity"):
        cats.quantize(other)
    cats.dequantize(other)
    assert not any(isinstance(module, QuantizedLinear | SparseForward) for module in other.modules())
    other.to("meta")
    with pytest.raises(ValueError, match="has no weight here"):
        cats.quantize(other)
    other = tiny_model()
    other.model.layers[0].mlp.up_proj = nn.Sequential(other.model.layers[0].mlp.up_proj)
    with pytest.raises(ValueError, match=r"no gated MLP|only torch's own nn.Linear"):
        cats.quantize(other)


def test_biases_are_kept():
    model = tiny_model("Llama", mlp_bias=True)
    for mlp in cats.gated_mlps(model).values():
        for part in parts_of(mlp).linears:
            nn.init.normal_(getattr(mlp, part).bias)
    before = logits(model)
    cats.quantize(model, 8)
    assert close(logits(model), before, 0.05) and close(logits(model), logits(dequantised(model)))


def test_the_quantised_weight_is_that_of_the_operator(llama):
    cats.quantize(llama, 4, 32)
    mlp, x = llama.model.layers[0].mlp, torch.randn(1, 32)
    weights = [getattr(mlp, name).quantized for name in ("gate_proj", "up_proj", "down_proj")]
    gate, up, down_t = (dequantize(weight) for weight in weights)
    with torch.no_grad():
        y = (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down_t
        assert close(mlp(x), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_layer_by_itself_is_multiplied_by_pieces_that_the_cpu_kernels_dequantise(transposed, dtype, monkeypatch):
    sizes, write = [], pieces.dequantise_into
    monkeypatch.setattr(pieces, "dequantise_into", lambda w, out: (sizes.append(out.numel()), write(w, out))[1])
    weight = quantize(torch.randn(210, 96).to(dtype), 4, 32)
    linear = QuantizedLinear(weight, transposed, dtype, nn.Parameter(torch.randn(96 if transposed else 210).to(dtype)))
    x = torch.randn(2, 3, linear.in_features).to(dtype)
    values = dequantize(weight).double()
    expected = x.double() @ (values if transposed else values.T) + linear.bias.double()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for most, count in ((2**22, 1), (96 * 70, 3), (1, 210)):
        monkeypatch.setattr(pieces, "WEIGHTS", most)
        sizes.clear()
        y = linear(x)
        assert len(sizes) == count and max(sizes) <= max(most, 96)
        assert y.dtype == dtype and close(y.double(), expected, tolerance)
        assert close(linear(x[0, 0]), y[0, 0], tolerance) and linear(x[:0]).shape == (0, *y.shape[1:])
    sizes.clear()
    asked = x.clone().requires_grad_()
    linear(asked).sum().backward()
    assert not sizes and close(asked.grad[0, 0].double(), (values if transposed else values.T).sum(1), 0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert close(linear(x).double(), expected, 0.03) and not sizes
    assert close(torch.func.vmap(linear)(x).double(), expected, 0.02)


def test_memory_of_pieces_is_kept_by_each_thread():
    first = pieces.piece_memory(8, 32, torch.float32)
    assert pieces.piece_memory(4, 16, torch.bfloat16).data_ptr() == first.data_ptr()

    @torch.inference_mode()
    def in_another_thread():
        made = pieces.piece_memory(8, 32, torch.float32)
        with torch.inference_mode(False):  # what is kept may be used later where gradients are wanted
            assert not pieces.piece_memory(8, 32, torch.float32).is_inference()
        return made.data_ptr()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(in_another_thread).result() != first.data_ptr()


def test_a_block_is_checked_by_few_products(llama, monkeypatch):
    cats.quantize(llama, 4, 32)
    seen = []
    monkeypatch.setattr(
        quantized_linear, "multiply", lambda x, *a: (seen.append(x.shape[:-1].numel()), multiply(x, *a))[1]
    )
    name, mlp = next(iter(cats.gated_mlps(llama).items()))
    check_equation_1(name, mlp)
    assert seen == [2] * 6


@pytest.mark.parametrize("keep", [False, True])
def test_dequantised_weights_require_gradients_where_they_did(keep):
    model = tiny_model(hidden_size=128, vocab_size=320)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    before = {name: weight.requires_grad for name, weight in model.named_parameters()}
    cats.quantize(model, 8, linears="all", keep=keep)
    cats.dequantize(model)
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == before
