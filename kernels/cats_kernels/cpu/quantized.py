"""int8 and int4 weights under the CPU kernels: how four packed rows are multiplied, and added, for `kernels`.

For one row of x packed weights are read once and used in registers: with x as integers where the processor can
(`packed_integers`), else widened (`packed_floats`). A zero point multiplies the sum of x over its group.

For more rows of x, and where x or a coefficient is not finite or so large that these sums would overflow, rows are
dequantised into a tile in the L1 cache first; infinity and NaN then behave as with an unquantised weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from cats_kernels.cpu.compiling import Array, jit
from cats_kernels.cpu.integers import (
    DOT_BYTES,
    spread_eight,
    spread_four,
)
from cats_kernels.cpu.kernels import adds, dots, many_adds, neurons, scratch_size, with_scratch
from cats_kernels.cpu.packed import (
    LARGEST,
    aligned,
    coefficient_stride,
    dequantised,
    dot,
    prefetch_bytes,
    row_scratch_floats,
    scaled_row,
    scales_before,
    steps_of,
    sums_of,
    widened,
    with_memory,
)
from cats_kernels.cpu.packed_floats import add_bytes, add_nibbles, byte_dots, nibble_dots
from cats_kernels.cpu.packed_integers import integer_dots
from cats_kernels.cpu.packed_sums import packed_sums, sum_floats, sums_rows
from cats_kernels.cpu.plain import COLUMNS, add_four, four_dots
from cats_kernels.cpu.vectors import LANES, address_of, float_at, load, set_float, splat, store, times


@jit()
def float_dots(
    w0: int, w1: int, w2: int, w3: int, n0: int, n1: int, n2: int, n3: int, weight: Any
) -> tuple[Any, Any, Any, Any]:
    """`packed_integers.integer_dots` on other processors; the coefficients are the scales."""
    if weight.bits == 4:
        return nibble_dots(w0, w1, w2, w3, n0, n1, n2, n3, weight)
    return byte_dots(w0, w1, w2, w3, n0, n1, n2, n3, weight)


@jit()
def scales_of_groups(weight: Any, scales: int, q: int) -> None:
    """A row's scales at address ``scales`` to row q of the scratch memory."""
    scaled_row(scales, weight.kind, weight.groups, np.float32(1), weight.scratch + 4 * q * weight.groups)


@jit()
def scales_of_pieces(weight: Any, scales: int, q: int) -> None:
    """A row's scales times the steps of x, piece by piece, to row q of the scratch memory; they end in a whole
    vector."""
    stride = coefficient_stride(weight)
    out, steps, groups, kind = weight.scratch + 4 * q * stride, steps_of(weight), weight.groups, weight.kind
    if groups == 1:
        scale = splat(widened(scales, 0, kind))
        for j in range(0, weight.pieces, LANES):
            store(out, j, times(scale, load(steps, j)))
    elif weight.group == weight.piece:
        for j in range(0, weight.pieces, LANES):
            store(out, j, times(scales_before(scales, j, groups, kind), load(steps, j)))
    else:
        spare, each = weight.scratch + 16 * stride, weight.group // weight.piece
        for g in range(0, groups, LANES):
            store(spare, g, scales_before(scales, g, groups, kind))
        for j in range(0, weight.pieces, LANES):
            scale = spread_eight(spare, j // 2) if each == 2 else spread_four(spare, j // 4)
            store(out, j, times(scale, load(steps, j)))


widen_scales, dots_of_rows = (scales_of_pieces, integer_dots) if DOT_BYTES else (scales_of_groups, float_dots)


@jit()
def zeros_dot(weight: Any, row: int) -> Any:
    """The zero points' part of a row's product with x."""
    spare = weight.scratch + 16 * coefficient_stride(weight)
    scaled_row(weight.zeros + 2 * row * weight.row_halves, weight.kind, weight.groups, np.float32(1), spare)
    return dot(spare, sums_of(weight), weight.groups)


@jit()
def dots_of_one(weight: Any, i: Array, s: Array) -> None:
    """`packed_dots` for the one row of x that ``weight`` has prepared, and s (i.size,)."""
    data, size, halves = weight.data, weight.row_bytes, 2 * weight.row_halves
    for j in range(0, i.size, 4):
        w0, w1, w2, w3 = data + i[j] * size, data + i[j + 1] * size, data + i[j + 2] * size, data + i[j + 3] * size
        after = min(j + 4, i.size - 4)
        n0, n1 = data + i[after] * size, data + i[after + 1] * size
        n2, n3 = data + i[after + 2] * size, data + i[after + 3] * size
        for q in range(4):
            prefetch_bytes(weight.scales + i[after + q] * halves, halves)
            widen_scales(weight, weight.scales + i[j + q] * halves, q)
        s[j], s[j + 1], s[j + 2], s[j + 3] = dots_of_rows(w0, w1, w2, w3, n0, n1, n2, n3, weight)
        if weight.zeros:
            for q in range(4):
                s[j + q] += zeros_dot(weight, i[j + q])


@jit()
def packed_dots(weight: Any, i: Array, x: Array, s: Array) -> None:
    """`kernels.dots` of a packed weight."""
    if weight.row:
        dots_of_one(weight, i, s[0])
        return
    s[:] = 0
    for j in range(0, i.size, 4):
        for k in range(0, weight.d, COLUMNS):
            n = min(COLUMNS, weight.d - k)
            tile = dequantised(weight, i[j : j + 4], k, n)
            for r in range(x.shape[0]):
                part = four_dots(tile[0], tile[1], tile[2], tile[3], x[r, k : k + n])
                for q in range(4):
                    s[r, j + q] += part[q]


@jit()
def add_zeros(weight: Any, row: int, h: Any, y: int) -> None:
    """``y += h zeros[row]``, the zero point of each column's group."""
    group, zeros = weight.group, weight.zeros + 2 * row * weight.row_halves
    for g in range(weight.groups):
        value = h * widened(zeros, g, weight.kind)
        for k in range(g * group, min(weight.d, (g + 1) * group)):
            set_float(y, k, float_at(y, k) + value)


@jit()
def packed_adds(weight: Any, i: Array, h: Array, y: Array) -> None:
    """`kernels.adds` of a packed weight."""
    fine = y.shape[0] == 1
    for q in range(4):
        fine &= abs(h[0, q]) < LARGEST
    if fine:
        after = 4 if i.size >= 8 else 0
        data, size = weight.data, weight.row_bytes
        w0, w1, w2, w3 = data + i[0] * size, data + i[1] * size, data + i[2] * size, data + i[3] * size
        n0, n1 = data + i[after] * size, data + i[after + 1] * size
        n2, n3 = data + i[after + 2] * size, data + i[after + 3] * size
        address = address_of(y)
        for q in range(4):
            scales = weight.scales + 2 * i[q] * weight.row_halves
            scaled_row(scales, weight.kind, weight.groups, h[0, q], weight.scratch + 4 * q * weight.groups)
            if weight.zeros and h[0, q] != 0:
                add_zeros(weight, i[q], h[0, q], address)
        if weight.bits == 4:
            add_nibbles(w0, w1, w2, w3, n0, n1, n2, n3, weight, address)
        else:
            add_bytes(w0, w1, w2, w3, n0, n1, n2, n3, weight, address)
        return
    for k in range(0, weight.d, COLUMNS):
        n = min(COLUMNS, weight.d - k)
        tile = dequantised(weight, i, k, n)
        for r in range(y.shape[0]):
            add_four(tile[0], tile[1], tile[2], tile[3], h[r], y[r, k : k + n])


@jit()
def packed_many_adds(weight: Any, i: Array, h: Array, n: int, y: Array) -> int:
    """`kernels.many_adds` of a packed weight."""
    if y.shape[0] > 1 or not sums_rows(weight):
        return 0
    address = address_of(y)
    added = packed_sums(weight, i, h[0], n, weight.scratch + 4 * row_scratch_floats(weight), address)
    if weight.zeros:
        for q in range(added):
            if h[0, q] != 0:
                add_zeros(weight, i[q], h[0, q], address)
    return added


@overload(dots, strict=False)
def _dots(weight: Any, i: Any, x: Any, s: Any) -> Any:
    packed = isinstance(weight, types.BaseTuple)
    return (lambda weight, i, x, s: packed_dots(weight, i, x, s)) if packed else None


@overload(adds, strict=False)
def _adds(weight: Any, i: Any, h: Any, y: Any) -> Any:
    packed = isinstance(weight, types.BaseTuple)
    return (lambda weight, i, h, y: packed_adds(weight, i, h, y)) if packed else None


@overload(many_adds, strict=False)
def _many_adds(weight: Any, i: Any, h: Any, n: Any, y: Any) -> Any:
    if not isinstance(weight, types.BaseTuple):
        return None
    if not DOT_BYTES:
        return lambda weight, i, h, n, y: 0
    return lambda weight, i, h, n, y: packed_many_adds(weight, i, h, n, y)


@overload(neurons, strict=False)
def _neurons(weight: Any) -> Any:
    return (lambda weight: weight.m) if isinstance(weight, types.BaseTuple) else None


@overload(scratch_size, strict=False)
def _scratch_size(weight: Any) -> Any:
    return (
        (lambda weight: LANES + row_scratch_floats(weight) + sum_floats(weight))
        if isinstance(weight, types.BaseTuple)
        else None
    )


@overload(with_scratch, strict=False)
def _with_scratch(weight: Any, memory: Any) -> Any:
    packed = isinstance(weight, types.BaseTuple)
    return (lambda weight, memory: with_memory(weight, weight.row, aligned(address_of(memory)))) if packed else None
