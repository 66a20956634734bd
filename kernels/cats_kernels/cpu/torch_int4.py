"""Products of many rows of x with int4 weights in the order of torch's own kernel for a CPU
(``_convert_weight_to_int4pack_for_cpu``), dequantised a piece at a time.

That order takes blocks of 64 (AVX-512) or 32 (AVX2) rows of W, and of a block one column after another: byte j of a
column has row j in its low nibble, and in its high one the row half a block further. So a piece is written transposed,
which a product takes as well. Torch does not promise it: `block_rows` looks.
"""

# mypy: disable-error-code="call-arg, type-var"
# (numba's stubs describe other signatures than those of compiled code)
from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from cats_kernels.cpu.addressed import pointer
from cats_kernels.cpu.dequantise import on_threads, put
from cats_kernels.cpu.kernels import fetch_add, jit
from cats_kernels.cpu.packed import BFLOAT16
from cats_kernels.cpu.pieces import by_pieces, piece_memory, product_dtype
from cats_kernels.cpu.quantized_launch import KINDS
from cats_kernels.cpu.team import compiled_member
from cats_kernels.cpu.vectors import LANES, high_nibbles, load, load_bytes, low_nibbles, multiply_add

DATA, SCALES, ZEROS, OUT, KIND, BLOCKS, ROWS, STRIDE, M, GROUPS, GROUP, COUNTER = range(12)
CALL = 12
"""Numbers of a call: addresses of the first block, of its scales and zero points, float32 (groups, m), and of what is
written, with its dtype; blocks, and rows of each; columns of what is written; rows of W; groups, and columns of each;
the address of a counter."""


@cache
@torch.inference_mode(False)
def block_rows() -> int:
    """Rows of a block in torch's order on this machine; 0 where it is another order than the two known ones."""
    nibbles = torch.randint(0, 16, (128, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles.int(), 1).view(-1).view(torch.uint8)
    for rows in (64, 32):
        low, high = nibbles.view(128 // rows, 2, rows // 2, 8).permute(1, 0, 3, 2)
        if torch.equal(packed, (low | high << 4).flatten()):
            return rows
    return 0


@jit()
def write_group(data: int, rows: int, columns: int, scales: int, zeros: int, out: int, stride: int, kind: int) -> None:
    """Some columns of a block to ``out``, transposed, where the next column is ``stride`` bytes further."""
    half = rows // 2
    for j in range(0, half, LANES):
        low_scale, low_zero = load(scales, j), load(zeros, j)
        high_scale, high_zero = load(scales, half + j), load(zeros, half + j)
        for k in range(columns):
            packed, column = load_bytes(data + k * half, j), out + k * stride
            put(column, j, multiply_add(low_nibbles(packed), low_scale, low_zero), kind)
            put(column, half + j, multiply_add(high_nibbles(packed), high_scale, high_zero), kind)


def write_blocks(address: Any) -> None:
    """What each thread does: take a group of a block until none is left. ``address``: of the numbers of a call."""
    call = carray(address, (CALL,), np.int64)
    counter = carray(pointer(call[COUNTER]), (1,), np.int64)
    rows, columns, kind = call[ROWS], call[GROUP], call[KIND]
    size = 2 if kind == BFLOAT16 else 4
    while True:
        taken = fetch_add(counter, 1)
        if taken >= call[BLOCKS] * call[GROUPS]:
            break
        block, group = taken // call[GROUPS], taken % call[GROUPS]
        data = call[DATA] + (block * call[GROUPS] + group) * columns * rows // 2
        at = 4 * (group * call[M] + block * rows)
        out = call[OUT] + (group * columns * call[STRIDE] + block * rows) * size
        write_group(data, rows, columns, call[SCALES] + at, call[ZEROS] + at, out, call[STRIDE] * size, kind)


@cache
def block_writer() -> Any:
    """`write_blocks` compiled."""
    return compiled_member(write_blocks)


def multiply_int4(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """``x W^T`` (rows, m), in the dtype of x, where `block_rows` divides m. No gradient must be asked for.

    Args:
        x: (rows, d), one of `cats_kernels.cpu_products.DTYPES`.
        packed: W (m, d) in torch's order, contiguous.
        scales: (groups, m, 2), scales and zero points, where the value of a nibble n is (n - 8) * scale + zero.
    """
    (groups, m, _), d, rows = scales.shape, x.shape[1], block_rows()
    values = scales.float().permute(2, 0, 1).contiguous()
    inner = x.to(product_dtype(x.dtype))

    def columns(first: int, last: int) -> Tensor:
        out, counter = piece_memory(d, last - first, inner.dtype), np.zeros(1, np.int64)
        own = [tensor.data_ptr() + 4 * first for tensor in values]
        numbers = [packed.data_ptr() + first * d // 2, *own, out.data_ptr(), KINDS[inner.dtype]]
        numbers += [(last - first) // rows, rows, last - first, m, groups, d // groups, counter.ctypes.data]
        on_threads(block_writer().address, np.array(numbers, np.int64), out.numel())
        return out

    return by_pieces(inner, (m, d), columns, rows).to(x.dtype)
