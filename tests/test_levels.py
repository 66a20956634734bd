"""Thresholds with a level per layer: applied and calibrated again, each layer keeps its own."""

import pytest
import torch

import cats
from cats.finetuning import recalibrate
from tests.conftest import tiny_model

FIRST, SECOND, THIRD = (f"model.layers.{i}.mlp" for i in range(3))
LEVELS = {FIRST: 0.3, SECOND: 0.7, THIRD: 0.5}


def batches():
    return list(torch.randint(0, 64, (8, 24), generator=torch.Generator().manual_seed(3)))


def with_levels(model, criterion="cats", sites=None, levels=LEVELS):
    """Thresholds of each MLP at its own level, put together by hand."""
    made = cats.calibrate(model, batches(), [0.3, 0.5, 0.7], sites, criterion)
    own = {}
    for level in made:
        for site, values in made[level].sites.items():
            kept = {n: v for n, v in values.items() if next((k for m, k in levels.items() if m in n), 0.5) == level}
            own[site] = own.get(site, {}) | kept
    return cats.Thresholds(0.5, model=made[0.5].model, criterion=criterion, levels=levels, **own)


def drift(model):
    """Other gate and up weights, so that the values under the thresholds are others."""
    for name, parameter in model.named_parameters():
        if "gate_proj" in name or "up_proj" in name:
            parameter.data.mul_(1.5)


@pytest.mark.parametrize("criterion", ["cats", "gate_norm", "auto", "oracle", "random"])
def test_recalibrate_keeps_the_level_of_each_layer(criterion):
    model = tiny_model()
    applied = with_levels(model, criterion.replace("_", "-"))
    cats.apply(model, applied, kernel="reference")
    drift(model)
    for _ in range(3):  # later layers see other inputs once the earlier ones have moved
        thresholds = recalibrate(model, batches(), 0.5)
    assert (thresholds.sparsity, thresholds.levels) == (0.5, LEVELS)
    torch.manual_seed(0)
    measured = cats.measure_sparsity(model, batches())
    assert measured == pytest.approx(LEVELS, abs=0.02)
    if criterion in ("cats", "gate_norm"):
        assert thresholds != applied


def test_a_layer_without_a_level_keeps_the_target_of_all():
    model = tiny_model()
    cats.apply(model, with_levels(model, levels={SECOND: 0.7}), kernel="reference")
    drift(model)
    for _ in range(3):
        thresholds = recalibrate(model, batches(), 0.5)
    assert thresholds.levels == {SECOND: 0.7}
    assert cats.measure_sparsity(model, batches()) == pytest.approx({FIRST: 0.5, SECOND: 0.7, THIRD: 0.5}, abs=0.02)


def test_levels_hold_for_inputs_of_a_block_and_of_its_linear_layers():
    for criterion, sites in (("cats", ("gate", "attention_input", "mlp_input")), ("teal", None)):
        model = tiny_model()
        cats.apply(model, with_levels(model, criterion, sites), kernel="reference")
        expected = {level: cats.calibrate(model, batches(), level, sites, criterion) for level in (0.3, 0.5)}
        thresholds = recalibrate(model, batches(), 0.5)
        for site, values in thresholds.sites.items():
            for name, value in values.items():
                level = 0.3 if name.startswith(FIRST) else 0.5
                if "layers.0" in name:
                    assert value == expected[level].sites[site][name], (site, name)


def test_another_target_than_that_of_the_levels_is_refused_and_levels_go_with_new_thresholds():
    model = tiny_model()
    cats.apply(model, with_levels(model), kernel="reference")
    with pytest.raises(ValueError, match=r"levels of their own, made for the target 0\.5: .* not at 0\.7"):
        recalibrate(model, batches(), 0.7)
    with pytest.raises(ValueError, match=r"sparsity must be a number in \[0, 1\)"):
        recalibrate(model, batches(), 1.0)
    cats.apply(model, cats.calibrate(model, batches(), 0.3), kernel="reference")
    assert recalibrate(model, batches(), 0.7).levels == {}
