"""Repeated calls of a patched MLP: what they skip looking at, and that they notice whatever may have changed."""

import copy
import gc
import sys
import threading
import time
import timeit
import weakref
from collections.abc import Callable

import peft
import pytest
import torch
from cats_kernels import dispatch, operator, repeated, sparse_gated_mlp
from cats_kernels.problem import Problem
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import cats

from .conftest import tiny_model


def shapes_computed(monkeypatch, module) -> list[torch.Size]:
    """Shapes of x in the calls of an operator, of ``module``, that looked at everything."""
    shapes: list[torch.Size] = []
    compute = module._compute
    monkeypatch.setattr(module, "_compute", lambda x, *rest: (shapes.append(x.shape), compute(x, *rest))[1])
    return shapes


@pytest.fixture
def slow_calls(monkeypatch) -> list[torch.Size]:
    return shapes_computed(monkeypatch, operator)


def patched(batches: list) -> nn.Module:
    """A tiny patched model whose first block has repeated a call of one row."""
    model = tiny_model()
    cats.apply(model, cats.calibrate(model, batches, 0.6))
    block = first_block(model)
    with torch.no_grad():
        for _ in range(2):
            block(row())
    assert list(block.cats_state.known.calls) == [torch.Size((1, 1, 32))]
    return model


def first_block(model: nn.Module):
    return next(iter(cats.gated_mlps(model).values()))


def row(rows: int = 1) -> torch.Tensor:
    return torch.randn(1, rows, 32, generator=torch.Generator().manual_seed(3))


def anew(block, x: torch.Tensor) -> torch.Tensor:
    """What the block computes when it has nothing to repeat."""
    block.cats_state.known = None
    return block(x)


@pytest.mark.parametrize("criterion", ["cats", "up-norm", "gate-norm"])
@pytest.mark.parametrize("family", ["Llama", "Phi3", "Gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_repeated_call_gives_the_same_bits(family, criterion, dtype, batches, slow_calls):
    model = tiny_model(family)
    thresholds = cats.calibrate(model, batches, 0.6, criterion=criterion)
    model.to(dtype)
    cats.apply(model, thresholds)
    block = first_block(model)
    inputs = [row(rows).to(dtype) for rows in (1, 3, 8)]
    once = [block(x) for x in inputs]
    assert len(slow_calls) == 3
    for x, expected in zip((*inputs, *inputs), (*once, *once), strict=True):
        y = block(x)
        assert y.shape == x.shape and torch.equal(y, expected)
        assert torch.equal(block(2 * x), anew(copy.deepcopy(block), 2 * x))
    assert len(slow_calls) == 3 + 6  # those of the copies


def replace_data(block) -> None:
    block.gate_proj.weight.data = block.gate_proj.weight.data.clone() * 2


def narrower(block) -> None:
    """The same address, fewer neurons."""
    for linear in (block.gate_proj, block.up_proj):
        linear.weight.data = linear.weight.data[:-8]
    block.down_proj.weight.data = block.down_proj.weight.data.t()[:-8].t()


def other_layout(block) -> None:
    """The same address read in another order."""
    weight = block.up_proj.weight
    weight.data = weight.data.view(weight.shape[1], weight.shape[0]).t()


def assign(block) -> None:
    state = {name: value * 2 for name, value in block.state_dict().items()}
    block.load_state_dict(state, assign=True)


def hook(part: str) -> Callable[[nn.Module], object]:
    return lambda block: block.get_submodule(part).register_forward_hook(lambda _module, _args, y: 2 * y + 1)


def other_projection(block) -> None:
    block.up_proj = nn.Linear(32, 88, False)


def lora(block) -> None:
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["gate_proj"], init_lora_weights=False), block)


def new_threshold(block) -> None:
    block.act_fn.set_threshold(0.01)


def vector_threshold(block) -> None:
    block.act_fn.set_threshold(torch.linspace(0, 2, 88))


def changed_in_place(block) -> None:
    block.down_proj.weight.mul_(3)


CHANGES = {
    "other data": replace_data,
    "fewer neurons": narrower,
    "other layout": other_layout,
    "load_state_dict(assign=True)": assign,
    "hook on a projection": hook("down_proj"),
    "hook on the activation": hook("act_fn"),
    "another projection": other_projection,
    "lora": lora,
    "threshold": new_threshold,
    "thresholds": vector_threshold,
    "in place": changed_in_place,
    "float64": lambda block: block.double(),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_of_the_block_is_noticed(change: str, batches: list):
    block = first_block(patched(batches))
    before, x = block(row()), row()
    torch.manual_seed(1)
    CHANGES[change](block)
    x = x.to(block.down_proj.weight.dtype)
    y = block(x)
    assert not torch.allclose(y.float(), before) or change == "float64"
    written_out = masked(block, x)
    assert torch.allclose(y, written_out, atol=1e-5)
    assert torch.equal(block(x), y) and torch.equal(anew(block, x), y)


def masked(block, x: torch.Tensor) -> torch.Tensor:
    """Equation 1 with the threshold, through the block's own modules."""
    v = block.act_fn(block.gate_proj(x))
    return block.down_proj(v * block.up_proj(x))


@pytest.mark.parametrize("criterion", ["up-norm", "teal", "cats"])
@torch.no_grad()
def test_another_apply_is_noticed(criterion: str, batches: list):
    model, fresh = patched(batches), tiny_model()
    thresholds = cats.calibrate(fresh, batches, 0.8, criterion=criterion)
    for each in (model, fresh):
        cats.apply(each, thresholds, "reference" if criterion == "teal" else "auto")
    assert torch.equal(first_block(model)(row()), first_block(fresh)(row()))
    cats.remove(model)
    assert torch.equal(first_block(model)(row()), first_block(tiny_model())(row()))


@torch.no_grad()
def test_another_backend_in_the_environment_is_noticed(batches: list, slow_calls: list, monkeypatch):
    block, other = first_block(patched(batches)), []
    slow_calls.clear()
    expected = block(row())
    assert slow_calls == []
    reference = dispatch.sparse_gated_mlp_reference
    monkeypatch.setattr(dispatch, "sparse_gated_mlp_reference", lambda *a: other.append(1) or reference(*a))
    for backend, calls in (("reference", 1), ("cpu", 1), ("reference", 2)):
        monkeypatch.setenv("CATS_BACKEND", backend)
        assert torch.allclose(block(row()), expected, atol=1e-6) and len(other) == calls
    monkeypatch.delenv("CATS_BACKEND")
    assert torch.equal(block(row()), expected) and len(other) == 2
    named = first_block(patched(batches))
    named.cats_state.kernel, named.cats_state.known = "cpu", None  # which nothing in the environment replaces
    named(row())
    slow_calls.clear()
    monkeypatch.setenv("CATS_BACKEND", "reference")
    assert torch.equal(named(row()), expected) and slow_calls == [] and len(other) == 2


class Names(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_what_records_calls_still_sees_them(batches: list):
    block, x = first_block(patched(batches)), row()
    expected = block(x)
    with Names() as names:
        assert torch.equal(block(x), expected)
    assert "sparse_gated_mlp" in names.names
    with Operators() as operators:
        block(x)
    assert "cats.sparse_gated_mlp.default" in operators.names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        block(x)
    assert "cats::sparse_gated_mlp" in [event.key for event in profiler.key_averages()]
    traced = torch.jit.trace(block, x)
    assert "cats::sparse_gated_mlp" in str(traced.inlined_graph)
    assert torch.equal(torch.func.vmap(block)(x[None])[0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x).dtype == torch.bfloat16
    torch.compiler.reset()
    assert torch.equal(torch.compile(block, backend="eager", fullgraph=True)(x), expected)
    torch.compiler.reset()


def test_gradients_and_training_take_the_dense_path(batches: list):
    block, x = first_block(patched(batches)), row().requires_grad_()
    block(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    block.train()
    with torch.no_grad():
        assert torch.allclose(block(row()), block.eval()(row()), atol=1e-5)


@torch.no_grad()
def test_inputs_of_other_kinds(batches: list, slow_calls: list):
    block = first_block(patched(batches))
    slow_calls.clear()
    wide = torch.randn(1, 1, 64)
    assert torch.equal(block(wide[..., ::2]), block(wide[..., ::2].contiguous()))
    assert len(slow_calls) == 1  # the one that is not contiguous
    assert block(row().bfloat16().float().to("meta")).device.type == "meta"
    for x in (row(9), row(40), row()[0], row()[0, 0]):
        for _ in range(2):
            assert torch.allclose(block(x), masked(block, x), atol=1e-5)
    assert not any(shape.numel() > 8 * 32 for shape in block.cats_state.known.calls)


@torch.no_grad()
def test_who_replaces_the_operator_gets_the_calls(batches: list, operator_calls: list):
    model = tiny_model()
    cats.apply(model, cats.calibrate(model, batches, 0.5))
    for _ in range(3):
        first_block(model)(row())
    assert len(operator_calls) == 3 and first_block(model).cats_state.known is None


@torch.no_grad()
def test_copies_and_weights_that_are_gone(batches: list):
    model = patched(batches)
    block = first_block(model)
    twin = copy.deepcopy(block)
    assert twin.cats_state.known is None and block.cats_state.known is not None
    assert torch.equal(twin(row()), block(row()))
    gone = weakref.ref(block.gate_proj.weight)
    block.gate_proj.weight = nn.Parameter(block.gate_proj.weight * 2)
    gc.collect()
    assert gone() is None
    assert torch.allclose(block(row()), masked(block, row()), atol=1e-5)


@torch.no_grad()
def wrong_in_threads(block) -> list[int]:
    """Of 200 calls in each of four threads, each with rows of its own, those that gave something else than alone."""
    inputs = [torch.randn(1, rows, 32) for rows in (1, 2, 3, 4)]
    expected = [block(x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            wrong.extend(i for _ in range(200) if not torch.equal(block(inputs[i]), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


def test_several_threads_on_one_block(batches: list):
    assert wrong_in_threads(first_block(patched(batches))) == []


@torch.no_grad()
def test_the_recorded_operator_repeats_too(slow_calls: list):
    """Compiled code calls it; a tensor that took another's place in memory is another call."""
    made, call = Problem(32, 48, 2), torch.ops.cats.sparse_gated_mlp
    threshold = torch.tensor(made.threshold(0.5))
    arguments = [made.x, made.gate.clone(), made.up, made.down_t, threshold]
    options = "silu", "auto", "gate"
    for turn in range(3):
        for x in (made.x, 2 * made.x, made.x[:1]):
            y = call(x, *arguments[1:], *options)
            assert torch.equal(y, sparse_gated_mlp(x, *arguments[1:]))
        arguments[1].mul_(1.5)
        arguments[4].mul_(0.5 if turn else 2)
    recorded = len(slow_calls) - 9
    assert recorded == 2  # one for each shape
    assert torch.equal(call(*arguments[:4], threshold[None].expand(48), *options), sparse_gated_mlp(*arguments))


def test_facts_tell_what_a_kernel_could_mistake():
    weight = torch.zeros(4, 6)
    others = [weight[:3], weight.t(), weight.view(6, 4), weight.view(torch.int32), weight[1:], nn.Parameter(weight)]
    facts = [repeated.facts(tensor) for tensor in (weight, *others)]
    assert len(set(facts)) == len(facts)
    assert repeated.facts(weight[:]) == facts[0]


@torch.no_grad()
def test_host_time_of_a_tiny_block_is_below_the_dense_ones():
    """Processor time of this thread, so that other programs matter little; on weights of 8 KB, whose products take next
    to nothing. It was 0.45 of the dense block's when this was written, and 1.3 without repeating."""
    threads, tracer = torch.get_num_threads(), sys.gettrace()
    torch.set_num_threads(1)
    sys.settrace(None)  # coverage looks at every line of the patched block's Python, and at none of torch's C++
    try:
        model = nn.ModuleDict({"mlp": tiny_model(hidden_size=16, intermediate_size=32).model.layers[0].mlp})
        x, dense = torch.randn(1, 1, 16), copy.deepcopy(model)
        cats.apply(model, cats.Thresholds(0.5, {"mlp": 0.1}))
        seconds = {}
        for name, block in (("dense", dense["mlp"]), ("patched", model["mlp"])):
            timeit.timeit(lambda block=block: block(x), number=100)
            times = timeit.repeat(lambda block=block: block(x), timer=time.thread_time, number=300, repeat=9)
            seconds[name] = min(times)
    finally:
        sys.settrace(tracer)
        torch.set_num_threads(threads)
    assert seconds["patched"] < 0.8 * seconds["dense"]
