"""Families of models beside Llama: parts are told apart by their role, and what only looks alike is refused."""

import copy
import warnings

import pytest
import torch
import transformers
from torch import nn

import cats
from cats.structure import parts_of

from .conftest import TINY, error, logits, tiny_model

OTHER_NAMES = {  # (gate, up, down, activation) by family; None where there is none
    "Llama": ("gate_proj", "up_proj", "down_proj", "act_fn"),
    "Phi3": ("gate_up_proj", None, "down_proj", "activation_fn"),
    "Lfm2": ("w1", "w3", "w2", None),
}


@pytest.mark.parametrize("family", OTHER_NAMES)
@pytest.mark.parametrize("criterion", ["cats", "up-norm", "teal"])
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_projections_are_told_apart_by_their_role(family: str, criterion: str, kernel: str, batches, operator_calls):
    if kernel == "auto" and criterion == "teal":
        pytest.skip("no kernel")
    extra = {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}
    model = tiny_model(family, **(extra if family == "Lfm2" else {}))
    mlps = cats.gated_mlps(model)
    of = parts_of(next(iter(mlps.values())))
    assert (of.gate, of.up, of.down, of.activation) == OTHER_NAMES[family] and len(mlps) == 3
    thresholds = cats.calibrate(model, batches, 0.5, criterion=criterion)
    before = {name: type(module) for name, module in model.named_modules()}
    ids = batches[0]["input_ids"][:1, :5]
    reference, dense = copy.deepcopy(model).double(), logits(model, ids)
    for name, mlp in cats.gated_mlps(reference).items():

        def forward(x, mlp=mlp, name=name, of=of):
            def masked(site: str, key: str, v: torch.Tensor) -> torch.Tensor:
                t = getattr(thresholds, site).get(key)
                return v if t is None else v * (v.abs() >= t)

            def into(part: str) -> torch.Tensor:
                return masked("mlp_linears", f"{name}.{part}", x) @ getattr(mlp, part).weight.T

            g, u = into(of.gate).chunk(2, -1) if of.up is None else (into(of.gate), into(of.up))
            h = masked("gate", name, nn.functional.silu(g)) * masked("up", name, u)
            return masked("mlp_linears", f"{name}.{of.down}", h) @ getattr(mlp, of.down).weight.T

        mlp.forward = forward
    expected = logits(reference, ids)
    cats.apply(model, thresholds, kernel)
    assert error(logits(model, ids), expected) < 1e-5 and error(dense, expected) > 1e-2
    assert len(operator_calls) == (3 if kernel == "auto" else 0)
    assert error(logits(copy.deepcopy(model), ids), expected) < 1e-5
    assert all(abs(f - 0.5) < 0.1 for f in cats.measure_sparsity(model, batches).values())
    cats.remove(model)
    assert torch.equal(logits(model, ids), dense)
    assert {name: type(module) for name, module in model.named_modules()} == before


class Renamed(nn.Module):
    """Equation 1 with names of nobody, in an unusual order, and d = m."""

    def __init__(self, width: int = 24, act: str = "gelu") -> None:
        super().__init__()
        self.out, self.b, self.a = (nn.Linear(width, width, False) for _ in range(3))
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(getattr(nn.functional, self.act)(self.a(x)) * self.b(x))


@pytest.mark.parametrize("act", ["silu", "gelu", "relu"])
def test_parts_are_found_by_running_the_block(act: str) -> None:
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"block": Renamed(act=act)}), torch.randn(3, 24)
    of = parts_of(cats.gated_mlps(model)["block"])
    assert (of.gate, of.up, of.down, type(of.function).__name__.lower()) == ("a", "b", "out", act)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cats.apply(model, cats.Thresholds(0.5, {"block": 0.3}))
    block = model["block"]
    v = getattr(nn.functional, act)(block.a(x))
    assert torch.allclose(block(x), block.out(v * (v.abs() >= 0.3) * block.b(x)), atol=1e-6)
    cats.remove(model)
    assert torch.equal(block(x), block.out(v * block.b(x))) and type(block) is Renamed


def test_blocks_that_only_look_alike_are_none() -> None:
    class Bilinear(Renamed):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x) * self.b(x))

    for block in (Bilinear(), nn.Sequential(nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4))):
        with pytest.raises(ValueError, match="has no gated MLP"):
            cats.gated_mlps(nn.ModuleDict({"block": block}))


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("Mixtral", {"num_local_experts": 4}),
        ("Qwen3Moe", {"moe_intermediate_size": 16, "num_experts": 4, "head_dim": 8}),
        ("Olmoe", {"num_experts": 4}),
    ],
)
def test_stacked_experts_are_not_yet_supported(family: str, extra: dict) -> None:
    config = getattr(transformers, f"{family}Config")(**{**TINY, **extra})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"is a mixture of experts, stacked in .*, which is not yet supported"):
        cats.gated_mlps(model)
