"""A quantised weight in numba's hands, the row of x that it is multiplied with, and its rows widened to float32."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import carray

from cats_kernels.cpu.addressed import pointer
from cats_kernels.cpu.compiling import Array, jit
from cats_kernels.cpu.integers import (
    BLOCK_BYTES,
    DOT_BYTES,
    load_bfloat16_before,
    load_float16_before,
    load_floats_before,
)
from cats_kernels.cpu.plain import LINE
from cats_kernels.cpu.vectors import LANES, address_of, byte_at, float_at, half_at, prefetch, set_float

LARGEST = np.float32(1e30)
"""Magnitudes from here on, infinity and NaN take the tile, where nothing overflows before it would unquantised."""
SMALLEST = np.float32(1e-20)
"""And so do pieces of x with nothing as large as this, but for zeros: their fixed point is beyond float32."""
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
WIDTH = 256
"""Rows of x and y are padded to a multiple of this, so that a ragged group has columns to read and write."""
PARTS = {FLOAT32: 3, BFLOAT16: 2} if DOT_BYTES else {FLOAT32: 0, BFLOAT16: 0}
"""Bytes of a number of x, by its dtype, where rows are multiplied as integers; 0: as float32. The largest magnitude in
a piece of x is between 2 ** 22 and 2 ** 23, or 2 ** 14 and 2 ** 15, of its fixed point."""


class Packed(NamedTuple):
    """A quantised weight (m, d); all numbers, since arrays in a tuple have their references counted.

    Attributes:
        data, scales, zeros: addresses of its tensors; zeros 0: none.
        kind: of scales and zeros: FLOAT32, BFLOAT16 or FLOAT16.
        row_bytes: of a row of data.
        row_halves: of a row of scales, in units of two bytes.
        bits, group, groups, m, d: as in `QuantizedWeight`.
        parts: as in `PARTS`.
        piece: columns of x that have one exponent, 32 to 128.
        pieces: how many there are, in whole blocks of BLOCK_BYTES of a row.
        row: address of what `prepare_row` made of the one row of x; 0 where x has several, or has values for which
            rows must be dequantised first.
        x: address of the one row of x, float32, padded with zeros to a multiple of WIDTH.
        scratch: address of memory of one thread, `row_scratch_floats` float32 and what `packed_sums` needs.
    """

    data: int
    scales: int
    zeros: int
    kind: int
    row_bytes: int
    row_halves: int
    bits: int
    group: int
    groups: int
    m: int
    d: int
    parts: int
    piece: int
    pieces: int
    row: int
    x: int
    scratch: int


FIELDS = len(Packed._fields)


@jit()
def from_numbers(numbers: Array, first: int, row: int, x: int, scratch: int) -> Any:
    """The weight whose FIELDS numbers begin at ``first``, with these last three."""
    n = numbers[first : first + FIELDS - 3]
    return Packed(
        n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12], n[13], row, x, scratch
    )


@jit()
def aligned(address: int) -> int:
    """The first cache line from there on: what is read soon after it was written must not lie in two of them."""
    return (address + LINE - 1) // LINE * LINE


@jit()
def row_scratch_floats(weight: Any) -> int:
    """float32 of memory that a thread needs for four rows: their coefficients, one row's of groups, and four blocks."""
    return 4 * coefficient_stride(weight) + weight.groups + BLOCK_BYTES


@jit()
def whole_vectors(count: int) -> int:
    """As many float32, or more to fill the last vector."""
    return (count + LANES - 1) // LANES * LANES


@jit()
def coefficient_stride(weight: Any) -> int:
    """float32 from one row's coefficients to the next one's."""
    return whole_vectors(max(weight.pieces, weight.groups))


@jit()
def row_floats(weight: Any) -> int:
    """float32 of memory that `prepare_row` needs."""
    blocks = (weight.row_bytes + BLOCK_BYTES - 1) // BLOCK_BYTES
    columns = BLOCK_BYTES * 8 // weight.bits
    of_x = whole_vectors(weight.groups) + whole_vectors(weight.pieces)
    return LANES + of_x + blocks * (16 * max(0, weight.parts - 1) + weight.parts * columns // 4)


@jit()
def sums_of(weight: Any) -> int:
    """Address of the sums of x over each group."""
    return weight.row


@jit()
def steps_of(weight: Any) -> int:
    """Address of the float32 value of one in the fixed point of each piece of x, then zeros up to a whole vector."""
    return weight.row + 4 * whole_vectors(weight.groups)


@jit()
def offsets_of(weight: Any) -> int:
    """Address of int32 for each block and lane: what a row's bytes being without sign adds to its products, negative;
    with three bytes to a number of x first those of the upper two, then those of the last."""
    return steps_of(weight) + 4 * whole_vectors(weight.pieces)


@jit()
def digits_of(weight: Any) -> int:
    """Address of x in bytes, in the order in which they are multiplied with a row's: for each block the most
    significant bytes first, and of each the columns of the low nibbles before those of the high ones."""
    blocks = (weight.row_bytes + BLOCK_BYTES - 1) // BLOCK_BYTES
    return offsets_of(weight) + BLOCK_BYTES * (weight.parts - 1) * blocks


@jit()
def sum_groups(x: Array, group: int, sums: Array) -> bool:
    """Sums of one row of x over each group; False where a value of it is too large or not finite."""
    fine = True
    for g in range(sums.size):
        s = np.float32(0)
        for k in range(g * group, min(x.size, (g + 1) * group)):
            s += x[k]
            fine &= abs(x[k]) < LARGEST
        sums[g] = s
    return fine


@jit()
def step_of(peak: Any, parts: int) -> Any:
    """The power of two that is one in the fixed point of numbers up to ``peak``."""
    bits, largest = (23, 8355711) if parts == 3 else (15, 32639)  # 127 in every byte
    step = 2.0 ** (math.frexp(peak)[1] - bits)
    return np.float32(step if peak <= largest * step else 2 * step)


@jit()
def write_digits(x: Array, step: Any, parts: int, out: Array, stride: int) -> None:
    """Fixed point of x in signed bytes: out[p * stride + k] is the byte of significance 256 ** (parts - 1 - p)."""
    inverse = np.float32(1) / step if step > 0 else np.float32(0)
    for k in range(x.size):
        whole = np.int32(np.rint(x[k] * inverse))
        last = np.int32(((whole + 128) & 255) - 128)
        whole = (whole - last) >> 8
        out[(parts - 1) * stride + k] = last
        last = np.int32(((whole + 128) & 255) - 128)
        out[(parts - 2) * stride + k] = last
        if parts == 3:
            out[k] = (whole - last) >> 8


@jit()
def write_offsets(digits: Array, parts: int, columns: int, bias: int, out: Array) -> None:
    """Of one block: ``-bias`` times what every lane's columns of x add up to."""
    out[:] = 0
    for p in range(parts):
        of = 16 * (p // 2)
        for lane in range(16):
            part = 0
            for first in range(0, columns, BLOCK_BYTES):
                for k in range(first + 4 * lane, first + 4 * lane + 4):
                    part += digits[p * columns + k]
            out[of + lane] = 256 * out[of + lane] - bias * part


@jit()
def prepare_row(weight: Any, x: Array, memory: Array) -> int:
    """One row of x, float32, padded, as the products with ``weight`` need it, into ``memory``, of which it uses no more
    than `row_floats`; the address, or 0 where rows must be dequantised for it."""
    weight = with_memory(weight, aligned(address_of(memory)), 0)
    fine = sum_groups(x, weight.group, carray(pointer(sums_of(weight)), (weight.groups,), np.float32))  # type: ignore[call-arg]
    if not fine or weight.parts == 0:
        return weight.row if fine else 0
    parts, columns = weight.parts, BLOCK_BYTES * 8 // weight.bits
    blocks = (weight.row_bytes + BLOCK_BYTES - 1) // BLOCK_BYTES
    steps = carray(pointer(steps_of(weight)), (whole_vectors(weight.pieces),), np.float32)
    steps[weight.pieces :] = 0  # read in whole vectors: other bits are slow where they are subnormal numbers
    offsets = carray(pointer(offsets_of(weight)), (blocks, 16 * (parts - 1)), np.int32)
    digits = carray(pointer(digits_of(weight)), (blocks, parts * columns), np.int8)
    in_block = columns // weight.piece
    half = weight.piece // 2
    per_group = max(1, weight.group // weight.piece)
    for j in range(weight.pieces):
        if weight.bits == 4:
            low = j // per_group * weight.group + j % per_group * half
            high, apart = low + weight.group // 2, BLOCK_BYTES
        else:
            low, high, apart = j * weight.piece, j * weight.piece + half, half
        peak = max(np.abs(x[low : low + half]).max(), np.abs(x[high : high + half]).max())
        fine &= peak == 0 or peak > SMALLEST
        steps[j] = step_of(peak, parts) if peak > SMALLEST else np.float32(0)
        at = j % in_block * (half if weight.bits == 4 else weight.piece)
        out = digits[j // in_block]
        write_digits(x[low : low + half], steps[j], parts, out[at:], columns)
        write_digits(x[high : high + half], steps[j], parts, out[at + apart :], columns)
    for b in range(blocks):
        write_offsets(digits[b], parts, columns, 8 if weight.bits == 4 else 128, offsets[b])
    return weight.row if fine else 0


@jit()
def with_memory(weight: Any, row: int, scratch: int) -> Any:
    """The weight with the addresses of a prepared row and of a thread's memory."""
    w = weight
    return Packed(
        w.data, w.scales, w.zeros, w.kind, w.row_bytes, w.row_halves, w.bits, w.group, w.groups, w.m, w.d,
        w.parts, w.piece, w.pieces, row, w.x, scratch,
    )  # fmt: skip


@jit()
def widened(row: int, g: int, kind: int) -> Any:
    """Number ``g`` of the scales or zero points at address ``row``, as float32."""
    if kind == FLOAT32:
        return float_at(row, g)
    bits = np.uint32(half_at(row, g))
    if kind == BFLOAT16:
        return np.uint32(bits << np.uint32(16)).view(np.float32)
    # float16's exponent is 112 less than float32's; the product is exact, for subnormal numbers too
    magnitude = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32)
    value = magnitude * np.float32(2.0**112)
    return -value if bits & np.uint32(0x8000) else value


@jit()
def scaled_row(row: int, kind: int, groups: int, factor: Any, out: int) -> None:
    """``factor`` times the scales or zero points at address ``row``, to address ``out``."""
    if kind == FLOAT32:
        for g in range(groups):
            set_float(out, g, factor * widened(row, g, FLOAT32))
    elif kind == BFLOAT16:
        for g in range(groups):
            set_float(out, g, factor * widened(row, g, BFLOAT16))
    else:
        for g in range(groups):
            set_float(out, g, factor * widened(row, g, FLOAT16))


@jit()
def scales_before(scales: int, k: int, groups: int, kind: int) -> Any:
    """The vector of scales from number ``k`` on, as float32; there are ``groups``."""
    if kind == FLOAT32:
        return load_floats_before(scales, k, groups)
    return load_bfloat16_before(scales, k, groups) if kind == BFLOAT16 else load_float16_before(scales, k, groups)


@jit()
def dot(a: int, b: int, n: int) -> Any:
    """Of n float32 at two addresses."""
    s = np.float32(0)
    for g in range(n):
        s += float_at(a, g) * float_at(b, g)
    return s


@jit()
def dequantise(weight: Any, row: int, first: int, out: Array) -> None:
    """Columns [first, first + out.size) of a row as float32; ``first`` is a multiple of COLUMNS."""
    data, group = weight.data + row * weight.row_bytes, weight.group
    half, last = group // 2, first + out.size
    for g in range(first // group, (last + group - 1) // group):
        scale = widened(weight.scales + 2 * row * weight.row_halves, g, weight.kind)
        zero = np.float32(0)
        if weight.zeros:
            zero = widened(weight.zeros + 2 * row * weight.row_halves, g, weight.kind)
        begin, end = max(first, g * group), min(last, (g + 1) * group)
        if weight.bits == 8:
            for k in range(begin, end):
                out[k - first] = np.float32(np.int8(byte_at(data, k))) * scale + zero
        else:
            at = data + begin // 2 - begin
            for k in range(begin, min(begin + half, end)):
                out[k - first] = np.float32(np.int32(byte_at(at, k) & np.uint8(15)) - np.int32(8)) * scale + zero
            for k in range(begin + half, end):
                out[k - first] = np.float32(np.int32(byte_at(at, k - half) >> 4) - np.int32(8)) * scale + zero


@jit()
def dequantised(weight: Any, i: Array, first: int, columns: int) -> Array:
    """Columns [first, first + columns) of four rows, float32."""
    tile = np.empty((4, columns), np.float32)
    for q in range(4):
        dequantise(weight, i[q], first, tile[q])
    return tile


@jit()
def prefetch_four(n0: int, n1: int, n2: int, n3: int, first: int, last: int) -> None:
    """The cache lines of bytes [first, last) of four rows."""
    for k in range(first, last, LINE):
        prefetch(n0 + k)
        prefetch(n1 + k)
        prefetch(n2 + k)
        prefetch(n3 + k)


@jit()
def prefetch_bytes(first: int, count: int) -> None:
    """The cache lines of ``count`` bytes from address ``first`` on."""
    for line in range(first // LINE * LINE, first + count, LINE):
        prefetch(line)
