"""The parallel kernel on the threads that torch's own products use.

Numba's OpenMP layer is another runtime than the one in torch's wheel, with threads of its own. Both spin for
milliseconds after a call, so in a model, where torch's products and ours take turns, four threads competed for two
cores: with a busy neighbour a call took longer than the dense MLP. Here the calling thread opens a parallel region in
torch's runtime (``GOMP_parallel``, which GNU's and Intel's libraries have): the thread that is still spinning after
torch's last product is the one that helps. Torch's dense MLP waits for its threads three times, this once.

Where torch has no such runtime, and where NUMBA_THREADING_LAYER asks for one of numba's layers, there is no team.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from cats_kernels.cpu.addressed import pointer
from cats_kernels.cpu.compiling import FASTMATH, Array, follow_sources, jit
from cats_kernels.cpu.kernels import BLOCK, add_all_partial, fetch_add, take_blocks


@cache
def region_address() -> int | None:
    """Of ``GOMP_parallel(function, data, threads, flags)`` in the OpenMP runtime that torch is linked to, or None."""
    if os.environ.get("NUMBA_THREADING_LAYER") or not torch.backends.openmp.is_available():
        return None
    try:  # looked up in torch's library, so in the one of several runtimes that torch itself calls
        function = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


@intrinsic
def open_region(context: Any, region: Any, member: Any, data: Any, threads: Any) -> Any:
    """Call the function at the address ``region`` with two addresses, a number and 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = ir.FunctionType(ir.VoidType(), [byte, byte, number, number])
        called = builder.inttoptr(arguments[0], function.as_pointer())
        addresses = [builder.inttoptr(argument, byte) for argument in arguments[1:3]]
        builder.call(called, [*addresses, builder.trunc(arguments[3], number), ir.Constant(number, 0)])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@jit()
def join(data: Array, deciding: Array, other: Array, down: Array) -> None:
    """What each thread of the team does: take blocks until none is left. data: see `team`."""
    rows, d, m = data[6], data[7], data[8]
    x = carray(pointer(data[0]), (rows, d), np.float32)  # type: ignore[call-arg]
    thresholds = carray(pointer(data[4]), (data[9],), np.float32)
    partial = carray(pointer(data[12]), ((m + BLOCK - 1) // BLOCK, rows, d), np.float32)
    counters = carray(pointer(data[13]), (2,), np.int64)
    fetch_add(counters[1:], 1)
    take_blocks(counters[:1], x, deciding, other, down, thresholds, data[10] != 0, data[11] != 0, partial)
    fetch_add(counters[1:], -1)


def join_float32(address: Any) -> None:
    data = carray(address, (14,), np.int64)
    shape = (data[8], data[7])
    deciding = carray(pointer(data[1]), shape, np.float32)  # type: ignore[call-arg]
    other = carray(pointer(data[2]), shape, np.float32)
    join(data, deciding, other, carray(pointer(data[3]), shape, np.float32))


def join_bfloat16(address: Any) -> None:
    data = carray(address, (14,), np.int64)
    shape = (data[8], data[7])
    deciding = carray(pointer(data[1]), shape, np.uint16)  # type: ignore[call-arg]
    other = carray(pointer(data[2]), shape, np.uint16)
    join(data, deciding, other, carray(pointer(data[3]), shape, np.uint16))


MEMBERS = {torch.float32: join_float32, torch.bfloat16: join_bfloat16}


def compiled_member(function: Callable[[Any], None]) -> Any:
    """A function of an address compiled for a team's threads; its ``address`` is what they call."""
    made = CFunc(function, ((types.voidptr,), types.void), {}, {"fastmath": FASTMATH})
    with suppress(RuntimeError):  # numba can write no cache
        made.enable_caching()
    follow_sources(made).compile()
    return made


@cache
def member(dtype: torch.dtype) -> Any:
    """The compiled function that a team's threads call, for weights of ``dtype``."""
    return compiled_member(MEMBERS[dtype])


@jit(nogil=True)
def team(
    region: int, member: int, x: int, deciding: int, other: int, down: int, thresholds: int, y: int,
    rows: int, d: int, m: int, count: int, gelu: bool, up_decides: bool, threads: int,
) -> int:  # fmt: skip
    """`cats_kernels.cpu.kernels.parallel_kernel` by addresses. How many threads did not come to their end: of 0."""
    partial = np.empty(((m + BLOCK - 1) // BLOCK, rows, d), np.float32)
    counters = np.zeros(2, np.int64)  # blocks taken; threads at work
    data = np.empty(14, np.int64)
    data[0], data[1], data[2], data[3], data[4], data[5] = x, deciding, other, down, thresholds, y
    data[6], data[7], data[8], data[9], data[10], data[11] = rows, d, m, count, gelu, up_decides
    data[12], data[13] = partial.ctypes.data, counters.ctypes.data
    open_region(region, member, data.ctypes.data, threads)  # type: ignore[call-arg]
    data[:] = 0  # used so long, since nothing else keeps it alive
    add_all_partial(partial, carray(pointer(y), (rows, d), np.float32))
    return counters[1]


def team_kernel(dtype: torch.dtype) -> Callable[..., None] | None:
    """The second of `cats_kernels.cpu.addressed.addressed_kernels`, to the last bit, on torch's threads; None where it
    has none that can be called. Hold the lock of `cats_kernels.cpu.threads.torch_region` meanwhile.

    The kernel raises MemoryError where a thread could not allocate its lists of neurons.
    """
    region = region_address()
    if region is None:
        return None

    def call(*arguments: Any) -> None:
        if team(region, member(dtype).address, *arguments):
            raise MemoryError("the CPU kernel had no memory for its lists of active neurons")

    return call
