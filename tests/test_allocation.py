"""Sparsity shared among layers: the least sum of errors of all ways to share it, and the artifact that holds it."""

import itertools
import json
import math
from collections.abc import Iterable

import pytest
import torch
from torch import nn

import cats
from cats import search, sensitivity
from cats.allocation import LEVELS, allocate
from cats.sensitivity import Output, sample_rows
from cats.sparsity import overall_sparsity

from .conftest import tiny_model

GRID = (0.25, 0.5, 0.75)


def cost_at(costs: list[float], level: float) -> float:
    """Straight between the levels measured."""
    points = [(0.0, 0.0), *zip(GRID, costs, strict=True)]
    for (x, y), (x2, y2) in itertools.pairwise(points):
        if x <= level <= x2 + 1e-9:
            return y + (y2 - y) * (level - x) / (x2 - x)
    raise AssertionError(level)


def convex(generator: torch.Generator) -> list[float]:
    return torch.rand(3, generator=generator).double().sort().values.cumsum(0).tolist()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 5)])
def test_no_other_allocation_costs_less(seed: int, sizes: tuple[int, ...]) -> None:
    """Every way to share 0.4 on a fine grid, for curves whose slope rises."""
    generator = torch.Generator().manual_seed(seed)
    costs = {name: convex(generator) for name in "abc"}
    made = allocate(costs, dict(zip("abc", sizes, strict=True)), 0.4, GRID, 0.35)
    assert sum(size * made[name] for name, size in zip("abc", sizes, strict=True)) == pytest.approx(0.4 * sum(sizes))
    total = sum(cost_at(costs[name], level) for name, level in made.items())
    steps = [step / 40 for step in range(2, 31)]
    for a, b in itertools.product(steps, steps):
        c = (0.4 * sum(sizes) - sizes[0] * a - sizes[1] * b) / sizes[2]
        if 0.05 <= c <= 0.75:
            assert total <= sum(cost_at(costs[n], x) for n, x in zip("abc", (a, b, c), strict=True)) + 1e-9


def test_equal_layers_of_rising_slope_share_equally_and_a_free_one_takes_most() -> None:
    same = {name: [0.1, 0.3, 0.9] for name in "abcd"}
    ones = dict.fromkeys("abcd", 1)
    assert allocate(same, ones, 0.5, GRID) == dict.fromkeys("abcd", 0.5)
    for spread, most in ((0.5, 0.75), (0.2, 0.45)):
        made = allocate({**same, "a": [0.0, 0.0, 0.0]}, ones, 0.25, GRID, spread)
        assert made["a"] == pytest.approx(most) and sum(made.values()) == pytest.approx(1.0)
        assert min(made.values()) >= 0.25 - spread


def test_a_dent_in_a_curve_is_no_place_to_stop() -> None:
    """A layer whose second step costs less than its first is taken past the dent, or not at all."""
    made = allocate({"a": [1.0, 1.1, 9.0], "b": [0.2, 0.8, 9.0]}, {"a": 1, "b": 1}, 0.375, GRID, 0.375)
    assert made == {"a": pytest.approx(0.5), "b": pytest.approx(0.25)}


def test_the_ends_of_the_range() -> None:
    costs, sizes = {"a": [0.1, 0.2, 0.4], "b": [0.1, 0.3, 0.6]}, {"a": 1, "b": 1}
    assert allocate(costs, sizes, 0.0, GRID) == {"a": 0.0, "b": 0.0}
    assert allocate(costs, sizes, 0.75, GRID) == {"a": 0.75, "b": 0.75}
    assert allocate(costs, sizes, 0.9, GRID) == {"a": 0.9, "b": 0.9}


@pytest.fixture
def uneven() -> nn.Module:
    """Three MLPs of other widths; the first one's gate is nearly a ReLU, so that half of its neurons cost nothing."""
    model = tiny_model("Llama")
    torch.manual_seed(0)
    for mlp, width in zip(cats.gated_mlps(model).values(), (88, 44, 264), strict=True):
        mlp.gate_proj, mlp.up_proj = nn.Linear(32, width, bias=False), nn.Linear(32, width, bias=False)
        mlp.down_proj = nn.Linear(width, 32, bias=False)
    with torch.no_grad():
        next(iter(cats.gated_mlps(model).values())).gate_proj.weight.mul_(100)
    return model


@pytest.mark.parametrize("target", [0.2, 0.5, 0.8])
def test_the_whole_is_on_target_and_costs_less_than_uniform(uneven: nn.Module, batches: list, target: float) -> None:
    made = cats.calibrate(uneven, batches, target, criterion="auto", allocation="output")
    mlps = cats.gated_mlps(uneven)
    sizes = {path: mlp.gate_proj.out_features for path, mlp in mlps.items()}
    total = sum(sizes.values())
    assert sum(sizes[path] * made.level_of(path) for path in mlps) / total == pytest.approx(target)
    first = next(iter(mlps))
    assert made.level_of(first) >= min(target, 0.4) - 1e-9  # which cost nothing
    cats.apply(uneven, made, kernel="reference")
    skipped = cats.measure_sparsity(uneven, batches)
    assert sum(sizes[path] * skipped[path] for path in mlps) / total == pytest.approx(target, abs=0.01)
    cats.remove(uneven)
    uniform = cats.calibrate(uneven, batches, target, criterion="auto", allocation="uniform")
    assert not uniform.levels and uniform.level_of(first) == target
    output = Output(uneven, batches)
    assert output.divergence(skips_of(made, mlps)) < output.divergence(skips_of(uniform, mlps))


def skips_of(thresholds: cats.Thresholds, paths: Iterable[str]) -> dict:
    return {path: (side, getattr(thresholds, side)[path]) for path in paths if (side := thresholds.decider_of(path))}


def plain_divergence(dense: torch.Tensor, sparse: torch.Tensor) -> float:
    p, q = dense.double().log_softmax(-1), sparse.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Phi3"])
@torch.no_grad()
def test_divergence_is_that_of_the_patched_model(family: str) -> None:
    """Also where the model is patched already: its own thresholds are not in force."""
    model = tiny_model(family).eval()
    ids = torch.randint(0, 64, (3, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    batches = [{"input_ids": ids, "attention_mask": mask}]
    thresholds = cats.calibrate(model, batches, 0.6, criterion="auto", allocation="uniform")
    dense = model(ids, attention_mask=mask).logits[mask.bool()]
    cats.apply(model, thresholds, kernel="reference")
    sparse = model(ids, attention_mask=mask).logits[mask.bool()]
    cats.remove(model)
    skips = skips_of(thresholds, cats.gated_mlps(model))
    expected = plain_divergence(dense, sparse)
    assert expected > 1e-6
    assert Output(model, batches).divergence(skips) == pytest.approx(expected, rel=1e-3)
    assert Output(model, batches).divergence({}) == pytest.approx(0.0, abs=1e-9)
    cats.apply(model, cats.calibrate(model, batches, 0.3), kernel="reference")
    assert Output(model, batches).divergence(skips) == pytest.approx(expected, rel=1e-3)


def test_rows_for_the_output_are_spread_over_the_text(llama: nn.Module, monkeypatch) -> None:
    monkeypatch.setattr(sensitivity, "POSITIONS", 8)
    text = torch.arange(160).reshape(8, 20) % 60
    rows = sample_rows(llama, [text[:5], {"input_ids": text[5:]}], 40)
    assert [row["input_ids"][0, 0].item() for row, _ in rows] == [text[0, 0], text[4, 0]]
    assert [positions.tolist() for _, positions in rows] == [[0, 5, 10, 15]] * 2
    (long,) = sample_rows(llama, [torch.zeros(1, 100, dtype=torch.int64)], 40)
    assert long[0]["input_ids"].shape == (1, 40)
    mask = torch.tensor([[0] * 12 + [1] * 8, [0] * 20])
    (padded,) = sample_rows(llama, [{"input_ids": text[:2], "attention_mask": mask}], 40)
    assert padded[0]["input_ids"].tolist() == [text[0, 12:].tolist()]


@pytest.mark.parametrize("order", [1, -1])
def test_rows_of_any_length_are_taken_by_their_tokens(llama: nn.Module, order: int) -> None:
    """Every n-th row was taken before: of these 40 or 400 tokens where 100 were asked for."""
    lengths = [20, 100, 20, 20, 100, 20, 20, 100, 20, 20, 100, 20, 20, 100, 20][::order]
    texts = [torch.full((1, length), i) for i, length in enumerate(lengths)]
    rows = [row["input_ids"] for row, _ in sample_rows(llama, texts, 180)]
    assert 150 <= sum(row.numel() for row in rows) <= 180
    assert rows[0][0, 0] == 0 and rows[-1][0, 0] >= 9
    everything = [row["input_ids"] for row, _ in sample_rows(llama, texts, 10**4)]
    assert [row.numel() for row in everything] == lengths


class Elsewhere(nn.Module):
    """Some of a model, on another device."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, device="meta"))


def test_a_model_spread_over_devices(llama: nn.Module, batches: list, monkeypatch) -> None:
    """Positions are on the CPU, from where tensors of any device are indexed; and the model, which would index with
    them on its last device what accelerate had moved to its first one, gives all logits."""
    skips = {path: ("gate", 0.3) for path in cats.gated_mlps(llama)}
    expected = Output(llama, batches).divergence(skips)
    kept, forward = [], llama.forward
    monkeypatch.setattr(
        llama,
        "forward",
        lambda *args, logits_to_keep=0, **options: (
            kept.append(logits_to_keep),
            forward(*args, logits_to_keep=logits_to_keep, **options),
        )[1],
    )
    monkeypatch.setattr(sensitivity, "keeps_logits", lambda _model: True)
    assert Output(llama, batches).divergence(skips) == pytest.approx(expected)
    assert all(isinstance(positions, torch.Tensor) for positions in kept)
    kept.clear()
    llama.add_module("elsewhere", Elsewhere())
    assert Output(llama, batches).divergence(skips) == pytest.approx(expected)
    assert kept and not any(isinstance(positions, torch.Tensor) for positions in kept)
    monkeypatch.setattr(sensitivity, "execution_device", lambda _model: torch.device("meta"))
    monkeypatch.setattr(sensitivity, "model_inputs", lambda ids, device, _vocabulary: {"input_ids": ids.to(device)})
    ((inputs, positions),) = sample_rows(llama, [torch.zeros(1, 20, dtype=torch.int64)], 40)
    assert inputs["input_ids"].device.type == "meta" and positions.device.type == "cpu"


def test_a_layer_that_matters_more_costs_more(llama: nn.Module, batches: list) -> None:
    """The scale of each MLP's errors, from the output itself."""
    paths = list(cats.gated_mlps(llama))
    with torch.no_grad():
        cats.gated_mlps(llama)[paths[1]].down_proj.weight.mul_(0.05)  # the same relative errors, of next to nothing
        inputs, _ = search.sample_inputs(llama, batches)
        tried = {p: list(search.candidates(p, cats.gated_mlps(llama)[p], inputs[p], LEVELS)) for p in paths}
    costs = search.output_costs(Output(llama, batches), tried, LEVELS)
    at = LEVELS.index(0.5)
    assert costs[paths[1]][at] < 0.3 * min(costs[paths[0]][at], costs[paths[2]][at])
    for path, own in costs.items():
        ratios = [cost / min(one.errors[i] for one in tried[path]) for i, cost in enumerate(own)]
        assert ratios == pytest.approx([ratios[0]] * len(ratios)) and ratios[0] > 0


@torch.no_grad()
def test_layers_count_by_their_weights(uneven: nn.Module) -> None:
    fractions = dict(zip(cats.gated_mlps(uneven), (0.9, 0.1, 0.2), strict=True))
    assert overall_sparsity(uneven, fractions) == pytest.approx((88 * 0.9 + 44 * 0.1 + 264 * 0.2) / 396)
    linears = {"model.layers.0.mlp.up_proj": 0.5, "model.layers.2.self_attn.o_proj": 0.2}
    assert overall_sparsity(uneven, linears) == pytest.approx((88 * 32 * 0.5 + 32 * 32 * 0.2) / (120 * 32))


def test_nothing_is_left_on_the_model(llama: nn.Module, batches: list) -> None:
    """Also where the text breaks off the pass."""
    output = Output(llama, batches)
    skips = {path: ("gate", torch.ones(7)) for path in cats.gated_mlps(llama)}  # of another width
    with pytest.raises(RuntimeError):
        output.divergence(skips)
    for mlp in cats.gated_mlps(llama).values():
        assert "forward" not in mlp.__dict__ and not mlp._forward_hooks
        mlp.forward = mlp.forward  # as accelerate does
    skips = {path: ("gate", 0.3) for path in skips}
    hooked = output.divergence(skips)
    for mlp in cats.gated_mlps(llama).values():
        assert "forward" in mlp.__dict__ and not mlp._forward_hooks
        del mlp.forward
    assert output.divergence(skips) == pytest.approx(hooked) and hooked > 0


def test_levels_are_in_the_file_where_they_differ_alone(tmp_path, uneven: nn.Module, batches: list) -> None:
    made = cats.calibrate(uneven, batches, [0.3, 0.6], criterion="auto", allocation="output")
    made[0.3].save(tmp_path / "t.json")
    loaded = cats.Thresholds.load(tmp_path / "t.json")
    assert loaded == made[0.3] and loaded.levels == made[0.3].levels and loaded != made[0.6]
    assert all(0.1 - 1e-9 <= level <= 0.5 + 1e-9 for level in loaded.levels.values())
    data = json.loads((tmp_path / "t.json").read_text())
    data["levels"]["model.layers.0.mlp"] = 1.0
    (tmp_path / "t.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"levels\['model.layers.0.mlp'\]: sparsity must be a number in \[0, 1\)"):
        cats.Thresholds.load(tmp_path / "t.json")
    with pytest.raises(ValueError, match="levels must map module paths to sparsities, not be a list"):
        cats.Thresholds(0.5, {"a": 1.0}, levels=[0.5])
    cats.calibrate(uneven, batches, 0.5).save(tmp_path / "plain.json")
    assert "levels" not in json.loads((tmp_path / "plain.json").read_text())


def test_unknown_allocations_are_refused(uneven: nn.Module, batches: list) -> None:
    with pytest.raises(ValueError, match="criterion 'cats' has no allocation 'output': allowed are uniform"):
        cats.calibrate(uneven, batches, 0.5, allocation="output")
    with pytest.raises(ValueError, match="criterion 'auto' has no allocation 'best': allowed are uniform, output"):
        cats.calibrate(uneven, batches, 0.5, criterion="auto", allocation="best")
    same = cats.calibrate(uneven, batches, 0.5, allocation="uniform")
    assert same == cats.calibrate(uneven, batches, 0.5) and math.isclose(same.level_of("any"), 0.5)
