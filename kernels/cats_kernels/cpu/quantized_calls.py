"""Calls of the kernel on quantised weights by addresses, on one thread, on torch's (see `team`) or on numba's.

All three call one compiled function, `join_packed`, which takes blocks of neurons until none is left.
"""

# mypy: disable-error-code="call-arg, type-var"
# (numba's stubs describe other signatures than those of compiled code)
from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, prange, types

from cats_kernels.cpu import quantized  # noqa: F401  (which says how packed rows are multiplied)
from cats_kernels.cpu.addressed import pointer
from cats_kernels.cpu.compiling import Array, jit
from cats_kernels.cpu.kernels import BLOCK, add_all_partial, fetch_add, take_blocks
from cats_kernels.cpu.packed import BFLOAT16, FIELDS, WIDTH, from_numbers, prepare_row, row_floats
from cats_kernels.cpu.team import compiled_member, open_region
from cats_kernels.cpu.vectors import intrinsic

DECIDING, OTHER, DOWN = 0, FIELDS, 2 * FIELDS
GELU, UP_DECIDES, KIND, SAME_FORMAT = range(3 * FIELDS, 3 * FIELDS + 4)
PLAN = 3 * FIELDS + 4
"""Numbers that stay the same from call to call: the three weights; the options; dtype of x and y; whether the first two
weights need x alike."""
THRESHOLDS, COUNT, X, ROWS, ROW_OF_DECIDING, ROW_OF_OTHER, PARTIAL, COUNTERS = range(PLAN, PLAN + 8)
CALL = PLAN + 8
"""Numbers of one call: address and number of the thresholds; x as float32, padded, and how many rows; what
`prepare_row` made of it; the blocks' results."""


@intrinsic
def call_member(context: Any, member: Any, data: Any) -> Any:
    """Call the function at the address ``member`` with an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        function = builder.inttoptr(arguments[0], ir.FunctionType(ir.VoidType(), [byte]).as_pointer())
        builder.call(function, [builder.inttoptr(arguments[1], byte)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def join_packed(address: Any) -> None:
    """What each thread does: take blocks until none is left. ``address``: of the CALL numbers of a call."""
    data = carray(address, (CALL,), np.int64)
    rows, m, d = data[ROWS], data[DECIDING + 9], data[DECIDING + 10]
    width = d + -d % WIDTH
    counters = carray(pointer(data[COUNTERS]), (2,), np.int64)
    fetch_add(counters[1:], 1)
    take_blocks(
        counters[:1],
        carray(pointer(data[X]), (rows, width), np.float32),
        from_numbers(data, DECIDING, data[ROW_OF_DECIDING], data[X], 0),
        from_numbers(data, OTHER, data[ROW_OF_OTHER], data[X], 0),
        from_numbers(data, DOWN, 0, data[X], 0),
        carray(pointer(data[THRESHOLDS]), (data[COUNT],), np.float32),
        data[GELU] != 0,
        data[UP_DECIDES] != 0,
        carray(pointer(data[PARTIAL]), ((m + BLOCK - 1) // BLOCK, rows, width), np.float32),
    )
    fetch_add(counters[1:], -1)


@cache
def member() -> Any:
    """`join_packed` compiled; its ``address`` is what a thread calls."""
    return compiled_member(join_packed)


@jit(nogil=True)
def widen_rows(address: int, kind: int, out: Array) -> None:
    """x (rows, d) at an address, float32 or bfloat16, as float32 into the first columns of ``out``, whose others are
    zero."""
    rows, d = out.shape
    if kind == BFLOAT16:
        bits = carray(pointer(address), (rows * d,), np.uint16)
        for r in range(rows):
            for k in range(d):
                out[r, k] = np.uint32(np.uint32(bits[r * d + k]) << np.uint32(16)).view(np.float32)
    else:
        numbers = carray(pointer(address), (rows * d,), np.float32)
        for r in range(rows):
            for k in range(d):
                out[r, k] = numbers[r * d + k]


@jit(parallel=True, nogil=True)
def numba_region(member: int, data: int, threads: int) -> None:
    """Call the function at the address ``member`` on each of numba's threads."""
    for _ in prange(threads):
        call_member(member, data)


@jit(nogil=True)
def begin(plan: Array, x: int, rows: int, padded: Array, first: Array, second: Array, data: Array) -> None:
    """Write the numbers of a call but for its thresholds and results, and x for its threads into ``padded`` and, if
    there is one row, ``first`` and ``second``."""
    d = plan[DECIDING + 10]
    widen_rows(x, plan[KIND], padded[:, :d])
    data[:PLAN] = plan
    data[X], data[ROWS] = padded.ctypes.data, rows
    data[ROW_OF_DECIDING], data[ROW_OF_OTHER] = 0, 0
    if rows > 1:
        return
    data[ROW_OF_DECIDING] = prepare_row(from_numbers(plan, DECIDING, 0, 0, 0), padded[0], first)
    if plan[SAME_FORMAT]:
        data[ROW_OF_OTHER] = data[ROW_OF_DECIDING]
    else:
        data[ROW_OF_OTHER] = prepare_row(from_numbers(plan, OTHER, 0, 0, 0), padded[0], second)


@jit(nogil=True)
def run_packed(
    region: int, member: int, plan: int, thresholds: int, count: int, x: int, y: int, rows: int, threads: int
) -> int:
    """y = the sparse gated MLP of x, on this thread or by ``region``'s; how many threads did not come to their end.

    Thresholds (count,) float32, x (rows, d) in the plan's dtype, y (rows, d) float32, by address.
    """
    numbers = carray(pointer(plan), (PLAN,), np.int64)
    m, d = numbers[DECIDING + 9], numbers[DECIDING + 10]
    width = d + -d % WIDTH
    padded = np.zeros((rows, width), np.float32)
    first = np.empty(row_floats(from_numbers(numbers, DECIDING, 0, 0, 0)), np.float32)
    second = np.empty(row_floats(from_numbers(numbers, OTHER, 0, 0, 0)), np.float32)
    partial = np.empty(((m + BLOCK - 1) // BLOCK, rows, width), np.float32)
    counters = np.zeros(2, np.int64)  # blocks taken; threads at work
    data = np.empty(CALL, np.int64)
    begin(numbers, x, rows, padded, first, second, data)
    data[THRESHOLDS], data[COUNT] = thresholds, count
    data[PARTIAL], data[COUNTERS] = partial.ctypes.data, counters.ctypes.data
    if threads == 1:
        call_member(member, data.ctypes.data)
    else:
        open_region(region, member, data.ctypes.data, threads)
    add_all_partial(partial, carray(pointer(y), (rows, d), np.float32))
    padded[:], first[:], second[:], data[:] = 0, 0, 0, 0  # used so long, since nothing else keeps them alive
    return counters[1]


def run_packed_on_numba(member: int, plan: Array, thresholds: int, count: int, x: int, y: Array, threads: int) -> int:
    """The same on numba's threads; hold the lock of `cats_kernels.cpu.threads.parallel_region`."""
    rows, d = y.shape
    m, width = plan[DECIDING + 9], d + -d % WIDTH
    padded = np.zeros((rows, width), np.float32)
    first, second = (np.empty(row_floats(from_numbers(plan, i, 0, 0, 0)), np.float32) for i in (DECIDING, OTHER))
    partial = np.empty(((m + BLOCK - 1) // BLOCK, rows, width), np.float32)
    counters, data = np.zeros(2, np.int64), np.empty(CALL, np.int64)
    begin(plan, x, rows, padded, first, second, data)
    data[THRESHOLDS], data[COUNT] = thresholds, count
    data[PARTIAL], data[COUNTERS] = partial.ctypes.data, counters.ctypes.data
    numba_region(member, data.ctypes.data, threads)
    add_all_partial(partial, y)
    return int(counters[1])
