"""Rows of quantised weights dequantised at the speed of memory, for products of many rows of x, on torch's threads."""

# mypy: disable-error-code="call-arg, type-var"
# (numba's stubs describe other signatures than those of compiled code)
from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from torch import Tensor

from cats_kernels.cpu.addressed import pointer
from cats_kernels.cpu.kernels import Array, fetch_add, jit
from cats_kernels.cpu.packed import BFLOAT16, FIELDS, FLOAT32, from_numbers, widened
from cats_kernels.cpu.quantized_calls import call_member, numba_region
from cats_kernels.cpu.quantized_launch import KINDS, pack
from cats_kernels.cpu.team import compiled_member, open_region, region_address
from cats_kernels.cpu.threads import parallel_region, threads_for, torch_region
from cats_kernels.cpu.vectors import (
    F32,
    FLOATS,
    I16,
    I32,
    INTEGERS,
    LANES,
    byte_at,
    high_nibbles,
    intrinsic,
    load_bytes,
    load_signed,
    low_nibbles,
    multiply_add,
    pointer_to,
    set_float,
    splat,
    store,
)
from cats_kernels.quantized import QuantizedWeight

ROWS = 16
"""Of a weight that a thread takes at a time."""
COUNT, FIRST, LAST, KIND, COUNTERS, WEIGHTS = range(6)
"""Numbers of a call: how many weights, which rows of each, the dtype written, the address of the counters, and from
WEIGHTS on FIELDS numbers of each weight and the address its rows are written to."""
EACH = FIELDS + 1
X_ROWS, X, PRODUCTS, MARKS, MEMORY, SHARED = range(FIELDS, FIELDS + 6)
AGAIN = FIELDS + 6
"""Numbers of a call of `multiply_rows_again` after those of its weight: rows of x; addresses of x, of the products, of
their marks, of a row of float32 for each thread, and of the counters."""
MAGNITUDE, INFINITE, QUIET = 0x7FFFFFFF, 0x7F800000, 0x7FC0
"""Bits of a float32 without its sign; of infinity, above which is NaN; and the upper half of a NaN."""


@intrinsic
def store_bfloat16(context: Any, address: Any, k: Any, value: Any) -> Any:
    """Write numbers [k, k + LANES) of the bfloat16 at ``address``, rounded to the nearest, ties to even."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def each(number: int) -> Any:
            return ir.Constant(INTEGERS.backend, [number] * LANES)

        address, k, vector = arguments
        bits = builder.bitcast(vector, INTEGERS.backend)
        upper = builder.lshr(bits, each(16))
        rounded = builder.add(builder.add(bits, each(0x7FFF)), builder.and_(upper, each(1)))
        not_a_number = builder.icmp_unsigned(">", builder.and_(bits, each(MAGNITUDE)), each(INFINITE))
        upper = builder.select(not_a_number, each(QUIET), builder.lshr(rounded, each(16)))
        halves = ir.VectorType(I16, LANES)
        place = builder.bitcast(pointer_to(builder, I16, address, k), halves.as_pointer())
        builder.store(builder.trunc(upper, halves), place, align=2)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, FLOATS), generate


@intrinsic
def set_bfloat16(context: Any, address: Any, k: Any, value: Any) -> Any:
    """Write number ``k`` of the bfloat16 at ``address``, rounded in the same way."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, k, number = arguments
        bits = builder.bitcast(number, I32)
        odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
        rounded = builder.lshr(builder.add(builder.add(bits, I32(0x7FFF)), odd), I32(16))
        not_a_number = builder.icmp_unsigned(">", builder.and_(bits, I32(MAGNITUDE)), I32(INFINITE))
        upper = builder.select(not_a_number, I32(QUIET), rounded)
        builder.store(builder.trunc(upper, I16), pointer_to(builder, I16, address, k), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@jit()
def put(address: int, k: int, vector: Any, kind: int) -> None:
    """Write a vector as float32 or bfloat16."""
    if kind == BFLOAT16:
        store_bfloat16(address, k, vector)
    else:
        store(address, k, vector)


@jit()
def put_one(address: int, k: int, number: Any, kind: int) -> None:
    """The same for one number."""
    if kind == BFLOAT16:
        set_bfloat16(address, k, number)
    else:
        set_float(address, k, number)


@jit()
def nibbles_of_group(data: int, group: int, columns: int, scale: Any, zero: Any, out: int, at: int, kind: int) -> None:
    """A group of int4, of which ``columns`` are wanted, its data at address ``data``, to numbers from ``at`` on."""
    half, whole = group // 2, group // 2 // LANES * LANES
    if columns < group:
        whole = 0
    scales, zeros = splat(scale), splat(zero)
    for k in range(0, whole, LANES):
        packed = load_bytes(data, k)
        put(out, at + k, multiply_add(low_nibbles(packed), scales, zeros), kind)
        put(out, at + half + k, multiply_add(high_nibbles(packed), scales, zeros), kind)
    for k in range(whole, half):
        packed_pair = byte_at(data, k)
        if k < columns:
            low = np.float32(np.int32(packed_pair & np.uint8(15)) - np.int32(8))
            put_one(out, at + k, low * scale + zero, kind)
        if half + k < columns:
            high = np.float32(np.int32(packed_pair >> 4) - np.int32(8))
            put_one(out, at + half + k, high * scale + zero, kind)


@jit()
def bytes_of_group(data: int, columns: int, scale: Any, zero: Any, out: int, at: int, kind: int) -> None:
    """The same for a group of int8."""
    whole = columns // LANES * LANES
    scales, zeros = splat(scale), splat(zero)
    for k in range(0, whole, LANES):
        put(out, at + k, multiply_add(load_signed(data, k), scales, zeros), kind)
    for k in range(whole, columns):
        put_one(out, at + k, np.float32(np.int8(byte_at(data, k))) * scale + zero, kind)


@jit()
def write_row(weight: Any, row: int, out: int, kind: int) -> None:
    """A row of a weight to address ``out``, as float32 or bfloat16."""
    data, offset = weight.data + row * weight.row_bytes, 2 * row * weight.row_halves
    for g in range(weight.groups):
        first = g * weight.group
        columns = min(weight.group, weight.d - first)
        scale, zero = widened(weight.scales + offset, g, weight.kind), np.float32(0)
        if weight.zeros:
            zero = widened(weight.zeros + offset, g, weight.kind)
        if weight.bits == 4:
            nibbles_of_group(data + first // 2, weight.group, columns, scale, zero, out, first, kind)
        else:
            bytes_of_group(data + first, columns, scale, zero, out, first, kind)


def write_rows(address: Any) -> None:
    """What each thread does: take some rows of a weight until none is left. ``address``: of the numbers of a call."""
    head = carray(address, (WEIGHTS,), np.int64)
    data = carray(address, (WEIGHTS + EACH * head[COUNT],), np.int64)
    first, last, kind = data[FIRST], data[LAST], data[KIND]
    blocks = (last - first + ROWS - 1) // ROWS
    counter = carray(pointer(data[COUNTERS]), (1,), np.int64)
    while True:
        taken = fetch_add(counter, 1)
        if taken >= blocks * data[COUNT]:
            break
        at = WEIGHTS + EACH * (taken // blocks)
        weight = from_numbers(data, at, 0, 0, 0)
        begin = first + taken % blocks * ROWS
        row_size = weight.d * (2 if kind == BFLOAT16 else 4)
        for row in range(begin, min(last, begin + ROWS)):
            write_row(weight, row, data[at + FIELDS] + (row - first) * row_size, kind)


@cache
def row_writer() -> Any:
    """`write_rows` compiled."""
    return compiled_member(write_rows)


@jit(nogil=True)
def call_or_open(region: int, member: int, data: int, threads: int) -> None:
    """Call the function at the address ``member`` on this thread, or on each of ``region``'s."""
    if threads == 1:
        call_member(member, data)
    else:
        open_region(region, member, data, threads)


def on_threads(member: int, data: Array, work: int) -> None:
    """Call the function at the address ``member`` with that of ``data`` on as many threads as ``work`` is worth, in
    weights."""
    threads, region = threads_for(work), region_address()
    if threads == 1:
        call_or_open(0, member, data.ctypes.data, 1)
    elif region is not None:
        with torch_region():
            call_or_open(region, member, data.ctypes.data, threads)
    else:
        with parallel_region(threads):
            numba_region(member, data.ctypes.data, threads)


def dequantise_into(weights: Sequence[QuantizedWeight], first: int, last: int, out: Sequence[Tensor]) -> None:
    """Rows [first, last) of some weights (m, d) into the first rows of contiguous tensors (rows, d), one for each, all
    float32 or all bfloat16, rounded once; formats may differ, and columns of a group be any number."""
    counters = np.zeros(1, np.int64)
    numbers = [len(weights), first, last, KINDS[out[0].dtype], counters.ctypes.data]
    for weight, tensor in zip(weights, out, strict=True):
        numbers += [*pack(weight, torch.float32)[: FIELDS], tensor.data_ptr()]
    data = np.array(numbers, np.int64)
    on_threads(row_writer().address, data, len(weights) * (last - first) * weights[0].d)


def multiply_rows_again(address: Any) -> None:
    """What each thread does: take some rows of a weight until none is left, and multiply those marked with the rows of x
    that they are marked for, in float32. ``address``: of the numbers of a call."""
    data = carray(address, (AGAIN,), np.int64)
    weight, rows = from_numbers(data, 0, 0, 0, 0), data[X_ROWS]
    m, d = weight.m, weight.d
    x = carray(pointer(data[X]), (rows, d), np.float32)
    products = carray(pointer(data[PRODUCTS]), (rows, m), np.float32)
    marks = carray(pointer(data[MARKS]), (rows, m), np.uint8)
    counters = carray(pointer(data[SHARED]), (2,), np.int64)
    memory = data[MEMORY] + 4 * d * fetch_add(counters[1:], 1)
    plain = carray(pointer(memory), (d,), np.float32)
    while True:
        begin = fetch_add(counters[:1], 1) * ROWS
        if begin >= m:
            break
        for j in range(begin, min(m, begin + ROWS)):
            written = False
            for r in range(rows):
                if marks[r, j]:
                    if not written:
                        write_row(weight, j, memory, FLOAT32)
                        written = True
                    products[r, j] = inner_product(plain, x[r])


@jit()
def inner_product(a: Array, b: Array) -> Any:
    """Of two rows of float32."""
    s = np.float32(0)
    for k in range(a.size):
        s += a[k] * b[k]
    return s


@cache
def row_multiplier() -> Any:
    """`multiply_rows_again` compiled."""
    return compiled_member(multiply_rows_again)


def multiply_again(weight: QuantizedWeight, x: Tensor, products: Tensor, marks: Tensor) -> None:
    """Where ``marks`` (rows, m) is true, put the product of x (rows, d) with the row of a weight (m, d), in float32,
    into ``products`` (rows, m), float32; all contiguous."""
    m, d = weight.shape
    x = x.float()
    work = 3 * m * d
    memory = torch.empty(threads_for(work), d, dtype=torch.float32)
    counters = np.zeros(2, np.int64)  # blocks of rows taken; threads at work
    addresses = [tensor.data_ptr() for tensor in (x, products, marks, memory)]
    data = np.array([*pack(weight, torch.float32), len(x), *addresses, counters.ctypes.data], np.int64)
    on_threads(row_multiplier().address, data, work)
