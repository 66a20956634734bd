"""Sequential calibration: each layer's thresholds behind those of the layers before it, the sparse model on target."""

from dataclasses import replace

import pytest
import torch

import cats
from cats.command_inputs import sample_text, token_batches
from cats.criteria import names
from cats.models import load_model
from cats.observe import observe
from cats.sequential import settle
from cats.thresholds import Thresholds
from tests.conftest import tiny_model

TARGET = 0.6


def loud_model(family: str = "Llama", layers: int = 4, **extra: object) -> torch.nn.Module:
    """A tiny model whose MLPs write loudly, so that masks change what later layers read."""
    model = tiny_model(family, num_hidden_layers=layers, **extra).eval()
    for name, parameter in model.named_parameters():
        if "down_proj" in name:
            parameter.data *= 30
    return model


def text(rows: int = 24, length: int = 48, seed: int = 0) -> list[torch.Tensor]:
    ids = torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
    return list(ids.split(8))


def displaced(thresholds: Thresholds) -> Thresholds:
    """Higher, far from the target."""
    return replace(thresholds, **{s: {p: 2 * v for p, v in of.items()} for s, of in thresholds.sites.items()})


def farthest(model: torch.nn.Module, thresholds: Thresholds, target: float = TARGET) -> float:
    """From its target, of all layers."""
    cats.apply(model, thresholds, kernel="reference")
    skipped = cats.measure_sparsity(model, text())
    cats.remove(model)
    return max(abs(share - target) for share in skipped.values())


@pytest.mark.parametrize("family", ["Llama", "Phi3", "Gemma3Text"])
@pytest.mark.parametrize("criterion", [name for name in names() if name not in ("relufication", "random")])
def test_every_layer_is_on_its_target(family: str, criterion: str) -> None:
    model = loud_model(family)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    plain = cats.calibrate(model, text(), TARGET, criterion=criterion)
    moved = cats.calibrate(model, text(), TARGET, criterion=criterion, sequential=True)
    assert (plain.sequential, moved.sequential) == (False, True)
    assert farthest(model, moved) < 0.01
    if criterion != "oracle":  # has no threshold
        assert farthest(model, displaced(plain)) > 0.05
        assert farthest(model, settle(model, displaced(plain), text())) < 0.01
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("criterion", ["cats", "auto", "teal"])
def test_a_trained_model_misses_its_target_without(criterion: str) -> None:
    model, tokenizer = load_model("pocket")
    batches = token_batches(model, tokenizer, sample_text(None, heldout=False), 2048)
    missed = []
    for sequential in (False, True):
        made = cats.calibrate(model, batches, 0.9, criterion=criterion, sequential=sequential)
        cats.apply(model, made, kernel="reference")
        missed.append(max(abs(share - 0.9) for share in cats.measure_sparsity(model, batches).values()))
        cats.remove(model)
    assert missed[0] > 0.01 > 0.003 > missed[1]


def layer_by_layer(model: torch.nn.Module, start: Thresholds) -> Thresholds:
    """What it must come to: each layer calibrated in a pass of its own, with the layers before it sparse already."""
    (site,) = start.sites
    values = dict(start.sites[site])
    for path in values:
        cats.apply(model, replace(start, **{site: values}), kernel="reference")
        seen: list[torch.Tensor] = []
        observe(
            model, text(), lambda _s, name, v, path=path, seen=seen: seen.append(v) if name == path else None, (site,)
        )
        scores = torch.cat(seen).double().abs() / torch.as_tensor(values[path]).double()
        values[path] = values[path] * float(torch.quantile(scores, TARGET, interpolation="lower"))
    cats.remove(model)
    return replace(start, **{site: values})


@pytest.mark.parametrize("criterion", ["cats", "up", "chess", "up-norm"])
def test_one_pass_comes_to_what_a_pass_for_each_layer_does(criterion: str) -> None:
    model = loud_model()
    start = displaced(cats.calibrate(model, text(), TARGET, criterion=criterion))
    expected, moved = layer_by_layer(model, start), settle(model, start, [torch.cat(text())])
    for site, values in expected.sites.items():
        for path, value in values.items():
            own = moved.sites[site][path]
            assert torch.allclose(torch.as_tensor(own), torch.as_tensor(value), rtol=2e-3), path


def test_several_targets_and_criteria_and_appendix_b() -> None:
    model = loud_model()
    made = cats.calibrate(model, text(), [0.0, 0.3, 0.8], None, ["cats", "up"], sequential=True)
    for by_target in made.values():
        assert set(next(iter(by_target[0.0].sites.values())).values()) == {0.0}  # keeps everything, and stays
        assert farthest(model, by_target[0.3], 0.3) < 0.01
        assert farthest(model, by_target[0.8], 0.8) < 0.01
    sites = ("gate", "attention_input", "mlp_input")
    moved = settle(model, displaced(cats.calibrate(model, text(), 0.5, sites)), text())
    cats.apply(model, moved, kernel="reference")
    for site in sites:
        shares = []
        observe(
            model,
            text(),
            lambda s, n, v, m=moved, out=shares: out.append((v.abs() < m.sites[s][n]).float().mean()),
            (site,),
        )
        assert float(torch.stack(shares).mean()) == pytest.approx(0.5, abs=0.01)
    cats.remove(model)


def test_what_is_always_skipped_stays_so() -> None:
    model = loud_model()
    plain = cats.calibrate(model, text(), 0.5, criterion="chess")
    for value in plain.gate.values():
        value[:10] = torch.inf
    moved = settle(model, plain, text())
    assert all(value[:10].isinf().all() and value[10:].isfinite().all() for value in moved.gate.values())
    assert farthest(model, moved, 0.5) < 0.01
    for value in plain.gate.values():
        value[:80] = torch.inf  # more than the target: next to nothing else is skipped
    assert all((value[80:] < 1e-6).all() for value in settle(model, plain, text()).gate.values())


def test_a_patched_model_is_refused_and_left_alone(llama: torch.nn.Module) -> None:
    cats.apply(llama, cats.calibrate(llama, text(), 0.5))
    with pytest.raises(ValueError, match=r"starts from the dense model: call cats\.remove"):
        cats.calibrate(llama, iter(()), 0.5, sequential=True)  # said before the text is looked at
    assert cats.measure_sparsity(llama, text())


def test_it_is_in_the_file(tmp_path, llama: torch.nn.Module) -> None:
    moved = cats.calibrate(llama, text(), 0.5, sequential=True)
    moved.save(tmp_path / "t.json")
    assert cats.Thresholds.load(tmp_path / "t.json") == moved
    assert moved != cats.calibrate(llama, text(), 0.5)
    with pytest.raises(ValueError, match="sequential must be true or false"):
        cats.Thresholds(0.5, sequential=1)  # type: ignore[arg-type]
