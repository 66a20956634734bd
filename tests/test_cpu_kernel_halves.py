"""One row of bfloat16 x times bfloat16 weights on the CPU: by the processor's own instruction, or widened."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from cats_kernels import sparse_gated_mlp, sparse_gated_mlp_reference
from cats_kernels.cpu.halves import DOT_HALVES
from cats_kernels.cpu.launch import as_array, sparse_gated_mlp_cpu
from cats_kernels.cpu.plain import plain_dots
from cats_kernels.cpu.vectors import features
from cats_kernels.problem import inputs, oracle, weights

from tests.mlp_cases import same_pattern

instruction = pytest.mark.skipif(not DOT_HALVES, reason="this processor does not multiply bfloat16")
PLACES = [0, 31, 32, 39]
"""Columns of 40: in the first vector of 32, and behind it."""


def products(x, weight, index):
    """What `plain_dots` gives, and what it leaves of the memory behind: two arrays of float32."""
    s = np.full((1, len(index) + 4), 7, np.float32)
    plain_dots(as_array(weight), np.array(index), as_array(x.float()), s[:, : len(index)])
    return s[0, : len(index)], s[0, len(index) :]


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64, 95, 300, 4096])
@pytest.mark.parametrize("listed", [4, 8, 12])
def test_products_are_those_of_float64(columns, listed):
    x, weight = inputs(1, columns, torch.bfloat16), weights(columns, 20, torch.bfloat16)[0]
    index = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:listed].tolist()
    s, behind = products(x, weight, index)
    terms = (x.double() * weight[index].double()).numpy()
    additions = columns / 8 + 40  # to each of 8 sums or more, then of these sums and of up to 31 columns behind
    assert (abs(s - terms.sum(1)) <= additions * 2.0**-24 * abs(terms).sum(1)).all()
    assert (behind == 7).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("of_weight", [False, True])
def test_products_with_nan_and_infinity(value, place, of_weight):
    x, weight = inputs(1, 40, torch.bfloat16), weights(40, 8, torch.bfloat16)[0]
    (weight[5] if of_weight else x[0])[place] = value
    (x[0] if of_weight else weight[5])[place] = -4.0  # 3e38 times that overflows
    weight[6, place] = 0.0
    s, _ = products(x, weight, range(8))
    assert same_pattern(torch.from_numpy(s), (x.float() * weight.float()).sum(1))
    assert not np.isfinite(s[5]) and np.isfinite(s[6]) == (of_weight or value == 3e38)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("decider", ["gate", "up"])
@pytest.mark.parametrize("values", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf], [math.nan, math.inf]])
@pytest.mark.parametrize("place", [PLACES[0], PLACES[2]])
def test_one_row_with_nan_and_infinity_as_the_reference(activation, decider, values, place):
    x, parameters = inputs(1, 40, torch.bfloat16), weights(40, 50, torch.bfloat16)
    x[0, place : place + len(values)] = torch.tensor(values)
    arguments = x, *parameters, 0.3, activation, decider
    y = sparse_gated_mlp_cpu(*arguments)
    assert same_pattern(y, sparse_gated_mlp_reference(*arguments))
    assert same_pattern(y, oracle(*arguments))
    assert not y.isfinite().all()


@instruction
def test_denormals_are_zero_to_the_instruction():
    """And so the other tests here are of it."""
    x, weight = torch.ones(1, 33).bfloat16(), torch.zeros(4, 33).bfloat16()
    weight[0, 3] = weight[1, 32] = 1e-39  # column 32 is widened
    weight[2, 3] = 1.25e-38
    s, _ = products(x, weight, range(4))
    assert s.tolist() == [0, float(weight[1, 32]), float(weight[2, 3]), 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_x_of_another_dtype_is_refused(dtype):
    """The kernel would take the upper halves of its numbers."""
    x, parameters = inputs(1, 64, dtype), weights(64, 48, torch.bfloat16)
    with pytest.raises(TypeError, match=f"gate_weight is torch.bfloat16; it must be {dtype} as x is"):
        sparse_gated_mlp(x, *parameters, 0.1)


OTHER_PROCESSOR = """
import torch
from cats_kernels.cpu.halves import DOT_HALVES
from cats_kernels.cpu.launch import sparse_gated_mlp_cpu
from cats_kernels.cpu.vectors import LANES
from cats_kernels.problem import TOLERANCE, Problem
assert (LANES, DOT_HALVES) == (16, False)
for d in (31, 40, 300):
    for decider in ("gate", "up"):
        made = Problem(d, 300, 1, torch.bfloat16, decider=decider)
        threshold = made.threshold(0.5)
        error = made.error(sparse_gated_mlp_cpu(*made.arguments(threshold)), threshold)
        assert error < TOLERANCE[torch.bfloat16], (d, decider, error)
print("fine")
"""


@instruction
def test_a_processor_without_the_instruction():
    chosen = ",".join(f"{'+' if has and name != 'avx512bf16' else '-'}{name}" for name, has in features().items())
    environment = {**os.environ, "NUMBA_CPU_FEATURES": chosen}
    command = [sys.executable, "-c", OTHER_PROCESSOR]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.stdout == "fine\n", done.stderr[-2000:]
