"""Vectors of bytes as values of numba code: products of eight-bit integers, four to a lane, summed exactly in 32 bits.

For processors with the instruction for it (AVX512-VNNI); other ones use `vectors`. Exists in compiled code only; no
function checks a bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from cats_kernels.cpu.vectors import F32, FLOATS, I8, I16, I32, INTEGERS, LANES, features, intrinsic, pointer_to

BLOCK_BYTES = 64
"""Bytes of a vector."""
DOT_BYTES = LANES == 16 and bool(features().get("avx512vnni"))
"""Whether this processor multiplies bytes."""


def repeated(number: int) -> ir.Constant:
    """Every lane the number."""
    return ir.Constant(INTEGERS.backend, [number] * LANES)


@intrinsic
def load_words(context: Any, address: Any, k: Any) -> Any:
    """The vector of bytes that begins ``k`` bytes after ``address``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = builder.bitcast(pointer_to(builder, I8, *arguments), INTEGERS.backend.as_pointer())
        return builder.load(at, align=1)

    return INTEGERS(types.int64, types.int64), generate


@intrinsic
def set_byte(context: Any, address: Any, k: Any, value: Any) -> Any:
    """Write byte ``k`` at ``address``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, k, number = arguments
        builder.store(number, pointer_to(builder, I8, address, k), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.uint8), generate


@intrinsic
def no_words(context: Any) -> Any:
    """Zero in every lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return repeated(0)

    return INTEGERS(), generate


@intrinsic
def lower_nibbles(context: Any, values: Any) -> Any:
    """Bits 0 to 3 of every byte, a byte each."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.and_(arguments[0], repeated(0x0F0F0F0F))

    return INTEGERS(INTEGERS), generate


@intrinsic
def upper_nibbles(context: Any, values: Any) -> Any:
    """Bits 4 to 7 of every byte, a byte each."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.and_(builder.lshr(arguments[0], repeated(4)), repeated(0x0F0F0F0F))

    return INTEGERS(INTEGERS), generate


@intrinsic
def above_128(context: Any, values: Any) -> Any:
    """Bytes of two's complement, plus 128: without a sign."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.xor(arguments[0], ir.Constant(INTEGERS.backend, [0x80808080 - 2**32] * LANES))

    return INTEGERS(INTEGERS), generate


@intrinsic
def dot_bytes(context: Any, sums: Any, unsigned: Any, signed: Any) -> Any:
    """Each lane of ``sums`` plus the products of its four bytes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(INTEGERS.backend, [INTEGERS.backend] * 3)
        function = builder.module.declare_intrinsic("llvm.x86.avx512.vpdpbusd.512", fnty=kind)
        return builder.call(function, arguments)

    return INTEGERS(INTEGERS, INTEGERS, INTEGERS), generate


@intrinsic
def times_256(context: Any, values: Any) -> Any:
    """Every lane times 256."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.shl(arguments[0], repeated(8))

    return INTEGERS(INTEGERS), generate


@intrinsic
def plus_words(context: Any, a: Any, b: Any) -> Any:
    """``a + b``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.add(*arguments)

    return INTEGERS(INTEGERS, INTEGERS), generate


@intrinsic
def as_floats(context: Any, values: Any) -> Any:
    """Lanes, of two's complement, as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.sitofp(arguments[0], FLOATS.backend)

    return FLOATS(INTEGERS), generate


def _spread(count: int) -> Any:
    """An intrinsic: ``count`` float32 at an address, each in as many neighbouring lanes."""

    def spread(context: Any, address: Any, k: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            few = ir.VectorType(F32, count)
            at = builder.bitcast(pointer_to(builder, F32, *arguments), few.as_pointer())
            numbers = builder.load(at, align=4)
            lanes = [lane * count // LANES for lane in range(LANES)]
            return builder.shuffle_vector(numbers, numbers, ir.Constant(ir.VectorType(I32, LANES), lanes))

        return FLOATS(types.int64, types.int64), generate

    return intrinsic(spread)


spread_two = _spread(2)
spread_four = _spread(4)
spread_eight = _spread(8)


def _masked(element: ir.Type, widen: Callable[[Any, Any], Any]) -> Any:
    """An intrinsic: at most LANES numbers at an address, those from the ``last`` on as zero; no memory of theirs is
    read."""

    def some(context: Any, address: Any, k: Any, last: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, k, last = arguments
            vector, mask = ir.VectorType(element, LANES), ir.VectorType(ir.IntType(1), LANES)
            at = builder.bitcast(pointer_to(builder, element, address, k), vector.as_pointer())
            left = builder.trunc(builder.sub(last, k), I32)
            lanes = ir.Constant(INTEGERS.backend, list(range(LANES)))
            first = builder.insert_element(repeated(0), left, ir.Constant(I32, 0))
            limit = builder.shuffle_vector(first, first, repeated(0))
            kind = ir.FunctionType(vector, [vector.as_pointer(), I32, mask, vector])
            name = f"llvm.masked.load.v{LANES}{'i16' if element == I16 else 'f32'}.p0"
            function = cgutils.get_or_insert_function(builder.module, kind, name)
            inside = builder.icmp_signed("<", lanes, limit)
            align = ir.Constant(I32, 2 if element == I16 else 4)
            return widen(builder, builder.call(function, [at, align, inside, ir.Constant(vector, None)]))

        return FLOATS(types.int64, types.int64, types.int64), generate

    return intrinsic(some)


def _from_bfloat16(builder: Any, values: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(values, INTEGERS.backend), repeated(16)), FLOATS.backend)


def _from_float16(builder: Any, values: Any) -> Any:
    return builder.fpext(builder.bitcast(values, ir.VectorType(ir.HalfType(), LANES)), FLOATS.backend)


load_floats_before = _masked(F32, lambda builder, values: values)
load_bfloat16_before = _masked(I16, _from_bfloat16)
load_float16_before = _masked(I16, _from_float16)
