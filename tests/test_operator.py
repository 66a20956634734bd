"""The operator: validation, choice of backend, registration with torch.library."""

import math
import os
import subprocess
import sys

import pytest
import torch
from cats_kernels import operator, sparse_gated_mlp, sparse_gated_mlp_reference
from cats_kernels.cpu import sparse_gated_mlp_cpu

from tests.mlp_cases import error, inputs, oracle, weights


@pytest.fixture
def problem():
    return [inputs(2, 16), *weights(16, 24), 0.1]


def test_keeps_leading_dimensions_and_takes_non_contiguous_x(problem):
    _, *parameters = problem
    x = inputs(6, 32).reshape(3, 2, 32)[..., ::2]
    y = sparse_gated_mlp(x, *parameters)
    assert y.shape == x.shape and y.is_contiguous()
    assert error(y.reshape(6, 16), oracle(x.reshape(6, 16), *parameters)) < 1e-5
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
        (4, torch.tensor(0.1), TypeError, "threshold is a Tensor; it must be a Python number"),
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


def test_refuses_gradients(problem):
    problem[0].requires_grad_()
    with pytest.raises(RuntimeError, match="for inference and has no gradient"):
        sparse_gated_mlp(*problem)
    with torch.no_grad():
        sparse_gated_mlp(*problem)


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "expected"),
    [
        ("auto", "cpu", torch.float32, sparse_gated_mlp_cpu),
        ("auto", "cpu", torch.bfloat16, sparse_gated_mlp_cpu),
        ("auto", "cpu", torch.float64, sparse_gated_mlp_reference),
        ("auto", "cpu", torch.float16, sparse_gated_mlp_reference),
        ("auto", "mps", torch.float32, sparse_gated_mlp_reference),
        ("auto", "cuda", torch.float64, sparse_gated_mlp_reference),
        ("cpu", "cpu", torch.bfloat16, sparse_gated_mlp_cpu),
        ("reference", "cuda", torch.float32, sparse_gated_mlp_reference),
    ],
)
def test_chosen_backend(backend, device, dtype, expected):
    assert operator.choose_backend(backend, device, dtype) is expected


def test_backends_that_cannot_run(problem, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    operator.choose_backend.cache_clear()
    with pytest.raises(ValueError, match="takes float32 or bfloat16 on the CPU, not torch"):
        sparse_gated_mlp(*(t.double() if torch.is_tensor(t) else t for t in problem), backend="cpu")
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        sparse_gated_mlp(*problem, backend="triton")
    operator.choose_backend.cache_clear()


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "cats_kernels.triton_mlp", None)
    operator.choose_backend.cache_clear()
    with pytest.raises(RuntimeError, match="backend 'triton' cannot be imported"):
        operator.choose_backend("triton", "cuda", torch.float32)
    with pytest.warns(UserWarning, match="No Triton kernel"):
        assert operator.choose_backend("auto", "cuda", torch.float32) is sparse_gated_mlp_reference
    operator.choose_backend.cache_clear()


def test_triton_is_chosen_on_cuda():
    triton_mlp = pytest.importorskip("cats_kernels.triton_mlp")
    assert operator.choose_backend("auto", "cuda", torch.bfloat16) is triton_mlp.VARIANTS["cats"]


def test_environment_overrides_auto(problem, monkeypatch):
    def fail(*_):
        raise AssertionError("the kernel was called")

    monkeypatch.setattr(operator, "_cpu", lambda: fail)
    operator.choose_backend.cache_clear()
    with pytest.raises(AssertionError, match="kernel was called"):
        sparse_gated_mlp(*problem)
    monkeypatch.setenv("CATS_BACKEND", "reference")
    assert torch.equal(sparse_gated_mlp(*problem), sparse_gated_mlp_reference(*problem))
    monkeypatch.setenv("CATS_BACKEND", "fastest")
    with pytest.raises(ValueError, match="CATS_BACKEND is 'fastest'; allowed"):
        sparse_gated_mlp(*problem)
    operator.choose_backend.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype):
    x = inputs(6, 32, dtype).reshape(3, 2, 32)[..., ::2]
    torch.library.opcheck(torch.ops.cats.sparse_gated_mlp, (x, *weights(16, 24, dtype), 0.1, "silu", "auto"))


def test_compiles_without_a_graph_break(problem):
    def layer(x, gate, up, down_t, threshold):
        return sparse_gated_mlp(x * 2, gate, up, down_t, threshold) + x

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (2, 3):
        problem[0] = inputs(rows, 16)
        assert torch.allclose(compiled(*problem), layer(*problem), rtol=1e-6, atol=1e-6)


def test_fake_tensors(problem):
    with torch._subclasses.FakeTensorMode() as mode:
        x, *parameters = [mode.from_tensor(t) if torch.is_tensor(t) else t for t in problem]
        assert sparse_gated_mlp(x, *parameters).shape == (2, 16)


def test_importing_the_package_loads_no_compiler():
    code = "import sys, cats_kernels; assert not {'numba', 'triton'} & set(sys.modules), 'numba or triton was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
