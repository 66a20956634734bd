"""Products of four packed rows with x in integers, where the processor has an instruction for bytes.

x is in fixed point of two or three bytes, with an exponent for each piece of at most 128 columns (`packed.PARTS`), so a
row's bytes are multiplied as they are, 64 in an instruction, and summed exactly; a quarter of the instructions that
widening them to float32 takes. int4 numbers are used as 0 to 15 and int8 ones as 0 to 255: what that adds, which
depends on x alone, is in the offsets of `packed.prepare_row`.
"""

from __future__ import annotations

from typing import Any

from cats_kernels.cpu.compiling import jit
from cats_kernels.cpu.integers import (
    BLOCK_BYTES,
    above_128,
    as_floats,
    dot_bytes,
    load_words,
    lower_nibbles,
    no_words,
    plus_words,
    set_byte,
    spread_four,
    spread_two,
    times_256,
    upper_nibbles,
)
from cats_kernels.cpu.packed import coefficient_stride, digits_of, offsets_of
from cats_kernels.cpu.vectors import byte_at, float_at, multiply_add, prefetch, splat, total


@jit()
def copied(row: int, first: int, last: int, to: int) -> int:
    """Copy bytes [first, last) of a row; the address from which a row would begin that had them at ``first``."""
    for k in range(first, last):
        set_byte(to, k - first, byte_at(row, k))
    return to - first


@jit()
def block_scale(coefficients: int, b: int, spread: int) -> Any:
    """The coefficients of block ``b``, ``spread`` of them, in the lanes that they belong to."""
    if spread == 1:
        return splat(float_at(coefficients, b))
    if spread == 2:
        return spread_two(coefficients, 2 * b)
    return spread_four(coefficients, 4 * b)


@jit()
def nibble_products(
    a0: Any, a1: Any, a2: Any, a3: Any, v0: Any, v1: Any, v2: Any, v3: Any, x: int
) -> tuple[Any, Any, Any, Any]:
    """a plus the products of four blocks of nibbles with one byte of each number of x."""
    low, high = load_words(x, 0), load_words(x, BLOCK_BYTES)
    a0, a1 = dot_bytes(a0, lower_nibbles(v0), low), dot_bytes(a1, lower_nibbles(v1), low)
    a2, a3 = dot_bytes(a2, lower_nibbles(v2), low), dot_bytes(a3, lower_nibbles(v3), low)
    a0, a1 = dot_bytes(a0, upper_nibbles(v0), high), dot_bytes(a1, upper_nibbles(v1), high)
    a2, a3 = dot_bytes(a2, upper_nibbles(v2), high), dot_bytes(a3, upper_nibbles(v3), high)
    return a0, a1, a2, a3


@jit()
def sums(a0: Any, a1: Any, a2: Any, a3: Any, offsets: int) -> tuple[Any, Any, Any, Any]:
    """Products of four blocks as float32, less what the bytes being without sign adds."""
    offset = load_words(offsets, 0)
    return (
        as_floats(plus_words(a0, offset)),
        as_floats(plus_words(a1, offset)),
        as_floats(plus_words(a2, offset)),
        as_floats(plus_words(a3, offset)),
    )


@jit()
def with_last(
    f0: Any, f1: Any, f2: Any, f3: Any, a0: Any, a1: Any, a2: Any, a3: Any, offsets: int
) -> tuple[Any, Any, Any, Any]:
    """The same of x in three bytes: f of the upper two, and the products with the last."""
    l0, l1, l2, l3 = sums(a0, a1, a2, a3, offsets)
    unit = splat(256.0)
    return (
        multiply_add(f0, unit, l0),
        multiply_add(f1, unit, l1),
        multiply_add(f2, unit, l2),
        multiply_add(f3, unit, l3),
    )


@jit()
def nibble_block(v0: Any, v1: Any, v2: Any, v3: Any, x: int, offsets: int, parts: int) -> tuple[Any, Any, Any, Any]:
    """Products of four blocks of int4 with x in ``parts`` bytes, as float32."""
    none = no_words()
    a0, a1, a2, a3 = nibble_products(none, none, none, none, v0, v1, v2, v3, x)
    a0, a1, a2, a3 = times_256(a0), times_256(a1), times_256(a2), times_256(a3)
    a0, a1, a2, a3 = nibble_products(a0, a1, a2, a3, v0, v1, v2, v3, x + 2 * BLOCK_BYTES)
    f0, f1, f2, f3 = sums(a0, a1, a2, a3, offsets)
    if parts == 3:
        a0, a1, a2, a3 = nibble_products(none, none, none, none, v0, v1, v2, v3, x + 4 * BLOCK_BYTES)
        f0, f1, f2, f3 = with_last(f0, f1, f2, f3, a0, a1, a2, a3, offsets + BLOCK_BYTES)
    return f0, f1, f2, f3


@jit()
def byte_products(
    a0: Any, a1: Any, a2: Any, a3: Any, v0: Any, v1: Any, v2: Any, v3: Any, x: int
) -> tuple[Any, Any, Any, Any]:
    """The same for blocks of int8, plus 128."""
    value = load_words(x, 0)
    return dot_bytes(a0, v0, value), dot_bytes(a1, v1, value), dot_bytes(a2, v2, value), dot_bytes(a3, v3, value)


@jit()
def byte_block(v0: Any, v1: Any, v2: Any, v3: Any, x: int, offsets: int, parts: int) -> tuple[Any, Any, Any, Any]:
    """The same for blocks of int8."""
    none = no_words()
    v0, v1, v2, v3 = above_128(v0), above_128(v1), above_128(v2), above_128(v3)
    a0, a1, a2, a3 = byte_products(none, none, none, none, v0, v1, v2, v3, x)
    a0, a1, a2, a3 = times_256(a0), times_256(a1), times_256(a2), times_256(a3)
    a0, a1, a2, a3 = byte_products(a0, a1, a2, a3, v0, v1, v2, v3, x + BLOCK_BYTES)
    f0, f1, f2, f3 = sums(a0, a1, a2, a3, offsets)
    if parts == 3:
        a0, a1, a2, a3 = byte_products(none, none, none, none, v0, v1, v2, v3, x + 2 * BLOCK_BYTES)
        f0, f1, f2, f3 = with_last(f0, f1, f2, f3, a0, a1, a2, a3, offsets + BLOCK_BYTES)
    return f0, f1, f2, f3


@jit()
def integer_dots(
    w0: int, w1: int, w2: int, w3: int, n0: int, n1: int, n2: int, n3: int, weight: Any
) -> tuple[Any, Any, Any, Any]:
    """Four rows times x: the sum over the pieces of coefficient * sum of q * x; coefficients in the scratch memory.
    Rows n are read next."""
    c0, size = weight.scratch, 4 * coefficient_stride(weight)
    c1, c2, c3, spare = c0 + size, c0 + 2 * size, c0 + 3 * size, c0 + 4 * size + 4 * weight.groups
    whole, left = weight.row_bytes // BLOCK_BYTES, weight.row_bytes % BLOCK_BYTES
    digits, offsets, parts = digits_of(weight), offsets_of(weight), weight.parts
    columns = BLOCK_BYTES * 8 // weight.bits
    spread = columns // weight.piece
    s0, s1, s2, s3 = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    for b in range(whole + (left > 0)):
        at, x, offset = BLOCK_BYTES * b, digits + parts * columns * b, offsets + BLOCK_BYTES * (parts - 1) * b
        if b == whole:  # nothing beyond a row's end is read, which may be that of the memory
            end = weight.row_bytes
            w0, w1 = copied(w0, at, end, spare), copied(w1, at, end, spare + BLOCK_BYTES)
            w2, w3 = copied(w2, at, end, spare + 2 * BLOCK_BYTES), copied(w3, at, end, spare + 3 * BLOCK_BYTES)
        prefetch(n0 + at)
        prefetch(n1 + at)
        prefetch(n2 + at)
        prefetch(n3 + at)
        v0, v1, v2, v3 = load_words(w0, at), load_words(w1, at), load_words(w2, at), load_words(w3, at)
        if weight.bits == 4:
            f0, f1, f2, f3 = nibble_block(v0, v1, v2, v3, x, offset, parts)
        else:
            f0, f1, f2, f3 = byte_block(v0, v1, v2, v3, x, offset, parts)
        s0 = multiply_add(f0, block_scale(c0, b, spread), s0)
        s1 = multiply_add(f1, block_scale(c1, b, spread), s1)
        s2 = multiply_add(f2, block_scale(c2, b, spread), s2)
        s3 = multiply_add(f3, block_scale(c3, b, spread), s3)
    return total(s0), total(s1), total(s2), total(s3)
