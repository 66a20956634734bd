"""Vectors of bfloat16, which LLVM's types here lack, as their bits; otherwise as `cats_kernels.cpu.vectors`."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, types
from numba.core.datamodel import models

from cats_kernels.cpu.compiling import jit
from cats_kernels.cpu.vectors import FLOATS, I8, I16, I32, INTEGERS, LANES, features, intrinsic, pointer_to

MAGNITUDE, INFINITE, QUIET = 0x7FFFFFFF, 0x7F800000, 0x7FC0
"""Bits of a float32 without its sign; of infinity, above which is NaN; and the upper half of a NaN."""
BY_TABLE = LANES == 16 and bool(features().get("avx512bw")) and bool(features().get("avx512vl"))
"""Whether sixteen numbers of two bytes are looked up in one instruction."""
DOT_HALVES = LANES == 16 and bool(features().get("avx512bf16"))
"""Whether this processor multiplies bfloat16."""


class _Halves(types.Type):
    """Numba's type of ``LANES`` bfloat16."""

    def __init__(self) -> None:
        self.backend = ir.VectorType(I16, LANES)
        super().__init__("halves")


@extending.register_model(_Halves)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: _Halves) -> None:
        super().__init__(manager, kind, kind.backend)


HALVES = _Halves()


def _each(number: int) -> Any:
    return ir.Constant(INTEGERS.backend, [number] * LANES)


@intrinsic
def rounded(context: Any, vector: Any) -> Any:
    """float32 as bfloat16, rounded to the nearest, ties to even."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], INTEGERS.backend)
        odd = builder.and_(builder.lshr(bits, _each(16)), _each(1))
        upper = builder.lshr(builder.add(builder.add(bits, _each(0x7FFF)), odd), _each(16))
        not_a_number = builder.icmp_unsigned(">", builder.and_(bits, _each(MAGNITUDE)), _each(INFINITE))
        return builder.trunc(builder.select(not_a_number, _each(QUIET), upper), HALVES.backend)

    return HALVES(FLOATS), generate


@jit()
def rounded_bits(number: Any) -> Any:
    """The bits of one float32 rounded in the same way, uint16."""
    if number != number:
        return np.uint16(QUIET)
    bits = np.float32(number).view(np.uint32)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@intrinsic
def store_halves(context: Any, address: Any, k: Any, vector: Any) -> Any:
    """Write numbers [k, k + LANES) of the bfloat16 at ``address``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, k, vector = arguments
        place = builder.bitcast(pointer_to(builder, I16, address, k), HALVES.backend.as_pointer())
        builder.store(vector, place, align=2)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, HALVES), generate


@intrinsic
def load_widened(context: Any, address: Any, k: Any) -> Any:
    """Numbers [k, k + LANES) of the bfloat16 at ``address``, as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.bitcast(pointer_to(builder, I16, *arguments), HALVES.backend.as_pointer())
        bits = builder.shl(builder.zext(builder.load(place, align=2), INTEGERS.backend), _each(16))
        return builder.bitcast(bits, FLOATS.backend)

    return FLOATS(types.int64, types.int64), generate


@intrinsic
def nibble_values(context: Any) -> Any:
    """-8.0 to 7.0, where there are so many lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(FLOATS.backend, [n % 16 - 8.0 for n in range(LANES)])

    return FLOATS(), generate


def _look_up(builder: Any, arguments: Any, shift: int) -> Any:
    table, address, k = arguments
    place = builder.bitcast(pointer_to(builder, I8, address, k), ir.VectorType(I8, LANES).as_pointer())
    values = builder.zext(builder.load(place, align=1), HALVES.backend)
    values = builder.lshr(values, ir.Constant(HALVES.backend, [shift] * LANES))
    kind = ir.FunctionType(HALVES.backend, [HALVES.backend, HALVES.backend])
    function = builder.module.declare_intrinsic("llvm.x86.avx512.permvar.hi.256", fnty=kind)
    return builder.call(function, [table, values])  # which looks at the lowest four bits


@intrinsic
def of_low_nibbles(context: Any, table: Any, address: Any, k: Any) -> Any:
    """What a table of 16 numbers has for bits 0 to 3 of bytes [k, k + LANES) at ``address``; `BY_TABLE` only."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _look_up(builder, arguments, 0)

    return HALVES(HALVES, types.int64, types.int64), generate


@intrinsic
def of_high_nibbles(context: Any, table: Any, address: Any, k: Any) -> Any:
    """The same for bits 4 to 7."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _look_up(builder, arguments, 4)

    return HALVES(HALVES, types.int64, types.int64), generate


@intrinsic
def upper_halves(context: Any, a: Any, b: Any) -> Any:
    """The upper two bytes of each float32, of ``a`` and then of ``b``: bfloat16, exact where the numbers are."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        parts = ir.VectorType(I16, 2 * LANES)
        a, b = (builder.bitcast(values, parts) for values in arguments)
        upper = ir.Constant(ir.VectorType(I32, 2 * LANES), list(range(1, 4 * LANES, 2)))
        return builder.bitcast(builder.shuffle_vector(a, b, upper), INTEGERS.backend)

    return INTEGERS(FLOATS, FLOATS), generate


@intrinsic
def dot_halves(context: Any, a: Any, b: Any, sums: Any) -> Any:
    """Each lane of ``sums`` plus the products of the two bfloat16 in that lane of ``a`` and ``b``; `DOT_HALVES` only.

    Sums are float32, rounded to the nearest, ties to even. A denormal (below 1.2e-38), read or made, is taken for zero,
    so that with an infinite number it gives NaN and not infinity.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b, sums = arguments
        kind = ir.FunctionType(FLOATS.backend, [FLOATS.backend, INTEGERS.backend, INTEGERS.backend])
        function = builder.module.declare_intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", fnty=kind)
        return builder.call(function, [sums, a, b])

    return FLOATS(INTEGERS, INTEGERS, FLOATS), generate
