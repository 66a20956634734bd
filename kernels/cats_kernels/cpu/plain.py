"""Products and sums of four weight rows that are not quantised: float32, or bfloat16 as its bits (uint16).

bfloat16 is widened by a shift, so no processor support for it is needed. Where there is some (AVX512-BF16), one row of
x is multiplied as the bfloat16 that it holds: on two cores (AMD EPYC) the kernel is mostly 5 to 10 % faster at d =
4096, and 0 to 5 % at 2048.

Four rows at a time: x is loaded once for all. For one row of x the four weight rows that are read next are prefetched
meanwhile, line by line, into the second-level cache. Without that, two cores with AVX-512 read a weight at 15 GB/s and
every second row of it at 17 (bfloat16, rows of 3 KB); with it at 29 and 27, and as fast where they compute nothing: the
hardware's own prefetching begins anew in every row. Into the first-level cache it is as fast for rows of 3 KB, and 4 to
6 % slower for rows of 8 KB.
"""

# mypy: disable-error-code="call-arg, type-var"
# (numba's stubs describe other signatures than those of compiled code)
from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from cats_kernels.cpu.compiling import Array, jit
from cats_kernels.cpu.halves import DOT_HALVES, dot_halves, load_widened, upper_halves
from cats_kernels.cpu.integers import load_words
from cats_kernels.cpu.vectors import LANES, address_of, load, multiply_add, prefetch_second, splat, store, total

COLUMNS = 1024
"""Columns at a time where several rows of x share four weight rows: 16 KB of float32 weights stay in the L1 cache."""
LINE = 64
"""Bytes of a cache line."""


def widen(weight: Any) -> Any:
    """A weight as float32: itself, or bfloat16 bits (uint16) shifted into place. Exists in compiled code only."""
    raise NotImplementedError


@overload(widen, inline="always")
def _widen(weight: Any) -> Any:
    def identity(weight: Any) -> Any:
        return weight

    def shift(weight: Any) -> Any:
        return np.uint32(np.uint32(weight) << np.uint32(16)).view(np.float32)

    return identity if isinstance(weight, types.Float) else shift


def vector(weight: Array, address: int, k: int) -> Any:
    """Numbers [k, k + LANES) of those at ``address``, as float32, where they are stored as those of ``weight`` are.
    Exists in compiled code only."""
    raise NotImplementedError


def number_bytes(weight: Array) -> int:
    """Bytes of one number of ``weight``. Exists in compiled code only."""
    raise NotImplementedError


@overload(vector, strict=False)
def _vector(weight: Any, address: Any, k: Any) -> Any:
    if isinstance(weight.dtype, types.Float):
        return lambda weight, address, k: load(address, k)
    return lambda weight, address, k: load_widened(address, k)


@overload(number_bytes, strict=False)
def _number_bytes(weight: Any) -> Any:
    return (lambda weight: 4) if isinstance(weight.dtype, types.Float) else (lambda weight: 2)


def at_once(weight: Array) -> int:
    """Columns that `add_products` takes. Exists in compiled code only."""
    raise NotImplementedError


def multiplier(weight: Array, address: int, k: int) -> Any:
    """Columns [k, k + at_once) of the x at ``address``, float32, as `add_products` takes them for this kind of weight:
    as they are, or as bfloat16, which must be exact. Exists in compiled code only."""
    raise NotImplementedError


def add_products(weight: Array, address: int, k: int, values: Any, sums: Any) -> Any:
    """``sums`` (LANES) plus products of columns [k, k + at_once) of the weight row at ``address`` with such values of
    x. Exists in compiled code only."""
    raise NotImplementedError


def multiplies_halves(weight: Any) -> bool:
    """Whether a weight of this numba type is multiplied as it is: bfloat16, where the processor multiplies that."""
    return DOT_HALVES and not isinstance(weight.dtype, types.Float)


@overload(at_once, strict=False)
def _at_once(weight: Any) -> Any:
    return (lambda weight: 2 * LANES) if multiplies_halves(weight) else (lambda weight: LANES)


@overload(multiplier, strict=False)
def _multiplier(weight: Any, address: Any, k: Any) -> Any:
    if multiplies_halves(weight):
        return lambda weight, address, k: upper_halves(load(address, k), load(address, k + LANES))
    return lambda weight, address, k: load(address, k)


@overload(add_products, strict=False)
def _add_products(weight: Any, address: Any, k: Any, values: Any, sums: Any) -> Any:
    if multiplies_halves(weight):
        return lambda weight, address, k, values, sums: dot_halves(load_words(address, 2 * k), values, sums)
    return lambda weight, address, k, values, sums: multiply_add(vector(weight, address, k), values, sums)


@jit()
def four_dots(w0: Array, w1: Array, w2: Array, w3: Array, x: Array) -> tuple[Any, Any, Any, Any]:
    """Dot products of four weight rows (columns,) with x (columns,)."""
    s0 = np.float32(0)
    s1 = np.float32(0)
    s2 = np.float32(0)
    s3 = np.float32(0)
    for k in range(x.size):
        value = x[k]
        s0 += widen(w0[k]) * value
        s1 += widen(w1[k]) * value
        s2 += widen(w2[k]) * value
        s3 += widen(w3[k]) * value
    return s0, s1, s2, s3


@jit()
def add_four(w0: Array, w1: Array, w2: Array, w3: Array, h: Array, y: Array) -> None:
    """``y += h[0] w0 + h[1] w1 + h[2] w2 + h[3] w3`` for four weight rows and y (columns,)."""
    h0 = h[0]
    h1 = h[1]
    h2 = h[2]
    h3 = h[3]
    for k in range(y.size):
        y[k] += h0 * widen(w0[k]) + h1 * widen(w1[k]) + h2 * widen(w2[k]) + h3 * widen(w3[k])


@jit()
def prefetch_line(weight: Array, n0: int, n1: int, n2: int, n3: int, k: int) -> None:
    """The cache lines of column ``k`` of the rows at four addresses."""
    at = k * number_bytes(weight)
    prefetch_second(n0 + at)
    prefetch_second(n1 + at)
    prefetch_second(n2 + at)
    prefetch_second(n3 + at)


@jit()
def dots_of_one(weight: Array, i: Array, x: Array, s: Array) -> None:
    """Four products of `plain_dots` for one row of x (columns,) and s (4,). i[4:8], where there are so many, are the
    rows that follow. x is float32; where the weight is bfloat16, its numbers are bfloat16 too."""
    first, size, at = address_of(weight), weight.shape[1] * number_bytes(weight), address_of(x)
    after = 4 if i.size >= 8 else 0
    w0, w1, w2, w3 = first + i[0] * size, first + i[1] * size, first + i[2] * size, first + i[3] * size
    n0, n1 = first + i[after] * size, first + i[after + 1] * size
    n2, n3 = first + i[after + 2] * size, first + i[after + 3] * size
    line = LINE // number_bytes(weight)
    whole = x.size // line * line
    s0, s1, s2, s3 = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    for begin in range(0, whole, line):
        prefetch_line(weight, n0, n1, n2, n3, begin)
        for k in range(begin, begin + line, at_once(weight)):
            values = multiplier(weight, at, k)
            s0 = add_products(weight, w0, k, values, s0)
            s1 = add_products(weight, w1, k, values, s1)
            s2 = add_products(weight, w2, k, values, s2)
            s3 = add_products(weight, w3, k, values, s3)
    s[0], s[1], s[2], s[3] = total(s0), total(s1), total(s2), total(s3)
    if whole < x.size:
        prefetch_line(weight, n0, n1, n2, n3, whole)
        for q in range(4):
            row = weight[i[q]]
            for k in range(whole, x.size):
                s[q] += widen(row[k]) * x[k]


@jit()
def add_to_one(weight: Array, i: Array, h: Array, y: Array) -> None:
    """`plain_adds` for one row of h (4,) and y (columns,)."""
    first, size, at = address_of(weight), weight.shape[1] * number_bytes(weight), address_of(y)
    after = 4 if i.size >= 8 else 0
    w0, w1, w2, w3 = first + i[0] * size, first + i[1] * size, first + i[2] * size, first + i[3] * size
    n0, n1 = first + i[after] * size, first + i[after + 1] * size
    n2, n3 = first + i[after + 2] * size, first + i[after + 3] * size
    line = LINE // number_bytes(weight)
    whole = y.size // line * line
    h0, h1, h2, h3 = splat(h[0]), splat(h[1]), splat(h[2]), splat(h[3])
    for begin in range(0, whole, line):
        prefetch_line(weight, n0, n1, n2, n3, begin)
        for k in range(begin, begin + line, LANES):
            value = multiply_add(vector(weight, w0, k), h0, load(at, k))
            value = multiply_add(vector(weight, w1, k), h1, value)
            value = multiply_add(vector(weight, w2, k), h2, value)
            store(at, k, multiply_add(vector(weight, w3, k), h3, value))
    if whole < y.size:
        prefetch_line(weight, n0, n1, n2, n3, whole)
        for q in range(4):
            row = weight[i[q]]
            for k in range(whole, y.size):
                y[k] += h[q] * widen(row[k])


@jit()
def plain_dots(weight: Array, i: Array, x: Array, s: Array) -> None:
    """``s[r, j] = x[r] . weight[i[j]]`` for a multiple of four listed weight rows and every row of x, whose numbers are
    those of the weight's dtype, as float32."""
    rows, columns = x.shape
    for j in range(0, i.size, 4):
        if rows == 1:
            dots_of_one(weight, i[j : min(j + 8, i.size)], x[0], s[0, j : j + 4])
            continue
        w0, w1, w2, w3 = weight[i[j]], weight[i[j + 1]], weight[i[j + 2]], weight[i[j + 3]]
        s[:, j : j + 4] = 0
        for k in range(0, columns, COLUMNS):
            end = k + COLUMNS
            for r in range(rows):
                part = four_dots(w0[k:end], w1[k:end], w2[k:end], w3[k:end], x[r, k:end])
                for q in range(4):
                    s[r, j + q] += part[q]


@jit()
def plain_adds(weight: Array, i: Array, h: Array, y: Array) -> None:
    """``y[r] += sum over q of h[r, q] weight[i[q]]`` for four weight rows and every row of y; i as in `dots_of_one`."""
    rows, columns = y.shape
    if rows == 1:
        add_to_one(weight, i, h[0], y[0])
        return
    w0, w1, w2, w3 = weight[i[0]], weight[i[1]], weight[i[2]], weight[i[3]]
    for k in range(0, columns, COLUMNS):
        end = k + COLUMNS
        for r in range(rows):
            add_four(w0[k:end], w1[k:end], w2[k:end], w3[k:end], h[r], y[r, k:end])
