"""Products and sums of four packed rows in float32, on any processor.

What depends on a group alone is taken out of the loop over its columns: its scale multiplies the sum of the group. The
four rows that follow are prefetched: an int4 row of 2 KB ends before the hardware's own prefetching has caught up.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cats_kernels.cpu.compiling import jit
from cats_kernels.cpu.packed import prefetch_four
from cats_kernels.cpu.plain import LINE
from cats_kernels.cpu.vectors import (
    LANES,
    byte_at,
    float_at,
    high_nibbles,
    load,
    load_bytes,
    load_signed,
    low_nibbles,
    multiply_add,
    plus,
    set_float,
    splat,
    store,
    total,
)


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
