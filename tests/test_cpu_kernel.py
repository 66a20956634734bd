"""The CPU kernels against an independent float64 oracle: any shape, both dtypes, and the cases that break kernels."""

import math

import numpy as np
import pytest
import torch
from cats_kernels import cpu_kernels, sparse_gated_mlp, sparse_gated_mlp_reference
from cats_kernels.cpu import DENSE_ROWS, sparse_gated_mlp_cpu
from cats_kernels.cpu_variants import VARIANTS
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.mlp_cases import TOLERANCE, clear_threshold, error, inputs, oracle, same_pattern, weights

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@settings(max_examples=60, deadline=None)
@given(
    d=st.integers(1, 130),
    m=st.integers(1, 300),
    rows=st.integers(1, 8),
    sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(["silu", "gelu_tanh"]),
    seed=st.integers(0, 1000),
)
@example(d=1, m=1, rows=1, sparsity=0.0, dtype=torch.bfloat16, activation="silu", seed=0)
@example(d=1, m=257, rows=8, sparsity=0.5, dtype=torch.float32, activation="silu", seed=0)
def test_any_shape(d, m, rows, sparsity, dtype, activation, seed):
    x, parameters = inputs(rows, d, dtype, seed), weights(d, m, dtype, seed + 1)
    threshold = 0.0 if sparsity == 0 else clear_threshold(x, parameters[0], sparsity, activation)
    y = sparse_gated_mlp_cpu(x, *parameters, threshold, activation)
    assert y.shape == x.shape and y.dtype == dtype
    assert error(y, oracle(x, *parameters, threshold, activation)) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.97, 1.0])
def test_variants_agree_with_the_oracle(name, rows, sparsity):
    x, parameters = inputs(rows, 70), weights(70, 300)
    threshold = clear_threshold(x, parameters[0], sparsity)
    assert error(VARIANTS[name](x, *parameters, threshold), oracle(x, *parameters, threshold)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_rows_are_taken_in_pieces(dtype):
    x, parameters = inputs(8, 2500, dtype), weights(2500, 20, dtype)
    threshold = clear_threshold(x, parameters[0], 0.5)
    y = sparse_gated_mlp_cpu(x, *parameters, threshold)
    assert error(y, oracle(x, *parameters, threshold)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [9, 20, 70])
def test_many_rows(dtype, rows):
    x, parameters = inputs(rows, 32, dtype), weights(32, 48, dtype)
    threshold = clear_threshold(x, parameters[0], 0.5)
    y = sparse_gated_mlp_cpu(x, *parameters, threshold)
    assert error(y, oracle(x, *parameters, threshold)) < TOLERANCE[dtype]


def test_above_the_crossover_the_dense_path_runs(monkeypatch):
    x, parameters = inputs(DENSE_ROWS[torch.float32] + 1, 8), weights(8, 8)
    monkeypatch.setattr("cats_kernels.cpu.cats_kernel", None)
    assert torch.equal(sparse_gated_mlp_cpu(x, *parameters, 0.1), sparse_gated_mlp_reference(x, *parameters, 0.1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_ties_are_kept(name, dtype):
    # the gate inputs 4 and 3.5 are exact in both dtypes and in every order of summation
    x = torch.tensor([[1.0, 2.0, 1.0]]).to(dtype)
    gate = torch.tensor([[2.0, 1.0, 0.0], [2.0, 0.5, 0.5]]).to(dtype)
    up = torch.ones(2, 3).to(dtype)
    down_t = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).to(dtype)
    tie = float(cpu_kernels.activate(np.float32(4), False))  # the kernel's own float32 value of SiLU(4)
    if name == "gather":
        tie = torch.nn.functional.silu(torch.tensor(4.0, dtype=dtype)).item()
    kept = VARIANTS[name](x, gate, up, down_t, tie)
    assert kept[0, 0].item() == pytest.approx(4 * tie, rel=1e-2) and kept[0, 1] == 0
    above = float(np.nextafter(np.float32(tie), np.float32(math.inf)))
    assert VARIANTS[name](x, gate, up, down_t, above).eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("values", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf], [math.nan, math.inf]])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 1e30])
def test_nan_and_infinity_as_the_reference(dtype, activation, values, threshold):
    x, parameters = inputs(3, 40, dtype), weights(40, 50, dtype)
    healthy = sparse_gated_mlp_cpu(x, *parameters, threshold, activation)
    x[1, : len(values)] = torch.tensor(values, dtype=dtype)
    y = sparse_gated_mlp_cpu(x, *parameters, threshold, activation)
    assert same_pattern(y, sparse_gated_mlp_reference(x, *parameters, threshold, activation))
    assert not y[1].isfinite().all()
    assert torch.equal(y[[0, 2]], healthy[[0, 2]])  # the other rows are untouched


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_infinity_that_stays_infinity(dtype, sign):
    x = torch.full((1, 3), math.inf).to(dtype)
    gate, up = torch.ones(1, 3).to(dtype), torch.ones(1, 3).to(dtype)
    down_t = (sign * torch.ones(1, 3)).to(dtype)
    y = sparse_gated_mlp_cpu(x, gate, up, down_t, 0.5)
    assert y.tolist() == [[sign * math.inf] * 3]
    assert same_pattern(y, sparse_gated_mlp_reference(x, gate, up, down_t, 0.5))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rows", [1, 2])
def test_broken_weights(value, rows):
    x, (gate, up, down_t) = inputs(rows, 16), weights(16, 33)
    gate[4, 2] = value
    arguments = (x, gate, up, down_t, 0.2)
    assert same_pattern(sparse_gated_mlp_cpu(*arguments), sparse_gated_mlp_reference(*arguments))
    gate, up, down_t = weights(16, 33)
    up[:, 0] = value  # dropped neurons must not bring it in, kept ones must
    dropped = sparse_gated_mlp_cpu(x, gate, up, down_t, 1e9)
    assert dropped.eq(0).all()
    arguments = (x, gate, up, down_t, clear_threshold(x, gate, 0.5))
    assert same_pattern(sparse_gated_mlp_cpu(*arguments), sparse_gated_mlp_reference(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 8])
def test_bit_identical_from_run_to_run_at_any_number_of_threads(dtype, rows):
    x, parameters = inputs(rows, 300, dtype), weights(300, 1100, dtype)
    results = []
    for threads in (1, 2, 2, 1):
        torch.set_num_threads(threads)
        results.append(sparse_gated_mlp_cpu(x, *parameters, 0.1))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_uses_as_many_threads_as_torch_and_fewer_for_little_work():
    import numba
    from cats_kernels.cpu import WEIGHTS_PER_THREAD, set_threads

    torch.set_num_threads(2)
    many = min(2, numba.config.NUMBA_NUM_THREADS)
    assert set_threads(100 * WEIGHTS_PER_THREAD) == numba.get_num_threads() == many
    assert set_threads(100) == numba.get_num_threads() == 1
    torch.set_num_threads(1)
    assert set_threads(100 * WEIGHTS_PER_THREAD) == 1


def test_unused_rows_are_not_read():
    """Rows of up and down that are dropped may hold anything: the point of the kernel, seen without a clock."""
    x, (gate, up, down_t) = inputs(1, 32), weights(32, 600)
    threshold = clear_threshold(x, gate, 0.7)
    before = sparse_gated_mlp_cpu(x, gate, up, down_t, threshold)
    dropped = torch.nn.functional.silu(x @ gate.T)[0].abs() < threshold
    assert 0.6 < dropped.float().mean() < 0.8
    up[dropped] = math.nan
    down_t[dropped] = math.nan
    assert torch.equal(sparse_gated_mlp_cpu(x, gate, up, down_t, threshold), before)


def test_parameters_that_require_gradients_work_without_them():
    x, parameters = inputs(1, 16), weights(16, 20)
    expected = sparse_gated_mlp_cpu(x, *parameters, 0.1)
    with torch.no_grad():
        y = sparse_gated_mlp(x, *(torch.nn.Parameter(w) for w in parameters), 0.1, backend="cpu")
    assert torch.equal(y, expected)


def test_compiles_without_a_cache_where_none_can_be_written(monkeypatch):
    def no_cache(cache: bool = False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(cpu_kernels, "njit", no_cache)
    assert cpu_kernels.jit()(len) is len
