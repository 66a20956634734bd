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
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, types

from cats_kernels.cpu.kernels import BLOCK, FASTMATH, Array, add_all_partial, fetch_add, jit, take_blocks

Region = Callable[[int, int, int, int], None]


@cache
def open_region() -> Region | None:
    """``GOMP_parallel(function, data, threads, 0)`` of the OpenMP runtime that torch is linked to, or None."""
    if os.environ.get("NUMBA_THREADING_LAYER") or not torch.backends.openmp.is_available():
        return None
    try:  # looked up in torch's library, so in the one of several runtimes that torch itself calls
        found = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    found.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    found.restype = None
    return found  # type: ignore[no-any-return]


@jit()
def join(pointers: Any, sizes: Array, deciding: Array, other: Array, down: Array) -> None:
    """What each thread of the team does: take blocks until none is left."""
    rows, d, blocks = sizes[0], sizes[1], sizes[3]
    x = carray(pointers[0], (rows, d), np.float32)
    thresholds = carray(pointers[4], (sizes[4],), np.float32)
    partial = carray(pointers[5], (blocks, rows, d), np.float32)
    counters = carray(pointers[6], (2,), np.int64)
    fetch_add(counters[1:], 1)  # type: ignore[call-arg]
    take_blocks(counters[:1], x, deciding, other, down, thresholds, sizes[5] != 0, sizes[6] != 0, partial)
    fetch_add(counters[1:], -1)  # type: ignore[call-arg]


def join_float32(pointers: Any) -> None:
    sizes = carray(pointers[7], (7,), np.int64)
    shape = (sizes[2], sizes[1])
    deciding = carray(pointers[1], shape, np.float32)
    join(pointers, sizes, deciding, carray(pointers[2], shape, np.float32), carray(pointers[3], shape, np.float32))


def join_bfloat16(pointers: Any) -> None:
    sizes = carray(pointers[7], (7,), np.int64)
    shape = (sizes[2], sizes[1])
    deciding = carray(pointers[1], shape, np.uint16)
    join(pointers, sizes, deciding, carray(pointers[2], shape, np.uint16), carray(pointers[3], shape, np.uint16))


@cache
def _address(bfloat16: bool) -> int:
    """Of the compiled function that a team's threads call with the array of pointers."""
    signature, function = types.void(types.CPointer(types.voidptr)), join_bfloat16 if bfloat16 else join_float32
    try:
        return int(cfunc(signature, cache=True, fastmath=FASTMATH)(function).address)
    except RuntimeError:  # numba can write no cache
        return int(cfunc(signature, fastmath=FASTMATH)(function).address)


def team_kernel(
    region: Region,
    x: Array,
    deciding: Array,
    other: Array,
    down: Array,
    thresholds: Array,
    gelu: bool,
    up_decides: bool,
    y: Array,
    threads: int,
) -> None:
    """As `cats_kernels.cpu.kernels.parallel_kernel`, to the last bit, in ``region`` of `open_region`.

    Raises:
        MemoryError: a thread of the team could not allocate its lists of neurons.
    """
    m, d = deciding.shape
    partial = np.empty(((m + BLOCK - 1) // BLOCK, *x.shape), np.float32)
    counters = np.zeros(2, np.int64)  # blocks taken; threads that have not come to their end
    sizes = np.array([len(x), d, m, len(partial), thresholds.size, gelu, up_decides], np.int64)
    arrays = (x, deciding, other, down, thresholds, partial, counters, sizes)
    pointers = np.array([array.ctypes.data for array in arrays], np.uintp)
    region(_address(deciding.dtype == np.uint16), pointers.ctypes.data, threads, 0)
    if counters[1]:
        raise MemoryError("the CPU kernel had no memory for its lists of active neurons")
    add_all_partial(partial, y)
