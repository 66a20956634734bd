"""The paper's kernels in Triton (Figure 6): unfused gather, Algorithm 2 (indices), Algorithms 1 and 3 (mask).

They share device functions, the reduction and, without tensor cores, the down kernel with ours; what differs is what
the paper varies: whether thresholding is fused into the gate product, v into the up product, and whether rows are found
through indices or through the mask. The two that compact do it with an atomic counter as Algorithm 2 does, so the order
of their sums varies between runs.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cats_kernels import dispatch
from cats_kernels.ablation import NAMES, check_paper
from cats_kernels.thresholds import Threshold
from cats_kernels.triton import mlp
from cats_kernels.triton.configs import Config
from cats_kernels.triton.device import activate, add_rows, gated, kept, load_rows, project
from cats_kernels.triton.kernels import down_kernel
from cats_kernels.triton.launch import Call, Launch, cdiv, power_of_2, run
from cats_kernels.triton.mlp import make_call, plan_reduce, sparse_gated_mlp_triton


@triton.jit
def gate_kernel(
    x_ptr,
    gate_ptr,
    v_ptr,  # float32 (ROWS, m)
    mark_ptr,  # int32: MASK a flag per neuron | ATOMIC compacted indices | PLAIN unused
    count_ptr,  # int32 (1,), zeroed: ATOMIC only
    threshold,
    m,
    MARK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    EVEN_M: tl.constexpr,
):
    """v = activation(x W_gate^T) for TILE neurons, masked unless MARK is PLAIN, and the marks by which the next kernel
    skips."""
    neuron = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    valid = neuron < m
    z = project(x_ptr, gate_ptr, neuron, valid, ROWS, BLOCK_ROWS, D, BLOCK_D, TILE, EVEN_M, False, 1)
    v = activate(z, ACTIVATION)
    keep = kept(v, threshold) & valid[None, :] & (row < ROWS)
    if MARK != "PLAIN":
        v = tl.where(keep, v, 0.0)
    tl.store(v_ptr + row * m + neuron[None, :], v, mask=valid[None, :] & (row < ROWS))
    active = tl.max(keep.to(tl.int32), 0)  # the union over the rows of x
    if MARK == "MASK":
        tl.store(mark_ptr + neuron, active, mask=valid)
    elif MARK == "ATOMIC":
        slot = tl.atomic_add(count_ptr, tl.sum(active, 0)) + tl.cumsum(active, 0) - active
        tl.store(mark_ptr + slot, neuron, mask=active == 1)


@triton.jit
def compact_kernel(
    v_ptr, indices_ptr, count_ptr, threshold, m, ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Append the neurons that any row of x keeps to indices, counting them in count (zeroed before)."""
    neuron = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    mask = (neuron < m)[None, :] & (row < ROWS)
    v = tl.load(v_ptr + row * m + neuron[None, :], mask=mask, other=0.0)
    active = tl.max((kept(v, threshold) & mask).to(tl.int32), 0)
    first = tl.atomic_add(count_ptr, tl.sum(active, 0))
    tl.store(indices_ptr + first + tl.cumsum(active, 0) - active, neuron, mask=active == 1)


@triton.jit
def gated_up_kernel(
    x_ptr,
    up_ptr,
    v_ptr,
    mark_ptr,  # int32 (m,): indices of the active neurons, or a flag a neuron if BY_MASK
    count_ptr,
    h_ptr,  # float32 (ROWS, m): by slot among the active neurons, or by neuron if BY_MASK
    m,
    BY_MASK: tl.constexpr,
    FUSED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    """x W_up^T at the active neurons of one tile, multiplied by v if FUSED."""
    slot = tl.program_id(0) * TILE + tl.arange(0, TILE)
    if BY_MASK:
        valid = tl.load(mark_ptr + slot, mask=slot < m, other=0) != 0
        neuron = slot
    else:
        valid = slot < tl.load(count_ptr)
        neuron = tl.load(mark_ptr + slot, mask=valid, other=0)
    if tl.max(valid.to(tl.int32), 0) == 1:
        row = tl.arange(0, BLOCK_ROWS)[:, None]
        mask = valid[None, :] & (row < ROWS)
        h = project(x_ptr, up_ptr, neuron, valid, ROWS, BLOCK_ROWS, D, BLOCK_D, TILE, False, False, 1)
        if FUSED:
            v = tl.load(v_ptr + row * m + neuron[None, :], mask=mask, other=0.0)
            h = gated(v, h, "", False)
        tl.store(h_ptr + row * m + slot[None, :], h, mask=mask)


@triton.jit
def multiply_kernel(
    v_ptr,
    h_ptr,
    indices_ptr,
    count_ptr,
    threshold,
    m,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """h *= v at the compacted slots, each row of x under its own mask: the unfused step of "gather"."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    valid = slot < tl.load(count_ptr)
    mask = valid[None, :] & (row < ROWS)
    neuron = tl.load(indices_ptr + slot, mask=valid, other=0)
    v = tl.load(v_ptr + row * m + neuron[None, :], mask=mask, other=0.0)
    h = tl.load(h_ptr + row * m + slot[None, :], mask=mask, other=0.0)
    tl.store(h_ptr + row * m + slot[None, :], tl.where(kept(v, threshold), v * h, 0.0), mask=mask)


@triton.jit
def masked_down_kernel(
    h_ptr,  # float32 (ROWS, m), by neuron
    down_ptr,
    mask_ptr,  # int32 (m,): a flag per neuron
    partial_ptr,  # float32 (splits, ROWS, D)
    m,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    """Partial sums of h W_down over one split of the neurons, each looked up in the mask, and one block of columns."""
    split = tl.program_id(0)
    start = split * m // tl.num_programs(0)
    end = (split + 1) * m // tl.num_programs(0)
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    first_column = tl.program_id(1) * BLOCK_D
    sums = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for first in tl.range(start, end, TILE, num_stages=1):
        neuron = first + tl.arange(0, TILE)
        valid = tl.load(mask_ptr + neuron, mask=neuron < end, other=0) != 0
        h = tl.load(h_ptr + row * m + neuron[None, :], mask=valid[None, :] & (row < ROWS), other=0.0)
        sums = add_rows(sums, h, load_rows(down_ptr, neuron, valid, first_column, D, BLOCK_D, False), False)
    column = first_column + tl.arange(0, BLOCK_D)[None, :]
    tl.store(partial_ptr + split * (ROWS * D) + row * D + column, sums, mask=(row < ROWS) & (column < D))


def plan_paper(variant: str, call: Call) -> list[Launch]:
    """The launches of "gather", "fused-compact" or "fused-mask"; rows <= 8."""
    check_paper(call.threshold, call.decider)
    rows, m = call.rows, call.m
    by_mask, fused = variant == "fused-mask", variant != "gather"
    block_rows, tile = power_of_2(rows), 4 if rows <= 2 else 8
    block_d = min(power_of_2(call.d), 4096 if rows <= 2 else 1024)
    shape: dict[str, Any] = {"ROWS": rows, "BLOCK_ROWS": block_rows, "D": call.d, "BLOCK_D": block_d, "TILE": tile}
    v, h, mark = call.buffer(rows, m), call.buffer(rows, m), call.buffer(m, dtype=torch.int32)
    count = call.buffer(1, dtype=torch.int32)
    if not by_mask:
        count.zero_()
    common = {"mark_ptr": mark, "count_ptr": count, "m": m}
    listing = {"indices_ptr": mark, "count_ptr": count, "m": m}
    tiles, blocks = (cdiv(m, tile),), (cdiv(m, 256),)
    elementwise = {"ROWS": rows, "BLOCK_ROWS": block_rows, "BLOCK": 256}
    marks = {"gather": "PLAIN", "fused-compact": "ATOMIC", "fused-mask": "MASK"}
    gate = Launch(
        gate_kernel,
        tiles,
        call,
        dict(x_ptr="x", gate_ptr="gate_weight", threshold="threshold"),
        dict(common, v_ptr=v),
        dict(shape, MARK=marks[variant], ACTIVATION=call.activation, EVEN_M=m % tile == 0),
        warps=8,
    )
    up = Launch(
        gated_up_kernel,
        tiles,
        call,
        dict(x_ptr="x", up_ptr="up_weight"),
        dict(common, v_ptr=v, h_ptr=h),
        dict(shape, BY_MASK=by_mask, FUSED=fused),
        warps=8,
    )
    down = plan_paper_down(call, h, mark, count, by_mask)
    if fused:
        return [gate, up, *down]
    threshold = {"threshold": "threshold"}
    compact = Launch(compact_kernel, blocks, call, threshold, dict(listing, v_ptr=v), elementwise, warps=4)
    multiply = Launch(multiply_kernel, blocks, call, threshold, dict(listing, v_ptr=v, h_ptr=h), elementwise, warps=4)
    return [gate, compact, up, multiply, *down]


def plan_paper_down(call: Call, h: Tensor, mark: Tensor, count: Tensor, by_mask: bool) -> list[Launch]:
    """The down projection of h (rows, m) over the marked rows by multiply-adds, and its reduction into y."""
    block_d, tile = min(max(16, power_of_2(call.d)), 512), 16
    blocks = cdiv(call.d, block_d)
    splits = max(1, min(4 * call.target.processors // blocks, cdiv(call.m, tile)))
    partial_sums = call.buffer(splits, call.rows, call.d)
    shape = {"ROWS": call.rows, "BLOCK_ROWS": power_of_2(call.rows), "D": call.d, "BLOCK_D": block_d, "TILE": tile}
    common = {"h_ptr": h, "partial_ptr": partial_sums, "m": call.m}
    fields, grid = {"down_ptr": "down_weight_t"}, (splits, blocks)
    if by_mask:
        down = Launch(masked_down_kernel, grid, call, fields, dict(common, mask_ptr=mark), shape, warps=4)
    else:
        buffers = dict(common, indices_ptr=mark, count_ptr=count)
        constants = dict(shape, DOT=False, STAGES=1, PDL=False)
        down = Launch(down_kernel, grid, call, fields, buffers, constants, warps=4)
    return [down, plan_reduce(call, partial_sums, False, block=32)]


def plan(variant: str, call: Call, config: Config | None = None) -> list[Launch]:
    """The launches of a variant, "cats" included, in order."""
    return mlp.plan(call, config) if variant == "cats" else plan_paper(variant, call)


def launch(
    variant: str,
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: Threshold,
    activation: str = "silu",
    decider: str = "gate",
    config: Config | None = None,
) -> Tensor:
    """The sparse gated MLP by one variant; arguments as in ``sparse_gated_mlp_triton``. The paper's take one number as
    threshold and decider "gate" only."""
    weights = gate_weight, up_weight, down_weight_t
    if variant == "cats":
        return sparse_gated_mlp_triton(x, *weights, threshold, activation, decider, config)
    check_paper(threshold, decider)
    call = make_call(x, *weights, threshold, activation, decider)
    run(plan_paper(variant, call), x.device)
    return call.y.view(x.shape)


def launch_counted(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: Threshold,
    activation: str = "silu",
    decider: str = "gate",
) -> Tensor:
    """ "fused-compact" as the authors launch theirs: the host waits for the number of active neurons, and starts the up
    kernel on so many. Not to be captured in a CUDA graph."""
    call = make_call(x, gate_weight, up_weight, down_weight_t, threshold, activation, decider)
    gate, up, *rest = plan_paper("fused-compact", call)
    run([gate], x.device)
    active = int(up.buffers["count_ptr"])
    up.grid = (max(1, cdiv(active, up.constants["TILE"])),)
    run([up, *rest], x.device)
    return call.y.view(x.shape)


VARIANTS: dict[str, Callable[..., Tensor]] = {
    **{name: partial(launch, name) for name in NAMES},
    "cats": partial(dispatch.compute, "triton"),
}
"""The kernels of Figure 6 and ours ("cats", any number of rows by its fastest path), by name."""
