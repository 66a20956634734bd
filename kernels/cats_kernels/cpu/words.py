"""Vectors of words of 16 bits as values of numba code: products of pairs of them, summed exactly in 32 bits.

For processors with the instruction for it (AVX512-VNNI), as `integers`, and as there.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from cats_kernels.cpu.integers import repeated
from cats_kernels.cpu.vectors import FLOATS, I16, I32, INTEGERS, LANES, intrinsic, pointer_to

WORDS = ir.VectorType(I16, 2 * LANES)


@intrinsic
def dot_words(context: Any, sums: Any, a: Any, b: Any) -> Any:
    """Each lane of ``sums`` plus the products of its two words of 16 bits, both with a sign."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(INTEGERS.backend, [INTEGERS.backend] * 3)
        function = builder.module.declare_intrinsic("llvm.x86.avx512.vpdpwssd.512", fnty=kind)
        return builder.call(function, arguments)

    return INTEGERS(INTEGERS, INTEGERS, INTEGERS), generate


def _interleaved(first: int) -> Any:
    """An intrinsic: of each 128 bits four words of 16 bits from ``first`` on, those of a and b in turn."""

    def interleaved(context: Any, a: Any, b: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            a, b = (builder.bitcast(argument, WORDS) for argument in arguments)
            order = [8 * (j // 8) + first + j % 8 // 2 + 2 * LANES * (j % 2) for j in range(2 * LANES)]
            mixed = builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, 2 * LANES), order))
            return builder.bitcast(mixed, INTEGERS.backend)

        return INTEGERS(INTEGERS, INTEGERS), generate

    return intrinsic(interleaved)


interleaved_low, interleaved_high = _interleaved(0), _interleaved(4)


def _nibble(place: int) -> Any:
    """An intrinsic: of every word of 16 bits nibble ``place``, times 16 ** place; the last one not."""

    def nibble(context: Any, values: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            if place < 3:
                return builder.and_(arguments[0], repeated(0x000F000F << 4 * place))
            words = builder.bitcast(arguments[0], WORDS)
            return builder.bitcast(builder.lshr(words, ir.Constant(WORDS, [12] * 2 * LANES)), INTEGERS.backend)

        return INTEGERS(INTEGERS), generate

    return intrinsic(nibble)


nibble_0, nibble_1, nibble_2, nibble_3 = map(_nibble, range(4))


@intrinsic
def low_bytes(context: Any, values: Any) -> Any:
    """The lower byte of every word of 16 bits, of two's complement, plus 128."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.and_(builder.xor(arguments[0], repeated(0x00800080)), repeated(0x00FF00FF))

    return INTEGERS(INTEGERS), generate


@intrinsic
def high_bytes(context: Any, values: Any) -> Any:
    """The upper byte of every word of 16 bits, of two's complement."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words = builder.bitcast(arguments[0], WORDS)
        return builder.bitcast(builder.ashr(words, ir.Constant(WORDS, [8] * 2 * LANES)), INTEGERS.backend)

    return INTEGERS(INTEGERS), generate


@intrinsic
def splat_word(context: Any, value: Any) -> Any:
    """An int32 in every lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first = builder.insert_element(repeated(0), builder.trunc(arguments[0], I32), ir.Constant(I32, 0))
        return builder.shuffle_vector(first, first, repeated(0))

    return INTEGERS(types.int64), generate


@intrinsic
def word_at(context: Any, address: Any, k: Any) -> Any:
    """Number ``k`` of the int32 at ``address``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.sext(builder.load(pointer_to(builder, I32, *arguments), align=4), ir.IntType(64))

    return types.int64(types.int64, types.int64), generate


@intrinsic
def store_words(context: Any, address: Any, k: Any, values: Any) -> Any:
    """Write numbers [k, k + LANES) of the int32 at ``address``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, k, vector = arguments
        at = builder.bitcast(pointer_to(builder, I32, address, k), INTEGERS.backend.as_pointer())
        builder.store(vector, at, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, INTEGERS), generate


@intrinsic
def as_words(context: Any, values: Any) -> Any:
    """Lanes of float32 rounded to the nearest int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(INTEGERS.backend, [FLOATS.backend, INTEGERS.backend, ir.IntType(16), I32])
        function = builder.module.declare_intrinsic("llvm.x86.avx512.mask.cvtps2dq.512", fnty=kind)
        # every lane; 4: rounded as the processor's mode says, to nearest
        options = [repeated(0), ir.Constant(ir.IntType(16), 0xFFFF), ir.Constant(I32, 4)]
        return builder.call(function, [arguments[0], *options])

    return INTEGERS(FLOATS), generate


@intrinsic
def pairs_of_words(context: Any, low: Any, high: Any) -> Any:
    """Lanes of two numbers of 16 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        low, high = arguments
        return builder.or_(builder.shl(high, repeated(16)), builder.and_(low, repeated(0xFFFF)))

    return INTEGERS(INTEGERS, INTEGERS), generate


@intrinsic
def magnitudes(context: Any, values: Any) -> Any:
    """Lanes without their signs."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.and_(builder.bitcast(arguments[0], INTEGERS.backend), repeated(0x7FFFFFFF))
        return builder.bitcast(bits, FLOATS.backend)

    return FLOATS(FLOATS), generate


@intrinsic
def larger(context: Any, a: Any, b: Any) -> Any:
    """The larger one of each lane of numbers without a sign; NaN where either is, by their bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b = (builder.bitcast(argument, INTEGERS.backend) for argument in arguments)
        return builder.bitcast(builder.select(builder.icmp_unsigned("<", a, b), b, a), FLOATS.backend)

    return FLOATS(FLOATS, FLOATS), generate


@intrinsic
def inverses(context: Any, number: Any, values: Any) -> Any:
    """``number`` over each lane; zero where that is zero."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number, values = arguments
        none = ir.Constant(FLOATS.backend, [0.0] * LANES)
        return builder.select(builder.fcmp_unordered("==", values, none), none, builder.fdiv(number, values))

    return FLOATS(FLOATS, FLOATS), generate


@intrinsic
def all_between(context: Any, values: Any, low: Any, high: Any) -> Any:
    """Whether every lane is zero, or from ``low`` to below ``high``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, low, high = arguments
        none = ir.Constant(FLOATS.backend, [0.0] * LANES)
        inside = builder.and_(builder.fcmp_ordered(">=", values, low), builder.fcmp_ordered("<", values, high))
        fine = builder.or_(inside, builder.fcmp_ordered("==", values, none))
        bits = builder.bitcast(fine, ir.IntType(LANES))
        return builder.icmp_unsigned("==", bits, ir.Constant(ir.IntType(LANES), 2**LANES - 1))

    return types.boolean(FLOATS, FLOATS, FLOATS), generate


def _woven(part: int) -> Any:
    """An intrinsic: of two pairs of vectors, each interleaved, 16 numbers of the ``part``-th 128 bits."""

    def woven(context: Any, even_low: Any, odd_low: Any, even_high: Any, odd_high: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def both(even: Any, odd: Any) -> Any:
                order = [4 * part + j // 2 + LANES * (j % 2) for j in range(8)]
                return builder.shuffle_vector(even, odd, ir.Constant(ir.VectorType(I32, 8), order))

            low, high = both(*arguments[:2]), both(*arguments[2:])
            return builder.shuffle_vector(low, high, ir.Constant(INTEGERS.backend, list(range(LANES))))

        return FLOATS(*[FLOATS] * 4), generate

    return intrinsic(woven)


woven_0, woven_1, woven_2, woven_3 = map(_woven, range(4))
