"""The Triton kernels of the sparse gated MLP. Weights are row-major (m, d); sums are float32 throughout.

W_gate is read whole, W_up and W_down only in active rows. Each program writes its own part
of every buffer, so results do not depend on scheduling (except in the paper's ATOMIC compaction)."""

# mypy: disable-error-code=no-untyped-def

import triton
import triton.language as tl

from .triton_device import (
    activate,
    add_rows,
    await_previous_kernel,
    dot_rows,
    gated,
    kept,
    list_active,
    load_rows,
    load_x,
    project,
)


@triton.jit
def gate_kernel(
    x_ptr,
    gate_ptr,
    v_ptr,  # float32 (ROWS, m)
    mark_ptr,  # int32: WORDS one a WORD_ROWS neurons | MASK one flag a neuron | ATOMIC compacted indices | PLAIN unused
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
    WORD_ROWS: tl.constexpr,
    EVEN_M: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """v = activation(x W_gate^T) for TILE neurons, masked unless MARK is PLAIN, and the marks by which the next kernel
    skips."""
    await_previous_kernel(PDL)
    neuron = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    live = neuron < m
    z = project(x_ptr, gate_ptr, neuron, live, ROWS, BLOCK_ROWS, D, BLOCK_D, TILE, EVEN_M, DOT, STAGES)
    v = activate(z, ACTIVATION)
    keep = kept(v, threshold) & live[None, :] & (row < ROWS)
    if MARK != "PLAIN":
        v = tl.where(keep, v, 0.0)
    tl.store(v_ptr + row * m + neuron[None, :], v, mask=live[None, :] & (row < ROWS))
    active = tl.max(keep.to(tl.int32), 0)  # the union over the rows of x
    if MARK == "WORDS":
        flags = tl.reshape(active, [TILE // WORD_ROWS, WORD_ROWS])
        bits = tl.sum(flags << tl.arange(0, WORD_ROWS)[None, :], 1)
        word = tl.program_id(0) * (TILE // WORD_ROWS) + tl.arange(0, TILE // WORD_ROWS)
        tl.store(mark_ptr + word, bits | (tl.sum(flags, 1) << 16), mask=word * WORD_ROWS < m)
    elif MARK == "MASK":
        tl.store(mark_ptr + neuron, active, mask=live)
    elif MARK == "ATOMIC":
        place = tl.atomic_add(count_ptr, tl.sum(active, 0)) + tl.cumsum(active, 0) - active
        tl.store(mark_ptr + place, neuron, mask=active == 1)


@triton.jit
def fused_kernel(
    x_ptr,
    gate_ptr,
    up_ptr,
    down_ptr,
    v_ptr,  # float32 (ROWS, m): of the active neurons, by place
    indices_ptr,  # int32 (m,): the active neurons, by place; a program's places begin at its first neuron
    partial_ptr,  # float32 (programs, ROWS, D)
    threshold,
    m,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GATE_TILE: tl.constexpr,
    GATE_STAGES: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """All three products over this program's even share of the neurons: first its rows of W_gate, listing the active
    neurons, then their rows of W_up and W_down^T, summed in registers. No program waits for another. With PARTS over 1
    it does so in two parts, divided at a place that its number decides, so that not all change from W_gate at one time.

    The loads of both rows are issued together, before the product that the second one has to wait for.
    """
    await_previous_kernel(PDL)
    x = load_x(x_ptr, 0, ROWS, BLOCK_ROWS, D, BLOCK_D)
    program = tl.program_id(0)
    start = program * m // tl.num_programs(0)
    end = (program + 1) * m // tl.num_programs(0)
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    middle = start + (end - start) * (program % PARTS + 1) // PARTS
    sums = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for part in range(2 if PARTS > 1 else 1):
        part_start = middle if part else start
        part_end = end if part else middle
        last = part_start  # the end of this program's list
        for first in tl.range(part_start, part_end, GATE_TILE, num_stages=GATE_STAGES):
            neuron = first + tl.arange(0, GATE_TILE)
            live = neuron < part_end
            v = activate(dot_rows(x, load_rows(gate_ptr, neuron, live, 0, D, BLOCK_D, False)), ACTIVATION)
            keep = kept(v, threshold) & live[None, :] & (row < ROWS)
            active = tl.max(keep.to(tl.int32), 0)
            place = last + tl.cumsum(active, 0) - active
            tl.store(indices_ptr + place, neuron, mask=active == 1)
            mask = (active == 1)[None, :] & (row < ROWS)
            tl.store(v_ptr + row * m + place[None, :], tl.where(keep, v, 0.0), mask=mask)
            last += tl.sum(active, 0)
        tl.debug_barrier()  # other threads of this program read the list back
        for first in tl.range(part_start, last, TILE, num_stages=STAGES):
            place = first + tl.arange(0, TILE)
            live = place < last
            neuron = tl.load(indices_ptr + place, mask=live, other=0)
            up = load_rows(up_ptr, neuron, live, 0, D, BLOCK_D, False)
            down = load_rows(down_ptr, neuron, live, 0, D, BLOCK_D, False)
            v = tl.load(v_ptr + row * m + place[None, :], mask=live[None, :] & (row < ROWS), other=0.0)
            sums = add_rows(sums, gated(v, dot_rows(x, up)), down, False)
    partial = partial_ptr + program * (ROWS * D) + row * D + column
    tl.store(partial, sums, mask=(row < ROWS) & (column < D))


@triton.jit
def up_kernel(
    x_ptr,
    up_ptr,
    v_ptr,
    words_ptr,
    indices_ptr,  # int32 (m,)
    count_ptr,  # int32 (1,)
    h_ptr,  # float32 (ROWS, m), by place among the active neurons
    words,
    m,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    WORD_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """h = v * (x W_up^T) at the active neurons, on tensor cores."""
    await_previous_kernel(PDL)
    start, end, total = list_active(words_ptr, indices_ptr, words, BLOCK_WORDS, WORD_ROWS, CHUNK)
    tl.store(count_ptr, total, mask=tl.program_id(0) == 0)
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    for first in range(start, end, TILE):
        place = first + tl.arange(0, TILE)
        live = place < end
        mask = live[None, :] & (row < ROWS)
        neuron = tl.load(indices_ptr + place, mask=live, other=0)
        v = tl.load(v_ptr + row * m + neuron[None, :], mask=mask, other=0.0)
        u = project(x_ptr, up_ptr, neuron, live, ROWS, BLOCK_ROWS, D, BLOCK_D, TILE, False, True, STAGES)
        tl.store(h_ptr + row * m + place[None, :], gated(v, u), mask=mask)


@triton.jit
def down_kernel(
    h_ptr,  # float32 (ROWS, m): by place among the active neurons, or by neuron if BY_MASK
    down_ptr,
    mark_ptr,  # int32 (m,): indices of the active neurons, or a flag a neuron if BY_MASK
    count_ptr,
    partial_ptr,  # float32 (splits, ROWS, D)
    m,
    BY_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Partial sums of h W_down over one split of the neurons and one block of columns."""
    await_previous_kernel(PDL)
    total = m if BY_MASK else tl.load(count_ptr)
    split = tl.program_id(0)
    start = split * total // tl.num_programs(0)
    end = (split + 1) * total // tl.num_programs(0)
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    first_column = tl.program_id(1) * BLOCK_D
    sums = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for first in tl.range(start, end, TILE, num_stages=STAGES):
        place = first + tl.arange(0, TILE)
        live = place < end
        mark = tl.load(mark_ptr + place, mask=live, other=0)
        if BY_MASK:
            live = mark != 0
            neuron = place
        else:
            neuron = mark
        h = tl.load(h_ptr + row * m + place[None, :], mask=live[None, :] & (row < ROWS), other=0.0)
        sums = add_rows(sums, h, load_rows(down_ptr, neuron, live, first_column, D, BLOCK_D, False), DOT)
    column = first_column + tl.arange(0, BLOCK_D)[None, :]
    tl.store(partial_ptr + split * (ROWS * D) + row * D + column, sums, mask=(row < ROWS) & (column < D))


@triton.jit
def reduce_kernel(
    partial_ptr,  # float32 (parts, n)
    y_ptr,  # (n,)
    parts,
    n,
    BLOCK_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = the sum of the partial outputs, always in the same order, cast once."""
    await_previous_kernel(PDL)
    part = tl.arange(0, BLOCK_PARTS)[:, None]
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (part < parts) & (element < n)[None, :]
    y = tl.sum(tl.load(partial_ptr + part * n + element[None, :], mask=mask, other=0.0), axis=0)
    tl.store(y_ptr + element, y.to(y_ptr.dtype.element_ty), mask=element < n)


@triton.jit
def masked_product_kernel(z_ptr, u_ptr, h_ptr, threshold, n, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """h = v * u where v = activation(z) is kept, else 0: what lies between the products of the dense masked path."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = element < n
    v = activate(tl.load(z_ptr + element, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    u = tl.load(u_ptr + element, mask=mask, other=0.0).to(tl.float32)
    h = gated(tl.where(kept(v, threshold), v, 0.0), u)
    tl.store(h_ptr + element, h.to(h_ptr.dtype.element_ty), mask=mask)
