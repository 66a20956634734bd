"""Attention of one new token per sequence as one kernel: rotary embedding, cache write, softmax and weighted sum.

A program takes the new queries of one key-value head (a whole group shares what is read) and one split of the cache.
Splits beyond the filled part end at once, so a token reads only what is filled, whatever the cache's capacity. The
program that finishes last for a head combines the splits' partial sums (flash decoding). It adds them in their order,
so results do not depend on scheduling.
"""

# mypy: disable-error-code=no-untyped-def

from typing import Any

import torch
import triton
import triton.language as tl
from cats_kernels.triton.device import await_previous_kernel, dot
from cats_kernels.triton.launch import INTERPRETED, cdiv, on, power_of_2, target_of
from torch import Tensor

MIN_SPLIT = 64
"""Cache positions of a program, at least: 32 KiB of keys and values in bfloat16 with heads of 128."""
MAX_SPLITS = 32


@triton.jit
def rotated(row_ptr, row, valid, cos_ptr, sin_ptr, D: tl.constexpr):
    """Rows [n, D] rotated by position: x cos + rotate_half(x) sin, in float32."""
    column = tl.arange(0, D)[None, :]
    other = (column + D // 2) % D
    sign = tl.where(column < D // 2, -1.0, 1.0)
    x = tl.load(row_ptr + row * D + column, mask=valid, other=0.0).to(tl.float32)
    half = tl.load(row_ptr + row * D + other, mask=valid, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + column).to(tl.float32)
    sin = tl.load(sin_ptr + column).to(tl.float32)
    return x * cos + sign * half * sin


@triton.jit
def decode_attention_kernel(
    q_ptr,  # (b, KV_HEADS * GROUP * D), rows q_stride apart; k and v likewise, KV_HEADS * D
    k_ptr,
    v_ptr,
    cos_ptr,  # (b, D), rows cos_stride apart; sin likewise
    sin_ptr,
    keys_ptr,  # (b, KV_HEADS, capacity, D); values likewise
    values_ptr,
    position_ptr,  # int64 (1,): where the new token goes
    first_ptr,  # int64 (b,): the first position that is not padding
    out_ptr,  # (b, KV_HEADS * GROUP * D)
    partial_ptr,  # float32 (b * KV_HEADS, splits, GROUP, D)
    stats_ptr,  # float32 (b * KV_HEADS, 2, splits, GROUP): maxima and sums
    arrived_ptr,  # int32 (b * KV_HEADS,): zeros, before and after
    capacity,
    window,  # positions that the token sees, itself included
    scale,  # times log2(e)
    q_stride,
    k_stride,
    v_stride,
    cos_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    await_previous_kernel(PDL, True)
    split = tl.program_id(0)
    head = tl.program_id(1)  # of all sequences
    sequence = head // KV_HEADS
    kv_head = head % KV_HEADS
    position = tl.load(position_ptr).to(tl.int32)
    if split * SPLIT <= position:
        dtype = keys_ptr.dtype.element_ty
        first = tl.maximum(tl.load(first_ptr + sequence).to(tl.int32), position - window + 1)
        column = tl.arange(0, D)[None, :]
        member = tl.arange(0, BLOCK_GROUP)
        cos_row, sin_row = cos_ptr + sequence * cos_stride, sin_ptr + sequence * cos_stride
        q_row = q_ptr + sequence * q_stride
        q = rotated(q_row, kv_head * GROUP + member[:, None], member[:, None] < GROUP, cos_row, sin_row, D).to(dtype)
        one = tl.zeros([1, 1], tl.int32)
        new_k = rotated(k_ptr + sequence * k_stride, kv_head + one, one == 0, cos_row, sin_row, D).to(dtype)
        new_v = tl.load(v_ptr + sequence * v_stride + kv_head * D + column)

        owner = split == position // SPLIT
        cache = head.to(tl.int64) * capacity * D
        tl.store(keys_ptr + cache + position * D + column, new_k, mask=owner & (column >= 0))
        tl.store(values_ptr + cache + position * D + column, new_v, mask=owner & (column >= 0))
        own = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), 1) * scale
        top = tl.where(owner, own, float("-inf"))
        total = tl.where(owner, tl.full([BLOCK_GROUP], 1.0, tl.float32), 0.0)
        sums = tl.where(owner, new_v.to(tl.float32), 0.0) + tl.zeros([BLOCK_GROUP, D], tl.float32)

        for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, position), TILE):
            place = start + tl.arange(0, TILE)
            filled = place < position
            row = cache + place[:, None] * D + column
            k = tl.load(keys_ptr + row, mask=filled[:, None], other=0.0)
            v = tl.load(values_ptr + row, mask=filled[:, None], other=0.0)
            if DOT:
                scores = dot(q, tl.trans(k), tl.zeros([BLOCK_GROUP, TILE], tl.float32))
            else:
                scores = tl.sum(q.to(tl.float32)[:, None, :] * k.to(tl.float32)[None, :, :], 2)
            seen = filled & (place >= first)
            scores = tl.where(seen[None, :], scores * scale, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - base[:, None])
            shrink = tl.exp2(top - base)
            total = total * shrink + tl.sum(weights, 1)
            if DOT:
                sums = dot(weights.to(dtype), v, sums * shrink[:, None])
            else:
                sums = sums * shrink[:, None] + tl.sum(weights[:, :, None] * v.to(tl.float32)[None, :, :], 1)
            top = higher

        active = position // SPLIT + 1
        part = (head * SPLITS + split) * GROUP + member
        tl.store(partial_ptr + part[:, None] * D + column, sums, mask=member[:, None] < GROUP)
        stat = (2 * head * SPLITS + split) * GROUP + member
        tl.store(stats_ptr + stat, top, mask=member < GROUP)
        tl.store(stats_ptr + SPLITS * GROUP + stat, total, mask=member < GROUP)
        tl.debug_barrier()  # all threads' stores before the one thread that announces them
        before = tl.atomic_add(arrived_ptr + head, 1, sem="acq_rel")
        if before == active - 1:
            tl.store(arrived_ptr + head, 0)
            each = tl.arange(0, BLOCK_SPLITS)
            valid = each < active
            for index in tl.static_range(GROUP):
                stats = stats_ptr + (2 * head * SPLITS + each) * GROUP + index
                tops = tl.load(stats, mask=valid, other=float("-inf"), cache_modifier=".cg")
                totals = tl.load(stats + SPLITS * GROUP, mask=valid, other=0.0, cache_modifier=".cg")
                factors = tl.exp2(tops - tl.max(tops, 0))
                rows = (head * SPLITS + each) * GROUP + index
                parts = tl.load(
                    partial_ptr + rows[:, None] * D + column, mask=valid[:, None], other=0.0, cache_modifier=".cg"
                )
                out = tl.sum(parts * factors[:, None], 0) / tl.sum(totals * factors, 0)
                to = (head * GROUP + index) * D + tl.arange(0, D)
                tl.store(out_ptr + to, out.to(out_ptr.dtype.element_ty))


def split_of(capacity: int) -> int:
    """Cache positions of a program: `MIN_SPLIT`, or as many as keep the splits to `MAX_SPLITS`."""
    return max(MIN_SPLIT, power_of_2(cdiv(capacity, MAX_SPLITS)))


def constants_of(
    kv_heads: int, group: int, d: int, capacity: int, element_size: int, pdl: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time constants of the kernel, and Triton's options."""
    split = split_of(capacity)
    splits = cdiv(capacity, split)
    constants = dict(
        KV_HEADS=kv_heads,
        GROUP=group,
        BLOCK_GROUP=1 if group == 1 else max(16, power_of_2(group)),
        D=d,
        SPLIT=split,
        TILE=64 if element_size == 2 else 32,
        SPLITS=splits,
        BLOCK_SPLITS=power_of_2(splits),
        DOT=group > 1,
        PDL=pdl,
    )
    return constants, {
        "num_warps": 8 if group == 1 and element_size == 2 else 4,
        **({"launch_pdl": True} if pdl else {}),
    }


def decode_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    first: Tensor,
    arrived: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """`cats.generation.attention.decode_attention` on a GPU, or in Triton's interpreter."""
    batch, kv_heads, capacity, d = keys.shape
    group = q.shape[-1] // (kv_heads * d)
    pdl = target_of(q.device).dependent_launch
    constants, options = constants_of(kv_heads, group, d, capacity, keys.element_size(), pdl)
    splits, parts = constants["SPLITS"], batch * kv_heads * constants["SPLITS"] * group
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    buffer = torch.empty(parts * (d + 2), dtype=torch.float32, device=q.device)
    with on(q.device):
        decode_attention_kernel[(splits, batch * kv_heads)](
            q, k, v, cos, sin, keys, values, position, first, out, buffer, buffer[parts * d :], arrived,
            capacity, window or 2**30, scale * 1.4426950408889634,
            q.stride(0), k.stride(0), v.stride(0), cos.stride(0), **constants, **options,
        )  # fmt: skip
    return out


__all__ = ["INTERPRETED", "constants_of", "decode_attention_kernel", "decode_attention_triton", "split_of"]
