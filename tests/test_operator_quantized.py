"""The operator on quantised weights: recorded, compiled, traced, mapped, and what it refuses."""

import math

import pytest
import torch
from cats_kernels import QuantizedWeight, quantize, sparse_gated_mlp
from cats_kernels.problem import TOLERANCE, oracle, relative_error
from cats_kernels.quantized_problem import QuantizedProblem
from cats_kernels.reference import QUANTIZED_CHUNK
from cats_kernels.weights import bytes_per_row, bytes_read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_reference_is_that_of_the_dequantised_weights(dtype, monkeypatch):
    monkeypatch.setitem(QUANTIZED_CHUNK, "cpu", 50 * 700)  # neurons in three pieces
    made = QuantizedProblem(50, 1500, 2, 4, 32, dtype=torch.float32)
    threshold = made.thresholds(0.5)
    x = made.x.to(dtype)
    expected = oracle(x, *made.arguments(threshold)[1:])
    tolerance = {**TOLERANCE, torch.float64: 1e-12}[dtype]
    y = sparse_gated_mlp(x, *made.weights, threshold, backend="reference")
    assert y.dtype == dtype
    flips = (made.v.abs() - threshold).abs().min()
    assert relative_error(y, expected) < tolerance or flips < 1e-3


def test_bytes():
    gate, up, down_t = QuantizedProblem(100, 6, 1, 4, 32, symmetric=False, dtype=torch.bfloat16).weights
    assert bytes_per_row(gate) == 64 + 4 * 2 * 2 and gate.nbytes == 6 * bytes_per_row(gate)
    assert bytes_read(gate, up, down_t, 2, "gate") == 10 * bytes_per_row(gate)
    assert bytes_per_row(quantize(torch.ones(2, 100), 8)) == 104


@pytest.fixture
def made() -> QuantizedProblem:
    return QuantizedProblem(64, 48, 2, 4, 32)


def test_the_call_and_the_recorded_call_agree(made):
    expected = sparse_gated_mlp(made.x, *made.weights, 0.2)
    tensors = [tensor for weight in made.weights for tensor in weight.tensors]
    arguments = (made.x, *tensors, [4] * 3, [32] * 3, torch.tensor(0.2), "silu", "auto", "gate")
    assert torch.equal(torch.ops.cats.sparse_gated_mlp_quantized(*arguments), expected)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.cats.sparse_gated_mlp_quantized, arguments, test_utils=tests)


@pytest.mark.parametrize("symmetric", [True, False])
def test_compiles_to_one_operator(symmetric):
    made = QuantizedProblem(64, 48, 2, 4, 32, symmetric=symmetric)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(str(graph.graph))
        return graph

    @torch.compile(backend=backend, fullgraph=True)
    def call(x, tensors, threshold):
        weights = [QuantizedWeight(*tensors[i : i + 3], 4, 32, 64) for i in (0, 3, 6)]
        return sparse_gated_mlp(x, *weights, threshold)

    tensors = [tensor for weight in made.weights for tensor in weight.tensors]
    with torch.no_grad():
        for value in (0.1, 0.5):
            y = call(made.x, tensors, torch.tensor(value))
            assert torch.equal(y, sparse_gated_mlp(made.x, *made.weights, value))
    assert len(graphs) == 1 and "sparse_gated_mlp_quantized" in graphs[0]


def test_traces_and_maps(made):
    traced = torch.jit.trace(lambda x: sparse_gated_mlp(x, *made.weights, 0.2), made.x, check_trace=False)
    assert torch.equal(traced(made.x), sparse_gated_mlp(made.x, *made.weights, 0.2))
    batch = torch.randn(3, 2, 64)
    mapped = torch.vmap(lambda x: sparse_gated_mlp(x, *made.weights, 0.2))(batch)
    assert torch.allclose(mapped, sparse_gated_mlp(batch, *made.weights, 0.2), atol=1e-6)
    thresholds = torch.tensor([0.1, 0.3])
    mapped = torch.vmap(lambda t: sparse_gated_mlp(made.x, *made.weights, t))(thresholds)
    assert torch.equal(mapped, torch.stack([sparse_gated_mlp(made.x, *made.weights, float(t)) for t in thresholds]))


def test_autocast_and_empty_x(made):
    with torch.autocast("cpu", torch.bfloat16):
        assert sparse_gated_mlp(made.x, *made.weights, 0.2).dtype == torch.bfloat16
    assert sparse_gated_mlp(made.x[:0], *made.weights, 0.2).shape == (0, 64)


def test_wrong_arguments(made):
    x, (gate, up, down_t) = made.x, made.weights
    with pytest.raises(TypeError, match=r"up_weight is a Tensor; .* all three alike"):
        sparse_gated_mlp(x, gate, made.up, down_t, 0.1)
    with pytest.raises(TypeError, match=r"gate_weight is a Tensor; .* all three alike"):
        sparse_gated_mlp(x, made.gate, up, down_t, 0.1)
    with pytest.raises(ValueError, match=r"x has 63 columns and gate_weight is \(48, 64\)"):
        sparse_gated_mlp(x[:, 1:], gate, up, down_t, 0.1)
    with pytest.raises(ValueError, match=r"down_weight_t is \(47, 64\); it must be \(m, d\)"):
        sparse_gated_mlp(x, gate, up, down_t.rows(0, 47), 0.1)
    with pytest.raises(TypeError, match=r"x is torch.int64"):
        sparse_gated_mlp(x.long(), gate, up, down_t, 0.1)
    with pytest.raises(ValueError, match="up_weight is not contiguous"):
        wide = torch.cat([up.data, up.data], 1)[:, : up.data.shape[1]]
        sparse_gated_mlp(x, gate, QuantizedWeight(wide, up.scales, None, 4, 32, 64), down_t, 0.1)
    with pytest.raises(ValueError, match="up_weight is on meta"):
        sparse_gated_mlp(x, gate, up.to("meta"), down_t, 0.1)
    with pytest.raises(ValueError, match="threshold is NaN"):
        sparse_gated_mlp(x, gate, up, down_t, math.nan)
    with pytest.raises(RuntimeError, match="for inference"):
        sparse_gated_mlp(x.clone().requires_grad_(), gate, up, down_t, 0.1)
    with pytest.raises(ValueError, match="backend 'cpu' takes float32 or bfloat16"):
        sparse_gated_mlp(x.double(), gate, up, down_t, 0.1, backend="cpu")
