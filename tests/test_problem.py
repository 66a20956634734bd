"""The problems that kernels are tested and timed on: the oracle against a loop, thresholds clear of rounding."""

import math

import pytest
import torch
from cats_kernels.problem import Problem, clear_threshold, oracle, relative_error


@pytest.mark.parametrize("decider", ["gate", "up"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_the_oracle_is_the_formula_neuron_by_neuron(decider, activation):
    made = Problem(12, 20, 3, seed=5, activation=activation, decider=decider)
    vector = made.thresholds(0.5)
    x, gate, up, down_t = (t.double() for t in (made.x, made.gate, made.up, made.down_t))
    expected = torch.zeros(3, 12, dtype=torch.float64)
    for r in range(3):
        for j in range(20):
            g, u = float(x[r] @ gate[j]), float(x[r] @ up[j])
            if activation == "silu":
                v = g / (1 + math.exp(-g))
            else:
                v = 0.5 * g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
            if not abs(v if decider == "gate" else u) < float(vector[j]):
                expected[r] += v * u * down_t[j]
    assert relative_error(oracle(*made.arguments(vector)), expected) < 1e-14
    assert relative_error(made.expected(vector), expected) < 1e-14
    errors = made.errors({0.0: made.expected(0.0), 0.3: made.expected(0.3)})
    assert errors.keys() == {0.0, 0.3} and max(errors.values()) < 1e-14  # the same sum may round otherwise elsewhere
    assert made.error(made.expected(vector) * 1.01, vector) == pytest.approx(0.01)


@pytest.mark.parametrize("decider", ["gate", "up"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_thresholds_are_clear_of_rounding(decider, sparsity):
    made = Problem(64, 500, 4, torch.bfloat16, decider=decider)
    for threshold in (made.threshold(sparsity), made.thresholds(sparsity)):
        assert made.sparsity(threshold) == pytest.approx(sparsity, abs=0.01)
        limit = torch.as_tensor(threshold).double()
        if sparsity:
            assert ((made.magnitude - limit).abs() / limit).min() > 2e-5


def test_something_is_kept_and_something_dropped_between_0_and_1():
    values = torch.tensor([1.0, 2.0, 3.0]).double()
    for sparsity in (0.01, 0.5, 0.99):
        assert 1 < clear_threshold(values, sparsity) < 3
    assert clear_threshold(values, 0) == 0 and clear_threshold(values, 1) > 3


@pytest.mark.parametrize(("decider", "whole"), [("gate", 1), ("up", 1)])
def test_bytes_are_one_weight_whole_and_the_active_rows_of_two(decider, whole):
    made = Problem(8, 10, 2, torch.bfloat16, decider=decider)
    threshold = made.threshold(0.5)
    assert made.bytes_read(threshold) == 8 * 2 * (10 * whole + 2 * made.active(threshold))
    assert made.active(threshold) == int((made.magnitude >= threshold).any(0).sum())
