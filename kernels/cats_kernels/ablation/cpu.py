"""The kernels of Figure 6 on the CPU, for comparison with ours: same signature, same inner loops, other structure.

"gather": not fused; torch finds the kept neurons' indices, copies their rows of the weights, and multiplies.
"fused-compact" (Algorithm 2): gate activations compacted into one global list with atomics; then up, then down over it.
"fused-mask" (Algorithms 1 and 3): gate activations and a mask; then up, then down, each neuron looking at its own mask.
"cats": ours, one parallel region that compacts within a block of neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import prange
from torch import Tensor

from cats_kernels import dispatch
from cats_kernels.ablation import check_paper
from cats_kernels.cpu.compiling import Array, jit
from cats_kernels.cpu.kernels import BLOCK, activate, deciding_rows, dots, down_rows, fetch_add, other_rows
from cats_kernels.cpu.launch import as_array, as_thresholds
from cats_kernels.cpu.plain import widen
from cats_kernels.cpu.threads import parallel_region, threads_for
from cats_kernels.reference import gate_activation

CHUNK = 64
"""Listed neurons a thread takes at a time; a multiple of four."""


@jit(parallel=True)
def _compact_gate(
    x: Array, gate: Array, thresholds: Array, gelu: bool, index: Array, value: Array, keep: Array, count: Array
) -> None:
    m = gate.shape[0]
    for block in prange((m + BLOCK - 1) // BLOCK):
        first, last = block * BLOCK, min(m, (block + 1) * BLOCK)
        local_index = np.empty(BLOCK + 4, np.int64)
        local_value = np.empty((x.shape[0], BLOCK + 4), np.float32)
        local_keep = np.empty((x.shape[0], BLOCK + 4), np.bool_)
        n = deciding_rows(x, gate, thresholds, gelu, False, first, last, local_index, local_value, local_keep)
        at = fetch_add(count, n)  # type: ignore[call-arg,var-annotated]
        index[at : at + n] = local_index[:n]
        value[:, at : at + n] = local_value[:, :n]
        keep[:, at : at + n] = local_keep[:, :n]


@jit(parallel=True)
def _compact_up(x: Array, up: Array, index: Array, value: Array, keep: Array, n: int) -> None:
    for chunk in prange((n + CHUNK - 1) // CHUNK):
        a, b = chunk * CHUNK, min(n, (chunk + 1) * CHUNK)
        other_rows(x, up, False, False, index[a:b], value[:, a:b], keep[:, a:b], b - a)


@jit(parallel=True)
def _compact_down(value: Array, down: Array, index: Array, n: int, partial: Array) -> None:
    for chunk in prange((n + CHUNK - 1) // CHUNK):
        a, b = chunk * CHUNK, min(n, (chunk + 1) * CHUNK)
        down_rows(value[:, a:b], down, index[a:b], b - a, partial[chunk])


@jit(parallel=True)
def _mask_gate(x: Array, gate: Array, threshold: float, gelu: bool, value: Array, keep: Array) -> None:
    m = gate.shape[0]
    for group in prange((m + 3) // 4):
        s = np.empty((x.shape[0], 4), np.float32)
        four = np.minimum(4 * group + np.arange(4), m - 1)
        dots(gate, four, x, s)
        for r in range(x.shape[0]):
            for q in range(min(4, m - 4 * group)):
                v = activate(s[r, q], gelu)
                value[r, 4 * group + q] = v
                keep[r, 4 * group + q] = not (abs(v) < threshold)


@jit()
def _dot(a: Array, x: Array) -> Any:
    s = np.float32(0)
    for k in range(x.size):
        s += widen(a[k]) * x[k]
    return s


@jit()
def _add(a: Array, h: Any, y: Array) -> None:
    for k in range(y.size):
        y[k] += h * widen(a[k])


@jit(parallel=True)
def _mask_up(x: Array, up: Array, value: Array, keep: Array) -> None:
    for j in prange(up.shape[0]):
        for r in range(x.shape[0]):
            if keep[r, j]:
                value[r, j] *= _dot(up[j], x[r])


@jit(parallel=True)
def _mask_down(value: Array, keep: Array, down: Array, partial: Array) -> None:
    m = down.shape[0]
    for block in prange((m + BLOCK - 1) // BLOCK):
        for j in range(block * BLOCK, min(m, (block + 1) * BLOCK)):
            for r in range(partial.shape[1]):
                if keep[r, j]:
                    _add(down[j], value[r, j], partial[block, r])


def fused_compact(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: float,
    activation: str = "silu",
    decider: str = "gate",
) -> Tensor:
    """Algorithm 2: three parallel regions around one global list of indices. Arguments as ``sparse_gated_mlp_cpu``,
    with a number as threshold and the gate deciding.

    The order of the list, and so the rounding of the sum, changes from run to run.
    """
    check_paper(threshold, decider)
    gate_activation(activation)
    rows, d = x.shape
    m = gate_weight.shape[0]
    inputs = as_array(x.float())
    index, count = np.empty(m + 4, np.int64), np.zeros(1, np.int64)
    value, keep = np.empty((rows, m + 4), np.float32), np.zeros((rows, m + 4), np.bool_)
    gelu = activation == "gelu_tanh"
    with parallel_region(threads_for(3 * gate_weight.numel())):
        _compact_gate(inputs, as_array(gate_weight), as_thresholds(threshold), gelu, index, value, keep, count)
        n = int(count[0])
        padded = n + -n % 4  # the rest of keep is False
        index[n:padded] = index[n - 1]
        _compact_up(inputs, as_array(up_weight), index, value, keep, padded)
        partial = torch.zeros(-(-padded // CHUNK), rows, d)
        _compact_down(value, as_array(down_weight_t), index, padded, as_array(partial))
    return partial.sum(0).to(x.dtype)


def fused_mask(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: float,
    activation: str = "silu",
    decider: str = "gate",
) -> Tensor:
    """Algorithms 1 and 3: three parallel regions and a mask. Arguments as ``fused_compact``."""
    check_paper(threshold, decider)
    gate_activation(activation)
    rows, d = x.shape
    m = gate_weight.shape[0]
    inputs = as_array(x.float())
    value, keep = np.empty((rows, m), np.float32), np.empty((rows, m), np.bool_)
    partial = torch.zeros(-(-m // BLOCK), rows, d)
    with parallel_region(threads_for(3 * gate_weight.numel())):
        _mask_gate(inputs, as_array(gate_weight), np.float32(threshold), activation == "gelu_tanh", value, keep)
        _mask_up(inputs, as_array(up_weight), value, keep)
        _mask_down(value, keep, as_array(down_weight_t), as_array(partial))
    return partial.sum(0).to(x.dtype)


def gather(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: float,
    activation: str = "silu",
    decider: str = "gate",
) -> Tensor:
    """Not fused: indices of the kept neurons, copies of their weights, dense products. Arguments as the others'."""
    check_paper(threshold, decider)
    gate = gate_activation(activation)(F.linear(x, gate_weight))
    keep = ~(gate.float().abs() < threshold)
    index = keep.any(0).nonzero().squeeze(1)
    up = F.linear(x, up_weight.index_select(0, index))
    hidden = torch.where(keep.index_select(1, index), gate.index_select(1, index) * up, 0)
    return hidden @ down_weight_t.index_select(0, index)


VARIANTS: dict[str, Callable[..., Tensor]] = {
    "gather": gather,
    "fused-compact": fused_compact,
    "fused-mask": fused_mask,
    "cats": partial(dispatch.compute, "cpu"),
}
"""The kernels of Figure 6 and ours ("cats", any number of rows by its fastest path), by name."""
