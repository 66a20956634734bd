"""The operator wherever something records or transforms calls: one node, the eager result, no graph per threshold."""

import math
import subprocess
import sys

import pytest
import torch
from cats_kernels import sparse_gated_mlp, sparse_gated_mlp_reference
from cats_kernels.problem import Problem, inputs, weights
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import cats
from tests.mlp_cases import threshold_of_kind

OPERATOR = torch.ops.cats.sparse_gated_mlp
KINDS = [(kind, decider) for kind in ("number", "one", "vector") for decider in ("gate", "up")]


class Block(nn.Module):
    """A layer that calls the operator between other operations; its threshold is a buffer if it is a tensor."""

    def __init__(self, made: Problem, kind: str = "number", sparsity: float = 0.5) -> None:
        super().__init__()
        self.gate, self.up, self.down_t = (nn.Parameter(w, False) for w in (made.gate, made.up, made.down_t))
        threshold = threshold_of_kind(made, kind, sparsity)
        if kind == "number":
            self.threshold = threshold
        else:
            self.register_buffer("threshold", threshold)
        self.decider = made.decider

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = sparse_gated_mlp(x * 2, self.gate, self.up, self.down_t, self.threshold, decider=self.decider)
        return y + x


@pytest.fixture
def made() -> Problem:
    return Problem(32, 48, 3)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("decider", ["gate", "up"])
@pytest.mark.parametrize("threshold", [torch.tensor(0.1), torch.linspace(0, 1, 24)], ids=["one", "vector"])
def test_opcheck(dtype, decider, threshold):
    x = inputs(6, 32, dtype).reshape(3, 2, 32)[..., ::2]
    torch.library.opcheck(OPERATOR, (x, *weights(16, 24, dtype), threshold, "silu", "auto", decider))


@pytest.mark.parametrize(("kind", "decider"), KINDS)
def test_compiles_without_a_graph_break(kind, decider):
    made = Problem(32, 48, 3, decider=decider)
    block = Block(made, kind)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for rows in (1, 3, 2):
        assert torch.equal(compiled(made.x[:rows]), block(made.x[:rows]))


def test_one_graph_for_all_layers_and_thresholds(made):
    """A tensor threshold is an input of the graph: no guard on its value, none on which layer it is of."""
    for kind in ("one", "vector"):
        counter = CompileCounter()
        compiled = torch.compile(sparse_gated_mlp, fullgraph=True, backend=counter)
        for sparsity in (0.1, 0.3, 0.5, 0.7, 0.9):
            threshold = threshold_of_kind(made, kind, sparsity)
            y = compiled(made.x, made.gate, made.up, made.down_t, threshold)
            assert torch.equal(y, sparse_gated_mlp(made.x, made.gate, made.up, made.down_t, threshold))
        assert counter.frame_count == 1


def test_numbers_compile_twice_at_most(made):
    """torch.compile takes the first number as a constant and, when it changes, every other as an input."""
    counter = CompileCounter()
    compiled = torch.compile(sparse_gated_mlp, fullgraph=True, backend=counter)
    for sparsity in (0.1, 0.3, 0.5, 0.7, 0.9):
        arguments = made.arguments(made.threshold(sparsity))[:5]
        assert torch.equal(compiled(*arguments), sparse_gated_mlp(*arguments))
    assert counter.frame_count <= 2


@pytest.mark.parametrize(("kind", "decider"), KINDS)
def test_jit_trace_equals_eager(kind, decider, tmp_path):
    made = Problem(32, 48, 3, decider=decider)
    block = Block(made, kind).eval()
    traced = torch.jit.trace(block, made.x)
    assert "cats::sparse_gated_mlp" in str(traced.graph)
    for x in (made.x, inputs(3, 32, seed=9)):
        assert torch.equal(traced(x), block(x))
    traced.save(tmp_path / "block.pt")
    assert torch.equal(torch.jit.load(tmp_path / "block.pt")(x), block(x))


@pytest.mark.parametrize(("kind", "decider"), KINDS)
def test_export_keeps_one_node(kind, decider):
    made = Problem(32, 48, 3, decider=decider)
    block = Block(made, kind).eval()
    rows = torch.export.Dim("rows", min=2, max=8)
    program = torch.export.export(block, (made.x,), dynamic_shapes=({0: rows},))
    assert [node.target for node in program.graph.nodes].count(OPERATOR.default) == 1
    for x in (made.x, inputs(5, 32, seed=9)):
        assert torch.equal(program.module()(x), block(x))


def test_fx_symbolic_trace_keeps_one_node(made):
    block = Block(made)
    graph = torch.fx.symbolic_trace(block)
    assert [node.target for node in graph.graph.nodes].count(sparse_gated_mlp) == 1
    assert torch.equal(graph(made.x), block(made.x))


def test_onnx_export_gets_plain_products(made, monkeypatch):
    """The exporter knows no such operator; while it exports, the reference's own operations are recorded."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    traced = torch.jit.trace(Block(made), made.x)
    assert "cats::" not in str(traced.graph) and "aten::linear" in str(traced.graph)
    monkeypatch.undo()
    x = inputs(3, 32, seed=9)
    assert torch.allclose(traced(x), Block(made)(x), atol=1e-6)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[object] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators.append(function)
        return function(*args, **(kwargs or {}))


def test_dispatch_modes_see_the_operator(made):
    with Seen() as seen:
        y = sparse_gated_mlp(*made.arguments(0.1)[:5])
    assert OPERATOR.default in seen.operators
    assert torch.equal(y, sparse_gated_mlp(*made.arguments(0.1)[:5]))


def test_function_modes_see_the_function(made):
    class Names(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            names.append(function)
            return function(*args, **(kwargs or {}))

    names: list[object] = []
    with Names():
        y = sparse_gated_mlp(*made.arguments(0.1)[:5], decider="up")
    assert sparse_gated_mlp in names
    assert torch.equal(y, sparse_gated_mlp(*made.arguments(0.1)[:5], decider="up"))


def test_tensor_subclasses_see_the_function(made):
    class Named(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            names.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    names: list[object] = []
    gate = made.gate.as_subclass(Named)
    y = sparse_gated_mlp(made.x, gate, made.up, made.down_t, 0.1)
    assert names[0] is sparse_gated_mlp
    assert torch.equal(y.as_subclass(torch.Tensor), sparse_gated_mlp(*made.arguments(0.1)[:5]))


def test_flops_are_those_of_the_dense_block(made):
    counts = []
    for call in (made.dense(), lambda: sparse_gated_mlp(*made.arguments(0.1)[:5])):
        with FlopCounterMode(display=False) as counter:
            call()
        counts.append(counter.get_total_flops())
    assert counts == [6 * 3 * 48 * 32] * 2


def test_flops_are_counted_whichever_is_imported_first():
    code = """
import torch
{first}
{second}
x, weight = torch.ones(2, 8), torch.ones(16, 8)
for _ in range(2):
    with FlopCounterMode(display=False) as counter:
        cats_kernels.sparse_gated_mlp(x, weight, weight, weight, 0.1, backend="reference")
    assert counter.get_total_flops() == 6 * 2 * 16 * 8, counter.get_total_flops()
"""
    imports = ["import cats_kernels", "from torch.utils.flop_counter import FlopCounterMode"]
    for first, second in (imports, imports[::-1]):
        subprocess.run([sys.executable, "-c", code.format(first=first, second=second)], check=True)


def test_the_profiler_names_the_row(made):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        sparse_gated_mlp(*made.arguments(0.1)[:5])
    assert [event.count for event in profiler.key_averages() if event.key == "cats::sparse_gated_mlp"] == [1]


def test_fake_tensors(made):
    with torch._subclasses.FakeTensorMode() as mode:
        x, gate, up, down_t = (mode.from_tensor(t) for t in (made.x, made.gate, made.up, made.down_t))
        assert sparse_gated_mlp(x, gate, up, down_t, 0.1).shape == (3, 32)
        with pytest.raises(ValueError, match=r"up_weight is \(47, 32\)"):
            sparse_gated_mlp(x, gate, up[1:], down_t, 0.1)


def test_make_fx_records_the_operator(made):
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: sparse_gated_mlp(x, *made.arguments(0.1)[1:5]))(made.x)
    assert OPERATOR.default in [node.target for node in graph.graph.nodes]


@pytest.mark.parametrize("decider", ["gate", "up"])
def test_vmap_over_rows(made, decider):
    def one(x):
        return sparse_gated_mlp(x, made.gate, made.up, made.down_t, 0.1, decider=decider)

    expected = one(made.x)
    assert torch.equal(torch.func.vmap(one)(made.x), expected)
    assert torch.equal(torch.func.vmap(one, in_dims=1, out_dims=1)(made.x.T.contiguous()), expected.T)


def test_vmap_over_an_ensemble(made):
    members = [Problem(32, 48, 3, seed=seed) for seed in (1, 2)]
    stacked = [torch.stack([getattr(p, name) for p in members]) for name in ("gate", "up", "down_t")]
    thresholds = torch.stack([p.thresholds(0.5) for p in members])
    y = torch.func.vmap(sparse_gated_mlp, in_dims=(None, 0, 0, 0, 0))(made.x, *stacked, thresholds)
    for i, p in enumerate(members):
        assert torch.equal(y[i], sparse_gated_mlp(made.x, p.gate, p.up, p.down_t, thresholds[i]))


def test_gradients_of_torch_func_are_refused(made):
    def loss(x):
        return sparse_gated_mlp(x, made.gate, made.up, made.down_t, 0.1).sum()

    with pytest.raises(RuntimeError, match="for inference and has no gradient"):
        torch.func.grad(loss)(made.x)
    with pytest.raises(RuntimeError, match="for inference and has no gradient"):
        torch.func.jvp(loss, (made.x,), (made.x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="for inference and has no gradient"):
        loss(torch.autograd.forward_ad.make_dual(made.x, made.x))


def test_autocast_inside_a_compiled_graph(made):
    def block(x):
        with torch.autocast("cpu", torch.bfloat16):
            return sparse_gated_mlp(x, made.gate, made.up, made.down_t, 0.1)

    y = torch.compile(block, fullgraph=True, backend="aot_eager")(made.x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, block(made.x))


def test_a_number_that_no_float32_holds_is_the_same_everywhere(made):
    """0.1 is compared as the float32 nearest to it, also with float64 products, eager or recorded."""
    x, gate, up, down_t = (t.double() for t in (made.x, made.gate, made.up, made.down_t))
    magnitude = torch.nn.functional.silu(x @ gate.T).abs()
    threshold = float(magnitude.flatten().sort().values[40])
    below = float(torch.tensor(threshold).float())
    for t in (threshold, below, 1e300, math.inf):
        eager = sparse_gated_mlp(x, gate, up, down_t, t)
        assert torch.equal(OPERATOR(x, gate, up, down_t, torch.tensor(t).float(), "silu", "auto", "gate"), eager)
        assert torch.equal(sparse_gated_mlp_reference(x, gate, up, down_t, t), eager)


def test_the_operator_itself_refuses_bad_tensors(made):
    x, gate, up, down_t = made.arguments(0.1)[:4]
    with pytest.raises(ValueError, match=r"threshold is \(47,\)"):
        OPERATOR(x, gate, up, down_t, torch.ones(47), "silu", "auto", "gate")
    with pytest.raises(ValueError, match="decider is 'down'"):
        OPERATOR(x, gate, up, down_t, torch.ones(()), "silu", "auto", "down")


@pytest.mark.parametrize("rows", [1, 9])
def test_a_traced_patched_model_equals_eager(llama, batches, rows):
    cats.apply(llama, cats.calibrate(llama, batches, 0.5), kernel="cpu")
    first, second = (batch["input_ids"][:1, :rows] for batch in batches[:2])

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids, use_cache=False).logits

    with torch.no_grad():
        traced = torch.jit.trace(Logits().eval(), first, check_trace=False)
        assert str(traced.inlined_graph).count("cats::sparse_gated_mlp") == 3
        for ids in (first, second):
            assert torch.equal(traced(ids), llama(ids, use_cache=False).logits)
