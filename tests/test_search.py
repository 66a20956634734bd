"""The criterion `auto`: each MLP's choice against all candidates written out in float64, and the mixed artifact."""

import itertools

import pytest
import torch
from torch import nn

import cats
from cats import search
from cats.observe import observe

from .conftest import tiny_model


@pytest.fixture
def lopsided() -> nn.Module:
    """The first MLP's gate is nearly a ReLU, which knows half of the zeros; the second's is the same for every neuron,
    so that it cannot tell a token's neurons apart."""
    model = tiny_model("Llama")
    first, second = list(cats.gated_mlps(model).values())[:2]
    with torch.no_grad():
        first.gate_proj.weight.mul_(100)
        second.gate_proj.weight.copy_(second.gate_proj.weight[:1].expand_as(second.gate_proj.weight))
    return model


def relative(lost: torch.Tensor, whole: torch.Tensor) -> float:
    """Mean over tokens of the squared relative error."""
    return float((lost.square().sum(1) / whole.square().sum(1)).mean())


@torch.no_grad()
def plain_errors(mlp: nn.Module, x: torch.Tensor, sparsity: float) -> dict[tuple[str, str], float]:
    """Relative squared error of the output of every candidate, in float64 with torch's quantile."""
    a, u = nn.functional.silu(x @ mlp.gate_proj.weight.double().T), x @ mlp.up_proj.weight.double().T
    down, rms = mlp.down_proj.weight.double(), lambda v: v.square().mean(0).sqrt()
    errors = {}
    for (side, v, other), kind in itertools.product((("gate", a, u), ("up", u, a)), search.WEIGHTS):
        weights = {"none": 1.0, "rms": rms(other), "rms and norm": rms(other) * down.norm(dim=0)}[kind]
        score = v.abs() * weights
        lost = a * u * (score < torch.quantile(score.flatten()[: 2**24], sparsity))
        errors[side, kind] = relative(lost @ down.T, (a * u) @ down.T)
    return errors


def inputs_of(model: nn.Module, batches: list) -> dict[str, torch.Tensor]:
    seen: dict[str, list[torch.Tensor]] = {}
    observe(model, batches, lambda _site, name, v: seen.setdefault(name, []).append(v.double()), ("mlp_input",))
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("sparsity", [0.4, 0.7])
def test_candidates_have_the_errors_of_their_formula(llama: nn.Module, batches: list, sparsity: float) -> None:
    for path, x in inputs_of(llama, batches).items():
        mlp = cats.gated_mlps(llama)[path]
        plain = plain_errors(mlp, x, sparsity)
        with torch.no_grad():
            made = list(search.candidates(path, mlp, x.float(), [0.2, sparsity]))
        assert {(one.side, one.weights) for one in made} == set(plain)
        for one in made:
            assert one.errors[1] == pytest.approx(plain[one.side, one.weights], rel=0.02)
            assert one.errors[0] < one.errors[1]


def test_first_tokens_are_those_behind_the_padding_each_once() -> None:
    ids, mask = (
        torch.tensor([[5, 5, 7, 8], [7, 9, 5, 5], [3, 1, 2, 4]]),
        torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [0] * 4]),
    )
    assert search._first_tokens([{"input_ids": ids, "attention_mask": mask}, ids[2]]).tolist() == [[3], [7]]
    assert search._first_tokens([]).shape == (0, 1)


@torch.no_grad()
def test_the_error_of_first_tokens_counts_as_much_as_that_of_all_others(llama: nn.Module, batches: list) -> None:
    path, x = next(iter(inputs_of(llama, batches).items()))
    mlp, first = cats.gated_mlps(llama)[path], -3 * x[:4]
    alone = list(search.candidates(path, mlp, x.float(), [0.5]))
    for one, both in zip(alone, search.candidates(path, mlp, x.float(), [0.5], first.float()), strict=True):
        assert both.threshold(0.5) == pytest.approx(one.threshold(0.5))  # which they have no part in
        a, u = nn.functional.silu(first @ mlp.gate_proj.weight.double().T), first @ mlp.up_proj.weight.double().T
        lost = a * u * ((a if one.side == "gate" else u).abs() < torch.as_tensor(one.threshold(0.5)).double())
        down = mlp.down_proj.weight.double()
        assert both.errors[0] - one.errors[0] == pytest.approx(relative(lost @ down.T, (a * u) @ down.T), rel=1e-3)


@torch.no_grad()
def test_each_layer_gets_its_best_candidate(lopsided: nn.Module, batches: list) -> None:
    made = cats.calibrate(lopsided, batches, [0.4, 0.7], criterion="auto")
    paths = list(cats.gated_mlps(lopsided))
    for sparsity, thresholds in made.items():
        assert thresholds.decider == "mixed" and thresholds.sparsity == sparsity
        assert [thresholds.decider_of(path) for path in paths[:2]] == ["gate", "up"]
        for path, x in inputs_of(lopsided, batches).items():
            mlp = cats.gated_mlps(lopsided)[path]
            plain = plain_errors(mlp, x, sparsity)
            side = thresholds.decider_of(path)
            a, u = nn.functional.silu(x @ mlp.gate_proj.weight.double().T), x @ mlp.up_proj.weight.double().T
            kept = (a if side == "gate" else u).abs() >= torch.as_tensor(getattr(thresholds, side)[path])
            down = mlp.down_proj.weight.double()
            error = relative((a * u * ~kept) @ down.T, (a * u) @ down.T)
            assert error <= max(min(plain.values()) * 1.02, 1e-20)  # of a ReLU 0, but for rounding


def test_a_mixed_artifact_runs_in_every_kernel_and_from_its_file(
    tmp_path, lopsided: nn.Module, batches: list, operator_calls: list
) -> None:
    thresholds = cats.calibrate(lopsided, batches, 0.5, criterion="auto")
    thresholds.save(tmp_path / "auto.json")
    loaded = cats.Thresholds.load(tmp_path / "auto.json")
    assert loaded == thresholds and loaded.decider == "mixed"
    one = batches[0]["input_ids"][:1, :1]
    with torch.no_grad():
        dense = lopsided(one).logits
        cats.apply(lopsided, loaded, kernel="reference")
        masked = lopsided(one).logits
        skipped = cats.measure_sparsity(lopsided, batches)
        for path, fraction in skipped.items():
            assert abs(fraction - 0.5) < 0.03, path
        cats.apply(lopsided, loaded, kernel="cpu")
        sparse = lopsided(one).logits
    assert operator_calls == ["cpu"] * 3
    assert torch.allclose(sparse, masked, atol=1e-4) and not torch.allclose(dense, masked, atol=1e-3)
    cats.remove(lopsided)
    with torch.no_grad():
        assert torch.equal(lopsided(one).logits, dense)


def test_thresholds_that_leave_a_layer_undecided_are_refused(lopsided: nn.Module, batches: list) -> None:
    thresholds = cats.calibrate(lopsided, batches, 0.5, criterion="auto")
    first, second = list(cats.gated_mlps(lopsided))[:2]
    assert first in thresholds.gate and second in thresholds.up
    del thresholds.up[second]
    with pytest.raises(ValueError, match=f"lack {second} of its layers"):
        cats.apply(lopsided, thresholds)


def test_the_sample_is_spread_over_all_real_tokens(llama: nn.Module) -> None:
    ids = torch.arange(40).reshape(2, 20) % 30
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, 12:] = 0
    whole = search.sample_inputs(llama, [{"input_ids": ids, "attention_mask": mask}], most=32)
    part = search.sample_inputs(llama, [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :12]}], most=8)
    assert (whole.tokens, part.tokens) == (32, 8)
    for path, x in whole.inputs.items():
        assert x.shape[0] == 32 and torch.allclose(part.inputs[path], x[::4], atol=1e-5)
        firsts = torch.stack([x[0], x[20]])  # in the order of their ids, 0 and 20
        assert torch.allclose(whole.first[path], firsts, atol=1e-5) and torch.equal(whole.first[path], part.first[path])
    with pytest.raises(ValueError, match="no tokens"):
        cats.calibrate(llama, [], criterion="auto")


def test_a_batch_that_is_none_is_refused_as_by_other_criteria(lopsided: nn.Module) -> None:
    with pytest.raises(TypeError, match="a batch must be a tensor of token ids or a mapping with input_ids, not list"):
        cats.calibrate(lopsided, [[1, 2, 3]], 0.5, criterion="auto")
