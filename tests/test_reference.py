"""The plain PyTorch reference against hand-worked numbers and an independent oracle."""

import math

import pytest
import torch
from cats_kernels import gate_activation, sparse_gated_mlp_reference
from cats_kernels.problem import TOLERANCE, inputs, oracle, relative_error, weights

from tests.mlp_cases import gate_threshold


def silu(value: float) -> float:
    return value / (1 + math.exp(-value))


def test_hand_worked_numbers():
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    gate = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)  # gate inputs 1, 2, -1
    up = torch.tensor([[1.0, 1.0], [0.0, 3.0], [5.0, 5.0]], dtype=torch.float64)  # 3, 6, 15
    down_t = torch.tensor([[1.0, 10.0], [2.0, 20.0], [7.0, 7.0]], dtype=torch.float64)
    # |SiLU| is 0.731, 1.762, 0.269: a threshold of 0.5 drops the third neuron
    y = sparse_gated_mlp_reference(x, gate, up, down_t, 0.5)
    expected = [silu(1) * 3 * 1 + silu(2) * 6 * 2, silu(1) * 3 * 10 + silu(2) * 6 * 20]
    assert y.tolist() == [pytest.approx(expected, rel=1e-14)]


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5])
def test_matches_the_oracle(activation, dtype, rows):
    x, parameters = inputs(rows, 24, dtype), weights(24, 40, dtype)
    threshold = gate_threshold(x, parameters[0], 0.5, activation)
    y = sparse_gated_mlp_reference(x, *parameters, threshold, activation)
    assert y.dtype == dtype
    assert relative_error(y, oracle(x, *parameters, threshold, activation)) < TOLERANCE[dtype]


def test_gelu_is_the_tanh_approximation():
    value = torch.tensor(0.7, dtype=torch.float64)
    expected = 0.35 * (1 + math.tanh(math.sqrt(2 / math.pi) * (0.7 + 0.044715 * 0.7**3)))
    assert gate_activation("gelu_tanh")(value).item() == pytest.approx(expected, rel=1e-14)


def test_unknown_activation():
    with pytest.raises(ValueError, match=r"'relu'; allowed: 'silu', 'gelu_tanh'"):
        gate_activation("relu")


def test_ties_are_kept_and_the_next_number_is_not():
    x, gate, up, down_t = torch.ones(1, 1), torch.full((1, 1), 3.0), torch.ones(1, 1), torch.ones(1, 1)
    tie = gate_activation("silu")(torch.tensor(3.0))
    above = torch.nextafter(tie, torch.tensor(math.inf))
    assert sparse_gated_mlp_reference(x, gate, up, down_t, tie.item()).item() == tie.item()
    assert sparse_gated_mlp_reference(x, gate, up, down_t, above.item()).item() == 0


def test_bfloat16_is_compared_in_float32():
    # in bfloat16 a threshold of 0.7300 would round to 0.7305, the activation's own value, and the neuron would stay
    x, one = torch.ones(1, 1).bfloat16(), torch.ones(1, 1).bfloat16()
    value = gate_activation("silu")(one).item()
    threshold = math.nextafter(value, 1) + 1e-4
    assert torch.tensor(threshold).bfloat16().item() == value
    assert sparse_gated_mlp_reference(x, one, one, one, threshold).item() == 0


def test_nan_is_kept_and_a_dropped_neuron_gives_nothing():
    x, (gate, up, down_t) = inputs(1, 8), weights(8, 16)
    broken = x.clone()
    broken[0, 3] = math.nan
    assert sparse_gated_mlp_reference(broken, gate, up, down_t, 1e9).isnan().all()
    up[5] = math.inf
    assert sparse_gated_mlp_reference(x, gate, up, down_t, 1e9).eq(0).all()
