"""Launch of the CPU kernel on quantised weights: `QuantizedWeight` in, their addresses to numba, a tensor out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cats_kernels.cpu.integers import BLOCK_BYTES
from cats_kernels.cpu.launch import as_array, as_thresholds
from cats_kernels.cpu.packed import BFLOAT16, FLOAT16, FLOAT32, PARTS, Packed
from cats_kernels.cpu.quantized_calls import member, run_packed, run_packed_on_numba
from cats_kernels.cpu.team import region_address
from cats_kernels.cpu.threads import parallel_region, threads_for, torch_region
from cats_kernels.quantized import GROUP_SIZES, QuantizedWeight
from cats_kernels.reference import check_decider, gate_activation
from cats_kernels.thresholds import Threshold
from cats_kernels.weights import MAX_ROWS

KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
Weights = tuple[QuantizedWeight, QuantizedWeight, QuantizedWeight]
Call = Callable[[Tensor, int, int], Tensor]
"""y for x, and address and number of thresholds (1,) or (m,), float32."""
MOST_KEPT = 4096
"""Calls, each of three weights and a shape of x."""


def pack(weight: QuantizedWeight, dtype: torch.dtype) -> Packed:
    """The weight's numbers and addresses for x of ``dtype``; valid as long as the weight is."""
    row_bytes = weight.data.shape[1]
    group = weight.group_size if weight.group_size in GROUP_SIZES else BLOCK_BYTES
    columns = BLOCK_BYTES * 8 // weight.bits
    piece = min(group, columns)
    return Packed(
        data=weight.data.data_ptr(),
        scales=weight.scales.data_ptr(),
        zeros=0 if weight.zeros is None else weight.zeros.data_ptr(),
        kind=KINDS[weight.scales.dtype],
        row_bytes=row_bytes,
        row_halves=weight.groups * weight.scales.element_size() // 2,
        bits=weight.bits,
        group=weight.group_size,
        groups=weight.groups,
        m=weight.shape[0],
        d=weight.d,
        parts=PARTS[KINDS[dtype]],
        piece=piece,
        pieces=-(-row_bytes // BLOCK_BYTES) * (columns // piece),
        row=0,
        x=0,
        scratch=0,
    )


def sparse_gated_mlp_quantized_cpu(
    x: Tensor,
    gate_weight: QuantizedWeight,
    up_weight: QuantizedWeight,
    down_weight_t: QuantizedWeight,
    threshold: Threshold,
    activation: str = "silu",
    decider: str = "gate",
) -> Tensor:
    """`sparse_gated_mlp_cpu` on quantised weights (m, d), whose formats may differ; x float32 or bfloat16.

    For one row x is in fixed point where the processor multiplies bytes, see `packed.PARTS`: its error is below that of
    x's dtype.
    """
    gate_activation(activation)
    check_decider(decider)
    thresholds = as_thresholds(threshold)
    call = kept_call(x, gate_weight, up_weight, down_weight_t, activation, decider)
    return call(x, thresholds.ctypes.data, thresholds.size)


def repeated_quantized(
    x: Tensor,
    gate_weight: QuantizedWeight,
    up_weight: QuantizedWeight,
    down_weight_t: QuantizedWeight,
    threshold: Threshold,
    activation: str,
    decider: str,
) -> Callable[[Tensor], Tensor] | None:
    """`sparse_gated_mlp_quantized_cpu` for contiguous x (..., d) of this shape, while weights and threshold keep their
    addresses; None where the threshold is not in memory as the kernel reads it."""
    if isinstance(threshold, Tensor) and not threshold.is_contiguous():
        return None
    call = by_address(x, (gate_weight, up_weight, down_weight_t), activation, decider)
    if isinstance(threshold, Tensor):
        address, count = threshold.data_ptr(), threshold.numel()
        return lambda x: call(x, address, count)
    number = as_thresholds(threshold)
    return lambda x: call(x, number.ctypes.data, 1)


def facts(weight: QuantizedWeight) -> tuple[Any, ...]:
    """All that the kernel knows of a weight: two that agree in it are one to it."""
    data, scales, zeros = weight.tensors
    places = data.data_ptr(), scales.data_ptr(), 0 if zeros is None else zeros.data_ptr()
    return places, data.shape, scales.dtype, weight.bits, weight.group_size, weight.d


_kept: dict[Any, Call] = {}


def kept_call(x: Tensor, gate: QuantizedWeight, up: QuantizedWeight, down: QuantizedWeight, *options: str) -> Call:
    """`by_address`, made once for weights that stay where they are: a model calls it for every token. Few objects are
    looked at, since after a token's weights have been read each of them comes from memory."""
    key = x.shape, x.dtype, options, facts(gate), facts(up), facts(down)
    call = _kept.get(key)
    if call is None:
        if len(_kept) >= MOST_KEPT:
            _kept.clear()
        call = _kept[key] = by_address(x, (gate, up, down), *options)
    return call


def by_address(x: Tensor, weights: Weights, activation: str, decider: str) -> Call:
    """The kernel for x (..., d) of this shape and dtype and weights (gate, up, transposed down) where they are now, of
    which it keeps none alive."""
    gate, up, down = (pack(weight, x.dtype) for weight in weights)
    m, d = weights[0].shape
    rows, dtype, row_bytes = x.numel() // d, x.dtype, d * x.dtype.itemsize
    deciding, other = (gate, up) if decider == "gate" else (up, gate)
    alike = (gate.bits, gate.group) == (up.bits, up.group)
    options = activation == "gelu_tanh", decider == "up", KINDS[dtype], alike
    plan = np.array([*deciding, *other, *down, *options], np.int64)
    chunks = [(i, min(MAX_ROWS, rows - i)) for i in range(0, rows, MAX_ROWS)]
    address, code, region = plan.ctypes.data, member().address, region_address()

    def call(x: Tensor, limits: int, count: int) -> Tensor:
        y = torch.empty(x.shape, dtype=torch.float32, device=x.device)  # whatever torch's defaults are
        first_x, first_y = x.data_ptr(), y.data_ptr()
        threads = threads_for(3 * m * d)
        lost = 0
        for i, n in chunks:
            at = first_x + i * row_bytes
            if threads == 1:
                lost += run_packed(0, code, address, limits, count, at, first_y + 4 * i * d, n, 1)
            elif region is not None:
                with torch_region():
                    lost += run_packed(region, code, address, limits, count, at, first_y + 4 * i * d, n, threads)
            else:
                with parallel_region(threads):
                    lost += run_packed_on_numba(
                        code, plan, limits, count, at, as_array(y.view(-1, d))[i : i + n], threads
                    )
        if lost:
            raise MemoryError("the CPU kernel had no memory for its lists of active neurons")
        return y if dtype == torch.float32 else y.to(dtype)

    return call
