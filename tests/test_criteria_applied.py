"""Criteria on a patched model: from one to another and back, decoding alone, and what is refused."""

import copy

import pytest
import torch
from torch import nn

import cats
from tests.criteria_cases import MASKS, NEURONS, values


@pytest.mark.parametrize("name", NEURONS)
def test_the_kernel_serves_every_neuron_criterion(name: str, llama: nn.Module, batches: list, operator_calls) -> None:
    cats.apply(llama, cats.calibrate(llama, batches, 0.6, criterion=name), kernel="cpu")
    with torch.no_grad():
        llama(batches[0]["input_ids"][:1, :1])
    assert operator_calls == ["cpu"] * 3


@pytest.mark.parametrize("name", [*MASKS, "relufication"])
def test_criteria_without_a_kernel_say_so(name: str, llama: nn.Module, batches: list, operator_calls: list) -> None:
    thresholds = cats.calibrate(llama, batches, 0.5, criterion=name)
    with pytest.raises(ValueError, match=rf'kernel="cpu" cannot serve model\.layers\.0\.mlp: {name} runs as'):
        cats.apply(llama, thresholds, kernel="cpu")
    assert not hasattr(llama.model.layers[0].mlp, "cats_state")
    with pytest.warns(UserWarning, match=f"dense masked path, without speed-up .*{name} runs as"):
        cats.apply(llama, thresholds)
    with torch.no_grad():
        llama(batches[0]["input_ids"][:1, :1])
    assert operator_calls == []


def test_a_patched_model_changes_from_criterion_to_criterion(llama: nn.Module, batches: list) -> None:
    ids = batches[0]["input_ids"][:1, :6]
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    modules = {name: type(module) for name, module in llama.named_modules()}
    with torch.no_grad():
        dense = llama(ids).logits
    made = cats.calibrate(llama, batches, 0.6, criterion=("cats", "up-norm", "oracle", "teal"))
    for name in ("cats", "up-norm", "teal", "oracle", "up-norm", "cats"):
        fresh = copy.deepcopy(llama)
        cats.remove(fresh)
        for model in (fresh, llama):
            cats.apply(model, made[name], "auto" if name in NEURONS else "reference")
        with torch.no_grad():
            assert torch.equal(fresh(ids).logits, llama(ids).logits)
        assert list(llama.state_dict()) == list(before)
    cats.remove(llama)
    assert {name: type(module) for name, module in llama.named_modules()} == modules
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    with torch.no_grad():
        assert torch.equal(llama(ids).logits, dense)


def test_dead_neurons_are_skipped_and_never_nan(llama: nn.Module, batches: list) -> None:
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[5] = 0
        llama.model.layers[1].mlp.down_proj.weight[:, 7] = 0
    ids = batches[0]["input_ids"]
    for name in ("chess", "gate-norm"):
        vector = cats.calibrate(llama, batches, 0.5, criterion=name).gate["model.layers.1.mlp"]
        assert vector[5] == torch.inf and not vector.isnan().any()
        assert (vector[7] == torch.inf) == (name == "gate-norm")
        cats.apply(llama, cats.calibrate(llama, batches, 0.0, criterion=name))
        with torch.no_grad():
            kept = llama(ids).logits
        cats.remove(llama)
        with torch.no_grad():
            assert torch.allclose(kept, llama(ids).logits, atol=1e-4)  # at 0 all is kept


@pytest.mark.parametrize("name", ["cats", "up-norm", "teal", "oracle"])
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_dense_prefill_masks_decoding_only(name: str, kernel: str, llama: nn.Module, batches: list) -> None:
    if kernel == "auto" and name not in NEURONS:
        pytest.skip("no kernel")
    sites = ("mlp_linears", "attention_linears") if name == "teal" else None
    thresholds = cats.calibrate(llama, batches, 0.7, sites, name)
    ids = batches[0]["input_ids"][:2]
    with torch.no_grad():
        dense = {length: llama(ids[:, :length]).logits for length in (8, 9, 40)}
        cats.apply(llama, thresholds, kernel)
        masked = {length: llama(ids[:, :length]).logits for length in (8, 9, 40)}
        measured = cats.measure_sparsity(llama, batches)
        cats.apply(llama, thresholds, kernel, prefill="dense")
        for length in (9, 40):
            assert torch.equal(llama(ids[:, :length]).logits, dense[length])
        assert torch.equal(llama(ids[:, :8]).logits, masked[8])
        assert not torch.allclose(masked[9], dense[9], atol=1e-2)
        cache = llama(ids[:, :40], use_cache=True).past_key_values
        step = llama(ids[:, 40:41], past_key_values=cache).logits
        full = llama(ids[:, :41]).logits[:, -1:]
        assert not torch.allclose(step, full, atol=1e-2)  # one token more is masked
    assert cats.measure_sparsity(llama, batches) == measured  # what decoding skips
    llama.train()
    hidden = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(0))
    mlp = llama.model.layers[0].mlp
    torch.manual_seed(0)
    trained = mlp(hidden)
    cats.apply(llama, thresholds, kernel)
    torch.manual_seed(0)
    assert torch.equal(mlp(hidden), trained)  # training masks every token
    with pytest.raises(ValueError, match="unknown prefill 'none': allowed are sparse, dense"):
        cats.apply(llama, thresholds, prefill="none")


def test_sparsity_of_several_rows_is_that_of_their_union(llama: nn.Module, batches: list) -> None:
    thresholds = cats.calibrate(llama, batches, 0.7)
    cats.apply(llama, thresholds)
    (dropped,) = (
        values(llama, batches[:1], "gate")["model.layers.0.mlp"].abs() < thresholds.gate["model.layers.0.mlp"],
    )
    expected = dropped.reshape(-1, 4, 88).all(1).double().mean()
    assert cats.measure_sparsity(llama, batches[:1], rows=4)["model.layers.0.mlp"] == pytest.approx(float(expected))
    for rows in (0, 1.5, "two"):
        with pytest.raises(ValueError, match="rows must be a whole number of at least 1"):
            cats.measure_sparsity(llama, batches, rows=rows)
    with pytest.raises(ValueError, match="no batch has 500 tokens"):
        cats.measure_sparsity(llama, batches, rows=500)


def test_thresholds_that_do_not_fit_are_refused(llama: nn.Module, batches: list) -> None:
    thresholds = cats.calibrate(llama, batches, criterion="chess")
    short = {name: t[:-1] for name, t in thresholds.gate.items()}
    with pytest.raises(ValueError, match=r"gate has 87 of them for model\.layers\.0\.mlp, which has 88 values"):
        cats.apply(llama, cats.Thresholds(0.5, short, criterion="chess"))
    with pytest.raises(ValueError, match="'up' has no site gate: allowed are up, attention_input, mlp_input"):
        cats.apply(llama, cats.Thresholds(0.5, thresholds.gate, criterion="up"))
    with pytest.raises(ValueError, match="unknown criterion 'nobody'"):
        cats.apply(llama, cats.Thresholds(0.5, thresholds.gate, criterion="nobody"))
    with pytest.raises(ValueError, match=r"they lack model\.layers\.0\.mlp\.gate_proj"):
        cats.apply(llama, cats.Thresholds(0.5, criterion="teal"))
    with pytest.raises(TypeError, match=r"thresholds must be cats\.Thresholds, not a NoneType"):
        cats.apply(llama, None)
    assert not hasattr(llama.model.layers[0].mlp, "cats_state")
