"""The paper's kernels, for its ablation (Figure 6): unfused gather, Algorithm 2 (indices), Algorithms 1 and 3 (mask).

They share the gate, down and reduction kernels with ours; what differs is what the paper varies: whether thresholding
is fused into the gate product, v into the up product, and whether rows are found through indices or through the mask.
The two that compact do it with an atomic counter as Algorithm 2 does, so the order of their sums varies between runs.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_device import gated, kept, project
from .triton_kernels import down_kernel, gate_kernel, reduce_kernel
from .triton_launch import Call, Launch, cdiv, power_of_2


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
    h_ptr,  # float32 (ROWS, m): by place among the active neurons, or by neuron if BY_MASK
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
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    if BY_MASK:
        live = tl.load(mark_ptr + place, mask=place < m, other=0) != 0
        neuron = place
    else:
        live = place < tl.load(count_ptr)
        neuron = tl.load(mark_ptr + place, mask=live, other=0)
    if tl.max(live.to(tl.int32), 0) == 1:
        row = tl.arange(0, BLOCK_ROWS)[:, None]
        mask = live[None, :] & (row < ROWS)
        h = project(x_ptr, up_ptr, neuron, live, ROWS, BLOCK_ROWS, D, BLOCK_D, TILE, False, False, 1)
        if FUSED:
            h = gated(tl.load(v_ptr + row * m + neuron[None, :], mask=mask, other=0.0), h)
        tl.store(h_ptr + row * m + place[None, :], h, mask=mask)


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
    """h *= v at the compacted places, each row of x under its own mask: the unfused step of "gather"."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    live = place < tl.load(count_ptr)
    mask = live[None, :] & (row < ROWS)
    neuron = tl.load(indices_ptr + place, mask=live, other=0)
    v = tl.load(v_ptr + row * m + neuron[None, :], mask=mask, other=0.0)
    h = tl.load(h_ptr + row * m + place[None, :], mask=mask, other=0.0)
    tl.store(h_ptr + row * m + place[None, :], tl.where(kept(v, threshold), v * h, 0.0), mask=mask)


def plan_paper(variant: str, call: Call) -> list[Launch]:
    """The launches of "gather", "fused-compact" or "fused-mask"; rows <= 8."""
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
    listing = {"indices_ptr": mark, "count_ptr": count, "threshold": call.threshold, "m": m}
    tiles, blocks = (cdiv(m, tile),), (cdiv(m, 256),)
    elementwise = {"ROWS": rows, "BLOCK_ROWS": block_rows, "BLOCK": 256}
    gate = Launch(
        gate_kernel,
        tiles,
        dict(common, x_ptr=call.x, gate_ptr=call.gate_weight, v_ptr=v, threshold=call.threshold),
        dict(
            shape,
            MARK={"gather": "PLAIN", "fused-compact": "ATOMIC", "fused-mask": "MASK"}[variant],
            ACTIVATION=call.activation,
            WORD_ROWS=tile,
            EVEN_M=m % tile == 0,
            DOT=False,
            STAGES=1,
            PDL=False,
        ),
        warps=8,
    )
    up = Launch(
        gated_up_kernel,
        tiles,
        dict(common, x_ptr=call.x, up_ptr=call.up_weight, v_ptr=v, h_ptr=h),
        dict(shape, BY_MASK=by_mask, FUSED=fused),
        warps=8,
    )
    down = plan_down(call, h, mark, count, by_mask)
    if fused:
        return [gate, up, *down]
    compact = Launch(compact_kernel, blocks, dict(listing, v_ptr=v), elementwise, warps=4)
    multiply = Launch(multiply_kernel, blocks, dict(listing, v_ptr=v, h_ptr=h), elementwise, warps=4)
    return [gate, compact, up, multiply, *down]


def plan_down(
    call: Call,
    h: Tensor,
    mark: Tensor,
    count: Tensor,
    by_mask: bool,
    block_d: int = 512,
    tile: int = 16,
    programs_per_processor: int = 4,
    stages: int = 1,
    dot: bool = False,
    dependent: bool = False,
) -> list[Launch]:
    """The down projection of h (rows, m) over the marked rows: partial sums over splits of the neurons, then one
    reduction into y."""
    rows, d, m = call.rows, call.d, call.m
    block_d = min(max(16, power_of_2(d)), block_d)
    blocks = cdiv(d, block_d)
    splits = max(1, min(programs_per_processor * call.target.processors // blocks, cdiv(m, tile)))
    partial = call.buffer(splits, rows, d)
    down = Launch(
        down_kernel,
        (splits, blocks),
        dict(h_ptr=h, down_ptr=call.down_weight_t, mark_ptr=mark, count_ptr=count, partial_ptr=partial, m=m),
        dict(
            BY_MASK=by_mask,
            ROWS=rows,
            BLOCK_ROWS=16 if dot else power_of_2(rows),  # a tensor core's tile has 16 rows
            D=d,
            BLOCK_D=block_d,
            TILE=tile,
            DOT=dot,
            STAGES=stages,
            PDL=dependent,
        ),
        warps=4,
        dependent=dependent,
    )
    return [down, plan_reduce(call, partial, dependent, block=128 if dot else 32)]


def plan_reduce(call: Call, partial: Tensor, dependent: bool, block: int = 32) -> Launch:
    """The sum of partial (parts, rows, d) into y; a program sums a block of elements."""
    parts, n = partial.shape[0], call.y.numel()
    return Launch(
        reduce_kernel,
        (cdiv(n, block),),
        dict(partial_ptr=partial, y_ptr=call.y, parts=parts, n=n),
        dict(BLOCK_PARTS=power_of_2(parts), BLOCK=block, PDL=dependent),
        warps=8,
        dependent=dependent,
    )
