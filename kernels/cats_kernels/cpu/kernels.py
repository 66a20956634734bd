"""Numba code of the CPU kernels: float32 and bfloat16 weights, 1 to 8 rows of x, float32 accumulation.

How four weight rows are multiplied, and added, is in `plain`, and for quantised ones in `quantized`.

"Deciding" is the product that is compared with the threshold, of the weight that is read whole; "other" the second one,
of the weight that is read for kept neurons only. The activation belongs to the gate's product, whichever that is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange, types
from numba.extending import intrinsic, overload

from cats_kernels.cpu.compiling import Array, jit
from cats_kernels.cpu.plain import COLUMNS, plain_adds, plain_dots

BLOCK = 256
"""Neurons a thread takes at a time. Each block has its own partial sum, so results depend neither on the number of
threads nor on which thread took which block."""


@intrinsic
def fetch_add(context: Any, counter: Any, amount: Any) -> Any:
    """``counter[0] += amount`` atomically (both int64), returning the old value."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, arguments[1], "monotonic")

    return types.int64(counter, types.int64), generate


def dots(weight: Any, i: Array, x: Array, s: Array) -> None:
    """``s[r, j] = x[r] . weight[i[j]]`` for a multiple of four listed weight rows and every row of x; a weight of any
    kind."""
    raise NotImplementedError


def adds(weight: Any, i: Array, h: Array, y: Array) -> None:
    """``y[r] += sum over q of h[r, q] weight[i[q]]`` for four weight rows and every row of y; a weight of any kind.
    i[4:8], where there are so many, are the rows that follow."""
    raise NotImplementedError


def many_adds(weight: Any, i: Array, h: Array, n: int, y: Array) -> int:
    """`adds` of neurons i[:n] at once, or as many of them as this kind of weight takes so; how many. n is a multiple of
    four, h (rows, n)."""
    raise NotImplementedError


def neurons(weight: Any) -> int:
    """Rows of a weight of any kind."""
    raise NotImplementedError


def scratch_size(weight: Any) -> int:
    """How many float32 of memory one thread needs for reading it."""
    raise NotImplementedError


def with_scratch(weight: Any, memory: Array) -> Any:
    """The weight with such memory."""
    raise NotImplementedError


@overload(dots, strict=False)
def _dots(weight: Any, i: Any, x: Any, s: Any) -> Any:
    return (lambda weight, i, x, s: plain_dots(weight, i, x, s)) if isinstance(weight, types.Array) else None


@overload(adds, strict=False)
def _adds(weight: Any, i: Any, h: Any, y: Any) -> Any:
    return (lambda weight, i, h, y: plain_adds(weight, i, h, y)) if isinstance(weight, types.Array) else None


@overload(many_adds, strict=False)
def _many_adds(weight: Any, i: Any, h: Any, n: Any, y: Any) -> Any:
    return (lambda weight, i, h, n, y: 0) if isinstance(weight, types.Array) else None


@overload(neurons, strict=False)
def _neurons(weight: Any) -> Any:
    return (lambda weight: weight.shape[0]) if isinstance(weight, types.Array) else None


@overload(scratch_size, strict=False)
def _scratch_size(weight: Any) -> Any:
    return (lambda weight: 0) if isinstance(weight, types.Array) else None


@overload(with_scratch, strict=False)
def _with_scratch(weight: Any, memory: Any) -> Any:
    return (lambda weight, memory: weight) if isinstance(weight, types.Array) else None


@jit()
def activate(s: Any, gelu: bool) -> Any:
    """SiLU, or tanh-GELU as s * sigmoid(2 t): 1 + tanh(t) would cancel where t is negative."""
    z = s
    if gelu:
        z = np.float32(1.5957691216057308) * (s + np.float32(0.044715) * s * s * s)
    return s / (np.float32(1) + np.exp(-z))


@jit()
def deciding_rows(
    x: Array,
    weight: Any,
    thresholds: Array,
    gelu: bool,
    up_decides: bool,
    first: int,
    last: int,
    index: Array,
    value: Array,
    keep: Array,
) -> int:
    """Deciding products of neurons [first, last); those that any row keeps are listed in index, value and keep.

    x (rows, d), weight (m, d), thresholds (1,) or (m,); index (n,), value and keep (rows, n) with room for four more
    neurons than [first, last). Returns how many were listed. The lists are padded to a multiple of four with repeats
    that no row keeps.
    """
    step = 0 if thresholds.size == 1 else 1
    count = last - first
    padded = count + -count % 4
    for j in range(padded):
        index[j] = min(first + j, last - 1)
    dots(weight, index[:padded], x, value[:, :padded])
    n = 0  # at most j, so that the lists may replace the products
    for j in range(count):
        threshold = thresholds[step * (first + j)]
        wanted = False
        for r in range(x.shape[0]):
            v = value[r, j] if up_decides else activate(value[r, j], gelu)
            kept = not (abs(v) < threshold)  # so that NaN is kept
            value[r, n] = v
            keep[r, n] = kept
            wanted |= kept
        index[n] = first + j
        n += wanted
    for j in range(n, n + -n % 4):
        index[j] = index[n - 1]
        keep[:, j] = False
    return n


@jit()
def other_rows(
    x: Array, weight: Any, gelu: bool, up_decides: bool, index: Array, value: Array, keep: Array, n: int
) -> None:
    """``value *= x weight[index]`` (its activation, where up decides) where kept, else 0, for the first n listed
    neurons (padded to a multiple of four)."""
    padded = n + -n % 4
    s = np.empty((x.shape[0], padded), np.float32)
    dots(weight, index[:padded], x, s)
    for r in range(x.shape[0]):
        for j in range(padded):
            if keep[r, j]:
                value[r, j] *= activate(s[r, j], gelu) if up_decides else s[r, j]
            else:
                value[r, j] = np.float32(0)


@jit()
def down_rows(value: Array, down: Any, index: Array, n: int, y: Array) -> None:
    """``y += value down[index]`` for the first n listed neurons (padded to a multiple of four)."""
    padded = n + -n % 4
    for j in range(many_adds(down, index, value, padded, y), padded, 4):
        adds(down, index[j : min(j + 8, padded)], value[:, j : j + 4], y)


@jit()
def mlp_block(
    x: Array,
    deciding: Any,
    other: Any,
    down: Any,
    thresholds: Array,
    gelu: bool,
    up_decides: bool,
    first: int,
    last: int,
    y: Array,
) -> None:
    """The whole MLP of neurons [first, last), into y (rows, d)."""
    rows = x.shape[0]
    index = np.empty(last - first + 4, np.int64)
    value = np.empty((rows, last - first + 4), np.float32)
    keep = np.empty((rows, last - first + 4), np.bool_)
    y[:] = 0
    n = deciding_rows(x, deciding, thresholds, gelu, up_decides, first, last, index, value, keep)
    if n:
        other_rows(x, other, gelu, up_decides, index, value, keep, n)
        down_rows(value, down, index, n, y)


@jit()
def take_blocks(
    counter: Array,
    x: Array,
    deciding: Any,
    other: Any,
    down: Any,
    thresholds: Array,
    gelu: bool,
    up_decides: bool,
    partial: Array,
) -> None:
    """Take blocks of neurons by the shared counter (1,) until none is left, each into its partial[block] (rows, d)."""
    m = neurons(deciding)
    memory = np.empty(max(scratch_size(deciding), scratch_size(other), scratch_size(down)), np.float32)
    deciding, other, down = with_scratch(deciding, memory), with_scratch(other, memory), with_scratch(down, memory)
    while True:
        block = fetch_add(counter, 1)  # type: ignore[call-arg,var-annotated]
        if block >= partial.shape[0]:
            break
        first, last = block * BLOCK, min(m, (block + 1) * BLOCK)
        mlp_block(x, deciding, other, down, thresholds, gelu, up_decides, first, last, partial[block])
    memory[:] = 0  # used so long, since nothing in the weights keeps it alive


@jit()
def add_partial(partial: Array, chunk: int, y: Array) -> None:
    """``y = partial.sum(0)`` in one chunk of columns, in one order whatever the number of threads."""
    first, last = chunk * COLUMNS, min(y.shape[1], (chunk + 1) * COLUMNS)
    for r in range(y.shape[0]):
        out = y[r, first:last]
        out[:] = 0
        for block in range(partial.shape[0]):
            part = partial[block, r, first:last]
            for k in range(part.size):
                out[k] += part[k]


@jit(nogil=True)
def add_all_partial(partial: Array, y: Array) -> None:
    """``y = partial.sum(0)`` on the calling thread."""
    for chunk in range((y.shape[1] + COLUMNS - 1) // COLUMNS):
        add_partial(partial, chunk, y)


@jit(parallel=True, nogil=True)
def parallel_kernel(
    x: Array,
    deciding: Any,
    other: Any,
    down: Any,
    thresholds: Array,
    gelu: bool,
    up_decides: bool,
    y: Array,
    threads: int,
) -> None:
    """y = the sparse gated MLP of x; x, y (rows, d) float32; weights (m, d) float32, or uint16 for bfloat16; thresholds
    (1,) or (m,) float32.

    One parallel region does all three products: a block's active neurons are known as soon as its own deciding rows are
    read, so there is neither a barrier between the products nor a global list of indices.
    """
    blocks = (neurons(deciding) + BLOCK - 1) // BLOCK
    partial = np.empty((blocks, x.shape[0], x.shape[1]), np.float32)
    counter = np.zeros(1, np.int64)
    for _ in prange(threads):
        take_blocks(counter, x, deciding, other, down, thresholds, gelu, up_decides, partial)
    for chunk in prange((y.shape[1] + COLUMNS - 1) // COLUMNS):
        add_partial(partial, chunk, y)


@jit(nogil=True)
def serial_kernel(
    x: Array,
    deciding: Any,
    other: Any,
    down: Any,
    thresholds: Array,
    gelu: bool,
    up_decides: bool,
    y: Array,
) -> None:
    """The same on the calling thread alone, to the last bit. (A function of its own: numba's cache would confuse two
    compilations of one.)"""
    blocks = (neurons(deciding) + BLOCK - 1) // BLOCK
    partial = np.empty((blocks, x.shape[0], x.shape[1]), np.float32)
    counter = np.zeros(1, np.int64)
    take_blocks(counter, x, deciding, other, down, thresholds, gelu, up_decides, partial)
    add_all_partial(partial, y)
