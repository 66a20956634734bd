"""Calibration against exact float64 quantiles, in one pass and any dtype."""

import copy
import json

import accelerate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cats
from cats.calibration import Histogram
from cats.observe import observe
from cats.sparsity import overall_sparsity

from .conftest import tiny_model


def fraction_below(values: torch.Tensor, threshold: float) -> float:
    return float((values.double().abs() < threshold).double().mean())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-6, 1e3), st.sampled_from([0.0, 0.1, 0.5, 0.7, 0.9, 0.99]))
def test_threshold_is_the_quantile(seed: int, scale: float, sparsity: float) -> None:
    values = torch.nn.functional.silu(torch.randn(50_000, generator=torch.Generator().manual_seed(seed))) * scale
    histogram = Histogram()
    for chunk in values.split(20_001):
        histogram.add(chunk)
    threshold = histogram.threshold(sparsity)
    if sparsity:  # at 0 everything is kept: the threshold is 0
        exact = torch.quantile(values.double().abs(), sparsity, interpolation="lower").item()
        assert threshold == pytest.approx(exact, rel=1e-3, abs=1e-9)
    assert abs(fraction_below(values, threshold) - sparsity) < 1e-3
    assert histogram.fraction_below(threshold) == pytest.approx(fraction_below(values, threshold), abs=1e-9)


def test_counts_by_hand() -> None:
    histogram = Histogram()
    histogram.add(torch.tensor([0.0, -1.0, 1.0, 2.0, 3.0]))
    assert histogram.total == 5
    assert histogram.threshold(0.0) == 0.0
    # F(1) - F(1-) = 2/5: dropping 1/5 (below 1) or 3/5 (up to 1); 0.3 is nearer to 0.2
    assert histogram.fraction_below(histogram.threshold(0.3)) == pytest.approx(0.2)
    assert histogram.rebinned(torch.tensor([0.0, 0.5, 1.5, 10.0])).tolist() == [1, 2, 2]


def test_of_two_thresholds_that_miss_alike_the_lower_counts() -> None:
    histogram = Histogram()
    histogram.add(torch.tensor([0.5, 1.0, 1.0, 2.0]))  # a half is as far from a quarter as from three quarters
    assert histogram.threshold(0.5) == 1.0


def test_overall_sparsity_counts_modules_by_their_weights(llama: torch.nn.Module) -> None:
    mlp, key = "model.layers.0.mlp", "model.layers.1.self_attn.k_proj"
    weights = {mlp: 3 * 32 * 88, key: 32 * 16}
    expected = (0.9 * weights[mlp] + 0.1 * weights[key]) / sum(weights.values())
    assert overall_sparsity(llama, {mlp: 0.9, key: 0.1}) == pytest.approx(expected)


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        Histogram().add(torch.tensor([float("nan")]))


def gate_values(model: torch.nn.Module, batches: list) -> dict[str, torch.Tensor]:
    seen: dict[str, list[torch.Tensor]] = {}
    observe(model, batches, lambda _site, name, values: seen.setdefault(name, []).append(values))
    return {name: torch.cat(values) for name, values in seen.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calibrate_several_targets_in_one_pass(dtype: torch.dtype, batches: list) -> None:
    model = tiny_model().to(dtype)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    made = cats.calibrate(model, batches, sparsity=[0.5, 0.7, 0.9])
    assert len(calls) == len(batches)
    values = gate_values(model, batches)
    for sparsity, thresholds in made.items():
        assert thresholds.tokens == 4 * 4 * 48
        for name, threshold in thresholds.gate.items():
            # bfloat16 has ties, which no threshold can split: allow the mass of one value
            allowed = 1e-3 if dtype == torch.float32 else 6e-3
            assert abs(fraction_below(values[name], threshold) - sparsity) < allowed
    assert len(made[0.5].gate) == 3


def test_gate_values_are_silu_of_the_projection(batches: list) -> None:
    model = tiny_model()
    seen: list[torch.Tensor] = []
    mlp = model.model.layers[1].mlp
    mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    values = gate_values(model, batches)["model.layers.1.mlp"]
    x = torch.cat([s.reshape(-1, 32) for s in seen]).double()
    gate = x @ mlp.gate_proj.weight.double().T
    assert torch.allclose(values.double(), gate * torch.sigmoid(gate), atol=1e-5)


def test_attention_mask_leaves_padding_out(llama: torch.nn.Module) -> None:
    ids = torch.randint(0, 64, (2, 10), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([ids, torch.full((2, 30), 5)], dim=1)
    mask = torch.cat([torch.ones(2, 10), torch.zeros(2, 30)], dim=1).long()
    plain = cats.calibrate(llama, [ids])
    masked = cats.calibrate(llama, [{"input_ids": padded, "attention_mask": mask}])
    assert masked.tokens == plain.tokens == 20
    assert masked.gate == pytest.approx(plain.gate, rel=2e-3)


def test_heldout_sparsity_is_near_the_target() -> None:
    model = tiny_model()
    generator = torch.Generator().manual_seed(3)
    train, heldout = ([torch.randint(0, 64, (8, 64), generator=generator) for _ in range(12)] for _ in range(2))
    for target, thresholds in cats.calibrate(model, train, sparsity=[0.5, 0.9]).items():
        cats.apply(model, thresholds)
        for name, fraction in cats.measure_sparsity(model, heldout).items():
            assert abs(fraction - target) < 0.01, name
    cats.remove(model)


def test_input_sites(llama: torch.nn.Module, batches: list) -> None:
    thresholds = cats.calibrate(llama, batches, 0.5, sites=("gate", "attention_input", "mlp_input"))
    assert set(thresholds.attention_input) == {f"model.layers.{i}.self_attn" for i in range(3)}
    seen: list[torch.Tensor] = []
    llama.model.layers[2].self_attn.q_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    for batch in batches:
        llama(**batch)
    threshold = thresholds.attention_input["model.layers.2.self_attn"]
    assert abs(fraction_below(torch.cat(seen), threshold) - 0.5) < 2e-3
    cats.apply(llama, thresholds)
    seen.clear()
    llama(**batches[0])
    assert 0.3 < float((seen[0] == 0).double().mean()) < 0.7
    cats.apply(llama, cats.calibrate(llama, batches, 0.5))
    seen.clear()
    llama(**batches[0])
    assert not (seen[0] == 0).any()


def test_thresholds_file(tmp_path, llama: torch.nn.Module, batches: list) -> None:
    thresholds = cats.calibrate(llama, batches)
    path = tmp_path / "a folder" / "t.json"
    thresholds.save(path)
    assert cats.Thresholds.load(path) == thresholds
    data = json.loads(path.read_text())
    for change in (
        {"format": "other"},
        {"sparsity": 1.5},
        {"gate": {"a": -1}},
        {"gate": {"a": "b"}},
        {"extra": 1},
        {"model": "x"},
        {"tokens": "many"},
    ):
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(ValueError, match="not a CATS thresholds file"):
            cats.Thresholds.load(path)
    path.write_text("not json")
    with pytest.raises(ValueError, match="not a CATS thresholds file"):
        cats.Thresholds.load(path)


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 2, "half"])
def test_sparsity_outside_is_refused(llama: torch.nn.Module, batches: list, sparsity) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        cats.calibrate(llama, batches, sparsity=[sparsity])


@pytest.mark.parametrize("several", [np.array([0.25, 0.5]), torch.tensor([0.25, 0.5]), (np.float32(0.25), 0.5)])
def test_numbers_of_numpy_and_torch_are_sparsities(llama: torch.nn.Module, batches: list, several, tmp_path) -> None:
    expected = cats.calibrate(llama, batches, [0.25, 0.5])
    assert cats.calibrate(llama, batches, several) == expected
    for one in (np.float32(0.25), torch.tensor(0.25)):
        made = cats.calibrate(llama, batches, one)
        made.save(tmp_path / "t.json")
        assert made == cats.Thresholds.load(tmp_path / "t.json") == expected[0.25]


def test_sites_of_several_criteria_may_come_from_a_generator(llama: torch.nn.Module, batches: list) -> None:
    sites = ("gate", "mlp_input")
    made = cats.calibrate(llama, batches, 0.5, sites=(site for site in sites), criterion=["cats", "chess"])
    assert {name: tuple(thresholds.sites) for name, thresholds in made.items()} == {"cats": sites, "chess": sites}


def test_bad_batches(llama: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        cats.calibrate(llama, [])
    with pytest.raises(TypeError, match="input_ids"):
        cats.calibrate(llama, [{"ids": torch.zeros(1, 1)}])
    with pytest.raises(ValueError, match="unknown sites"):
        cats.calibrate(llama, [torch.zeros(1, 4, dtype=torch.long)], sites=("down",))
    with pytest.raises(ValueError, match=r"sites must be a tuple of names, not the string 'gate'"):
        cats.calibrate(llama, [torch.zeros(1, 4, dtype=torch.long)], sites="gate")
    with pytest.raises(TypeError, match=r"one batch alone must be in a list: \[batch\]"):
        cats.calibrate(llama, {"input_ids": torch.zeros(1, 4, dtype=torch.long)})
    with pytest.raises(TypeError, match=r"one batch alone must be in a list: \[batch\]"):
        cats.measure_sparsity(llama, {"input_ids": torch.zeros(1, 4, dtype=torch.long)})
    with pytest.raises(TypeError, match="input_ids of a batch must be a tensor or rows of equal length"):
        cats.calibrate(llama, [{"input_ids": [[1, 2], [3]]}])
    with pytest.raises(ValueError, match="attention_mask must have the shape of input_ids"):
        cats.calibrate(llama, [{"input_ids": torch.ones(2, 4).long(), "attention_mask": torch.ones(2, 1, 4, 4)}])


@pytest.mark.parametrize(
    "call",
    [
        lambda model: cats.calibrate(model, [torch.zeros(1, 4, dtype=torch.long)]),
        lambda model: cats.apply(model, cats.Thresholds(0.5, gate={"a": 0.1})),
        lambda model: cats.measure_sparsity(model, [torch.zeros(1, 4, dtype=torch.long)]),
        lambda model: cats.generate(model, torch.zeros(1, 4, dtype=torch.long), max_new_tokens=2),
        lambda model: cats.save_quantized(model, "file"),
        cats.remove,
        cats.quantize,
        cats.dequantize,
    ],
)
def test_a_name_in_place_of_a_model_is_one_sentence(call) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, as from_pretrained loads it, not a str"):
        call("pocket")


def test_lists_are_taken_as_a_tokenizer_returns_them(llama: torch.nn.Module) -> None:
    ids = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]
    mask = [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    tensors = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    assert cats.calibrate(llama, [{"input_ids": ids, "attention_mask": mask}]) == cats.calibrate(llama, [tensors])


def test_each_module_gets_its_own_mode_back(llama: torch.nn.Module, batches: list) -> None:
    llama.train()
    llama.model.layers[0].eval()
    cats.measure_sparsity(llama, batches)
    assert llama.training and llama.model.layers[1].mlp.training
    assert not llama.model.layers[0].mlp.training


def test_a_compiled_model_that_has_run_is_observed(llama: torch.nn.Module, batches: list) -> None:
    expected = cats.calibrate(llama, batches)
    compiled = torch.compile(llama, backend="eager")
    with torch.no_grad():
        compiled(**batches[0], use_cache=False)
    assert cats.calibrate(compiled, batches) == expected
    cats.apply(compiled, expected)
    assert list(cats.measure_sparsity(compiled, batches)) == list(expected.gate)


def test_blocks_that_did_not_run_are_named(llama: torch.nn.Module, batches: list) -> None:
    llama.tower = copy.deepcopy(llama.model.layers[0])
    with pytest.raises(ValueError, match=r"nothing was seen of tower\.mlp:"):
        cats.calibrate(llama, batches)
    with pytest.raises(ValueError, match=r"nothing was seen of tower\.mlp:"):
        cats.measure_sparsity(llama, batches)


def test_a_block_that_sees_some_tokens_only_is_refused_with_a_mask(llama: torch.nn.Module) -> None:
    mlp = llama.model.layers[0].mlp
    mlp.register_forward_pre_hook(lambda _module, args: (args[0].flatten(0, 1)[:3],))
    mlp.register_forward_hook(lambda _module, _args, _output: torch.zeros(2, 5, 32))
    ids = torch.ones(2, 5).long()
    mask = ids.clone()
    mask[0, 0] = 0
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp sees rows of shape \(3,\)"):
        cats.calibrate(llama, [{"input_ids": ids, "attention_mask": mask}])
    # what a tokenizer returns for sequences of one length: nothing is padded, so nothing need be left out
    assert cats.calibrate(llama, [{"input_ids": ids, "attention_mask": ids}]) == cats.calibrate(llama, [ids])


def test_an_offloaded_model_is_calibrated_where_it_computes(llama: torch.nn.Module, batches: list) -> None:
    expected = cats.calibrate(llama, batches)
    accelerate.cpu_offload(llama, execution_device="cpu")
    assert next(llama.parameters()).is_meta
    assert cats.calibrate(llama, batches) == expected


def test_ties_by_hand() -> None:
    histogram = Histogram()
    histogram.add(torch.tensor([1.0] * 60 + [2.0] * 40))
    # dropping 0 % misses a target of 20 % less than dropping 60 % does, and of 50 % more
    assert histogram.fraction_below(histogram.threshold(0.2)) == 0.0
    assert histogram.fraction_below(histogram.threshold(0.5)) == pytest.approx(0.6)
