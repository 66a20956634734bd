"""Libraries that quantise or replace linear layers, themselves: each test runs where its library is installed.

None of them is a dependency of the project. docs/OWN_MODEL.md says which versions were run.
"""

import copy
import logging
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import cats

from .conftest import tiny_model

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def each_projection(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    for mlp in cats.gated_mlps(model).values():
        for name in PROJECTIONS:
            setattr(mlp, name, make(getattr(mlp, name)))


def torchao(config: str) -> Callable[[nn.Module], None]:
    def quantise(model: nn.Module) -> None:
        quantization = pytest.importorskip("torchao.quantization")
        options = {}
        if config == "IntxWeightOnlyConfig":
            from torchao.quantization.granularity import PerGroup

            options = {"weight_dtype": torch.int4, "granularity": PerGroup(32)}
        made = getattr(quantization, config)(**options)
        quantization.quantize_(model, made, filter_fn=lambda module, name: name.endswith(PROJECTIONS))

    return quantise


def bitsandbytes(kind: str) -> Callable[[nn.Module], None]:
    def quantise(model: nn.Module) -> None:
        nn_ = pytest.importorskip("bitsandbytes").nn

        def make(linear: nn.Linear) -> nn.Module:
            weight, sizes = linear.weight.detach().clone(), (linear.in_features, linear.out_features, False)
            if kind == "int8":
                made = nn_.Linear8bitLt(*sizes, has_fp16_weights=False)
                made.weight = nn_.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            else:
                made = nn_.Linear4bit(*sizes, quant_type=kind, compute_dtype=torch.float32)
                made.weight = nn_.Params4bit(weight, requires_grad=False, quant_type=kind)
            return made.to("cpu").eval()

        each_projection(model, make)

    return quantise


def gptq(model: nn.Module) -> None:
    """Symmetric groups of 32 rounded to the nearest, in gptqmodel's layer and its packing."""
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    def make(linear: nn.Linear) -> nn.Module:
        m, d = linear.weight.shape
        layer = TorchLinear(
            bits=4, group_size=32, sym=True, desc_act=False, in_features=d, out_features=m, pack_dtype=torch.int32
        )
        scales = linear.weight.detach().view(m, d // 32, 32).abs().amax(-1) / 7
        integers = (linear.weight.detach() / scales.repeat_interleave(32, 1)).round() + 8
        integers = integers.clamp(0, 15).to(torch.int32).t().reshape(d // 8, 8, m)
        layer.qweight = (integers << torch.arange(0, 32, 4, dtype=torch.int32)[:, None]).sum(1, dtype=torch.int32)
        layer.qzeros = torch.full_like(layer.qzeros, -0x77777778)  # eights
        layer.scales = scales.t().contiguous().to(layer.scales.dtype)
        layer.g_idx = (torch.arange(d) // 32).to(torch.int32)
        layer.post_init()
        return layer.eval()

    each_projection(model, make)


def hqq(model: nn.Module) -> None:
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=64)
    each_projection(model, lambda linear: quantize.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu"))


def quanto(model: nn.Module) -> None:
    library = pytest.importorskip("optimum.quanto")
    library.quantize(model, weights=library.qint8)
    library.freeze(model)


FORMATS: dict[str, Callable[[nn.Module], None]] = {
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao int8 dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao int4": torchao("IntxWeightOnlyConfig"),
    "torchao float8": torchao("Float8WeightOnlyConfig"),
    "bitsandbytes int8": bitsandbytes("int8"),
    "bitsandbytes nf4": bitsandbytes("nf4"),
    "bitsandbytes fp4": bitsandbytes("fp4"),
    "gptqmodel": gptq,
    "hqq": hqq,
    "quanto int8": quanto,
}


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)  # bitsandbytes says at every call that it casts
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def model() -> nn.Module:
    made = tiny_model("Llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    return made.requires_grad_(False)


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def masked_by_hooks(model: nn.Module, ids: torch.Tensor, thresholds: cats.Thresholds) -> torch.Tensor:
    """What an unpatched model computes with equation 4 in hooks, with none of our code in the way."""
    handles = []
    for site, part in (("gate", "act_fn"), ("up", "up_proj")):
        for name, value in getattr(thresholds, site).items():
            t = torch.as_tensor(value)

            def mask(_module: nn.Module, _args: tuple, y: torch.Tensor, t=t) -> torch.Tensor:
                return y * (y.abs() >= t)

            handles.append(getattr(model.get_submodule(name), part).register_forward_hook(mask))
    try:
        return logits(model, ids)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("criterion", ["cats", "gate-norm", "up-norm"])
@pytest.mark.parametrize("name", FORMATS)
def test_quantised_by_a_library(name: str, criterion: str, model: nn.Module, batches: list) -> None:
    FORMATS[name](model)
    ids = batches[0]["input_ids"][:1, :4]
    dense = logits(model, ids)
    thresholds = cats.calibrate(model, batches[:2], 0.6, criterion=criterion)
    expected = masked_by_hooks(model, ids, thresholds)
    with pytest.warns(UserWarning, match=r"2 of 2 MLPs run on the dense masked path, without speed-up .*projection is"):
        cats.apply(model, thresholds)
    assert error(logits(model, ids), expected) < 1e-6 and error(dense, expected) > 1e-2
    assert all(abs(f - 0.6) < 0.03 for f in cats.measure_sparsity(model, batches[:2]).values())
    with pytest.raises(ValueError, match=r'kernel="cpu" cannot serve model\.layers\.0\.mlp: .*projection is'):
        cats.apply(model, thresholds, "cpu")
    cats.remove(model)
    assert torch.equal(logits(model, ids), dense)
    assert not any("cats" in path for path, _ in model.named_modules())


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("name", FORMATS)
def test_quantised_after_the_patch(name: str, kernel: str, model: nn.Module, batches: list) -> None:
    """The library meets a down projection that is a transposed view, and `remove` one that is none any more."""
    ids, twin = batches[0]["input_ids"][:1, :4], copy.deepcopy(model)
    thresholds = cats.calibrate(model, batches[:2], 0.6)
    FORMATS[name](twin)
    expected, dense = masked_by_hooks(twin, ids, thresholds), logits(twin, ids)
    cats.apply(model, thresholds, kernel)
    FORMATS[name](model)
    assert error(logits(model, ids), expected) < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cats.apply(model, thresholds)
    assert error(logits(model, ids), expected) < 1e-6
    cats.remove(model)
    assert error(logits(model, ids), dense) < 1e-6
    assert not any("cats" in path for path, _ in model.named_modules())


def test_liger_on_an_instance_is_refused(model: nn.Module, batches: list) -> None:
    liger = pytest.importorskip("liger_kernel.transformers")
    thresholds = cats.calibrate(model, batches[:2], 0.5)
    others = dict.fromkeys(("rope", "cross_entropy", "fused_linear_cross_entropy", "rms_norm"), False)
    liger.apply_liger_kernel_to_llama(**others, swiglu=True, model=model)
    for change in (lambda: cats.apply(model, thresholds), lambda: cats.calibrate(model, batches[:2])):
        with pytest.raises(ValueError, match=r"layers\.0\.mlp \(LlamaMLP\) has had its forward replaced"):
            change()


def test_liger_as_a_class_says_that_its_block_does_not_run(batches: list) -> None:
    """Its kernels need a GPU: what cannot be run cannot be recognised, and that is said rather than "no gated MLP"."""
    swiglu = pytest.importorskip("liger_kernel.transformers.swiglu")
    if torch.cuda.is_available():
        pytest.skip("Liger's kernels run here")
    model = tiny_model("Llama")
    for layer in model.model.layers:
        mlp = swiglu.LigerSwiGLUMLP(model.config)
        mlp.load_state_dict(layer.mlp.state_dict())
        layer.mlp = mlp
    with pytest.raises(ValueError, match=r"layers\.0\.mlp \(LigerSwiGLUMLP\) looks like one but does not run here: "):
        cats.calibrate(model, batches[:2])
