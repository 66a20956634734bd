"""The CPU kernels against an independent float64 oracle: any shape, both dtypes, and the cases that break kernels."""

import math

import numpy as np
import pytest
import torch
from cats_kernels import sparse_gated_mlp, sparse_gated_mlp_reference
from cats_kernels.ablation.cpu import VARIANTS
from cats_kernels.cpu import compiling, kernels
from cats_kernels.cpu.launch import sparse_gated_mlp_cpu
from cats_kernels.dispatch import SPARSE_ROWS
from cats_kernels.problem import TOLERANCE, Problem, inputs, oracle, relative_error, weights
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tests.mlp_cases import gate_threshold, same_pattern, threshold_of_kind

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def cancellation(made):
    """By how much the products of x with W_gate and W_up cancel: an error in their terms, relative to these, is this
    many times as large in y."""
    x, gate, up, down = (weight.double() for weight in (made.x, made.gate, made.up, made.down_t))
    h = made.v * made.u
    errors = h * ((x.abs() @ gate.abs().T) / (x @ gate.T) + (x.abs() @ up.abs().T) / made.u)
    return float((errors.square() @ down.square()).sum().sqrt() / (h @ down).norm())


@settings(max_examples=60, deadline=None)
@given(
    d=st.integers(1, 130),
    m=st.integers(1, 300),
    rows=st.integers(1, 8),
    sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(["silu", "gelu_tanh"]),
    kind=st.sampled_from(["number", "one", "vector"]),
    decider=st.sampled_from(["gate", "up"]),
    seed=st.integers(0, 1000),
)
@example(1, 1, 1, 0.0, torch.bfloat16, "silu", "number", "gate", 0)
@example(1, 257, 8, 0.5, torch.float32, "silu", "number", "gate", 0)
@example(1, 1, 1, 0.5, torch.float32, "gelu_tanh", "vector", "up", 0)
@example(33, 257, 3, 0.5, torch.bfloat16, "gelu_tanh", "vector", "up", 0)
def test_any_shape(d, m, rows, sparsity, dtype, activation, kind, decider, seed):
    made = Problem(d, m, rows, dtype, seed=seed, activation=activation, decider=decider)
    assume(cancellation(made) < 150)  # 150 times float32's rounding is 1e-5; one neuron of three inputs may have 4000
    threshold = threshold_of_kind(made, kind, sparsity)
    y = sparse_gated_mlp_cpu(*made.arguments(threshold))
    assert y.shape == made.x.shape and y.dtype == dtype
    assert made.error(y, threshold) < TOLERANCE[dtype]


@pytest.mark.parametrize("decider", ["gate", "up"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_vector_is_one_threshold_per_neuron(decider, rows):
    """Neuron j has threshold 0 or infinity: what is kept is known from the vector alone."""
    made = Problem(32, 300, rows, decider=decider)
    vector = torch.zeros(300)
    vector[::3] = math.inf
    keep = vector == 0
    dense = oracle(made.x, made.gate[keep], made.up[keep], made.down_t[keep], 0.0)
    assert relative_error(sparse_gated_mlp_cpu(*made.arguments(vector)), dense) < 1e-5
    number = made.threshold(0.5)
    outputs = [made.arguments(t) for t in (number, torch.tensor(number), torch.full((300,), number))]
    first, *others = (sparse_gated_mlp_cpu(*arguments) for arguments in outputs)
    assert all(torch.equal(first, other) for other in others)


def test_the_papers_kernels_say_what_they_do_not_take():
    made = Problem(8, 16, 1)
    for name in VARIANTS.keys() - {"cats"}:
        for arguments in (made.arguments(torch.tensor(0.1)), (*made.arguments(0.1)[:6], "up")):
            with pytest.raises(ValueError, match="take one number as threshold and decider 'gate'"):
                VARIANTS[name](*arguments)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.97, 1.0])
def test_variants_agree_with_the_oracle(name, rows, sparsity):
    x, parameters = inputs(rows, 70), weights(70, 300)
    threshold = gate_threshold(x, parameters[0], sparsity)
    assert relative_error(VARIANTS[name](x, *parameters, threshold), oracle(x, *parameters, threshold)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_rows_are_taken_in_pieces(dtype):
    x, parameters = inputs(8, 2500, dtype), weights(2500, 20, dtype)
    threshold = gate_threshold(x, parameters[0], 0.5)
    y = sparse_gated_mlp_cpu(x, *parameters, threshold)
    assert relative_error(y, oracle(x, *parameters, threshold)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [9, 20, 70])
def test_many_rows(dtype, rows):
    x, parameters = inputs(rows, 32, dtype), weights(32, 48, dtype)
    threshold = gate_threshold(x, parameters[0], 0.5)
    y = sparse_gated_mlp_cpu(x, *parameters, threshold)
    assert relative_error(y, oracle(x, *parameters, threshold)) < TOLERANCE[dtype]


def test_above_the_crossover_the_dense_path_runs(monkeypatch):
    rows = int(SPARSE_ROWS["cpu", torch.float32]) + 1
    x, parameters = inputs(rows, 8), weights(8, 8)
    monkeypatch.setattr("cats_kernels.cpu.launch.by_address", None)
    assert torch.equal(VARIANTS["cats"](x, *parameters, 0.1), sparse_gated_mlp_reference(x, *parameters, 0.1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_ties_are_kept(name, dtype):
    # the gate inputs 4 and 3.5 are exact in both dtypes and in every order of summation
    x = torch.tensor([[1.0, 2.0, 1.0]]).to(dtype)
    gate = torch.tensor([[2.0, 1.0, 0.0], [2.0, 0.5, 0.5]]).to(dtype)
    up = torch.ones(2, 3).to(dtype)
    down_t = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).to(dtype)
    tie = float(kernels.activate(np.float32(4), False))  # the kernel's own float32 value of SiLU(4)
    if name == "gather":
        tie = torch.nn.functional.silu(torch.tensor(4.0, dtype=dtype)).item()
    kept = VARIANTS[name](x, gate, up, down_t, tie)
    assert kept[0, 0].item() == pytest.approx(4 * tie, rel=1e-2) and kept[0, 1] == 0
    above = float(np.nextafter(np.float32(tie), np.float32(math.inf)))
    assert VARIANTS[name](x, gate, up, down_t, above).eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decider", ["gate", "up"])
@pytest.mark.parametrize("vector", [False, True])
def test_ties_are_kept_by_both_deciders(decider, vector, dtype):
    x = torch.tensor([[1.0, 2.0, 1.0]]).to(dtype)
    deciding, other = torch.tensor([[2.0, 1.0, 0.0], [2.0, 0.5, 0.5]]).to(dtype), torch.ones(2, 3).to(dtype)
    gate, up = (deciding, other) if decider == "gate" else (other, deciding)
    down_t = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).to(dtype)
    tie = np.float32(kernels.activate(np.float32(4), False) if decider == "gate" else 4)
    for number, kept in ((tie, True), (np.nextafter(tie, np.float32(math.inf)), False)):
        threshold = torch.tensor([number, 0.0]) if vector else float(number)
        y = sparse_gated_mlp_cpu(x, gate, up, down_t, threshold, "silu", decider)
        assert (y[0, 0] != 0) == kept and (y[0, 1] != 0) == vector


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("decider", ["gate", "up"])
@pytest.mark.parametrize("values", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf], [math.nan, math.inf]])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 1e30])
def test_nan_and_infinity_as_the_reference(dtype, activation, decider, values, threshold):
    x, parameters = inputs(3, 40, dtype), weights(40, 50, dtype)
    options = (threshold, activation, decider)
    healthy = sparse_gated_mlp_cpu(x, *parameters, *options)
    x[1, : len(values)] = torch.tensor(values, dtype=dtype)
    y = sparse_gated_mlp_cpu(x, *parameters, *options)
    assert same_pattern(y, sparse_gated_mlp_reference(x, *parameters, *options))
    assert same_pattern(y, oracle(x, *parameters, *options))
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
    arguments = (x, gate, up, down_t, gate_threshold(x, gate, 0.5))
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


@pytest.mark.parametrize("decider", ["gate", "up"])
def test_unused_rows_are_not_read(decider):
    """Rows of the other two weights that are dropped may hold anything: the point of the kernel, seen without a
    clock."""
    made = Problem(32, 600, 1, decider=decider)
    threshold = made.threshold(0.7)
    before = sparse_gated_mlp_cpu(*made.arguments(threshold))
    dropped = ~made.kept(threshold)[0]
    assert 0.6 < dropped.float().mean() < 0.8
    (made.up if decider == "gate" else made.gate)[dropped] = math.nan
    made.down_t[dropped] = math.nan
    assert torch.equal(sparse_gated_mlp_cpu(*made.arguments(threshold)), before)


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

    monkeypatch.setattr(compiling, "njit", no_cache)
    assert compiling.jit()(len) is len
