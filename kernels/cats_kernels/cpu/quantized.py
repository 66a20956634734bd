"""int8 and int4 weights under the CPU kernels: how four packed rows are multiplied, and added, for `kernels`.

For one row of x packed weights are read once and widened in registers. What depends on a group alone is taken out of
the loop over its columns: its scale multiplies the sum of the group, its zero point the sum of x over the group. The
four rows that follow are prefetched: an int4 row of 2 KB ends before the hardware's own prefetching has caught up.

For more rows of x, and where x or a coefficient is not finite or so large that these sums would overflow, rows are
dequantised into a tile in the L1 cache first; infinity and NaN then behave as with an unquantised weight.

numba's cache of compiled code looks at the time of the file of the function that is called, `kernels`: after a change
in this file or in `vectors`, remove the ``*.nbi`` files beside it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import overload

from cats_kernels.cpu.kernels import (
    COLUMNS,
    Array,
    add_four,
    adds,
    dots,
    four_dots,
    jit,
    neurons,
    scratch_size,
    with_scratch,
)
from cats_kernels.cpu.vectors import (
    LANES,
    address_of,
    byte_at,
    float_at,
    half_at,
    high_nibbles,
    load,
    load_bytes,
    load_signed,
    low_nibbles,
    multiply_add,
    plus,
    prefetch,
    set_float,
    splat,
    store,
    total,
)

LARGEST = np.float32(1e30)
"""Magnitudes from here on, infinity and NaN take the tile, where nothing overflows before it would unquantised."""
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
WIDTH = 256
"""Rows of x and y are padded to a multiple of this, so that a ragged group has columns to read and write."""
LINE = 64
"""Bytes of a cache line."""


class Packed(NamedTuple):
    """A quantised weight (m, d) in numba's hands; all numbers, since arrays in a tuple have their references counted.

    Attributes:
        data, scales, zeros: addresses of its tensors; zeros 0: none.
        kind: of scales and zeros: FLOAT32, BFLOAT16 or FLOAT16.
        row_bytes: of a row of data.
        row_halves: of a row of scales, in units of two bytes.
        bits, group, groups, m, d: as in `QuantizedWeight`.
        x: address of the one row of x, float32, padded with zeros to a multiple of WIDTH.
        sums: address of (groups,) float32, the sums of x over each group.
        direct: 1 where there is one row of x, finite and not too large, else 0.
        scratch: address of 5 * groups float32, of one thread.
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
    x: int
    sums: int
    direct: int
    scratch: int


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
def nibble_dots(
    w0: int, w1: int, w2: int, w3: int, n0: int, n1: int, n2: int, n3: int, weight: Any
) -> tuple[Any, Any, Any, Any]:
    """Four int4 rows times x: the sum over the groups of scale * sum of q * x; scales in the scratch memory. Rows n are
    read next."""
    x, half, groups = weight.x, weight.group // 2, weight.groups
    c0 = weight.scratch
    c1, c2, c3 = c0 + 4 * groups, c0 + 8 * groups, c0 + 12 * groups
    s0, s1, s2, s3 = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    for g in range(groups):
        a0, a1, a2, a3 = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
        b0, b1, b2, b3 = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
        prefetch_four(n0, n1, n2, n3, g * half, (g + 1) * half)
        for k in range(g * half, (g + 1) * half, LANES):
            low, high = load(x, g * half + k), load(x, (g + 1) * half + k)
            v0, v1, v2, v3 = load_bytes(w0, k), load_bytes(w1, k), load_bytes(w2, k), load_bytes(w3, k)
            a0 = multiply_add(low_nibbles(v0), low, a0)
            a1 = multiply_add(low_nibbles(v1), low, a1)
            a2 = multiply_add(low_nibbles(v2), low, a2)
            a3 = multiply_add(low_nibbles(v3), low, a3)
            b0 = multiply_add(high_nibbles(v0), high, b0)
            b1 = multiply_add(high_nibbles(v1), high, b1)
            b2 = multiply_add(high_nibbles(v2), high, b2)
            b3 = multiply_add(high_nibbles(v3), high, b3)
        s0 = multiply_add(plus(a0, b0), splat(float_at(c0, g)), s0)
        s1 = multiply_add(plus(a1, b1), splat(float_at(c1, g)), s1)
        s2 = multiply_add(plus(a2, b2), splat(float_at(c2, g)), s2)
        s3 = multiply_add(plus(a3, b3), splat(float_at(c3, g)), s3)
    return total(s0), total(s1), total(s2), total(s3)


@jit()
def byte_dots(
    w0: int, w1: int, w2: int, w3: int, n0: int, n1: int, n2: int, n3: int, weight: Any
) -> tuple[Any, Any, Any, Any]:
    """Four rows of int8 weights times x: the sum over the groups of scale * sum of q * x; as `nibble_dots`."""
    x, group, groups = weight.x, weight.group, weight.groups
    c0 = weight.scratch
    c1, c2, c3 = c0 + 4 * groups, c0 + 8 * groups, c0 + 12 * groups
    s0, s1, s2, s3 = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    r0, r1, r2, r3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for g in range(groups):
        first, last = g * group, min(weight.d, (g + 1) * group)
        whole = first + (last - first) // LANES * LANES
        a0, a1, a2, a3 = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
        for line in range(first, whole, LINE):
            prefetch_four(n0, n1, n2, n3, line, line + 1)
            for k in range(line, min(line + LINE, whole), LANES):
                value = load(x, k)
                a0 = multiply_add(load_signed(w0, k), value, a0)
                a1 = multiply_add(load_signed(w1, k), value, a1)
                a2 = multiply_add(load_signed(w2, k), value, a2)
                a3 = multiply_add(load_signed(w3, k), value, a3)
        f0, f1, f2, f3 = float_at(c0, g), float_at(c1, g), float_at(c2, g), float_at(c3, g)
        s0 = multiply_add(a0, splat(f0), s0)
        s1 = multiply_add(a1, splat(f1), s1)
        s2 = multiply_add(a2, splat(f2), s2)
        s3 = multiply_add(a3, splat(f3), s3)
        for k in range(whole, last):
            value = float_at(x, k)
            r0 += f0 * value * np.float32(np.int8(byte_at(w0, k)))
            r1 += f1 * value * np.float32(np.int8(byte_at(w1, k)))
            r2 += f2 * value * np.float32(np.int8(byte_at(w2, k)))
            r3 += f3 * value * np.float32(np.int8(byte_at(w3, k)))
    return total(s0) + r0, total(s1) + r1, total(s2) + r2, total(s3) + r3


@jit()
def widen_scales(weight: Any, row: int, q: int) -> Any:
    """Scales of a row to row q of the scratch memory; returns the zero points' part of its product with x."""
    groups = weight.groups
    out, spare = weight.scratch + 4 * q * groups, weight.scratch + 16 * groups
    scaled_row(weight.scales + 2 * row * weight.row_halves, weight.kind, groups, np.float32(1), out)
    if not weight.zeros:
        return np.float32(0)
    scaled_row(weight.zeros + 2 * row * weight.row_halves, weight.kind, groups, np.float32(1), spare)
    return dot(spare, weight.sums, groups)


@jit()
def packed_dots(weight: Any, i: Array, x: Array, s: Array) -> None:
    """`kernels.dots` of a packed weight; i[4:8], where there are so many, are the rows that follow."""
    i0, i1, i2, i3 = i[0], i[1], i[2], i[3]
    if weight.direct:
        after = 4 if i.size >= 8 else 0
        data, size = weight.data, weight.row_bytes
        w0, w1, w2, w3 = data + i0 * size, data + i1 * size, data + i2 * size, data + i3 * size
        n0, n1 = data + i[after] * size, data + i[after + 1] * size
        n2, n3 = data + i[after + 2] * size, data + i[after + 3] * size
        z0, z1 = widen_scales(weight, i0, 0), widen_scales(weight, i1, 1)
        z2, z3 = widen_scales(weight, i2, 2), widen_scales(weight, i3, 3)
        if weight.bits == 4:
            p0, p1, p2, p3 = nibble_dots(w0, w1, w2, w3, n0, n1, n2, n3, weight)
        else:
            p0, p1, p2, p3 = byte_dots(w0, w1, w2, w3, n0, n1, n2, n3, weight)
        s[0, 0], s[0, 1], s[0, 2], s[0, 3] = p0 + z0, p1 + z1, p2 + z2, p3 + z3
        return
    s[:] = 0
    for k in range(0, weight.d, COLUMNS):
        n = min(COLUMNS, weight.d - k)
        tile = dequantised(weight, i, k, n)
        for r in range(x.shape[0]):
            part = four_dots(tile[0], tile[1], tile[2], tile[3], x[r, k : k + n])
            for q in range(4):
                s[r, q] += part[q]


@jit()
def add_nibbles(w0: int, w1: int, w2: int, w3: int, n0: int, n1: int, n2: int, n3: int, weight: Any, y: int) -> None:
    """``y += sum over q of c[q, g] weight[q]`` for four rows of int4, without zero points; c in the scratch memory."""
    half, groups = weight.group // 2, weight.groups
    c0 = weight.scratch
    c1, c2, c3 = c0 + 4 * groups, c0 + 8 * groups, c0 + 12 * groups
    for g in range(groups):
        f0, f1, f2, f3 = splat(float_at(c0, g)), splat(float_at(c1, g)), splat(float_at(c2, g)), splat(float_at(c3, g))
        prefetch_four(n0, n1, n2, n3, g * half, (g + 1) * half)
        for k in range(g * half, (g + 1) * half, LANES):
            v0, v1, v2, v3 = load_bytes(w0, k), load_bytes(w1, k), load_bytes(w2, k), load_bytes(w3, k)
            low, high = load(y, g * half + k), load(y, (g + 1) * half + k)
            low = multiply_add(low_nibbles(v0), f0, low)
            low = multiply_add(low_nibbles(v1), f1, low)
            low = multiply_add(low_nibbles(v2), f2, low)
            low = multiply_add(low_nibbles(v3), f3, low)
            high = multiply_add(high_nibbles(v0), f0, high)
            high = multiply_add(high_nibbles(v1), f1, high)
            high = multiply_add(high_nibbles(v2), f2, high)
            high = multiply_add(high_nibbles(v3), f3, high)
            store(y, g * half + k, low)
            store(y, (g + 1) * half + k, high)


@jit()
def add_bytes(w0: int, w1: int, w2: int, w3: int, n0: int, n1: int, n2: int, n3: int, weight: Any, y: int) -> None:
    """The same for four rows of int8."""
    group, groups = weight.group, weight.groups
    c0 = weight.scratch
    c1, c2, c3 = c0 + 4 * groups, c0 + 8 * groups, c0 + 12 * groups
    for g in range(groups):
        first, last = g * group, min(weight.d, (g + 1) * group)
        whole = first + (last - first) // LANES * LANES
        f0, f1, f2, f3 = float_at(c0, g), float_at(c1, g), float_at(c2, g), float_at(c3, g)
        for line in range(first, whole, LINE):
            prefetch_four(n0, n1, n2, n3, line, line + 1)
            for k in range(line, min(line + LINE, whole), LANES):
                value = multiply_add(load_signed(w0, k), splat(f0), load(y, k))
                value = multiply_add(load_signed(w1, k), splat(f1), value)
                value = multiply_add(load_signed(w2, k), splat(f2), value)
                value = multiply_add(load_signed(w3, k), splat(f3), value)
                store(y, k, value)
        for k in range(whole, last):
            tail = f0 * np.float32(np.int8(byte_at(w0, k))) + f1 * np.float32(np.int8(byte_at(w1, k)))
            tail += f2 * np.float32(np.int8(byte_at(w2, k))) + f3 * np.float32(np.int8(byte_at(w3, k)))
            set_float(y, k, float_at(y, k) + tail)


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
    """`kernels.adds` of a packed weight; i as in `packed_dots`."""
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


@overload(dots, strict=False)
def _dots(weight: Any, i: Any, x: Any, s: Any) -> Any:
    packed = isinstance(weight, types.BaseTuple)
    return (lambda weight, i, x, s: packed_dots(weight, i, x, s)) if packed else None


@overload(adds, strict=False)
def _adds(weight: Any, i: Any, h: Any, y: Any) -> Any:
    packed = isinstance(weight, types.BaseTuple)
    return (lambda weight, i, h, y: packed_adds(weight, i, h, y)) if packed else None


@overload(neurons, strict=False)
def _neurons(weight: Any) -> Any:
    return (lambda weight: weight.m) if isinstance(weight, types.BaseTuple) else None


@overload(scratch_size, strict=False)
def _scratch_size(weight: Any) -> Any:
    return (lambda weight: 5 * weight.groups) if isinstance(weight, types.BaseTuple) else None


@jit()
def packed_with_scratch(weight: Any, memory: Array) -> Any:
    """`kernels.with_scratch` of a packed weight."""
    return Packed(
        weight.data,
        weight.scales,
        weight.zeros,
        weight.kind,
        weight.row_bytes,
        weight.row_halves,
        weight.bits,
        weight.group,
        weight.groups,
        weight.m,
        weight.d,
        weight.x,
        weight.sums,
        weight.direct,
        address_of(memory),
    )


@overload(with_scratch, strict=False)
def _with_scratch(weight: Any, memory: Any) -> Any:
    packed = isinstance(weight, types.BaseTuple)
    return (lambda weight, memory: packed_with_scratch(weight, memory)) if packed else None
