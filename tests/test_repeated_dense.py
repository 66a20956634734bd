"""The dense masked path made again, with a kernel of the host's in place of Triton's: without a GPU."""

import ctypes

import pytest
import torch
from cats_kernels import dispatch, operator, repeated, sparse_gated_mlp_reference
from cats_kernels.problem import Problem
from torch import nn

import cats

from .conftest import tiny_model

pytest.importorskip("triton")
from cats_kernels.triton import dense


class HostKernel:
    """Stands for `masked_product_kernel` and for what Triton makes of it: computes at the addresses it is given."""

    def __init__(self) -> None:
        self.arg_names = dense.masked_product_kernel.arg_names
        self.launches = 0

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*values, **constants):
            if constants:
                return self  # the first one, which compiles
            self.launches += 1
            given = dict(zip(self.arg_names, values, strict=True))
            assert grid == (-(-given["n"] // given["BLOCK"]), 1, 1)
            gate, up, h = (floats(given[name], given["n"]) for name in ("gate_ptr", "up_ptr", "h_ptr"))
            count = given["M"] if given["THRESHOLD"] == "vector" else 1
            limit = given["threshold"]
            if given["THRESHOLD"] != "number":
                limit = floats(limit, count).repeat(len(gate) // count)
            v = nn.functional.silu(gate)
            decides = up if given["UP_DECIDES"] else v
            h.copy_(torch.where(decides.abs() < limit, 0, v * up))
            return None

        return launch


def floats(address: int, n: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_float * n).from_address(address), dtype=torch.float32)


@pytest.fixture
def kernel(monkeypatch) -> HostKernel:
    kernel = HostKernel()
    monkeypatch.setattr(dense, "masked_product_kernel", kernel)
    return kernel


@pytest.mark.parametrize("kind", ["number", "one", "vector"])
@pytest.mark.parametrize("decider", ["gate", "up"])
def test_it_computes_the_function_on_any_weights(kernel: HostKernel, kind: str, decider: str) -> None:
    made, other = Problem(32, 80, 8), Problem(32, 80, 8, seed=1)
    number = made.threshold(0.5)
    threshold = {"number": number, "one": torch.tensor(number), "vector": torch.linspace(0, 2 * number, 80)}[kind]
    call = dense.repeated_dense(made.x, made.gate, made.up, made.down_t, threshold, "silu", decider)
    assert call is not None and repeated.takes_weights(call)
    for weights in (made, other):
        given = made.x.view(2, 4, 32), weights.gate, weights.up, weights.down_t
        y, expected = call(*given), sparse_gated_mlp_reference(*given, threshold, "silu", decider)
        assert y.shape == (2, 4, 32) and torch.allclose(y, expected, atol=1e-5)
    assert kernel.launches == 2


def test_a_threshold_that_is_not_contiguous_is_not_repeated() -> None:
    made = Problem(32, 80, 8)
    assert dense.repeated_dense(*made.arguments(torch.zeros(160)[::2])) is None


@pytest.mark.parametrize("family", ["Llama", "Phi3"])
@torch.no_grad()
def test_a_patched_block_repeats_more_rows_than_the_sparse_kernel_takes(
    family: str, kernel: HostKernel, batches: list, monkeypatch
) -> None:
    """As on a GPU: up to 4 rows go to the sparse kernel, 5 to 8 to the dense path; weights are looked at every time."""
    monkeypatch.setitem(dispatch.SPARSE_ROWS, ("cpu", torch.float32), 4)
    monkeypatch.setattr(repeated, "repeat_dense_by", lambda backend: dense.repeated_dense)
    slow: list[torch.Size] = []
    compute = operator._compute
    monkeypatch.setattr(operator, "_compute", lambda x, *rest: (slow.append(x.shape), compute(x, *rest))[1])
    model = tiny_model(family)
    cats.apply(model, cats.calibrate(model, batches, 0.6))
    block = next(iter(cats.gated_mlps(model).values()))
    x = torch.randn(8, 1, 32, generator=torch.Generator().manual_seed(3))
    expected = block(x)
    assert len(slow) == 1
    assert torch.allclose(block(x), expected, atol=1e-6) and torch.allclose(block(2 * x), block(2 * x))
    assert len(slow) == 1 and kernel.launches == 3
    block.down_proj.weight.mul_(3)
    assert torch.allclose(block(x), 3 * expected, atol=1e-5)
    block.down_proj.weight.data = block.down_proj.weight.data.clone(memory_format=torch.preserve_format) / 3
    assert torch.allclose(block(x), expected, atol=1e-5)
    assert len(slow) == 2


@torch.no_grad()
def test_the_recorded_operator_repeats_it_too(kernel: HostKernel, monkeypatch) -> None:
    monkeypatch.setitem(dispatch.SPARSE_ROWS, ("cpu", torch.float32), 4)
    monkeypatch.setattr(repeated, "repeat_dense_by", lambda backend: dense.repeated_dense)
    monkeypatch.setattr(repeated, "KEPT", {})
    made = Problem(32, 80, 8)
    arguments = made.x, made.gate, made.up, made.down_t, torch.tensor(made.threshold(0.5)), "silu", "auto", "gate"
    first = torch.ops.cats.sparse_gated_mlp(*arguments)
    assert torch.allclose(torch.ops.cats.sparse_gated_mlp(*arguments), first, atol=1e-5)
    assert kernel.launches == 1
