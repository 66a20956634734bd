"""Between the products of many rows of x: what neurons give, of products rounded to bfloat16, masked as in float32.

A product that is so close to its threshold that rounding may have moved it across is computed anew in float32, from the
packed weight.
"""

# mypy: disable-error-code="call-arg, type-var"
# (numba's stubs describe other signatures than those of compiled code)
from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from cats_kernels.cpu.addressed import pointer
from cats_kernels.cpu.compiling import Array, jit
from cats_kernels.cpu.dequantise import on_threads, write_row
from cats_kernels.cpu.halves import rounded_bits
from cats_kernels.cpu.kernels import activate, fetch_add
from cats_kernels.cpu.packed import FIELDS, FLOAT32, from_numbers
from cats_kernels.cpu.plain import widen
from cats_kernels.cpu.quantized_launch import pack
from cats_kernels.cpu.team import compiled_member
from cats_kernels.cpu.vectors import LANES, float_at, load, multiply_add, plus, splat, total
from cats_kernels.quantized import QuantizedWeight

ROUNDED = np.float32(2.0**-8)
"""Largest relative error of a number rounded to bfloat16."""
STEEPEST = np.float32(1.13)
"""Largest slope of the activations (tanh-GELU's)."""
TIMES = 0.75
"""Times `ROUNDED`, the norm of x and the largest weight of a row is how far rounded weights may move a product. Errors
of single terms are of either sign, with a standard deviation of about 0.42 of `ROUNDED` and the term. That of their sum
is about a fifth of what is allowed here where weights are normal: the largest of many is 2.6 times their root mean
square or more."""
NEURONS = 16
"""That a thread takes at a time."""

PRODUCTS, DECIDING, OTHER, MARKS, X, NORMS, LARGEST, THRESHOLDS, MEMORY, COUNTERS, ROWS, GELU, UP_DECIDES = range(
    FIELDS, FIELDS + 13
)
CALL = FIELDS + 13
"""Numbers of a call after those of the weight that decides: addresses of all arrays of `neurons`, of a row of float32
for each thread, and of counters; rows of x; the options."""


@jit()
def silu_slope(product: Any, value: Any, moved: Any) -> Any:
    """Bound of the slope of SiLU within ``moved`` of a product; ``value`` is its SiLU, both are rounded to bfloat16.

    The slope is sigmoid (1 + product (1 - sigmoid)), which changes by half of ``moved`` at most.
    """
    sigmoid = value / product if product != 0 else np.float32(0.5)
    rounded = np.float32(0.02) * (np.float32(1) + abs(value))
    return abs(sigmoid + value * (np.float32(1) - sigmoid)) + np.float32(0.5) * moved + rounded


@jit()
def mask_row(
    products: Array, deciding: Array, other: Array, marks: Array, reach: Any, largest: Array, limits: Array, silu: bool
) -> None:
    """`neurons` for one row, but for those that are marked."""
    for j in range(other.size):
        product, value, limit = widen(products[j]), widen(deciding[j]), limits[j]
        size = abs(value)
        moved = reach * largest[j] + ROUNDED * abs(product)
        slope = min(STEEPEST, silu_slope(product, value, moved)) if silu else STEEPEST
        mark = (limit > 0) & (abs(size - limit) <= slope * moved + ROUNDED * size)
        given = value * widen(other[j])
        given = np.float32(0) if size < limit else given
        marks[j] = mark
        other[j] = other[j] if mark else rounded_bits(given)


def mask_rows(address: Any) -> None:
    """What each thread does: take a row until none is left. ``address``: of the numbers of a call."""
    data = carray(address, (CALL,), np.int64)
    rows, m = data[ROWS], from_numbers(data, 0, 0, 0, 0).m
    products = carray(pointer(data[PRODUCTS]), (rows, m), np.uint16)
    deciding = carray(pointer(data[DECIDING]), (rows, m), np.uint16)
    other = carray(pointer(data[OTHER]), (rows, m), np.uint16)
    marks = carray(pointer(data[MARKS]), (rows, m), np.uint8)
    norms = carray(pointer(data[NORMS]), (rows,), np.float32)
    largest = carray(pointer(data[LARGEST]), (m,), np.float32)
    limits = carray(pointer(data[THRESHOLDS]), (m,), np.float32)
    counter = carray(pointer(data[COUNTERS]), (1,), np.int64)
    silu = not (data[GELU] or data[UP_DECIDES])
    while True:
        r = fetch_add(counter, 1)
        if r >= rows:
            break
        mask_row(products[r], deciding[r], other[r], marks[r], norms[r], largest, limits, silu)


def settle_neurons(address: Any) -> None:
    """What each thread does afterwards: take some neurons until none is left, and compute those that are marked."""
    data = carray(address, (CALL,), np.int64)
    weight, rows = from_numbers(data, 0, 0, 0, 0), data[ROWS]
    m, d = weight.m, weight.d
    other = carray(pointer(data[OTHER]), (rows, m), np.uint16)
    marks = carray(pointer(data[MARKS]), (rows, m), np.uint8)
    limits = carray(pointer(data[THRESHOLDS]), (m,), np.float32)
    counters = carray(pointer(data[COUNTERS]), (3,), np.int64)
    memory = data[MEMORY] + 4 * d * fetch_add(counters[2:], 1)
    while True:
        first = fetch_add(counters[1:], 1) * NEURONS
        if first >= m:
            break
        for j in range(first, min(m, first + NEURONS)):
            written = False
            for r in range(rows):
                if marks[r, j]:
                    if not written:
                        write_row(weight, j, memory, FLOAT32)
                        written = True
                    value = inner_product(memory, data[X] + 4 * d * r, d)
                    if not data[UP_DECIDES]:
                        value = activate(value, data[GELU] != 0)
                    given = np.float32(0) if abs(value) < limits[j] else value * widen(other[r, j])
                    other[r, j] = rounded_bits(given)


@jit()
def inner_product(a: int, b: int, n: int) -> Any:
    """Of n float32 at two addresses."""
    s0, s1, s2, s3 = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    whole = n // (4 * LANES) * (4 * LANES)
    for k in range(0, whole, 4 * LANES):
        s0 = multiply_add(load(a, k), load(b, k), s0)
        s1 = multiply_add(load(a, k + LANES), load(b, k + LANES), s1)
        s2 = multiply_add(load(a, k + 2 * LANES), load(b, k + 2 * LANES), s2)
        s3 = multiply_add(load(a, k + 3 * LANES), load(b, k + 3 * LANES), s3)
    rest = np.float32(0)
    for k in range(whole, n):
        rest += float_at(a, k) * float_at(b, k)
    return total(plus(plus(s0, s1), plus(s2, s3))) + rest


@cache
def members() -> tuple[Any, Any]:
    """`mask_rows` and `settle_neurons` compiled."""
    return compiled_member(mask_rows), compiled_member(settle_neurons)


def neurons(
    weight: QuantizedWeight,
    x: Tensor,
    norms: Tensor,
    products: Tensor,
    deciding: Tensor,
    other: Tensor,
    thresholds: Tensor,
    gelu: bool,
    up_decides: bool,
) -> Tensor:
    """The deciding times the other number of each neuron (rows, m) where the first is kept, else 0; all contiguous.

    Args:
        weight: that decides, (m, d).
        x, norms: (rows, d) and the norm of each row, float32.
        products: of x and ``weight``, bfloat16 (rows, m).
        deciding: the same, or their activation where the gate decides.
        other: what is multiplied with it, bfloat16 (rows, m); overwritten by the result.
        thresholds: (m,), float32.
        gelu, up_decides: the options of the kernel.
    """
    m, d = weight.shape
    largest = weight.scales.float().abs() * 2 ** (weight.bits - 1)
    if weight.zeros is not None:
        largest += weight.zeros.float().abs()
    largest = largest.amax(1)
    reach = norms * (TIMES * float(ROUNDED))
    marks = torch.empty(len(x), m, dtype=torch.uint8, device=x.device)
    memory = torch.empty(max(1, torch.get_num_threads()), d, dtype=torch.float32, device=x.device)
    counters = np.zeros(3, np.int64)  # rows taken, blocks of neurons taken, threads at work
    tensors = products, deciding, other, marks, x, reach, largest, thresholds, memory
    addresses = [tensor.data_ptr() for tensor in tensors]
    numbers = [*pack(weight, torch.float32), *addresses, counters.ctypes.data, len(x), gelu, up_decides]
    data = np.array(numbers, np.int64)
    for member in members():
        on_threads(member.address, data, m * d)
    return other
