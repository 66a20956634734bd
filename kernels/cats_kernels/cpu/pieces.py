"""Products of rows of x with weights that are dequantised a piece at a time, multiplied by torch in the dtype that the
processor multiplies fast: float32, and bfloat16 for bfloat16 x where there are instructions for it.

Pieces are written over one another in memory that a thread keeps: new memory comes from the system a page at a time,
which takes as long as a dequantised piece does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cats_kernels.cpu.dequantise import dequantise_into
from cats_kernels.quantized import QuantizedWeight
from cats_kernels.reference import multiplies_bfloat16

WEIGHTS = 2**22
"""That are dequantised at a time."""

_own = threading.local()


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which x of ``dtype``, one of `cats_kernels.cpu_products.DTYPES`, is multiplied."""
    return torch.bfloat16 if dtype == torch.bfloat16 and multiplies_bfloat16() else torch.float32


def piece_memory(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Memory (rows, columns) of this thread, until the next call on this thread."""
    size = rows * columns * dtype.itemsize
    memory: Tensor | None = getattr(_own, "memory", None)
    if memory is None or len(memory) < size:
        with torch.inference_mode(False):
            memory = _own.memory = torch.empty(size, dtype=torch.uint8, device="cpu")
    return memory[:size].view(dtype).view(rows, columns)


def row_ranges(m: int, d: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges of rows of a weight (m, d), about `WEIGHTS` at a time; each but the last a multiple of ``multiple``."""
    step = max(multiple, WEIGHTS // d // multiple * multiple)
    for first in range(0, m, step):
        yield first, min(m, first + step)


def multiply(x: Tensor, weight: QuantizedWeight, transposed: bool = False) -> Tensor:
    """``x W^T`` (rows, m) of x (rows, d), or ``x W`` (rows, d) of x (rows, m), for W (m, d) on the CPU.

    No gradient must be asked for: what a product would keep for it is overwritten by the next piece.

    Args:
        x: one of `cats_kernels.cpu_products.DTYPES`; W is rounded to the dtype of the products, where that is bfloat16.
        weight: contiguous.
        transposed: multiply with W instead of its transposed.

    Returns:
        In the dtype of x; sums of ``x W`` over pieces are in float32.
    """
    inner = x.to(product_dtype(x.dtype))

    def write(first: int, last: int) -> Tensor:
        piece = piece_memory(last - first, weight.d, inner.dtype)
        dequantise_into(weight.rows(first, last), piece)
        return piece

    if not transposed:
        return by_pieces(inner, weight.shape, lambda first, last: write(first, last).t()).to(x.dtype)
    y: Tensor | None = None
    for first, last in row_ranges(*weight.shape):
        part = (inner[:, first:last] @ write(first, last)).float()
        y = part if y is None else y + part
    assert y is not None
    return y.to(x.dtype)


def by_pieces(x: Tensor, shape: tuple[int, int], columns: Callable[[int, int], Tensor], multiple: int = 1) -> Tensor:
    """``x W^T`` of a weight (m, d) of which ``columns`` gives rows [first, last) transposed, (d, last - first)."""
    pieces = [x @ columns(first, last) for first, last in row_ranges(*shape, multiple)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
