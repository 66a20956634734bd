"""Equations 4 and 5 against hand-worked numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import cats


def test_equation_4_by_hand() -> None:
    v = torch.tensor([-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3])
    expected = torch.tensor([-0.3, -0.2, 0.0, 0.0, 0.0, 0.2, 0.3])  # ties at exactly 0.2 are kept
    assert torch.equal(cats.threshold_activation(v, float(torch.tensor(0.2))), expected)


def test_equation_5_by_hand() -> None:
    activation = cats.CATSActivation(nn.SiLU(), 0.2)
    x = torch.tensor([-1.0, 0.2, 1.0])  # SiLU: -0.2689, 0.1100, 0.7311
    y = activation(x)
    assert y.tolist() == pytest.approx([-1 / (1 + math.e), 0.0, 1 / (1 + math.exp(-1))])


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=30), st.floats(0, 10))
def test_each_element_is_kept_or_zero(values: list[float], threshold: float) -> None:
    v = torch.tensor(values, dtype=torch.float64)
    kept = [x if abs(x) >= threshold else 0.0 for x in values]
    assert cats.threshold_activation(v, threshold).tolist() == kept


def test_bfloat16_is_compared_in_float32() -> None:
    v = torch.tensor([0.100097656], dtype=torch.bfloat16)  # exactly representable
    assert cats.threshold_activation(v, 0.1001).item() == 0.0  # 0.1001 rounded to bfloat16 would tie and keep it
    assert cats.threshold_activation(v, 0.1000).item() == v.item()


def test_nan_and_infinity_stay_visible() -> None:
    y = cats.threshold_activation(torch.tensor([math.nan, math.inf, -math.inf]), 1.0)
    assert math.isnan(y[0]) and y[1] == math.inf and y[2] == -math.inf


def test_gradient_is_masked() -> None:
    v = torch.tensor([0.5, 0.05], requires_grad=True)
    cats.threshold_activation(v, 0.1).sum().backward()
    assert v.grad is not None and v.grad.tolist() == [1.0, 0.0]
