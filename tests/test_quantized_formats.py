"""A format of quantised weights that no kernel takes is computed by the reference, until a kernel says that it does."""

import itertools

import pytest
import torch
from cats_kernels import dispatch, quantized, sparse_gated_mlp
from cats_kernels.problem import TOLERANCE, relative_error
from cats_kernels.quantized_problem import QuantizedProblem


@pytest.mark.parametrize("bits", [8, 4])
def test_a_group_size_without_a_kernel_is_dequantised(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "GROUP_SIZES", (16, *quantized.GROUP_SIZES))
    made = QuantizedProblem(100, 48, 1, bits, 16)
    assert not dispatch.kernels_take("cpu", *made.weights) and not dispatch.kernels_take("triton", *made.weights)
    for sparsity in (0.0, 0.5):
        threshold = made.threshold(sparsity)
        x, *weights, _, activation, decider = made.quantized_arguments(threshold)
        y = sparse_gated_mlp(x, *weights, threshold, activation, "cpu", decider)
        assert relative_error(y, made.oracle(threshold)) < TOLERANCE[torch.float32]


def test_what_the_kernels_take() -> None:
    for backend, sizes in dispatch.KERNEL_GROUP_SIZES.items():
        for bits, size in itertools.product(quantized.BITS, quantized.GROUP_SIZES):
            weights = QuantizedProblem(64, 8, 1, bits, size).weights
            assert dispatch.kernels_take(backend, *weights) == (size in sizes)
    row, grouped = (QuantizedProblem(48, 8, 1, 8, size).weights for size in (None, 32))
    assert dispatch.kernels_take("cpu", *row) and dispatch.kernels_take("triton", *row)
    mixed = (row[0], *grouped[1:])
    assert dispatch.kernels_take("cpu", *mixed) and not dispatch.kernels_take("triton", *mixed)


def test_a_gpu_takes_larger_pieces() -> None:
    """Each piece is some ten launches there."""
    for device, count in (("cpu", 224), ("cuda", 7)):
        pieces = list(quantized.row_chunks(14336, 4096, torch.device(device)))
        assert len(pieces) == count and pieces[0][0] == 0 and pieces[-1][1] == 14336
        assert all(before[1] == after[0] for before, after in itertools.pairwise(pieces))
