"""Sixteen packed rows added in integers: how exact, the order of the columns, and what is left to another path."""

import math

import numpy as np
import pytest
import torch
from cats_kernels import dequantize, quantize
from cats_kernels.cpu.integers import DOT_BYTES
from cats_kernels.cpu.quantized_launch import pack, sparse_gated_mlp_quantized_cpu
from cats_kernels.problem import TOLERANCE, relative_error
from cats_kernels.quantized_problem import QuantizedProblem
from numba import njit

if not DOT_BYTES:
    pytest.skip("this processor multiplies no bytes", allow_module_level=True)

from cats_kernels.cpu.packed import from_numbers
from cats_kernels.cpu.packed_sums import packed_sums, sum_floats, sums_rows
from cats_kernels.cpu.vectors import address_of

FORMS = [(8, None), (8, 64), (8, 128), (8, 256), (4, 128), (4, 256)]


@njit
def run(numbers, index, h, y):
    weight = from_numbers(numbers, 0, 0, 0, 0)
    memory = np.empty(sum_floats(weight), np.float32)
    added = packed_sums(weight, index, h, index.size, address_of(memory), address_of(y))
    memory[:] = 0
    return added


@njit
def takes(numbers):
    return sums_rows(from_numbers(numbers, 0, 0, 0, 0))


def numbers_of(weight, dtype=torch.bfloat16):
    return np.array([*pack(weight, dtype)], np.int64)


def add(weight, index, h, start=0.0):
    """How many rows were added, and y, which began with ``start``."""
    y = np.full(weight.d + -weight.d % 256, start, np.float32)
    added = run(numbers_of(weight), np.array(index), np.array(h, np.float32), y)
    return added, torch.from_numpy(y[: weight.d])


@pytest.mark.parametrize("count", [4, 12, 16, 20, 52])
@pytest.mark.parametrize("form", FORMS)
def test_sums_are_those_of_dequantised_rows(form, count):
    generator = np.random.default_rng(count)
    weight = quantize(torch.randn(60, 512), *form)
    index, h = generator.permutation(60)[:count], generator.standard_normal(count).astype(np.float32)
    added, y = add(weight, index, h, 1.0)
    assert added == count
    expected = 1 + torch.from_numpy(h).double() @ dequantize(weight).double()[torch.from_numpy(index)]
    assert relative_error(y, expected) < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_extreme_numbers_do_not_overflow(form):
    """Sixteen rows of the largest magnitude, all with the largest coefficient, of either sign."""
    rows = torch.full((16, 256), -1.0)
    rows[:, 1::2] = 7 / 8 if form[0] == 4 else 1.0
    weight = quantize(rows, *form)
    for sign in (1.0, -1.0):
        added, y = add(weight, range(16), [sign] * 16)
        assert added == 16
        assert relative_error(y, sign * dequantize(weight).double().sum(0)) < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_every_group_has_its_own_step(form):
    """Columns whose scales are a million times smaller are as exact as the others."""
    rows = torch.randn(16, 512)
    if form[1] is not None:
        rows[:, 256:] *= 1e-6
    weight = quantize(rows, *form)
    h = torch.randn(16)
    _, y = add(weight, range(16), h)
    expected = h.double() @ dequantize(weight).double()
    for part in (slice(0, 256), slice(256, 512)):
        assert relative_error(y[part], expected[part]) < 1e-4


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e35, 1e-25])
def test_what_has_no_fixed_point_is_left(value):
    """All sixteen that are added together, and what follows."""
    weight = quantize(torch.randn(40, 256), 4, 128)
    h = np.ones(40, np.float32)
    h[16:32] = value
    added, y = add(weight, range(40), h)
    assert added == 16
    assert relative_error(y, dequantize(weight).double()[:16].sum(0)) < 1e-4


@pytest.mark.parametrize("place", range(16))
def test_a_scale_that_is_nan_is_seen_in_any_row(place):
    weight = quantize(torch.randn(16, 256), 4, 128)
    weight.scales[place, 1] = math.nan
    assert add(weight, range(16), [1.0] * 16)[0] == 0


@pytest.mark.parametrize(("largest", "added"), [(100.0, 16), (1e5, 0)])
def test_small_rows_are_not_lost_beside_a_large_one(largest, added):
    """Where the large row is zero the others are what is left, to bfloat16 at least."""
    rows = torch.randn(16, 256)
    rows[3, ::2] = 0
    weight = quantize(rows, 4, 128)
    h = torch.ones(16)
    h[3] = largest
    now, y = add(weight, range(16), h)
    assert now == added
    if added:
        expected = (h.double() @ dequantize(weight).double())[::2]
        assert relative_error(y[::2], expected) < 2**-8


def test_a_sixteen_of_zeros():
    weight = quantize(torch.randn(16, 256), 4, 128)
    added, y = add(weight, range(16), [0.0] * 16)
    assert added == 16 and not y.any()


def test_which_weights_are_added_so():
    for form in FORMS:
        assert takes(numbers_of(quantize(torch.randn(4, 512), *form)))
        assert not takes(numbers_of(quantize(torch.randn(4, 512), *form), torch.float32))
    for d, form in ((512, (8, 32)), (512, (4, 32)), (512, (4, 64)), (300, (8, None))):
        assert not takes(numbers_of(quantize(torch.randn(4, d), *form)))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_in_the_operator_with_rows_that_are_left(form, symmetric):
    """A neuron with infinity gives what the path of four rows gives; the others as ever."""
    made = QuantizedProblem(512, 600, 1, *form, symmetric=symmetric, dtype=torch.bfloat16)
    threshold = made.threshold(0.5)
    y = sparse_gated_mlp_quantized_cpu(*made.quantized_arguments(threshold))
    assert made.error(y, threshold) < TOLERANCE[torch.bfloat16]
    _, up, down_t = made.weights
    kept = int(made.kept(threshold)[0].nonzero()[40])
    down_t.scales[kept] *= 0
    if not symmetric:
        down_t.zeros[kept] = 0
    without = sparse_gated_mlp_quantized_cpu(*made.quantized_arguments(threshold)).float()
    up.scales[kept] = 1e34
    with_large = sparse_gated_mlp_quantized_cpu(*made.quantized_arguments(threshold)).float()
    assert relative_error(with_large, without.double()) < TOLERANCE[torch.bfloat16]
