"""The Triton kernels on a real card: the correctness matrix, special values, determinism, CUDA graphs, torch.compile.

Run: ``python -m pytest tests/test_triton_gpu.py`` (compiling takes minutes; ``-n 12`` shares it out), and against
out-of-bounds accesses
``compute-sanitizer --tool memcheck --error-exitcode 1 python -m pytest tests/test_triton_gpu.py -k memcheck``.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a CUDA device", allow_module_level=True)

from cats_kernels import MAX_ROWS, sparse_gated_mlp
from cats_kernels.ablation.triton import VARIANTS, launch
from cats_kernels.problem import TOLERANCE, Problem, oracle, relative_error
from cats_kernels.triton.configs import TENSOR_CORES, Config, choose_config
from cats_kernels.triton.mlp import dense_masked
from torch import nn

import cats
from tests.conftest import tiny_model
from tests.triton_cases import ACTIVATIONS, DTYPES, case, tie_case

pytestmark = pytest.mark.gpu

KINDS = [(kind, decider) for kind in ("number", "one", "vector") for decider in ("gate", "up")]

SHAPES = ((4096, 14336), (4096, 11008), (5120, 13824), (40, 77), (33, 1), (1000, 1003))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_matches_the_float64_reference(variant: str, dtype: torch.dtype, rows: int):
    for d, m in SHAPES:
        for sparsity in (0.0, 0.5, 0.9, 1.0):
            for activation in ACTIVATIONS if d < 4096 else ("silu",):
                problem = case(rows, d, m, dtype, sparsity, activation, device="cuda")
                error = relative_error(launch(variant, *problem), oracle(*problem))
                assert error < TOLERANCE[dtype], f"{variant} rows={rows} d={d} m={m} s={sparsity}: {error:.2e}"


@pytest.mark.parametrize(("kind", "decider"), KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_thresholds_of_every_kind_and_both_deciders(kind: str, decider: str, dtype: torch.dtype, rows: int):
    for d, m in ((4096, 4000), (1000, 1003), (33, 1)):
        for activation in ACTIVATIONS:
            problem = case(rows, d, m, dtype, 0.5, activation, device="cuda", kind=kind, decider=decider)
            expected = oracle(*problem)
            for _ in range(2):  # the second call is a recorded launch
                assert relative_error(launch("cats", *problem), expected) < TOLERANCE[dtype]
            if dtype == torch.float32:
                assert relative_error(dense_masked(*problem), expected) < 1e-5


@pytest.mark.parametrize("decider", ["gate", "up"])
@pytest.mark.parametrize("rows", [1, 4])
def test_recorded_launches_follow_the_threshold(decider: str, rows: int):
    """Other values, other tensors, and ones that start at any multiple of 4 bytes."""
    made = Problem(1024, 3000, rows, torch.bfloat16, "cuda", decider=decider)
    room = torch.empty(4000, device="cuda")
    for sparsity in (0.3, 0.5, 0.9, 0.0, 1.0):
        number, vector = made.threshold(sparsity), made.thresholds(sparsity)
        one, odd = room[1:2].fill_(number)[0], room[3:3003].copy_(vector)
        for threshold in (number, torch.tensor(number, device="cuda"), one, vector, odd):
            y = launch("cats", *made.arguments(threshold))
            assert made.error(y, threshold) < TOLERANCE[torch.bfloat16]


@contextmanager
def no_host_wait() -> Iterator[None]:
    """Any call of torch's that makes the host wait raises; that it would is seen first."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.full((), 0.1, device="cuda").item()
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["number", "one", "vector"])
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_no_threshold_makes_the_host_wait(kind: str, rows: int):
    problem = case(rows, 1024, 3000, torch.bfloat16, 0.5, device="cuda", kind=kind)
    x, *weights, threshold, activation, decider = problem
    for backend in ("triton", "reference"):
        sparse_gated_mlp(x, *weights, threshold, activation, backend, decider)
        with no_host_wait():
            y = sparse_gated_mlp(x, *weights, threshold, activation, backend, decider)
            tensor = torch.full((), 0.1, device="cuda")
            again = torch.ops.cats.sparse_gated_mlp(x, *weights, tensor, activation, backend, decider)
        assert y.shape == again.shape == x.shape
        if backend == "triton" and rows < 8:  # eight take the dense path; it compares products rounded to bfloat16
            assert relative_error(y, oracle(*problem)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("decider", ["gate", "up"])
def test_cuda_graph_replays_follow_new_thresholds(decider: str):
    made = Problem(1024, 3000, 1, torch.float16, "cuda", decider=decider)
    vector = made.thresholds(0.5)
    arguments = made.arguments(vector)
    launch("cats", *arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = launch("cats", *arguments)
    for sparsity in (0.9, 0.2):
        vector.copy_(made.thresholds(sparsity, seed=3))
        graph.replay()
        assert made.error(y, vector) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("rows", range(1, MAX_ROWS + 1))
def test_every_number_of_rows(rows: int):
    problem = case(rows, 4096, 4000, torch.bfloat16, 0.6, device="cuda")
    assert relative_error(launch("cats", *problem), oracle(*problem)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("variant", VARIANTS)
def test_ties_are_kept_and_the_next_float_drops_them(variant: str):
    kept, dropped = tie_case("cuda")
    assert (launch(variant, *kept) == 16384).all()
    assert (launch(variant, *dropped) == 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_non_finite_inputs_come_out_as_in_the_reference(variant: str, value: float, rows: int):
    x, *rest = case(rows, 512, 600, torch.float32, 0.5, device="cuda")
    x[0, 3] = value
    y, reference = launch(variant, x, *rest), oracle(x, *rest)
    assert torch.equal(y.isnan(), reference.isnan())
    assert torch.equal(y.isinf(), reference.isinf())
    if rows > 1:
        assert relative_error(y[1:], reference[1:]) < 1e-5


@pytest.mark.parametrize("variant", ["cats", "fused-mask"])
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_deterministic_bit_for_bit_also_in_poisoned_memory(variant: str, rows: int):
    problem = case(rows, 4096, 14336, torch.bfloat16, 0.5, device="cuda")
    first = launch(variant, *problem)
    for _ in range(20):
        poison = [torch.full((2**k,), float("nan"), device="cuda") for k in range(9, 23)]
        del poison
        assert torch.equal(launch(variant, *problem), first)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", [1, 4])
def test_cuda_graph_replays_follow_new_inputs(variant: str, rows: int):
    x, *rest = case(rows, 1024, 3000, torch.float16, 0.7, device="cuda")
    launch(variant, x, *rest)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = launch(variant, x, *rest)
    for seed in range(5):
        fresh = case(rows, 1024, 3000, torch.float16, 0.7, seed=seed, device="cuda")[0]
        x.copy_(fresh)
        y.fill_(float("nan"))
        graph.replay()
        assert relative_error(y, oracle(fresh, *rest)) < TOLERANCE[torch.float16]


def test_back_to_back_calls_do_not_overtake_each_other():
    """Dependent launch lets a kernel start early, and each call reuses the last one's buffers: it must wait for it.
    There is nothing between the calls, which would make them wait anyway."""
    x, *rest = case(1, 4096, 14336, torch.float32, 0.5, device="cuda")
    inputs = [x * scale for scale in torch.linspace(0.5, 2.0, 32).tolist()]
    expected_outputs = []
    for given in inputs:
        expected_outputs.append(launch("cats", given, *rest))
        torch.cuda.synchronize()
    for _ in range(4):
        assert all(map(torch.equal, [launch("cats", given, *rest) for given in inputs], expected_outputs))


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("parts", [1, 3])
def test_other_configurations_agree(stages: int, parts: int):
    problem = case(2, 2048, 5000, torch.bfloat16, 0.5, device="cuda")
    config = Config(4, 2, warps=4, programs=3, gate_stages=stages, stages=stages, parts=parts, dependent=parts == 1)
    error = relative_error(launch("cats", *problem, config=config), oracle(*problem))
    assert error < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("rows", [1, 4])
def test_a_second_launch_serves_other_tensors(rows: int):
    """It reuses what the first compiled, whose weights were one tensor; at odd addresses it must not."""
    d, m = 512, 700
    x, gate, *_ = case(rows, d, m, torch.bfloat16, 0.5, device="cuda")
    launch("cats", x, gate, gate, gate, 0.1)
    for seed in range(3):
        problem = case(rows, d, m, torch.bfloat16, 0.5, seed=seed, device="cuda")
        for given in (problem, tuple(shifted(t) if isinstance(t, torch.Tensor) else t for t in problem)):
            assert relative_error(launch("cats", *given), oracle(*problem)) < TOLERANCE[torch.bfloat16]


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that starts 2 bytes after a multiple of 16."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return room[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensor_cores_for_any_number_of_rows(dtype: torch.dtype):
    for rows, d, m in ((1, 2048, 5000), (2, 130, 77), (5, 1000, 1003)):
        problem = case(rows, d, m, dtype, 0.5, device="cuda")
        error = relative_error(launch("cats", *problem, config=TENSOR_CORES), oracle(*problem))
        assert error < TOLERANCE[dtype], f"rows={rows} d={d} m={m}: {error:.2e}"


@pytest.mark.parametrize("rows", [1, 8, 100])
def test_the_entry_point_takes_any_number_of_rows(rows: int):
    problem = case(rows, 1024, 3000, torch.float32, 0.5, device="cuda")
    for call in (VARIANTS["cats"], dense_masked):
        assert relative_error(call(*problem), oracle(*problem)) < 1e-5


def test_dependent_launch_waits_for_a_copy_and_for_another_stream():
    """The first kernel may start early too: its predecessor here is a memory copy, then an event of another stream."""
    x, *rest = case(1, 2048, 6000, torch.bfloat16, 0.5, device="cuda")
    launch("cats", x, *rest)
    source, other = x.clone(), torch.cuda.Stream()

    def work() -> tuple[torch.Tensor, torch.Tensor]:
        x.copy_(source)
        first = launch("cats", x, *rest)
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            x.mul_(2.0)
        torch.cuda.current_stream().wait_stream(other)
        return first, launch("cats", x, *rest)

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = work()
    for factor in (1.0, -3.0):
        source.copy_(case(1, 2048, 6000, torch.bfloat16, 0.5, seed=7, device="cuda")[0] * factor)
        graph.replay()
        for y, scale in zip(outputs, (1.0, 2.0), strict=True):
            assert relative_error(y, oracle(source * scale, *rest)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(("kind", "decider"), KINDS)
def test_torch_compile_without_graph_break(kind: str, decider: str):
    problem = case(1, 1024, 2816, torch.bfloat16, 0.5, device="cuda", kind=kind, decider=decider)

    class Layer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + sparse_gated_mlp(x * 1.0, *problem[1:6], backend="triton", decider=decider)

    with torch.no_grad():
        y = torch.compile(Layer(), fullgraph=True, mode="reduce-overhead")(problem[0])
    assert relative_error(y - problem[0], oracle(*problem)) < 2e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_memcheck(variant: str):
    """Small and odd sizes of every kernel, for compute-sanitizer."""
    for dtype in DTYPES:
        for rows, d, m in ((1, 64, 96), (1, 33, 37), (2, 72, 130), (3, 130, 50), (8, 1, 1)):
            for kind, decider in KINDS if variant == "cats" else KINDS[:1]:
                problem = case(rows, d, m, dtype, 0.5, device="cuda", kind=kind, decider=decider)
                assert relative_error(launch(variant, *problem), oracle(*problem)) < TOLERANCE[dtype]


@pytest.mark.parametrize("changes", [{}, {"gate_stages": 6}, {"parts": 8}, {"gate_stages": 6, "parts": 2}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_early_weight_rows_but_no_early_input(changes: dict, dtype: torch.dtype):
    """Back to back, then each call on the output of the one before, which it may not read too early."""
    problem = case(1, 4096, 14336, dtype, 0.5, device="cuda")
    early, late = (replace(choose_config(dtype.itemsize, 1, 4096), early=early, **changes) for early in (True, False))
    outputs = [launch("cats", *problem, config=early) for _ in range(50)]
    assert all(torch.equal(y, outputs[0]) for y in outputs)
    assert relative_error(outputs[0], oracle(*problem)) < TOLERANCE[dtype]
    x, *rest = case(1, 4096, 14336, dtype, 0.0, device="cuda")

    def chains(config: Config) -> list[torch.Tensor]:
        outputs = []
        for _ in range(20):
            outputs.append(launch("cats", x, *rest, config=config))
            outputs.append(launch("cats", outputs[-1], *rest, config=config))
        return outputs

    expected = chains(late)
    assert expected[1].any() and not torch.equal(*expected[:2])
    assert all(map(torch.equal, chains(early), expected))


@torch.no_grad()
def test_a_patched_block_repeats_its_launches():
    """Same bits as the first call, on another stream and in a captured graph too; apply has compiled for one row."""
    model = nn.ModuleDict({"mlp": tiny_model(hidden_size=256, intermediate_size=640).model.layers[0].mlp})
    model.to("cuda", torch.bfloat16)
    cats.apply(model, cats.Thresholds(0.5, {"mlp": 0.1}))
    block, inputs = model["mlp"], [torch.randn(1, rows, 256, device="cuda").bfloat16() for rows in (1, 2, 4)]
    assert block.cats_state.known is not None
    expected = [block(x) for x in inputs]
    known = block.cats_state.known
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    for x, y in zip(inputs, expected, strict=True):
        assert known.calls[x.shape] is not None and torch.equal(block(x), y)
        with torch.cuda.stream(other):
            assert torch.equal(block(x), y)
        graph, given = torch.cuda.CUDAGraph(), x.clone()
        with torch.cuda.graph(graph):
            captured = block(given)
        given.copy_(3 * x)
        graph.replay()
        assert torch.equal(captured, block(3 * x)) and not torch.equal(captured, y)
    assert block.cats_state.known is known
