"""Tools around a patched model: the masked function, or one sentence. docs/OWN_MODEL.md lists them."""

import copy
import re
import warnings
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parameters_to_vector, parametrize, prune

import cats

from .conftest import error, logits, masked_reference_logits

# ---------------------------------------------------------------------------------------------------------------------
# wrapped and quantised modules


def dense_masked(model: nn.Module, thresholds: cats.Thresholds, reason: str) -> None:
    """Apply, expecting the warning that names ``reason``."""
    with pytest.warns(UserWarning, match=f"run on the dense masked path, without speed-up .*{reason}"):
        cats.apply(model, thresholds)


@pytest.mark.parametrize("criterion", ["cats", "gate-norm", "up-norm", "wina"])
def test_dynamically_quantised(criterion: str, llama: nn.Module, batches: list) -> None:
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(llama), {nn.Linear}, dtype=torch.qint8)
    assert not list(quantised.model.layers[0].mlp.parameters())
    ids = batches[0]["input_ids"][:1, :4]
    thresholds = cats.calibrate(quantised, batches, 0.8, criterion=criterion)
    assert thresholds.sites.keys() == cats.calibrate(llama, batches, 0.8, criterion=criterion).sites.keys()
    dense = logits(quantised, ids)
    dense_masked(quantised, thresholds, "runs as masks" if criterion == "wina" else "not torch's nn.Linear")
    masked = logits(quantised, ids)
    cats.apply(llama, thresholds, "reference")
    assert error(masked, logits(llama, ids)) < error(masked, dense) / 2
    assert all(abs(f - 0.8) < 0.1 for f in cats.measure_sparsity(quantised, batches).values())
    with pytest.raises(ValueError, match=r'kernel="cpu" cannot serve model\.layers\.0\.mlp'):
        cats.apply(quantised, thresholds, "cpu")
    cats.remove(quantised)
    assert torch.equal(logits(quantised, ids), dense)


class Int8Linear(nn.Module):
    """As GPTQ and bitsandbytes hold weights: integers and scales, nothing floating but buffers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scales", scales)
        self.weight = nn.Parameter((linear.weight.detach() / scales).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.to(x.dtype) * self.scales).T


@pytest.mark.parametrize("criterion", ["cats", "up-norm"])
def test_integer_weights_of_others(criterion: str, llama: nn.Module, batches: list) -> None:
    rounded = copy.deepcopy(llama)
    for mlp in (*cats.gated_mlps(llama).values(),):
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(mlp, name, Int8Linear(getattr(mlp, name)))
    for name, linear in llama.named_modules():
        if isinstance(linear, Int8Linear):
            rounded.get_submodule(name).weight.data = linear.weight.float() * linear.scales
    thresholds = cats.calibrate(llama, batches, 0.6, criterion=criterion)
    own = cats.calibrate(rounded, batches, 0.6, criterion=criterion)
    site = "up" if criterion == "up-norm" else "gate"
    for name, t in getattr(own, site).items():
        assert torch.allclose(torch.as_tensor(getattr(thresholds, site)[name]), torch.as_tensor(t), rtol=2e-3)
    dense_masked(llama, thresholds, "Int8Linear, not torch's nn.Linear")
    cats.apply(rounded, thresholds, "reference")
    ids = batches[0]["input_ids"][:1, :4]
    assert error(logits(llama, ids), logits(rounded, ids)) < 1e-4


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


@pytest.mark.parametrize("first", ["tool", "patch"])
@pytest.mark.parametrize("tool", ["parametrize", "prune", "weight_norm", "bias"])
def test_weights_computed_by_others(tool: str, first: str, llama: nn.Module, batches: list, operator_calls) -> None:
    def put(model: nn.Module) -> None:
        for mlp in cats.gated_mlps(model).values():
            if tool == "parametrize":
                parametrize.register_parametrization(mlp.down_proj, "weight", Doubled())
            elif tool == "prune":
                prune.random_unstructured(mlp.up_proj, "weight", 0.5)
            elif tool == "weight_norm":
                nn.utils.weight_norm(mlp.gate_proj)
            else:
                mlp.gate_proj.bias = nn.Parameter(torch.full((88,), 0.2))

    if tool == "bias" and first == "patch":
        pytest.skip("a bias that comes later changes the model itself")
    ids, plain = batches[0]["input_ids"][:1, :4], copy.deepcopy(llama)
    thresholds = cats.calibrate(llama, batches, 0.6)
    for model, kernel in ((llama, "auto"), (plain, "reference")):
        torch.manual_seed(0)
        if first == "tool":
            put(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cats.apply(model, thresholds, kernel)
        if first == "patch":
            put(model)
    assert torch.allclose(logits(llama, ids), logits(plain, ids), atol=1e-5) and operator_calls == []
    if first == "tool":
        dense_masked(llama, thresholds, "a projection")
    cats.remove(llama)
    cats.remove(plain)
    assert torch.allclose(logits(llama, ids), logits(plain, ids), atol=1e-5)


PEFT = {
    "lora": peft.LoraConfig(r=2, target_modules=["gate_proj", "down_proj"], init_lora_weights=False),
    "dora": peft.LoraConfig(r=2, target_modules=["up_proj", "down_proj"], use_dora=True, init_lora_weights=False),
    "all-linear": peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "loha": peft.LoHaConfig(r=2, target_modules=["up_proj", "down_proj"], init_weights=False),
    "oft": peft.OFTConfig(target_modules=["gate_proj", "down_proj"], oft_block_size=4, init_weights=False),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("form", PEFT)
@pytest.mark.parametrize("criterion", ["cats", "up-norm"])
def test_peft_in_all_forms(form: str, criterion: str, llama: nn.Module, batches: list) -> None:
    """Patched before and after the adapters come: the same, and what is written out by hand."""
    ids = batches[0]["input_ids"][:1, :4]
    thresholds = cats.calibrate(llama, batches, 0.6, criterion=criterion)
    before, after = copy.deepcopy(llama), copy.deepcopy(llama)
    cats.apply(before, thresholds)
    wrapped = []
    for model in (before, after, llama):
        torch.manual_seed(0)
        wrapped.append(peft.get_peft_model(model, PEFT[form]).eval())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cats.apply(wrapped[1], thresholds)
    for mlp in cats.gated_mlps(wrapped[2]).values():

        def forward(x, mlp=mlp, t=None):
            a, u = mlp.act_fn(mlp.gate_proj(x)), mlp.up_proj(x)
            return mlp.down_proj(a * u * ((u if criterion == "up-norm" else a).abs() >= t))

        name = next(n for n, other in cats.gated_mlps(wrapped[2]).items() if other is mlp)
        t = (thresholds.up or thresholds.gate)[name]
        mlp.forward = lambda x, forward=forward, t=t: forward(x, t=t)
    expected = logits(wrapped[2], ids)
    assert error(logits(wrapped[0], ids), expected) < 1e-5 and error(logits(wrapped[1], ids), expected) < 1e-5
    assert list(cats.gated_mlps(wrapped[1])) == list(thresholds.up or thresholds.gate)
    with wrapped[0].disable_adapter(), wrapped[1].disable_adapter(), wrapped[2].disable_adapter():
        off = logits(wrapped[2], ids)
        assert error(logits(wrapped[0], ids), off) < 1e-5 and error(logits(wrapped[1], ids), off) < 1e-5
    assert error(off, expected[:, -off.shape[1] :]) > 1e-3  # a prompt has positions of its own
    if form not in ("prompt", "prefix"):
        assert error(logits(wrapped[0].merge_and_unload(), ids), expected) < 1e-4
    cats.remove(wrapped[1])
    assert not any("cats" in name for name, _ in wrapped[1].named_modules())


def test_data_parallel(llama: nn.Module, batches: list) -> None:
    ids = batches[0]["input_ids"][:2, :4]
    thresholds = cats.calibrate(llama, batches, 0.6)
    expected = masked_reference_logits(llama, ids, thresholds)
    wrapped = nn.DataParallel(llama)
    assert cats.calibrate(wrapped, batches, 0.6) == thresholds
    cats.apply(wrapped, thresholds)
    assert error(logits(wrapped, ids), expected) < 1e-5
    assert cats.measure_sparsity(wrapped, batches) == cats.measure_sparsity(llama, batches)
    mlp, x = llama.model.layers[0].mlp, torch.randn(1, 2, 32)
    replica = mlp._replicate_for_data_parallel()  # as on a second GPU, where weights are plain tensors
    for name in ("gate_proj", "up_proj", "down_proj"):
        linear = getattr(mlp, name)._replicate_for_data_parallel()
        linear.weight, linear.bias = getattr(mlp, name).weight.detach().clone(), None
        replica._modules[name] = linear
    with torch.no_grad():
        assert not list(replica.parameters()) and torch.allclose(replica(x), mlp(x), atol=1e-6)
    cats.remove(wrapped)
    assert type(llama.model.layers[0].mlp).__name__ == "LlamaMLP"


@pytest.fixture
def process_group(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("first", ["fsdp", "patch"])
@pytest.mark.parametrize("criterion", ["cats", "up-norm"])
def test_fully_sharded(first: str, criterion: str, llama: nn.Module, batches: list) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ids, twin = batches[0]["input_ids"][:1, :4], copy.deepcopy(llama)
    thresholds, mesh = cats.calibrate(llama, batches, 0.6, criterion=criterion), init_device_mesh("cpu", (1,))
    dense = logits(llama, ids)
    cats.apply(twin, thresholds, "reference")
    expected = logits(twin, ids)
    if first == "patch":
        cats.apply(llama, thresholds, "reference")
    for layer in llama.model.layers:
        fully_shard(layer.mlp, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(llama, mesh=mesh)
    if first == "fsdp":
        assert cats.calibrate(llama, batches, 0.6, criterion=criterion) == thresholds
        dense_masked(llama, thresholds, "DTensor")
    assert error(logits(llama, ids), expected) < 1e-5
    cats.remove(llama)
    assert error(logits(llama, ids), dense) < 1e-5
    assert not any(name.startswith("CATS") or "CATS" in name for name in (type(m).__name__ for m in llama.modules()))


# ---------------------------------------------------------------------------------------------------------------------
# dtypes and layout


@pytest.mark.parametrize("criterion", ["cats", "up-norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_dtype_of_the_dense_block(criterion: str, dtype: torch.dtype, llama, batches) -> None:
    llama.to(dtype)
    mlp, x = llama.model.layers[0].mlp, torch.randn(1, 2, 32).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        dense = mlp(x)
    cats.apply(llama, cats.calibrate(llama, batches, 0.6, criterion=criterion))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        sparse = mlp(x)
    assert sparse.dtype == dense.dtype == torch.bfloat16
    cats.apply(llama, cats.calibrate(llama, batches, 0.6, criterion=criterion), "reference")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert error(sparse, mlp(x)) < 0.05


def test_the_way_round_the_transposed_parameter(tmp_path: Path, llama: nn.Module, batches: list) -> None:
    """One storage has one order: rows per neuron for the kernel, or (d, m) for what insists on contiguous parameters.

    The documented ways: ``state_dict()`` for saving, ``kernel="reference"`` for everything else.
    """
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    thresholds = cats.calibrate(llama, batches, 0.6)
    cats.apply(llama, thresholds)
    down = llama.model.layers[0].mlp.down_proj.weight
    assert not down.is_contiguous() and down.t().is_contiguous()
    save_file(llama.state_dict(), tmp_path / "saved.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in load_file(tmp_path / "saved.safetensors").items())
    cats.apply(llama, thresholds, kernel="reference")
    assert llama.model.layers[0].mlp.down_proj.weight is down and down.is_contiguous()
    save_file(dict(llama.named_parameters()), tmp_path / "saved.safetensors")
    vector = parameters_to_vector(llama.parameters())
    assert vector.numel() == sum(p.numel() for p in llama.parameters())
    optimizer = torch.optim.LBFGS(llama.parameters(), max_iter=1)
    ids = batches[0]["input_ids"]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = llama(ids, labels=ids).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    prune.l1_unstructured(llama.model.layers[0].mlp.down_proj, "weight", 0.1)


def test_bad_batches_and_ids_are_one_sentence(llama: nn.Module) -> None:
    with pytest.raises(ValueError, match="no tokens to look at"):
        cats.calibrate(llama, [torch.zeros(0, 5, dtype=torch.long)])
    with pytest.raises(ValueError, match="input_ids must lie in 0 to 63"):
        cats.calibrate(llama, [torch.full((1, 4), 64)])
    with pytest.raises(TypeError, match=re.escape("input_ids must be whole numbers, not torch.float32")):
        cats.calibrate(llama, [torch.zeros(1, 4)])
