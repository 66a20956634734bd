"""The operator in eager mode: validation, the choice of backend and path, autocast."""

import math
import os
import subprocess
import sys

import pytest
import torch
from cats_kernels import dispatch, path_of, sparse_gated_mlp, sparse_gated_mlp_reference
from cats_kernels.problem import TOLERANCE, Problem, inputs, oracle, relative_error, weights
from cats_kernels.reference import multiplies_bfloat16


@pytest.fixture
def problem():
    return [inputs(2, 16), *weights(16, 24), 0.1]


def test_keeps_leading_dimensions_and_takes_non_contiguous_x(problem):
    _, *parameters = problem
    x = inputs(6, 32).reshape(3, 2, 32)[..., ::2]
    y = sparse_gated_mlp(x, *parameters)
    assert y.shape == x.shape and y.is_contiguous()
    assert relative_error(y.reshape(6, 16), oracle(x.reshape(6, 16), *parameters)) < 1e-5
    assert sparse_gated_mlp(x[0, 0], *parameters).shape == (16,)
    assert sparse_gated_mlp(x[:0], *parameters).shape == (0, 2, 16)


@pytest.mark.parametrize(
    ("index", "value", "error_type", "message"),
    [
        (0, torch.randn(2, 15), ValueError, "x has 15 columns"),
        (0, torch.tensor(1.0), ValueError, r"x is \(\)"),
        (0, torch.ones(2, 16, dtype=torch.int64), TypeError, "x is torch.int64; it must be floating point"),
        (1, torch.randn(24), ValueError, r"gate_weight \(24,\)"),
        (1, torch.randn(0, 16), ValueError, "m and d positive"),
        (2, torch.randn(23, 16), ValueError, r"up_weight is \(23, 16\); it must be \(m, d\) = \(24, 16\)"),
        (3, torch.randn(16, 24), ValueError, r"down_weight_t is \(16, 24\)"),
        (2, torch.randn(24, 16).double(), TypeError, "up_weight is torch.float64; it must be torch.float32"),
        (3, torch.randn(16, 24).T, ValueError, "down_weight_t is not contiguous"),
        (1, torch.randn(24, 16, device="meta"), ValueError, "gate_weight is on meta; it must be on cpu"),
        (4, math.nan, ValueError, "threshold is NaN"),
        (4, "0.1", TypeError, "threshold is a str; it must be a number or a float32 tensor"),
        (4, True, TypeError, "threshold is a bool; it must be a number"),
        (4, torch.tensor(0.1).double(), TypeError, "tensor of torch.float64; a tensor must be torch.float32"),
        (4, torch.ones(16), ValueError, r"threshold is \(16,\); a tensor must be \(m,\) = \(24,\) or \(\)"),
        (4, torch.ones(1, 24), ValueError, r"threshold is \(1, 24\)"),
        (4, torch.ones((), device="meta"), ValueError, "threshold is on meta; a tensor must be on cpu"),
    ],
)
def test_says_what_is_wrong(problem, index, value, error_type, message):
    problem[index] = value
    with pytest.raises(error_type, match=message):
        sparse_gated_mlp(*problem)


def test_unknown_names(problem):
    with pytest.raises(ValueError, match="activation is 'relu'; allowed: 'silu', 'gelu_tanh'"):
        sparse_gated_mlp(*problem, activation="relu")
    with pytest.raises(ValueError, match="backend is 'cuda'; allowed: 'auto', 'reference', 'cpu', 'triton'"):
        sparse_gated_mlp(*problem, backend="cuda")
    with pytest.raises(ValueError, match="decider is 'down'; allowed: 'gate', 'up'"):
        sparse_gated_mlp(*problem, decider="down")


def test_refuses_gradients(problem):
    problem[0].requires_grad_()
    with pytest.raises(RuntimeError, match="for inference and has no gradient"):
        sparse_gated_mlp(*problem)
    with torch.no_grad():
        sparse_gated_mlp(*problem)
    problem[0], problem[4] = problem[0].detach(), torch.full((24,), 0.1, requires_grad=True)
    with pytest.raises(RuntimeError, match="for inference and has no gradient"):
        sparse_gated_mlp(*problem)


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "expected"),
    [
        ("auto", "cpu", torch.float32, "cpu"),
        ("auto", "cpu", torch.bfloat16, "cpu"),
        ("auto", "cpu", torch.float64, "reference"),
        ("auto", "cpu", torch.float16, "reference"),
        ("auto", "mps", torch.float32, "reference"),
        ("auto", "cuda", torch.float64, "reference"),
        ("cpu", "cpu", torch.bfloat16, "cpu"),
        ("reference", "cuda", torch.float32, "reference"),
    ],
)
def test_chosen_backend(backend, device, dtype, expected):
    assert dispatch.choose_backend(backend, device, dtype) == expected


@pytest.fixture
def fresh_choice():
    """`choose_backend` decides once per combination: here again, and again after the test."""
    caches = (dispatch.choose_backend, dispatch._cpu, dispatch._triton)
    for function in caches:
        function.cache_clear()
    yield
    dispatch.choose_backend.cache_clear()


def test_backends_that_cannot_run(problem, monkeypatch, fresh_choice):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="takes float32 or bfloat16 on the CPU, not torch"):
        sparse_gated_mlp(*(t.double() if torch.is_tensor(t) else t for t in problem), backend="cpu")
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        sparse_gated_mlp(*problem, backend="triton")


def test_without_triton(monkeypatch, fresh_choice):
    monkeypatch.setitem(sys.modules, "cats_kernels.triton.mlp", None)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot be imported"):
        dispatch.choose_backend("triton", "cuda", torch.float32)
    with pytest.warns(UserWarning, match="No Triton kernel"):
        assert dispatch.choose_backend("auto", "cuda", torch.float32) == "reference"


def test_triton_is_chosen_on_cuda():
    pytest.importorskip("triton")
    assert dispatch.choose_backend("auto", "cuda", torch.bfloat16) == "triton"


@pytest.mark.parametrize(
    ("rows", "dtype", "backend", "expected"),
    [
        (1, torch.float32, "auto", "sparse kernel"),
        (64, torch.float32, "auto", "sparse kernel"),
        (65, torch.float32, "cpu", "dense masked"),
        (8, torch.bfloat16, "auto", "sparse kernel"),
        (10**6, torch.bfloat16, "auto", "dense masked" if multiplies_bfloat16() else "sparse kernel"),
        (1, torch.float16, "auto", "dense masked"),
        (1, torch.float32, "reference", "dense masked"),
    ],
)
def test_path_of_says_what_runs(rows, dtype, backend, expected, monkeypatch):
    assert path_of(rows, dtype, "cpu", backend) == path_of(rows, dtype, torch.device("cpu"), backend, "up") == expected
    if rows > 100:
        return
    paths = []
    real = dispatch._cpu()

    def watched(path, function):
        return lambda *arguments: (paths.append(path), function(*arguments))[1]

    monkeypatch.setattr(
        dispatch, "_cpu", lambda: [watched(*pair) for pair in zip(("sparse kernel", "dense masked"), real, strict=True)]
    )
    sparse_gated_mlp(inputs(rows, 16, dtype), *weights(16, 24, dtype), 0.1, backend=backend)
    assert (paths or ["dense masked"]) == [expected]


@pytest.mark.parametrize("place", range(4))
def test_what_is_no_tensor_is_refused_by_name(place):
    given = [torch.ones(1, 32), *(torch.ones(64, 32) for _ in range(3))]
    given[place] = given[place].tolist()
    name = ("x", "gate_weight", "up_weight", "down_weight_t")[place]
    with pytest.raises(TypeError, match=f"^{name} is a list; it must be a tensor"):
        sparse_gated_mlp(*given, 0.1)


def test_path_of_refuses_what_the_call_refuses(monkeypatch):
    with pytest.raises(ValueError, match="takes float32 or bfloat16 on the CPU"):
        path_of(1, torch.float16, "cpu", "cpu")
    with pytest.raises(ValueError, match="decider is 'down'; allowed: 'gate', 'up'"):
        path_of(1, torch.float32, "cpu", decider="down")
    with pytest.raises(ValueError, match=r"^backend is 'fastest'; allowed: 'auto', 'reference', 'cpu', 'triton'"):
        path_of(1, torch.float32, "cpu", "fastest")
    monkeypatch.setenv("CATS_BACKEND", "reference")
    assert path_of(1, torch.float32, "cpu") == "dense masked"


def test_environment_overrides_auto(problem, monkeypatch):
    def fail(*_):
        raise AssertionError("the kernel was called")

    monkeypatch.setattr(dispatch, "_cpu", lambda: (fail, fail))
    with pytest.raises(AssertionError, match="kernel was called"):
        sparse_gated_mlp(*problem)
    monkeypatch.setenv("CATS_BACKEND", "reference")
    assert torch.equal(sparse_gated_mlp(*problem), sparse_gated_mlp_reference(*problem))
    monkeypatch.setenv("CATS_BACKEND", "fastest")
    with pytest.raises(ValueError, match="CATS_BACKEND is 'fastest'; allowed"):
        sparse_gated_mlp(*problem)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_dtype_of_the_dense_block(backend, x_dtype):
    made = Problem(64, 96, 3)
    threshold = made.threshold(0.5)
    x = made.x.to(x_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        dense = made.dense()()
        y = sparse_gated_mlp(x, made.gate, made.up, made.down_t, threshold, backend=backend)
        zero = sparse_gated_mlp(x, made.gate, made.up, made.down_t, 0.0, backend=backend)
    assert y.dtype == dense.dtype == torch.bfloat16
    assert made.error(y, threshold) < TOLERANCE[torch.bfloat16]
    assert relative_error(zero, dense.double()) < 2 * TOLERANCE[torch.bfloat16]
    if x_dtype == torch.float32:
        assert sparse_gated_mlp(x, made.gate, made.up, made.down_t, threshold, backend=backend).dtype == torch.float32


def test_autocast_leaves_float64_alone():
    made = Problem(16, 24, 2, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert made.dense()().dtype == torch.float64
        assert sparse_gated_mlp(*made.arguments(0.1)[:6]).dtype == torch.float64


def test_importing_the_package_loads_no_compiler():
    code = "import sys, cats_kernels; assert not {'numba', 'triton'} & set(sys.modules), 'numba or triton was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
