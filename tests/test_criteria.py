"""Every criterion against its formula written out in float64, and a made-up one against the whole way through."""

import copy

import pytest
import torch
from torch import nn

import cats
from cats import criteria
from tests.conftest import tiny_model
from tests.criteria_cases import ALL, MASKS, NEURONS, scores, values


def test_all_criteria_are_there_by_name() -> None:
    assert criteria.names() == ALL
    for name in ALL:
        criterion = criteria.get(name)
        assert criterion.name == name and criterion.title
        assert bool(criterion.no_kernel) == (name in (*MASKS, "relufication"))
        assert (criterion.decider is None) == (name in MASKS)
    assert criteria.label("cats", 0.5) == "CATS-50" and criteria.label("chess", 0.625) == "CHESS-62.5"
    assert criteria.label("relufication", 0.5) == "ReLUfication" and criteria.label("teal") == "TEAL"
    for name in ("CATS", "none", 3, None):
        with pytest.raises(ValueError, match=r"unknown criterion .*: allowed are auto, cats, chess, gate-norm"):
            criteria.get(name)


@pytest.mark.parametrize("name", NEURONS)
@pytest.mark.parametrize("family", ["Llama", "Phi3"])
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_neuron_criteria_compute_their_formula(name: str, family: str, kernel: str, batches: list) -> None:
    model = tiny_model(family)
    thresholds = cats.calibrate(model, batches, 0.5, criterion=name)
    assert thresholds.decider == ("up" if name.startswith("up") else "gate") and thresholds.criterion == name
    given = {layer: torch.as_tensor(t) for layer, t in getattr(thresholds, thresholds.decider).items()}
    for layer, score in scores(model, batches, name).items():
        v = values(model, batches, thresholds.decider)[layer]
        assert abs(float((v.abs() < given[layer]).double().mean()) - 0.5) < 1e-3
        t = torch.quantile(score.flatten(), 0.5)  # the thresholds are those of the score itself
        weights = (score / v.abs()).nan_to_num(0).amax(0)
        assert torch.allclose(given[layer].double() * weights, t.expand_as(weights), rtol=2e-3)

    reference = copy.deepcopy(model).double()
    for layer, mlp in cats.gated_mlps(reference).items():

        def forward(x, mlp=mlp, t=given[layer]):
            fused = family == "Phi3"
            first = mlp.gate_up_proj.weight.chunk(2) if fused else (mlp.gate_proj.weight, mlp.up_proj.weight)
            a, u = nn.functional.silu(x @ first[0].T), x @ first[1].T
            kept = (u if name.startswith("up") else a).abs() >= t
            return (a * u * kept) @ mlp.down_proj.weight.T

        mlp.forward = forward
    ids = batches[0]["input_ids"][:1, :6]
    with torch.no_grad():
        expected, dense = reference(ids).logits, model(ids).logits.double()
        cats.apply(model, thresholds, kernel)
        actual = model(ids).logits.double()
    assert (actual - expected).norm() / expected.norm() < 1e-5
    assert (dense - expected).norm() / expected.norm() > 1e-2
    for fraction in cats.measure_sparsity(model, batches).values():
        assert abs(fraction - 0.5) < 0.02


@pytest.mark.parametrize("name", ["teal", "wina"])
def test_input_criteria_mask_the_inputs_of_linear_layers(name: str, llama: nn.Module, batches: list) -> None:
    sites = ("mlp_linears", "attention_linears")
    thresholds = cats.calibrate(llama, batches, 0.4, sites=sites, criterion=name)
    paths = [f"model.layers.{i}.{part}" for i in range(3) for part in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]
    assert list(thresholds.mlp_linears) == paths and thresholds.decider is None
    assert len(thresholds.attention_linears) == 12
    given = {**thresholds.mlp_linears, **thresholds.attention_linears}
    for site in sites:
        for path, x in values(llama, batches, site).items():
            if name == "wina":
                x = x * llama.get_submodule(path).weight.double().norm(dim=0)
                weights = llama.get_submodule(path).weight.norm(dim=0)
                t = torch.quantile(x.abs().flatten(), 0.4)
                assert torch.allclose((given[path] * weights).double(), t.expand_as(weights), rtol=2e-3)
            else:
                assert given[path] == pytest.approx(torch.quantile(x.abs().flatten(), 0.4).item(), rel=2e-3)

    reference, ids = copy.deepcopy(llama).double(), batches[0]["input_ids"][:1, :6]
    for path, t in given.items():
        linear = reference.get_submodule(path)
        linear.register_forward_pre_hook(lambda _m, args, t=t: (args[0] * (args[0].abs() >= t),))
    with torch.no_grad():
        expected = reference(ids).logits
        cats.apply(llama, thresholds, "reference")
        actual = llama(ids).logits.double()
    assert (actual - expected).norm() / expected.norm() < 1e-5
    measured = cats.measure_sparsity(llama, batches)
    assert set(measured) == set(given) and all(abs(fraction - 0.4) < 0.05 for fraction in measured.values())
    cats.apply(llama, cats.calibrate(llama, batches, 0.4, criterion=name), "reference")
    assert set(cats.measure_sparsity(llama, batches)) == set(paths)  # attention's masks are gone


def test_oracle_keeps_the_largest_of_each_token(llama: nn.Module, batches: list) -> None:
    reference, ids = copy.deepcopy(llama).double(), batches[0]["input_ids"][:1, :6]
    for mlp in cats.gated_mlps(reference).values():

        def forward(x, mlp=mlp):
            h = nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
            order = (h.abs() * mlp.down_proj.weight.norm(dim=0)).argsort(dim=-1, descending=True)
            rank = order.argsort(dim=-1)
            return (h * (rank < 35)) @ mlp.down_proj.weight.T  # 40 % of 88

        mlp.forward = forward
    thresholds = cats.calibrate(llama, batches, 0.6, criterion="oracle")
    assert thresholds.sites.keys() == {"neurons"} and thresholds.tokens == 0
    cats.apply(llama, thresholds, "reference")
    with torch.no_grad():
        expected, actual = reference(ids).logits, llama(ids).logits.double()
    assert (actual - expected).norm() / expected.norm() < 1e-5
    assert all(f == pytest.approx(53 / 88, abs=1e-3) for f in cats.measure_sparsity(llama, batches).values())


def test_random_drops_its_share_of_each_token_anew(llama: nn.Module, batches: list) -> None:
    cats.apply(llama, cats.calibrate(llama, batches, 0.7, criterion="random"), "reference")
    assert all(abs(f - 0.7) < 0.01 for f in cats.measure_sparsity(llama, batches).values())
    ids = batches[0]["input_ids"][:1, :6]
    with torch.no_grad():
        torch.manual_seed(0)
        first, second = llama(ids).logits, llama(ids).logits
        torch.manual_seed(0)
        assert torch.equal(llama(ids).logits, first) and not torch.allclose(first, second)
    seen = []
    llama.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0] == 0))
    with torch.no_grad():
        llama(ids)
    assert not torch.equal(seen[0][0, 0], seen[0][0, 1])


def test_relufication_is_a_criterion_too(llama: nn.Module, batches: list) -> None:
    twin = copy.deepcopy(llama)
    cats.relufy(twin)
    cats.apply(llama, cats.calibrate(llama, batches, 0.5, criterion="relufication"), "reference")
    ids = batches[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(llama(ids).logits, twin(ids).logits)


def test_several_criteria_and_targets_at_once_are_each_alone(llama: nn.Module, batches: list) -> None:
    calls = []
    llama.register_forward_hook(lambda *_: calls.append(1))
    names = ("cats", "chess", "up", "up-norm", "oracle")
    made = cats.calibrate(llama, iter(batches), [0.3, 0.7], criterion=names)  # a generator is gone through once
    assert len(calls) == 2 * len(batches)
    assert list(made) == list(names)
    for name in names:
        for target in (0.3, 0.7):
            assert made[name][target] == cats.calibrate(llama, batches, target, criterion=name), (name, target)
    calls.clear()
    cats.calibrate(llama, batches, [0.3, 0.7], criterion=("cats", "up", "wina"))
    assert len(calls) == len(batches)  # no root mean square: one pass
    calls.clear()
    cats.calibrate(llama, batches, criterion=("random", "oracle"))
    assert not calls


class SecondHalf(criteria.Criterion):
    """Keeps large gate activations, those of the second half of the neurons twice as readily."""

    name, title = "second-half", "2nd"
    rms_of = ("up",)

    def weights(self, layer):
        weights = torch.ones_like(layer.rms("up"))
        weights[len(weights) // 2 :] = 2
        return weights


@pytest.fixture
def second_half():
    criteria.register(SecondHalf())
    yield
    del criteria._registered["second-half"]


@pytest.mark.usefixtures("second_half")
def test_a_made_up_criterion_works_everywhere(tmp_path, llama: nn.Module, batches: list, operator_calls: list) -> None:
    assert "second-half" in criteria.names() and criteria.label("second-half", 0.25) == "2nd-25"
    thresholds = cats.calibrate(llama, batches, 0.5, criterion="second-half")
    thresholds.save(tmp_path / "t.json")
    loaded = cats.Thresholds.load(tmp_path / "t.json")
    assert loaded == thresholds
    cats.apply(llama, loaded)
    with torch.no_grad():
        llama(batches[0]["input_ids"][:1, :1])
    assert operator_calls == ["auto"] * 3
    assert all(abs(f - 0.5) < 0.01 for f in cats.measure_sparsity(llama, batches).values())
    gate = thresholds.gate["model.layers.0.mlp"]
    assert torch.equal(gate[:44], 2 * gate[44:])
    with pytest.raises(ValueError, match="'second-half' has no site up: allowed are gate, attention_input, mlp_input"):
        cats.calibrate(llama, batches, sites=("up",), criterion="second-half")


def test_entry_points_of_other_packages_are_found(monkeypatch) -> None:
    class Entry:
        def load(self):
            return SecondHalf()

    monkeypatch.setattr(criteria, "entry_points", lambda group: [Entry()] if group == "cats.criteria" else [])
    criteria._installed.cache_clear()
    try:
        assert criteria.names() == tuple(sorted((*ALL, "second-half")))
    finally:
        criteria._installed.cache_clear()
    monkeypatch.undo()
    with pytest.raises(TypeError, match=r"must be an instance of cats\.criteria\.Criterion, not type"):
        criteria.register(SecondHalf)
