"""Sums of up to sixteen packed rows in integers, where the processor has an instruction for words of 16 bits.

For one row of x, of bfloat16: the coefficients of the rows, h times a scale, are in fixed point of 16 bits with an
exponent for each group, so that pairs of rows are multiplied as they are, summed exactly, and widened to float32 once
for sixteen rows. int4 numbers are used as 0 to 15, and every other int8 one as 0 to 255: what that adds, which depends
on the coefficients alone, is taken off where the sums begin.

A pair of rows is interleaved by words, each of which holds the bytes of two columns, so the sums are in another order
than the columns until all rows of a block of neurons have been added.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cats_kernels.cpu.compiling import Array, jit
from cats_kernels.cpu.integers import BLOCK_BYTES, as_floats, load_words, no_words, plus_words
from cats_kernels.cpu.packed import LARGEST, SMALLEST, aligned, prefetch_bytes, scales_before, whole_vectors
from cats_kernels.cpu.vectors import (
    LANES,
    float_at,
    load,
    multiply_add,
    plus,
    prefetch_second,
    splat,
    store,
    times,
)
from cats_kernels.cpu.words import (
    all_between,
    as_words,
    dot_words,
    high_bytes,
    interleaved_high,
    interleaved_low,
    inverses,
    larger,
    low_bytes,
    magnitudes,
    nibble_0,
    nibble_1,
    nibble_2,
    nibble_3,
    pairs_of_words,
    splat_word,
    store_words,
    word_at,
    woven_0,
    woven_1,
    woven_2,
    woven_3,
)

ROWS = 16
"""As many 15-bit coefficients times numbers up to 15 * 256 as a sum of 32 bits holds."""
MOST = np.float32(32767)
"""Largest coefficient."""
UNEQUAL = np.float32(256)
"""So many times the mean of the others' values the largest one of sixteen rows may be."""


@jit()
def sums_rows(weight: Any) -> bool:
    """Whether rows of this weight are added here, for one row of x: whole blocks of one group each, x in two bytes."""
    if weight.parts != 2 or weight.row_bytes % BLOCK_BYTES:
        return False
    return weight.groups == 1 or weight.group >= BLOCK_BYTES * 8 // weight.bits


@jit()
def sum_floats(weight: Any) -> int:
    """float32 of memory that a thread needs here: all columns in another order, and for each group a coefficient of
    every row, their sum and their step."""
    if not sums_rows(weight):
        return 0
    return LANES + weight.row_bytes * 8 // weight.bits + (ROWS // 2 + 2) * whole_vectors(weight.groups)


@jit()
def coefficients(weight: Any, h: Array, index: Array, first: int, rows: int, memory: int) -> bool:
    """Of ``rows`` listed neurons from the ``first`` on, into ``memory``: for each pair of rows and each group two of 16
    bits, then the sums over all rows, then the steps in float32. False where they have no fixed point: a value is not
    finite or very large, all of a group are tiny, or one row is so much larger than the others that a step, which is
    `MOST` of it, would be coarser than bfloat16 for them."""
    padded = whole_vectors(weight.groups)
    sums, steps = memory + 4 * (ROWS // 2) * padded, memory + 4 * (ROWS // 2 + 1) * padded
    fine: Any = True
    count, largest, total = 0, np.float32(0), np.float32(0)
    for q in range(first, first + rows):
        size = abs(h[q])
        fine &= size < LARGEST
        largest, total, count = max(largest, size), total + size, count + (size > 0)
    fine &= count < 2 or largest * (count - 1) < UNEQUAL * (total - largest)
    for g in range(0, padded, LANES):
        peak = splat(0.0)
        for q in range(first, first + rows):
            scales = scales_before(weight.scales + 2 * index[q] * weight.row_halves, g, weight.groups, weight.kind)
            peak = larger(magnitudes(times(splat(h[q]), scales)), peak)
        fine &= all_between(peak, splat(SMALLEST), splat(LARGEST))
        inverse, sum_of_all = inverses(splat(MOST), peak), no_words()
        for p in range(rows // 2):
            q = first + 2 * p
            low = scales_before(weight.scales + 2 * index[q] * weight.row_halves, g, weight.groups, weight.kind)
            high = scales_before(weight.scales + 2 * index[q + 1] * weight.row_halves, g, weight.groups, weight.kind)
            even, odd = (
                as_words(times(times(splat(h[q]), low), inverse)),
                as_words(times(times(splat(h[q + 1]), high), inverse)),
            )
            store_words(memory, p * padded + g, pairs_of_words(even, odd))
            sum_of_all = plus_words(sum_of_all, plus_words(even, odd))
        store_words(sums, g, sum_of_all)
        store(steps, g, times(peak, splat(np.float32(1) / MOST)))
    return fine


@jit()
def add_to(y: int, k: int, sums: Any, unit: Any) -> None:
    """Add sums times their unit to the vector of y at ``k``."""
    store(y, k, multiply_add(as_floats(sums), unit, load(y, k)))


@jit()
def sum_nibbles(rows: Array, pairs: int, at: int, words: int, padded: int, offset: int, step: Any, y: int) -> None:
    """Add one block of ``pairs`` of rows to 128 columns of y."""
    a0, a1 = splat_word(-8 * offset), splat_word(-128 * offset)
    a2, a3 = splat_word(-2048 * offset), splat_word(-8 * offset)
    b0, b1, b2, b3 = a0, a1, a2, a3
    for p in range(pairs):
        v, w = load_words(rows[2 * p], at), load_words(rows[2 * p + 1], at)
        low, high, c = interleaved_low(v, w), interleaved_high(v, w), splat_word(word_at(words, p * padded))
        a0, b0 = dot_words(a0, nibble_0(low), c), dot_words(b0, nibble_0(high), c)
        a1, b1 = dot_words(a1, nibble_1(low), c), dot_words(b1, nibble_1(high), c)
        a2, b2 = dot_words(a2, nibble_2(low), c), dot_words(b2, nibble_2(high), c)
        a3, b3 = dot_words(a3, nibble_3(low), c), dot_words(b3, nibble_3(high), c)
    unit = splat(step)
    add_to(y, 0, a0, unit)
    add_to(y, LANES, b0, unit)
    add_to(y, 6 * LANES, a3, unit)
    add_to(y, 7 * LANES, b3, unit)
    unit = splat(step * np.float32(1 / 16))
    add_to(y, 4 * LANES, a1, unit)
    add_to(y, 5 * LANES, b1, unit)
    unit = splat(step * np.float32(1 / 256))
    add_to(y, 2 * LANES, a2, unit)
    add_to(y, 3 * LANES, b2, unit)


@jit()
def sum_bytes(rows: Array, pairs: int, at: int, words: int, padded: int, offset: int, step: Any, y: int) -> None:
    """Add one block of ``pairs`` of rows to 64 columns of y."""
    a0 = splat_word(-128 * offset)
    b0, a1, b1 = a0, no_words(), no_words()
    for p in range(pairs):
        v, w = load_words(rows[2 * p], at), load_words(rows[2 * p + 1], at)
        low, high, c = interleaved_low(v, w), interleaved_high(v, w), splat_word(word_at(words, p * padded))
        a0, b0 = dot_words(a0, low_bytes(low), c), dot_words(b0, low_bytes(high), c)
        a1, b1 = dot_words(a1, high_bytes(low), c), dot_words(b1, high_bytes(high), c)
    unit = splat(step)
    add_to(y, 0, a0, unit)
    add_to(y, LANES, b0, unit)
    add_to(y, 2 * LANES, a1, unit)
    add_to(y, 3 * LANES, b1, unit)


@jit()
def in_order(sums: int, y: int) -> None:
    """Add 64 sums to the columns that they belong to: the first half are those of even columns."""
    even_low, even_high = load(sums, 0), load(sums, LANES)
    odd_low, odd_high = load(sums, 2 * LANES), load(sums, 3 * LANES)
    store(y, 0, plus(load(y, 0), woven_0(even_low, odd_low, even_high, odd_high)))
    store(y, LANES, plus(load(y, LANES), woven_1(even_low, odd_low, even_high, odd_high)))
    store(y, 2 * LANES, plus(load(y, 2 * LANES), woven_2(even_low, odd_low, even_high, odd_high)))
    store(y, 3 * LANES, plus(load(y, 3 * LANES), woven_3(even_low, odd_low, even_high, odd_high)))


@jit()
def add_in_order(weight: Any, sums: int, y: int) -> None:
    """Add all sums to y, column by column."""
    blocks = weight.row_bytes // BLOCK_BYTES
    if weight.bits == 8:
        for b in range(blocks):
            in_order(sums + 4 * 64 * b, y + 4 * 64 * b)
        return
    half = weight.group // 2
    for b in range(blocks):
        low = BLOCK_BYTES * b // half * weight.group + BLOCK_BYTES * b % half
        in_order(sums + 4 * 128 * b, y + 4 * low)
        in_order(sums + 4 * 128 * b + 4 * 64, y + 4 * (low + half))


@jit()
def sum_rows(weight: Any, rows: Array, first: int, pairs: int, last: int, memory: int, sums: int) -> None:
    """Add ``pairs`` of rows from the ``first`` on, whose `coefficients` are in ``memory``, to ``sums``. Those that
    follow, to before the ``last``, are read next.

    Sixteen rows are a loop of known length without a test of any index: the fewer instructions come between two reads,
    the more reads are under way. Half of the rows of int8 take 1.25 times a plain read so, and took 1.5.
    """
    padded = whole_vectors(weight.groups)
    offsets, steps = memory + 4 * (ROWS // 2) * padded, memory + 4 * (ROWS // 2 + 1) * padded
    blocks = weight.row_bytes // BLOCK_BYTES
    each = blocks if weight.groups == 1 else weight.group * weight.bits // (8 * BLOCK_BYTES)
    # indices that begin at 0: the compiler sees that none is negative
    these, following = rows[first : first + 2 * pairs], rows[first + 2 * pairs : last]
    for b in range(blocks):
        at, g = BLOCK_BYTES * b, b // each
        for q in range(following.size):
            prefetch_second(following[q] + at)
        words, offset, step = memory + 4 * g, word_at(offsets, g), float_at(steps, g)
        if weight.bits == 4:
            if pairs == 8:
                sum_nibbles(these, 8, at, words, padded, offset, step, sums + 4 * 128 * b)
            else:
                sum_nibbles(these, pairs, at, words, padded, offset, step, sums + 4 * 128 * b)
        elif pairs == 8:
            sum_bytes(these, 8, at, words, padded, offset, step, sums + 4 * 64 * b)
        else:
            sum_bytes(these, pairs, at, words, padded, offset, step, sums + 4 * 64 * b)


@jit()
def packed_sums(weight: Any, index: Array, h: Array, count: int, spare: int, y: int) -> int:
    """``y += h weight[index]`` without zero points, for the first ``count`` neurons, a multiple of four, or as many as
    have a fixed point; how many. ``spare``: address of `sum_floats`."""
    columns = weight.row_bytes * 8 // weight.bits
    spare = aligned(spare)
    memory = spare + 4 * columns
    rows = np.empty(count, np.int64)
    for q in range(count):
        rows[q] = weight.data + index[q] * weight.row_bytes
    for k in range(0, columns, LANES):
        store(spare, k, splat(0.0))
    first = 0
    while first < count:
        n = min(ROWS, count - first)
        for q in range(first + n, min(count, first + n + ROWS)):
            prefetch_bytes(weight.scales + 2 * index[q] * weight.row_halves, 2 * weight.row_halves)
        if not coefficients(weight, h, index, first, n, memory):
            break
        sum_rows(weight, rows, first, n // 2, min(count, first + n + ROWS), memory, spare)
        first += n
    add_in_order(weight, spare, y)
    return first
