"""The Triton kernel for quantised weights on a real card: the correctness matrix, determinism, CUDA graphs.

Run: ``python -m pytest tests/test_triton_quantized_gpu.py`` (``-n 12`` shares the compiling out), and against
out-of-bounds accesses ``compute-sanitizer --tool memcheck --error-exitcode 1 python -m pytest
tests/test_triton_quantized_gpu.py -k memcheck``.
"""

import os

import pytest
import torch

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a CUDA device", allow_module_level=True)

from cats_kernels.problem import TOLERANCE, relative_error
from cats_kernels.triton.quantized import sparse_gated_mlp_quantized
from cats_kernels.triton.quantized_configs import QuantizedConfig

import cats
from tests.conftest import tiny_model
from tests.quantized_cases import FORMATS, KINDS, quantized_case, quantized_tie_case
from tests.triton_cases import DTYPES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_matches_the_float64_reference(form: tuple, dtype: torch.dtype, rows: int):
    for d, m in ((4096, 4000), (5120, 1003), (1000, 803), (40, 77), (33, 1)):
        for sparsity in (0.0, 0.5, 1.0):
            problem, threshold = quantized_case(rows, d, m, form, dtype, sparsity, device="cuda")
            error = problem.error(sparse_gated_mlp_quantized(*problem.quantized_arguments(threshold)), threshold)
            assert error < TOLERANCE[dtype], f"{form} rows={rows} d={d} m={m} s={sparsity}: {error:.2e}"


@pytest.mark.parametrize(("kind", "decider"), KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_thresholds_of_every_kind_and_both_deciders(kind: str, decider: str, dtype: torch.dtype):
    for form in FORMATS[::2]:
        case = quantized_case(1, 1000, 1003, form, dtype, 0.5, "gelu_tanh", device="cuda", kind=kind, decider=decider)
        problem, threshold = case
        for _ in range(2):  # the second call is a recorded launch
            y = sparse_gated_mlp_quantized(*problem.quantized_arguments(threshold))
            assert problem.error(y, threshold) < TOLERANCE[dtype]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("decider", ["gate", "up"])
def test_ties_are_kept_and_the_next_float_drops_them(bits: int, decider: str):
    for arguments, expected in zip(quantized_tie_case(bits, decider, "cuda"), (16384, 0), strict=True):
        assert (sparse_gated_mlp_quantized(*arguments) == expected).all()


@pytest.mark.parametrize("form", FORMATS[::3], ids=str)
def test_a_second_launch_serves_other_tensors_and_thresholds(form: tuple):
    for seed, sparsity in ((0, 0.5), (1, 0.9), (2, 0.0)):
        problem, threshold = quantized_case(1, 512, 700, form, torch.bfloat16, sparsity, seed=seed, device="cuda")
        y = sparse_gated_mlp_quantized(*problem.quantized_arguments(threshold))
        assert problem.error(y, threshold) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("form", FORMATS[::3], ids=str)
def test_deterministic_bit_for_bit_also_in_poisoned_memory(form: tuple):
    problem, threshold = quantized_case(1, 4096, 14336, form, torch.bfloat16, 0.5, device="cuda")
    first = sparse_gated_mlp_quantized(*problem.quantized_arguments(threshold))
    for _ in range(20):
        poison = [torch.full((2**k,), float("nan"), device="cuda") for k in range(9, 23)]
        del poison
        assert torch.equal(sparse_gated_mlp_quantized(*problem.quantized_arguments(threshold)), first)


@pytest.mark.parametrize("form", FORMATS[::3], ids=str)
def test_cuda_graph_replays_follow_new_inputs(form: tuple):
    problem, threshold = quantized_case(1, 1024, 3000, form, torch.float16, 0.7, device="cuda")
    arguments = problem.quantized_arguments(threshold)
    sparse_gated_mlp_quantized(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse_gated_mlp_quantized(*arguments)
    for factor in (1.0, -0.5, 2.0):
        problem.x.mul_(factor)
        y.fill_(float("nan"))
        graph.replay()
        assert relative_error(y, problem.oracle(threshold)) < 2 * TOLERANCE[torch.float16]


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("words", [True, False])
def test_other_configurations_agree(stages: int, paired: bool, words: bool):
    for form in FORMATS[::2]:
        problem, threshold = quantized_case(1, 2048, 3000, form, torch.bfloat16, 0.5, device="cuda")
        for chunk in (0, 16):
            config = QuantizedConfig(
                4, 2, warps=4, programs=2, gate_stages=stages, stages=stages, words=words, paired=paired, chunk=chunk
            )
            y = sparse_gated_mlp_quantized(*problem.quantized_arguments(threshold), config)
            assert problem.error(y, threshold) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_memcheck(form: tuple):
    """Small and odd sizes, for compute-sanitizer."""
    for dtype in (torch.bfloat16, torch.float32):
        for rows, d, m in ((1, 64, 96), (1, 33, 37), (2, 72, 130), (1, 130, 51), (1, 1, 1)):
            problem, threshold = quantized_case(rows, d, m, form, dtype, 0.5, device="cuda")
            y = sparse_gated_mlp_quantized(*problem.quantized_arguments(threshold))
            assert problem.error(y, threshold) < TOLERANCE[dtype]


@pytest.mark.parametrize("patched", [False, True])
@torch.no_grad()
def test_a_quantised_block_repeats_its_launches(patched: bool):
    """Same bits as the first calls, on another stream and in a captured graph too; four rows are never one launch."""
    model = torch.nn.ModuleDict({"mlp": tiny_model(hidden_size=256, intermediate_size=640).model.layers[0].mlp})
    model.to("cuda", torch.bfloat16)
    cats.quantize(model, 4, 32)
    if patched:
        cats.apply(model, cats.Thresholds(0.5, {"mlp": 0.1}))
    block, inputs = model["mlp"], [torch.randn(1, rows, 256, device="cuda").bfloat16() for rows in (1, 2, 4)]
    expected = [block(x) for x in inputs]
    known = (block.cats_state if patched else block.cats_quantized).known
    assert [call is not None for call in known.calls.values()] == [True, True, False]
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    for x, y in zip(inputs, expected, strict=True):
        assert torch.equal(block(x), y)
        with torch.cuda.stream(other):
            assert torch.equal(block(x), y)
        graph, given = torch.cuda.CUDAGraph(), x.clone()
        with torch.cuda.graph(graph):
            captured = block(given)
        given.copy_(3 * x)
        graph.replay()
        assert torch.equal(captured, block(3 * x)) and not torch.equal(captured, y)
    block.down_proj.scales.mul_(2)
    assert torch.equal(block(inputs[0]), 2 * expected[0])
