"""Quantised weights on the CPU against the float64 truth about what they dequantise to."""

import itertools
import math

import numpy as np
import pytest
import torch
from cats_kernels import QuantizedWeight, dequantize, quantize, quantized, sparse_gated_mlp
from cats_kernels.cpu import kernels, many_rows, pieces
from cats_kernels.cpu.dequantise import dequantise_into
from cats_kernels.cpu.many_rows import quantized_mlp_many_rows
from cats_kernels.cpu.quantized_launch import sparse_gated_mlp_quantized_cpu
from cats_kernels.dispatch import DENSE_MASKED, QUANTIZED_ROWS, SPARSE, compute_quantized, path_of
from cats_kernels.problem import TOLERANCE, oracle, relative_error
from cats_kernels.quantized import GROUP_SIZES, pack
from cats_kernels.quantized_problem import QuantizedProblem
from cats_kernels.reference import quantized_mlp_reference, sparse_gated_mlp_reference
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tests.mlp_cases import same_pattern, threshold_of_kind
from tests.quantized_cases import CPU_FORMATS as FORMATS

DTYPES = [torch.float32, torch.bfloat16]
PATHS = {"kernel": sparse_gated_mlp_quantized_cpu, "reference": quantized_mlp_reference}


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def cancels(made):
    """Whether a product of one of few neurons is so small beside its terms that their errors are large beside it."""
    products = [made.x.double() @ weight.double().T for weight in made.original[:2]]
    sizes = [made.x.double().norm(dim=-1, keepdim=True) * weight.double().norm(dim=-1) for weight in made.original[:2]]
    return made.original[0].shape[0] < 8 and any(
        bool((product.abs() < 0.01 * size).any()) for product, size in zip(products, sizes, strict=True)
    )


@settings(max_examples=60, deadline=None)
@given(
    d=st.integers(1, 300),
    m=st.integers(1, 300),
    rows=st.integers(1, 8),
    sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    form=st.sampled_from(FORMATS),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(["silu", "gelu_tanh"]),
    kind=st.sampled_from(["number", "one", "vector"]),
    decider=st.sampled_from(["gate", "up"]),
    path=st.sampled_from(list(PATHS)),
    seed=st.integers(0, 1000),
)
@example(1, 1, 1, 0.0, (4, 32), False, torch.bfloat16, "silu", "number", "gate", "kernel", 0)
@example(1, 257, 8, 0.5, (8, None), True, torch.float32, "silu", "number", "gate", "kernel", 0)
@example(33, 257, 1, 0.5, (4, 32), True, torch.float32, "gelu_tanh", "vector", "up", "kernel", 0)
@example(130, 5, 1, 0.0, (8, 128), False, torch.float32, "silu", "number", "gate", "kernel", 0)
def test_any_shape(d, m, rows, sparsity, form, symmetric, dtype, activation, kind, decider, path, seed):
    made = QuantizedProblem(
        d, m, rows, *form, symmetric=symmetric, dtype=dtype, seed=seed, activation=activation, decider=decider
    )
    assume(not cancels(made))
    threshold = threshold_of_kind(made, kind, sparsity)
    y = PATHS[path](*made.quantized_arguments(threshold))
    assert y.shape == made.x.shape and y.dtype == dtype
    assert made.error(y, threshold) < TOLERANCE[dtype]


@pytest.mark.parametrize("form", [(8, None), (4, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 8])
def test_wide_rows_and_several_blocks(form, dtype, rows):
    made = QuantizedProblem(2500, 600, rows, *form, dtype=dtype)
    threshold = made.threshold(0.5)
    y = sparse_gated_mlp_quantized_cpu(*made.quantized_arguments(threshold))
    assert made.error(y, threshold) < TOLERANCE[dtype]


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2])
def test_scales_need_not_have_the_dtype_of_x_nor_weights_one_format(scale_dtype, rows):
    made = QuantizedProblem(200, 90, rows, 8)
    forms = [(8, None, True), (4, 32, False), (4, 128, True)]
    for order in itertools.permutations(forms):
        weights = [quantize(w, *form, scale_dtype=scale_dtype) for w, form in zip(made.original, order, strict=True)]
        truth = [dequantize(weight) for weight in weights]
        y = sparse_gated_mlp(made.x, *weights, 0.0)
        assert relative_error(y, oracle(made.x, *truth, 0.0)) < 1e-5


def test_small_and_large_scales_in_half_precision():
    """float16 has subnormal numbers, which the kernel's own conversion must know."""
    weight = torch.randn(40, 64)
    for size in (1e-5, 1.0, 1e4):
        weights = [quantize(weight * size, 4, 32, symmetric, torch.float16) for symmetric in (True, False, True)]
        truth = [dequantize(w).double() for w in weights]
        assert all((t != 0).any() for t in truth)
        x = torch.randn(1, 64) / size
        y = sparse_gated_mlp_quantized_cpu(x, *weights, 0.0)
        assert relative_error(y, oracle(x.double(), *truth, 0.0)) < 1e-5


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("decider", ["gate", "up"])
@pytest.mark.parametrize("rows", [1, 3])
def test_ties_are_kept(form, decider, rows):
    """Products that are exact in any order: small whole numbers, and scales that are powers of two."""
    bits, group = form
    q = torch.zeros(2, 256)
    q[0, :3], q[1, :3] = torch.tensor([4.0, 2.0, 0.0]), torch.tensor([4.0, 1.0, 1.0])
    data = q.to(torch.int8) if bits == 8 else pack((q + 8).to(torch.uint8), group)
    groups = 1 if group is None else 256 // group
    deciding = QuantizedWeight(data, torch.full((2, groups), 0.5), None, bits, group or 256, 256)
    other = quantize(torch.ones(2, 256), bits, group)
    x = torch.zeros(rows, 256)
    x[:, :3] = torch.tensor([1.0, 2.0, 1.0])
    tie = np.float32(kernels.activate(np.float32(4), False) if decider == "gate" else 4)
    gate, up = (deciding, other) if decider == "gate" else (other, deciding)
    for number, kept in ((tie, True), (np.nextafter(tie, np.float32(math.inf)), False)):
        for path in (*PATHS.values(), quantized_mlp_many_rows):
            y = path(x, gate, up, other, torch.tensor([number, math.inf]), "silu", decider)
            assert bool((y != 0).any()) == kept


@pytest.mark.parametrize("form", [(8, None), (4, 32)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("decider", ["gate", "up"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("values", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf], [3e38]])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_nan_and_infinity_as_the_reference(form, symmetric, decider, rows, values, threshold):
    made = QuantizedProblem(40, 50, rows, *form, symmetric=symmetric, decider=decider)
    healthy = sparse_gated_mlp_quantized_cpu(*made.quantized_arguments(threshold))
    made.x[0, : len(values)] = torch.tensor(values)
    y = sparse_gated_mlp_quantized_cpu(*made.quantized_arguments(threshold))
    assert same_pattern(y, sparse_gated_mlp_reference(*made.arguments(threshold)))
    assert not y[0].isfinite().all()
    assert torch.equal(y[1:], healthy[1:])


@pytest.mark.parametrize("form", [(8, None), (4, 128)])
@pytest.mark.parametrize("rows", [1, 8])
def test_bit_identical_at_any_number_of_threads(form, rows):
    made = QuantizedProblem(300, 1100, rows, *form, dtype=torch.bfloat16)
    results = []
    for threads in (1, 2, 2, 1):
        torch.set_num_threads(threads)
        results.append(sparse_gated_mlp_quantized_cpu(*made.quantized_arguments(0.1)))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("decider", ["gate", "up"])
def test_unused_rows_are_not_read(form, decider):
    made = QuantizedProblem(64, 600, 1, *form, decider=decider)
    threshold = made.threshold(0.7)
    before = sparse_gated_mlp_quantized_cpu(*made.quantized_arguments(threshold))
    dropped = ~made.kept(threshold)[0]
    gate, up, down_t = made.weights
    for weight in (up if decider == "gate" else gate, down_t):
        weight.scales[dropped] = math.nan
        weight.data[dropped] = 77
    assert torch.equal(sparse_gated_mlp_quantized_cpu(*made.quantized_arguments(threshold)), before)


def test_rows_decide_the_path(monkeypatch):
    for dtype in DTYPES:
        most = int(QUANTIZED_ROWS["cpu", dtype])
        assert path_of(most, dtype, "cpu", quantized=True) == SPARSE
        assert path_of(most + 1, dtype, "cpu", quantized=True) == DENSE_MASKED
        made = QuantizedProblem(40, 20, most + 1, 4, 32, dtype=dtype)
        arguments = made.quantized_arguments(0.1)
        monkeypatch.setattr("cats_kernels.cpu.quantized_launch.run_packed", None)
        assert torch.equal(compute_quantized("cpu", *arguments), quantized_mlp_many_rows(*arguments))
        assert torch.equal(compute_quantized("reference", *arguments), quantized_mlp_reference(*arguments))
        monkeypatch.undo()
    assert path_of(1, torch.float64, "cpu", quantized=True) == DENSE_MASKED


# ---------------------------------------------------------------------------------------------------------------------
# many rows


@pytest.fixture
def bfloat16_products(monkeypatch):
    """As on a processor with instructions for them."""
    monkeypatch.setattr(pieces, "multiplies_bfloat16", lambda: True)


@settings(max_examples=60, deadline=None)
@given(
    d=st.integers(40, 300),
    m=st.integers(40, 300),
    rows=st.integers(3, 70),
    sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    form=st.sampled_from(FORMATS),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(["silu", "gelu_tanh"]),
    kind=st.sampled_from(["number", "one", "vector"]),
    decider=st.sampled_from(["gate", "up"]),
    seed=st.integers(0, 1000),
)
def test_any_shape_of_many_rows(d, m, rows, sparsity, form, symmetric, dtype, activation, kind, decider, seed):
    """(With less than 40 columns or neurons a sum of few may cancel so that what is rounded before it shows.)"""
    made = QuantizedProblem(
        d, m, rows, *form, symmetric=symmetric, dtype=dtype, seed=seed, activation=activation, decider=decider
    )
    threshold = threshold_of_kind(made, kind, sparsity)
    y = quantized_mlp_many_rows(*made.quantized_arguments(threshold))
    assert y.shape == made.x.shape and y.dtype == dtype
    assert made.error(y, threshold) < TOLERANCE[dtype]


@pytest.mark.parametrize("form", [*FORMATS, (4, 16)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_dequantised_as_by_torch(form, symmetric, scale_dtype, dtype, monkeypatch):
    monkeypatch.setattr(quantized, "GROUP_SIZES", (*GROUP_SIZES, 16))
    for d in (1, 33, 256, 700):
        weight = quantize(torch.randn(40, d), *form, symmetric, scale_dtype)
        weight.scales[3] = torch.tensor(2.0**-10).to(scale_dtype)  # small numbers too
        out = torch.full((40, d), math.nan, dtype=dtype)
        dequantise_into(weight.rows(2, 37), out[:35])
        expected = dequantize(weight.rows(2, 37), dtype)
        assert torch.equal(out[:35], expected) or not symmetric  # whose sum is rounded once here and twice there
        assert torch.allclose(
            out[:35].float(), expected.float(), rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )
        assert out[35:].isnan().all()


def test_what_is_not_finite_is_dequantised_to_the_same():
    weight = quantize(torch.randn(3, 64), 4, 32)
    weight.scales[0], weight.scales[1] = math.nan, math.inf
    out = torch.empty(3, 64, dtype=torch.bfloat16)
    dequantise_into(weight, out)
    assert same_pattern(out, dequantize(weight, torch.bfloat16)) and out[0].isnan().all()


@pytest.mark.parametrize("form", [(8, None), (4, 32), (4, 128)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("decider", ["gate", "up"])
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.9])
def test_the_mask_is_that_of_float32(form, symmetric, activation, decider, sparsity, bfloat16_products, monkeypatch):
    """For thresholds as close to some products as float32 allows; rounded to bfloat16 others would be dropped."""
    options = {"dtype": torch.bfloat16, "activation": activation, "decider": decider}
    made, hidden = QuantizedProblem(384, 1000, 40, *form, symmetric=symmetric, **options), []
    compute = many_rows.neurons
    monkeypatch.setattr(many_rows, "neurons", lambda *a: hidden.append(compute(*a)) or hidden[-1])
    for threshold in (made.threshold(sparsity), made.thresholds(sparsity)):
        hidden.clear()
        y = quantized_mlp_many_rows(*made.quantized_arguments(threshold))
        assert torch.equal(torch.cat(hidden, 1) != 0, made.kept(threshold))
        assert made.error(y, threshold) < TOLERANCE[torch.bfloat16]
        made.gate, made.up = made.gate.bfloat16(), made.up.bfloat16()
        limit = torch.as_tensor(threshold)
        assert not torch.equal(made.rounded_magnitude() >= limit, made.kept(threshold))
        made.gate, made.up = (dequantize(weight) for weight in made.weights[:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decider", ["gate", "up"])
@pytest.mark.parametrize("values", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf], [3e38]])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_nan_and_infinity_in_one_of_many_rows(dtype, decider, values, threshold, bfloat16_products):
    made = QuantizedProblem(40, 50, 12, 4, 32, dtype=dtype, decider=decider)
    healthy = quantized_mlp_many_rows(*made.quantized_arguments(threshold))
    made.x[3, : len(values)] = torch.tensor(values)
    y = quantized_mlp_many_rows(*made.quantized_arguments(threshold))
    assert same_pattern(y, quantized_mlp_reference(*made.quantized_arguments(threshold)))
    others = torch.arange(12) != 3
    assert torch.equal(y[others], healthy[others]) and not y[3].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_take_little_memory(dtype, bfloat16_products, monkeypatch):
    """In pieces of few rows and few weights the result is the same."""
    made = QuantizedProblem(96, 500, 50, 4, 32, dtype=dtype)
    threshold, sizes = made.thresholds(0.5), []
    whole = quantized_mlp_many_rows(*made.quantized_arguments(threshold))
    write = many_rows.dequantise_into
    monkeypatch.setattr(many_rows, "dequantise_into", lambda w, out: (sizes.append(out.numel()), write(w, out))[1])
    monkeypatch.setattr(many_rows, "WEIGHTS", 96 * 70)
    monkeypatch.setattr(many_rows, "ROWS", 16)
    pieces = quantized_mlp_many_rows(*made.quantized_arguments(threshold))
    assert relative_error(pieces, whole.double()) < TOLERANCE[dtype]
    assert made.error(pieces, threshold) < TOLERANCE[dtype]
    assert max(sizes) == 96 * 70 and len(sizes) == 3 * 8 * 4


def test_the_default_device_does_not_matter():
    made = QuantizedProblem(64, 100, 2, 4, 32)
    arguments = made.quantized_arguments(0.1)
    expected = [compute_quantized("cpu", *arguments), quantized_mlp_many_rows(*arguments)]
    with torch.device("meta"):
        given = [sparse_gated_mlp_quantized_cpu(*arguments), quantized_mlp_many_rows(*arguments)]
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


def test_calls_that_are_kept_look_at_the_weights_anew():
    """Other weights, moved ones, other thresholds and other shapes of x after a first call with one gate weight."""
    made = QuantizedProblem(64, 100, 2, 4, 32)
    x, gate, up, down_t = made.quantized_arguments(0.0)[:4]

    def check(x, *weights, threshold=0.1):
        y = sparse_gated_mlp_quantized_cpu(x, *weights, threshold)
        expected = oracle(x.double(), *(dequantize(weight).double() for weight in weights), threshold)
        assert relative_error(y, expected) < TOLERANCE[torch.float32]

    check(x, gate, up, down_t)
    check(x, gate, up, down_t, threshold=0.3)
    check(x[:1], gate, up, down_t)
    check(x, gate, down_t, up)
    check(x, gate, quantize(torch.randn(100, 64), 8, 32), down_t)
    for weight in (gate, up, down_t):
        moved = torch.randint_like(weight.data, 256)
        weight.data.data = moved
        check(x, gate, up, down_t)
