"""The kernel of `cats.generation.triton_attention` and its parts.

A program takes one split of one key-value head's filled places; a whole group of queries shares what it reads. By
lanes, a few threads compare a place with the queries and keep a softmax of their own, so that no program's threads wait
for each other before the end; on tensor cores (DOT), a tile of places meets a padded group of queries. The program that
finishes last for a head adds the splits' partial sums in their order, so results do not depend on scheduling.
"""

# mypy: disable-error-code=no-untyped-def

import triton
import triton.language as tl
from cats_kernels.triton.device import await_previous_kernel, dot


@triton.jit
def rotated(row_ptr, row, column, valid, cos_ptr, sin_ptr, D: tl.constexpr):
    """Rows rotated by position: x cos + rotate_half(x) sin, in float32; row and column are of one rank."""
    other = (column + D // 2) % D
    sign = tl.where(column < D // 2, -1.0, 1.0)
    x = tl.load(row_ptr + row * D + column, mask=valid, other=0.0).to(tl.float32)
    half = tl.load(row_ptr + row * D + other, mask=valid, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + column).to(tl.float32)
    sin = tl.load(sin_ptr + column).to(tl.float32)
    return x * cos + sign * half * sin


@triton.jit
def share_of(split, first, position, TILE: tl.constexpr, SPLITS: tl.constexpr):
    """This split's places [start, end) of those before position, and how many splits have any (one at least). Whole
    tiles from that of ``first`` on are divided evenly."""
    begin = first // TILE * TILE
    tiles = tl.cdiv(position - begin, TILE)
    each = tl.maximum(tl.cdiv(tiles, SPLITS), 1)
    active = tl.maximum(tl.cdiv(tiles, each), 1)
    start = begin + split * each * TILE
    return start, tl.minimum(start + each * TILE, position), active


@triton.jit
def lane_places(start, TILE: tl.constexpr, LANES: tl.constexpr):
    """The tile's places as [1, TILE / LANES, LANES]."""
    turn = tl.arange(0, TILE // LANES)[None, :, None]
    lane = tl.arange(0, LANES)[None, None, :]
    return start + turn * LANES + lane


@triton.jit
def load_tile(cache_ptr, start, end, D: tl.constexpr, TILE: tl.constexpr):
    """A tile of the cache's rows [TILE, D]; zeros from ``end`` on."""
    place = start + tl.arange(0, TILE)[:, None]
    column = tl.arange(0, D)[None, :]
    return tl.load(cache_ptr + place * D + column, mask=place < end, other=0.0)


@triton.jit
def load_lanes(cache_ptr, start, end, D: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr):
    """A tile of the cache's rows as [1, TILE / LANES, LANES, D]; zeros from ``end`` on.

    It is loaded as rows and columns, whose layout all versions of Triton choose alike: a lane's places are its own.
    """
    return tl.reshape(load_tile(cache_ptr, start, end, D, TILE), [1, TILE // LANES, LANES, D])


@triton.jit
def attend_by_lanes(
    q_row, first_head, cos_row, sin_row, keys_ptr, values_ptr, k, v, start, end, first, scale,
    GROUP: tl.constexpr, BLOCK_GROUP: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Maxima and sums of weights [BLOCK_GROUP], and weighted sums of values [BLOCK_GROUP, D], over [start, end).

    Every lane holds a softmax of its own until the end. k and v are the first tile; the next one is asked for before a
    tile is used.
    """
    member = tl.arange(0, BLOCK_GROUP)[:, None, None, None]
    column = tl.arange(0, D)[None, None, None, :]
    q = rotated(q_row, first_head + member, column, member < GROUP, cos_row, sin_row, D)
    q = q.to(keys_ptr.dtype.element_ty).to(tl.float32) * scale
    top = tl.full([BLOCK_GROUP, LANES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP, LANES], tl.float32)
    sums = tl.zeros([BLOCK_GROUP, LANES, D], tl.float32)
    for begin in tl.range(start, end, TILE, num_stages=1):
        next_k = load_lanes(keys_ptr, begin + TILE, end, D, TILE, LANES)
        next_v = load_lanes(values_ptr, begin + TILE, end, D, TILE, LANES)
        place = lane_places(begin, TILE, LANES)
        scores = tl.sum(q * k.to(tl.float32), 3)
        scores = tl.where((place >= first) & (place < end), scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None, :])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, :, None] + tl.sum(weights[:, :, :, None] * v.to(tl.float32), 1)
        top = higher
        k, v = next_k, next_v
    highest = tl.max(top, 1)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    shrink = tl.exp2(top - base[:, None])
    return highest, tl.sum(total * shrink, 1), tl.sum(sums * shrink[:, :, None], 1)


@triton.jit
def attend_by_tiles(
    q_row, first_head, cos_row, sin_row, keys_ptr, values_ptr, early_k, early_v, start, end, first, scale,
    GROUP: tl.constexpr, BLOCK_GROUP: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """`attend_by_lanes` on tensor cores. HELD: early_k and early_v are the first tile, else not used."""
    dtype = keys_ptr.dtype.element_ty
    member = tl.arange(0, BLOCK_GROUP)[:, None]
    column = tl.arange(0, D)[None, :]
    q = rotated(q_row, first_head + member, column, member < GROUP, cos_row, sin_row, D).to(dtype)
    top = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    sums = tl.zeros([BLOCK_GROUP, D], tl.float32)
    for begin in tl.range(start, end, TILE, num_stages=STAGES):
        place = begin + tl.arange(0, TILE)
        if HELD:
            k, v = early_k, early_v
            early_k = load_tile(keys_ptr, begin + TILE, end, D, TILE)
            early_v = load_tile(values_ptr, begin + TILE, end, D, TILE)
        else:
            row = place[:, None] * D + column
            k = tl.load(keys_ptr + row, mask=(place < end)[:, None], other=0.0)
            v = tl.load(values_ptr + row, mask=(place < end)[:, None], other=0.0)
        scores = dot(q, tl.trans(k), tl.zeros([BLOCK_GROUP, TILE], tl.float32)) * scale
        scores = tl.where(((place >= first) & (place < end))[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        sums = dot(weights.to(dtype), v, sums * shrink[:, None])
        top = higher
    return top, total, sums


@triton.jit
def combine(
    partial_ptr, stats_ptr, out_ptr, head, active,
    GROUP: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """The output of one head from the partial sums of its active splits, past L1, which may hold older ones."""
    each = tl.arange(0, BLOCK_SPLITS)
    valid = each < active
    column = tl.arange(0, D)
    for index in tl.static_range(GROUP):
        stats = stats_ptr + (2 * head * SPLITS + each) * GROUP + index
        tops = tl.load(stats, mask=valid, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(stats + SPLITS * GROUP, mask=valid, other=0.0, cache_modifier=".cg")
        rows = ((head * SPLITS + each) * GROUP + index)[:, None] * D + column[None, :]
        parts = tl.load(partial_ptr + rows, mask=valid[:, None], other=0.0, cache_modifier=".cg")
        factors = tl.exp2(tops - tl.max(tops, 0))
        out = tl.sum(parts * factors[:, None], 0) / tl.sum(totals * factors, 0)
        tl.store(out_ptr + (head * GROUP + index) * D + column, out.to(out_ptr.dtype.element_ty))


@triton.jit
def combine_together(
    partial_ptr, stats_ptr, out_ptr, head, active,
    GROUP: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """`combine` for all queries of a group at once: as many splits at a time as make the bytes that `combine` reads for
    one query, so that few splits are read in one go."""
    CHUNK: tl.constexpr = BLOCK_SPLITS // MEMBERS if BLOCK_SPLITS > MEMBERS else 1
    member = tl.arange(0, MEMBERS)[None, :]
    column = tl.arange(0, D)[None, None, :]
    top = tl.full([MEMBERS], float("-inf"), tl.float32)
    total = tl.zeros([MEMBERS], tl.float32)
    sums = tl.zeros([MEMBERS, D], tl.float32)
    for begin in tl.range(0, active, CHUNK, num_stages=1):
        each = begin + tl.arange(0, CHUNK)[:, None]
        valid = (each < active) & (member < GROUP)
        stats = stats_ptr + (2 * head * SPLITS + each) * GROUP + member
        rows = ((head * SPLITS + each) * GROUP + member)[:, :, None] * D + column
        tops = tl.load(stats, mask=valid, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(stats + SPLITS * GROUP, mask=valid, other=0.0, cache_modifier=".cg")
        parts = tl.load(partial_ptr + rows, mask=valid[:, :, None], other=0.0, cache_modifier=".cg")
        higher = tl.maximum(top, tl.max(tops, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        factors = tl.exp2(tops - base[None, :])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(totals * factors, 0)
        sums = sums * shrink[:, None] + tl.sum(parts * factors[:, :, None], 0)
        top = higher
    row = tl.arange(0, MEMBERS)[:, None]
    out = (sums / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (head * GROUP + row) * D + tl.arange(0, D)[None, :], out, mask=row < GROUP)


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
    partial_ptr,  # float32 (b * KV_HEADS, SPLITS, GROUP, D)
    stats_ptr,  # float32 (b * KV_HEADS, 2, SPLITS, GROUP): maxima and sums
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
    TILE: tl.constexpr,
    LANES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
    HELD: tl.constexpr,
    AHEAD: tl.constexpr,
    TOGETHER: tl.constexpr,
    MEMBERS: tl.constexpr,
    PDL: tl.constexpr,
):
    """HELD: tiles are read into registers, one before it is needed; always so without DOT. AHEAD: where the first tile
    lies is read, and it is asked for, before the previous kernel is waited for. TOGETHER: groups by `combine_together`;
    and the new token's key and value are read before the older ones, not after them."""
    split = tl.program_id(0)
    head = tl.program_id(1)  # of all sequences
    sequence = head // KV_HEADS
    kv_head = head % KV_HEADS
    keys_ptr += head.to(tl.int64) * capacity * D
    values_ptr += head.to(tl.int64) * capacity * D
    if not AHEAD:
        await_previous_kernel(PDL, False)
    position = tl.load(position_ptr).to(tl.int32)
    first = tl.maximum(tl.load(first_ptr + sequence).to(tl.int32), position - window + 1)
    start, end, active = share_of(split, first, position, TILE, SPLITS)
    early_k, early_v = None, None
    if not DOT:
        early_k = load_lanes(keys_ptr, start, end, D, TILE, LANES)
        early_v = load_lanes(values_ptr, start, end, D, TILE, LANES)
    elif HELD:
        early_k = load_tile(keys_ptr, start, end, D, TILE)
        early_v = load_tile(values_ptr, start, end, D, TILE)
    if AHEAD:
        await_previous_kernel(PDL, False)
    if split < active:
        cos_row, sin_row = cos_ptr + sequence * cos_stride, sin_ptr + sequence * cos_stride
        q_row = q_ptr + sequence * q_stride
        member = tl.arange(0, BLOCK_GROUP)
        column = tl.arange(0, D)[None, :]
        dtype = keys_ptr.dtype.element_ty
        if TOGETHER:
            new_k = rotated(k_ptr + sequence * k_stride, kv_head, column, column >= 0, cos_row, sin_row, D).to(dtype)
            new_v = tl.load(v_ptr + sequence * v_stride + kv_head * D + column)
        if DOT:
            top, total, sums = attend_by_tiles(
                q_row, kv_head * GROUP, cos_row, sin_row, keys_ptr, values_ptr, early_k, early_v, start, end, first,
                scale, GROUP, BLOCK_GROUP, D, TILE, STAGES, HELD,
            )  # fmt: skip
        else:
            top, total, sums = attend_by_lanes(
                q_row, kv_head * GROUP, cos_row, sin_row, keys_ptr, values_ptr, early_k, early_v, start, end, first,
                scale, GROUP, BLOCK_GROUP, D, TILE, LANES,
            )  # fmt: skip

        if split == active - 1:  # the new token's own key and value
            q = rotated(q_row, kv_head * GROUP + member[:, None], column, member[:, None] < GROUP, cos_row, sin_row, D)
            if not TOGETHER:
                k_row = k_ptr + sequence * k_stride
                new_k = rotated(k_row, kv_head, column, column >= 0, cos_row, sin_row, D).to(dtype)
                new_v = tl.load(v_ptr + sequence * v_stride + kv_head * D + column)
            tl.store(keys_ptr + position * D + column, new_k)
            tl.store(values_ptr + position * D + column, new_v)
            own = tl.sum(q.to(dtype).to(tl.float32) * new_k.to(tl.float32), 1) * scale
            higher = tl.maximum(top, own)
            shrink, weight = tl.exp2(top - higher), tl.exp2(own - higher)
            total = total * shrink + weight
            sums = sums * shrink[:, None] + weight[:, None] * new_v.to(tl.float32)
            top = higher

        part = (head * SPLITS + split) * GROUP + member
        tl.store(partial_ptr + part[:, None] * D + column, sums, mask=member[:, None] < GROUP)
        stat = (2 * head * SPLITS + split) * GROUP + member
        tl.store(stats_ptr + stat, top, mask=member < GROUP)
        tl.store(stats_ptr + SPLITS * GROUP + stat, total, mask=member < GROUP)
        tl.debug_barrier()  # all threads' stores before the one thread that announces them
        before = tl.atomic_add(arrived_ptr + head, 1, sem="acq_rel")
        if before == active - 1:
            tl.store(arrived_ptr + head, 0)
            if TOGETHER and GROUP > 1:
                combine_together(partial_ptr, stats_ptr, out_ptr, head, active, GROUP, D, SPLITS, BLOCK_SPLITS, MEMBERS)
            else:
                combine(partial_ptr, stats_ptr, out_ptr, head, active, GROUP, D, SPLITS, BLOCK_SPLITS)
