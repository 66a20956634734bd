"""Vectors of float32 as values of numba code, and memory by address, for loops that numba's arrays do not serve.

LLVM's own vectoriser adds up the lanes at the end of every inner loop, and a row of groups, each with its own scale,
has a short one for each; here a vector is a variable that lives through all of them. And an array that is passed to a
function, or taken from a tuple, has its references counted, which took as long as the product of four int4 rows (d =
4096); an address is a number. Exists in compiled code only; no function checks a bound, and all memory is the caller's.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import config, extending, types
from numba.core.datamodel import models


def features() -> dict[str, bool]:
    """What the processor has, or what NUMBA_CPU_FEATURES says that it has, as ``-avx512f,+avx2``."""
    chosen = config.CPU_FEATURES  # type: ignore[attr-defined]
    if chosen is None:
        return dict(get_host_cpu_features())
    return {name[1:]: name[0] == "+" for name in chosen.split(",") if name}


LANES = 16 if features().get("avx512f") else 8
FAST = ("contract", "nsz", "reassoc")
I8, I16, I32, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()


def intrinsic(function: Any) -> Any:
    """Numba's, for type checkers: compiled code calls it without the context."""
    return extending.intrinsic(function)


class _Vector(types.Type):
    """Numba's type of ``LANES`` numbers."""

    def __init__(self, name: str, element: ir.Type) -> None:
        self.backend = ir.VectorType(element, LANES)
        super().__init__(name)


class _Floats(_Vector):
    pass


class _Integers(_Vector):
    pass


@extending.register_model(_Floats)
@extending.register_model(_Integers)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: _Vector) -> None:
        super().__init__(manager, kind, kind.backend)


FLOATS, INTEGERS = _Floats("floats", F32), _Integers("integers", I32)


def pointer_to(builder: Any, element: ir.Type, address: Any, k: Any) -> Any:
    """Pointer to element ``k`` of those at ``address``."""
    return builder.gep(builder.inttoptr(address, element.as_pointer()), [k])


def _vector(builder: Any, element: ir.Type, address: Any, k: Any) -> Any:
    """Pointer to the vector that begins there."""
    return builder.bitcast(pointer_to(builder, element, address, k), ir.VectorType(element, LANES).as_pointer())


@intrinsic
def address_of(context: Any, array: Any) -> Any:
    """Where an array's data begin, which it keeps alive no longer than it is used itself."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.ptrtoint(data, ir.IntType(64))

    return types.int64(array), generate


@intrinsic
def float_at(context: Any, address: Any, k: Any) -> Any:
    """Number ``k`` of the float32 at ``address``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(pointer_to(builder, F32, *arguments), align=4)

    return types.float32(types.int64, types.int64), generate


@intrinsic
def set_float(context: Any, address: Any, k: Any, value: Any) -> Any:
    """Write number ``k`` of the float32 at ``address``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, k, number = arguments
        builder.store(number, pointer_to(builder, F32, address, k), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@intrinsic
def half_at(context: Any, address: Any, k: Any) -> Any:
    """Number ``k`` of the uint16 at ``address``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(pointer_to(builder, I16, *arguments), align=2)

    return types.uint16(types.int64, types.int64), generate


@intrinsic
def byte_at(context: Any, address: Any, k: Any) -> Any:
    """Byte ``k`` at ``address``, 0 to 255."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(pointer_to(builder, I8, *arguments), align=1)

    return types.uint8(types.int64, types.int64), generate


def _prefetch(locality: int) -> Any:
    """What writes a prefetch for reading: 3 into every cache, 2 into all but the first."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        options = [ir.Constant(I32, value) for value in (0, locality, 1)]  # for reading, data
        builder.call(function, [builder.inttoptr(arguments[0], pointer), *options])
        return context.get_dummy_value()

    return generate


@intrinsic
def prefetch(context: Any, address: Any) -> Any:
    """Ask for the cache line at ``address``, which need not be the program's."""
    return types.void(types.int64), _prefetch(3)


@intrinsic
def prefetch_second(context: Any, address: Any) -> Any:
    """The same into the second-level cache, for what the first has no room for."""
    return types.void(types.int64), _prefetch(2)


@intrinsic
def splat(context: Any, value: Any) -> Any:
    """A float32 in every lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.Constant(FLOATS.backend, ir.Undefined)
        first = builder.insert_element(vector, arguments[0], ir.Constant(I32, 0))
        return builder.shuffle_vector(first, vector, ir.Constant(ir.VectorType(I32, LANES), [0] * LANES))

    return FLOATS(types.float32), generate


@intrinsic
def load(context: Any, address: Any, k: Any) -> Any:
    """Numbers [k, k + LANES) of the float32 at ``address``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_vector(builder, F32, *arguments), align=4)

    return FLOATS(types.int64, types.int64), generate


@intrinsic
def store(context: Any, address: Any, k: Any, value: Any) -> Any:
    """Write numbers [k, k + LANES) of the float32 at ``address``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, k, vector = arguments
        builder.store(vector, _vector(builder, F32, address, k), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, FLOATS), generate


@intrinsic
def load_signed(context: Any, address: Any, k: Any) -> Any:
    """Bytes [k, k + LANES) at ``address``, of two's complement, as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values = builder.load(_vector(builder, I8, *arguments), align=1)
        return builder.sitofp(builder.sext(values, INTEGERS.backend), FLOATS.backend)

    return FLOATS(types.int64, types.int64), generate


@intrinsic
def load_bytes(context: Any, address: Any, k: Any) -> Any:
    """Bytes [k, k + LANES) at ``address``, 0 to 255, as integers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values = builder.load(_vector(builder, I8, *arguments), align=1)
        return builder.zext(values, INTEGERS.backend)

    return INTEGERS(types.int64, types.int64), generate


def _nibbles(builder: Any, values: Any) -> Any:
    """Integers' low four bits, less 8, as float32: by a table in a register, or by arithmetic."""
    if LANES == 16:
        kind = ir.FunctionType(FLOATS.backend, [FLOATS.backend, INTEGERS.backend])
        function = builder.module.declare_intrinsic("llvm.x86.avx512.permvar.sf.512", fnty=kind)
        return builder.call(function, [ir.Constant(FLOATS.backend, [n - 8.0 for n in range(16)]), values])
    low = builder.and_(values, ir.Constant(INTEGERS.backend, [15] * LANES))
    return builder.sitofp(builder.sub(low, ir.Constant(INTEGERS.backend, [8] * LANES)), FLOATS.backend)


@intrinsic
def low_nibbles(context: Any, values: Any) -> Any:
    """Integers' bits 0 to 3, less 8, as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _nibbles(builder, arguments[0])

    return FLOATS(INTEGERS), generate


@intrinsic
def high_nibbles(context: Any, values: Any) -> Any:
    """Bits 4 to 7 of integers from 0 to 255, less 8, as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _nibbles(builder, builder.lshr(arguments[0], ir.Constant(INTEGERS.backend, [4] * LANES)))

    return FLOATS(INTEGERS), generate


@intrinsic
def plus(context: Any, a: Any, b: Any) -> Any:
    """``a + b``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments, flags=FAST)

    return FLOATS(FLOATS, FLOATS), generate


@intrinsic
def times(context: Any, a: Any, b: Any) -> Any:
    """``a * b``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fmul(*arguments, flags=FAST)

    return FLOATS(FLOATS, FLOATS), generate


@intrinsic
def multiply_add(context: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c``, fused where the processor can."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b, c = arguments
        return builder.fadd(builder.fmul(a, b, flags=FAST), c, flags=FAST)

    return FLOATS(FLOATS, FLOATS, FLOATS), generate


@intrinsic
def total(context: Any, values: Any) -> Any:
    """The sum of the lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(F32, [F32, FLOATS.backend])
        name = f"llvm.vector.reduce.fadd.v{LANES}f32"
        function = builder.module.declare_intrinsic(name, fnty=kind)
        return builder.call(function, [ir.Constant(F32, -0.0), arguments[0]], fastmath=FAST)

    return types.float32(FLOATS), generate
