"""Rows of quantised weights dequantised at the speed of memory, for products of many rows of x, on torch's threads."""

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
from cats_kernels.cpu.compiling import Array, jit
from cats_kernels.cpu.halves import (
    BY_TABLE,
    nibble_values,
    of_high_nibbles,
    of_low_nibbles,
    rounded,
    rounded_bits,
    store_halves,
)
from cats_kernels.cpu.kernels import fetch_add
from cats_kernels.cpu.packed import BFLOAT16, FIELDS, from_numbers, widened
from cats_kernels.cpu.quantized_calls import call_member, numba_region
from cats_kernels.cpu.quantized_launch import KINDS, pack
from cats_kernels.cpu.team import compiled_member, open_region, region_address
from cats_kernels.cpu.threads import parallel_region, threads_for, torch_region
from cats_kernels.cpu.vectors import (
    LANES,
    byte_at,
    high_nibbles,
    load_bytes,
    load_signed,
    low_nibbles,
    multiply_add,
    set_float,
    splat,
    store,
)
from cats_kernels.quantized import QuantizedWeight

ROWS = 16
"""Of a weight that a thread takes at a time."""
KIND, OUT, COUNTER = range(FIELDS, FIELDS + 3)
CALL = FIELDS + 3
"""Numbers of a call: those of the weight, the dtype written, and the addresses of what is written and of a counter."""


@jit()
def put(address: int, k: int, vector: Any, kind: int) -> None:
    """Write a vector as float32 or bfloat16."""
    if kind == BFLOAT16:
        store_halves(address, k, rounded(vector))
    else:
        store(address, k, vector)


@jit()
def put_one(address: int, k: int, number: Any, kind: int) -> None:
    """The same for one number."""
    if kind == BFLOAT16:
        carray(pointer(address + 2 * k), (1,), np.uint16)[0] = rounded_bits(number)
    else:
        set_float(address, k, number)


@jit()
def nibbles_by_table(data: int, group: int, scale: Any, zero: Any, out: int, at: int) -> None:
    """`nibbles_of_group` of a whole group as bfloat16, whose sixteen values are computed once."""
    half, table = group // 2, rounded(multiply_add(nibble_values(), splat(scale), splat(zero)))
    for k in range(0, half, LANES):
        store_halves(out, at + k, of_low_nibbles(table, data, k))
        store_halves(out, at + half + k, of_high_nibbles(table, data, k))


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
def nibbles_without_table(data: int, group: int, scale: Any, zero: Any, out: int, at: int) -> None:
    """The same on other processors."""
    nibbles_of_group(data, group, group, scale, zero, out, at, BFLOAT16)


write_table = nibbles_by_table if BY_TABLE else nibbles_without_table


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
        if weight.bits == 4 and kind == BFLOAT16 and columns == weight.group and columns % (2 * LANES) == 0:
            write_table(data + first // 2, columns, scale, zero, out, first)
        elif weight.bits == 4:
            nibbles_of_group(data + first // 2, weight.group, columns, scale, zero, out, first, kind)
        else:
            bytes_of_group(data + first, columns, scale, zero, out, first, kind)


def write_rows(address: Any) -> None:
    """What each thread does: take some rows of a weight until none is left. ``address``: of the numbers of a call."""
    data = carray(address, (CALL,), np.int64)
    weight, kind, out = from_numbers(data, 0, 0, 0, 0), data[KIND], data[OUT]
    counter = carray(pointer(data[COUNTER]), (1,), np.int64)
    row_size = weight.d * (2 if kind == BFLOAT16 else 4)
    while True:
        first = fetch_add(counter, 1) * ROWS
        if first >= weight.m:
            break
        for row in range(first, min(weight.m, first + ROWS)):
            write_row(weight, row, out + row * row_size, kind)


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


def dequantise_into(weight: QuantizedWeight, out: Tensor) -> None:
    """A weight (m, d) into contiguous ``out`` (m, d), float32 or bfloat16, rounded once; any number of columns to a
    group."""
    counter = np.zeros(1, np.int64)
    last = KINDS[out.dtype], out.data_ptr(), counter.ctypes.data
    data = np.array([*pack(weight, torch.float32), *last], np.int64)
    on_threads(row_writer().address, data, out.numel())
