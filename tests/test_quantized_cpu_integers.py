"""Packed rows multiplied as integers: how exact, what is left to other paths, and processors that cannot."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from cats_kernels import dequantize, quantize
from cats_kernels.cpu import packed
from cats_kernels.cpu.compiling import follow_sources
from cats_kernels.cpu.integers import DOT_BYTES
from cats_kernels.cpu.kernels import dots, scratch_size, serial_kernel
from cats_kernels.cpu.quantized_launch import pack, sparse_gated_mlp_quantized_cpu
from cats_kernels.cpu.team import region_address
from cats_kernels.cpu.vectors import LANES, address_of
from cats_kernels.problem import TOLERANCE, oracle, relative_error
from cats_kernels.quantized_problem import QuantizedProblem
from numba import njit

integers = pytest.mark.skipif(not DOT_BYTES, reason="this processor multiplies no bytes")


@integers
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 23), (torch.bfloat16, 15)])
@pytest.mark.parametrize("form", [(8, None), (8, 32), (8, 128), (4, 32), (4, 64), (4, 128), (4, 256)])
def test_x_in_bytes_is_x(dtype, bits, form):
    """Bytes, steps and offsets by hand, of pieces of very different magnitude and one of zeros."""
    d = 300
    weight = pack(quantize(torch.randn(2, d), *form), dtype)
    x = np.zeros(512, np.float32)
    x[:d] = np.random.default_rng(0).standard_normal(d) * np.float32(10.0) ** (np.arange(d) // 20 - 8)
    x[128:192] = 0
    memory = np.full(packed.row_floats(weight), np.nan, np.float32)
    row = packed.prepare_row(weight, x, memory)
    begin = (row - memory.ctypes.data) // 4
    assert row % 64 == 0 and 0 <= begin < 16
    g, p = weight.groups, weight.pieces
    whole_g, whole_p = -(-g // LANES) * LANES, -(-p // LANES) * LANES
    memory = memory[begin:]
    blocks, columns = -(-weight.row_bytes // 64), 64 * 8 // weight.bits
    assert np.allclose(memory[:g], [x[i * weight.group : (i + 1) * weight.group].sum() for i in range(g)], rtol=1e-5)
    steps = memory[whole_g : whole_g + p].astype(np.float64)
    assert not memory[whole_g + p : whole_g + whole_p].any()  # read with the others: other bits could be subnormal
    words = memory[whole_g + whole_p :].view(np.int32)
    offsets = words[: 16 * blocks * (weight.parts - 1)].reshape(blocks, -1, 16).astype(np.float64)
    digits = words[16 * blocks * (weight.parts - 1) :].view(np.int8)
    digits = digits[: blocks * weight.parts * columns].reshape(blocks, weight.parts, columns)
    whole = sum(256.0 ** (weight.parts - 1 - i) * digits[:, i] for i in range(weight.parts))
    for column in range(d):
        at, group = column, weight.group
        if weight.bits == 4:  # its byte, and whether it is the high nibble
            byte, high = column // group * group // 2 + column % (group // 2), column % group >= group // 2
            at = byte // 64 * 128 + high * 64 + byte % 64
        piece = (column if weight.bits == 8 else 2 * (at // 128 * 64 + at % 64)) // weight.piece
        value = whole.reshape(-1)[at] * steps[piece]
        assert abs(value - x[column]) <= steps[piece] / 2
        assert steps[piece] <= max(np.abs(x).max(), 1e-30) * 2.0 ** (2 - bits)
    lanes = digits.reshape(blocks, weight.parts, -1, 16, 4).sum((2, 4)).astype(np.float64)
    upper = 256 * lanes[:, 0] + lanes[:, 1]
    assert np.array_equal(offsets[:, 0], -(8 if weight.bits == 4 else 128) * upper)
    if weight.parts == 3:
        assert np.array_equal(offsets[:, 1], -(8 if weight.bits == 4 else 128) * lanes[:, 2])


@njit
def listed_products(numbers, index, x, prepared, s):
    weight = packed.from_numbers(numbers, 0, 0, address_of(x), 0)
    row = packed.prepare_row(weight, x[0], prepared)
    memory = np.empty(scratch_size(weight) + LANES, np.float32)
    weight = packed.with_memory(weight, row, packed.aligned(address_of(memory)))
    dots(weight, index, x, s)
    memory[:] = 0  # addresses keep nothing alive: it must live until here
    return row


@pytest.mark.parametrize("count", [4, 8, 20])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("form", [(8, None), (8, 32), (8, 128), (8, 256), (4, 32), (4, 128), (4, 256)])
@pytest.mark.parametrize("d", [512, 300])
def test_products_of_listed_rows(d, form, symmetric, count):
    """In the order of the list, which may have a row twice; what lies around the products is left alone."""
    generator = torch.Generator().manual_seed(count)
    weight = quantize(torch.randn(30, d, generator=generator), *form, symmetric)
    x = np.zeros((1, 512), np.float32)
    x[0, :d] = torch.randn(d, generator=generator).bfloat16().float().numpy()
    index = np.random.default_rng(count).integers(0, 30, count)
    numbers = np.array([*pack(weight, torch.bfloat16)], np.int64)
    s = np.full((1, count + 4), 7, np.float32)
    prepared = np.empty(packed.row_floats(packed.Packed(*numbers)), np.float32)
    assert listed_products(numbers, index, x, prepared, s[:, :count])
    expected = dequantize(weight).double()[torch.from_numpy(index)] @ torch.from_numpy(x[0, :d]).double()
    assert relative_error(torch.from_numpy(s[0, :count]), expected) < 1e-4
    assert (s[0, count:] == 7).all()


@pytest.mark.parametrize("size", [1e-25, 1e-18, 1e-6, 1e6, 1e12])
@pytest.mark.parametrize("form", [(8, None), (4, 128)])
def test_x_of_any_magnitude(size, form):
    made = QuantizedProblem(300, 90, 1, *form)
    x = made.x * size
    weights = [made.weights[0], made.weights[1], made.weights[2]]
    scaled = [quantize(weight / size, *form) for weight in made.original[:2]] + [weights[2]]
    y = sparse_gated_mlp_quantized_cpu(x, *scaled, 0.0)
    assert relative_error(y, oracle(x.double(), *(dequantize(w).double() for w in scaled), 0.0)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [(8, None), (8, 128), (4, 32), (4, 128)])
def test_one_column_much_larger_than_the_others(dtype, form):
    """As the hidden states of language models have them."""
    made = QuantizedProblem(512, 90, 1, *form, dtype=dtype)
    made.x[0, 77] = 100.0
    threshold = made.threshold(0.5)
    y = sparse_gated_mlp_quantized_cpu(*made.quantized_arguments(threshold))
    assert relative_error(y, oracle(made.x, *made.arguments(threshold)[1:])) < TOLERANCE[dtype]


OTHER_PROCESSOR = """
import torch
from cats_kernels.cpu.integers import DOT_BYTES
from cats_kernels.cpu.quantized_launch import sparse_gated_mlp_quantized_cpu
from cats_kernels.cpu.vectors import LANES
from cats_kernels.cpu.vectors import LANES, address_of
from cats_kernels.problem import TOLERANCE
from cats_kernels.quantized_problem import QuantizedProblem
assert (LANES, DOT_BYTES) == (8, False)
for form in ((8, None), (8, 32), (4, 32), (4, 128)):
    for dtype in (torch.float32, torch.bfloat16):
        for d, symmetric in ((300, False), (512, True)):
            made = QuantizedProblem(d, 300, 1, *form, symmetric=symmetric, dtype=dtype)
            threshold = made.threshold(0.5)
            error = made.error(sparse_gated_mlp_quantized_cpu(*made.quantized_arguments(threshold)), threshold)
            assert error < TOLERANCE[dtype], (form, dtype, d, error)
print("fine")
"""


@pytest.mark.skipif(not DOT_BYTES, reason="the other tests cover it here")
def test_a_processor_that_multiplies_no_bytes():
    chosen = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+bmi,+bmi2,+f16c,+lzcnt,+popcnt"}
    command = [sys.executable, "-c", OTHER_PROCESSOR]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **chosen}, timeout=600)
    assert done.stdout == "fine\n", done.stderr[-2000:]


def test_numba_threads_compute_the_same():
    """Where torch has no threads that can be called."""
    code = """
import sys, torch
from cats_kernels.cpu.quantized_launch import sparse_gated_mlp_quantized_cpu
from cats_kernels.quantized_problem import QuantizedProblem
made = QuantizedProblem(256, 1500, 1, 4, 32)
torch.set_num_threads(2)
y = sparse_gated_mlp_quantized_cpu(*made.quantized_arguments(made.threshold(0.5)))
torch.set_num_threads(1)
assert torch.equal(y, sparse_gated_mlp_quantized_cpu(*made.quantized_arguments(made.threshold(0.5))))
print("fine")
"""
    environment = {**os.environ, "NUMBA_THREADING_LAYER": "workqueue"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600)
    assert done.stdout == "fine\n", done.stderr[-2000:]
    assert region_address() is not None or os.environ.get("NUMBA_THREADING_LAYER")


def test_an_index_of_classes_that_are_gone_is_forgotten(monkeypatch):
    """Numba's own would fail at the first call after a class in a signature has moved."""
    cache = serial_kernel._cache._cache_file

    class Stale:
        _source_stamp = ""

        @staticmethod
        def _load_index():
            raise AttributeError("Can't get attribute 'Packed'")

    class Compiled:
        class _cache:
            _cache_file = Stale()

    follow_sources(Compiled)
    assert Compiled._cache._cache_file._load_index() == {}
    assert cache._source_stamp == Compiled._cache._cache_file._source_stamp


def test_the_default_dtype_does_not_matter():
    made = QuantizedProblem(300, 90, 1, 4, 32)
    expected = sparse_gated_mlp_quantized_cpu(*made.quantized_arguments(0.1))
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(sparse_gated_mlp_quantized_cpu(*made.quantized_arguments(0.1)), expected)
    finally:
        torch.set_default_dtype(torch.float32)
