"""The Triton kernels of the sparse gated MLP. Weights are row-major (m, d); sums are float32 throughout.

The deciding weight (W_gate, or W_up where UP_DECIDES) is read whole, the other one and W_down only in active rows. Each
program writes its own part of every buffer, so results do not depend on scheduling."""

# mypy: disable-error-code=no-untyped-def

import triton
import triton.language as tl

from cats_kernels.triton.device import (
    activate,
    add_rows,
    append_active,
    await_previous_kernel,
    deciding,
    dot_rows,
    gated,
    kept,
    list_active,
    load_rows,
    load_x,
    project,
    threshold_of,
)


@triton.jit
def deciding_kernel(
    x_ptr,
    w_ptr,
    v_ptr,  # float32 (ROWS, m)
    words_ptr,  # int32: one per WORD_ROWS neurons, as `list_active` reads them
    threshold,
    m,
    THRESHOLD: tl.constexpr,
    UP_DECIDES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    WORD_ROWS: tl.constexpr,
    EVEN_M: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """v = the deciding product of TILE neurons on tensor cores, masked, and the words by which the next kernel
    skips."""
    await_previous_kernel(PDL, False)
    neuron = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    valid = neuron < m
    z = project(x_ptr, w_ptr, neuron, valid, ROWS, BLOCK_ROWS, D, BLOCK_D, TILE, EVEN_M, True, STAGES)
    v = deciding(z, ACTIVATION, UP_DECIDES)
    limit = threshold_of(threshold, neuron[None, :], valid[None, :], THRESHOLD)
    keep = kept(v, limit) & valid[None, :] & (row < ROWS)
    v = tl.where(keep, v, 0.0)
    tl.store(v_ptr + row * m + neuron[None, :], v, mask=valid[None, :] & (row < ROWS))
    active = tl.max(keep.to(tl.int32), 0)  # the union over the rows of x
    flags = tl.reshape(active, [TILE // WORD_ROWS, WORD_ROWS])
    bits = tl.sum(flags << tl.arange(0, WORD_ROWS)[None, :], 1)
    word = tl.program_id(0) * (TILE // WORD_ROWS) + tl.arange(0, TILE // WORD_ROWS)
    tl.store(words_ptr + word, bits | (tl.sum(flags, 1) << 16), mask=word * WORD_ROWS < m)


@triton.jit
def fused_kernel(
    x_ptr,
    deciding_ptr,
    other_ptr,
    down_ptr,
    v_ptr,  # float32 (ROWS, m): of the active neurons, by slot
    indices_ptr,  # int32 (m,): the active neurons, by slot; a program's slots begin at its first neuron
    partial_ptr,  # float32 (programs, ROWS, D)
    threshold,
    m,
    THRESHOLD: tl.constexpr,
    UP_DECIDES: tl.constexpr,
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
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """All three products over this program's even share of the neurons: first its rows of the deciding weight, listing
    the active neurons, then their rows of the other weight and of W_down^T, summed in registers. No program waits for
    another. With PARTS over 1 it does so in two parts, divided at a neuron that its number decides, so that not all
    programs turn from the deciding weight to the others at one time.

    The loads of both rows are issued together, before the product that the second one has to wait for.

    EARLY: the previous kernel is waited for at the first product, when the first GATE_STAGES - 1 tiles of the deciding
    weight have been asked for: they come while it ends. That gains something where a multiprocessor has no room for
    more than this kernel's own programs, so that each starts as one of the kernel before ends.
    """
    program = tl.program_id(0)
    start = program * m // tl.num_programs(0)
    end = (program + 1) * m // tl.num_programs(0)
    if EARLY:
        x = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    else:
        await_previous_kernel(PDL, False)
        x = load_x(x_ptr, 0, ROWS, BLOCK_ROWS, D, BLOCK_D)
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
            valid = neuron < part_end
            w = load_rows(deciding_ptr, neuron, valid, 0, D, BLOCK_D, False)
            if EARLY:  # noqa: SIM102 (decided when compiling)
                if first == start:
                    await_previous_kernel(PDL, True)
                    x = load_x(x_ptr, 0, ROWS, BLOCK_ROWS, D, BLOCK_D)
            v = deciding(dot_rows(x, w), ACTIVATION, UP_DECIDES)
            limit = threshold_of(threshold, neuron[None, :], valid[None, :], THRESHOLD)
            keep = kept(v, limit) & valid[None, :] & (row < ROWS)
            last = append_active(v, keep, neuron, last, v_ptr, indices_ptr, m, row, ROWS)
        tl.debug_barrier()  # other threads of this program read the list back
        for first in tl.range(part_start, last, TILE, num_stages=STAGES):
            slot = first + tl.arange(0, TILE)
            valid = slot < last
            neuron = tl.load(indices_ptr + slot, mask=valid, other=0)
            other = load_rows(other_ptr, neuron, valid, 0, D, BLOCK_D, False)
            down = load_rows(down_ptr, neuron, valid, 0, D, BLOCK_D, False)
            v = tl.load(v_ptr + row * m + slot[None, :], mask=valid[None, :] & (row < ROWS), other=0.0)
            h = gated(v, dot_rows(x, other), ACTIVATION, UP_DECIDES)
            sums = add_rows(sums, h, down, False)
    partial = partial_ptr + program * (ROWS * D) + row * D + column
    tl.store(partial, sums, mask=(row < ROWS) & (column < D))


@triton.jit
def other_kernel(
    x_ptr,
    w_ptr,
    v_ptr,
    words_ptr,
    indices_ptr,  # int32 (m,)
    count_ptr,  # int32 (1,)
    h_ptr,  # float32 (ROWS, m), by slot among the active neurons
    words,
    m,
    UP_DECIDES: tl.constexpr,
    ACTIVATION: tl.constexpr,
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
    """h = v times the other product at the active neurons, on tensor cores."""
    await_previous_kernel(PDL, False)
    start, end, total = list_active(words_ptr, indices_ptr, words, BLOCK_WORDS, WORD_ROWS, CHUNK)
    tl.store(count_ptr, total, mask=tl.program_id(0) == 0)
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    for first in range(start, end, TILE):
        slot = first + tl.arange(0, TILE)
        valid = slot < end
        mask = valid[None, :] & (row < ROWS)
        neuron = tl.load(indices_ptr + slot, mask=valid, other=0)
        v = tl.load(v_ptr + row * m + neuron[None, :], mask=mask, other=0.0)
        z = project(x_ptr, w_ptr, neuron, valid, ROWS, BLOCK_ROWS, D, BLOCK_D, TILE, False, True, STAGES)
        tl.store(h_ptr + row * m + slot[None, :], gated(v, z, ACTIVATION, UP_DECIDES), mask=mask)


@triton.jit
def down_kernel(
    h_ptr,  # float32 (ROWS, m), by slot among the active neurons
    down_ptr,
    indices_ptr,  # int32 (m,): the active neurons
    count_ptr,
    partial_ptr,  # float32 (splits, ROWS, D)
    m,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Partial sums of h W_down over one split of the active neurons and one block of columns."""
    await_previous_kernel(PDL, False)
    total = tl.load(count_ptr)
    split = tl.program_id(0)
    start = split * total // tl.num_programs(0)
    end = (split + 1) * total // tl.num_programs(0)
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    first_column = tl.program_id(1) * BLOCK_D
    sums = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for first in tl.range(start, end, TILE, num_stages=STAGES):
        slot = first + tl.arange(0, TILE)
        valid = slot < end
        neuron = tl.load(indices_ptr + slot, mask=valid, other=0)
        h = tl.load(h_ptr + row * m + slot[None, :], mask=valid[None, :] & (row < ROWS), other=0.0)
        sums = add_rows(sums, h, load_rows(down_ptr, neuron, valid, first_column, D, BLOCK_D, False), DOT)
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
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = the sum of the partial outputs, always in the same order, cast once."""
    await_previous_kernel(PDL, EARLY)
    part = tl.arange(0, BLOCK_PARTS)[:, None]
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (part < parts) & (element < n)[None, :]
    y = tl.sum(tl.load(partial_ptr + part * n + element[None, :], mask=mask, other=0.0), axis=0)
    tl.store(y_ptr + element, y.to(y_ptr.dtype.element_ty), mask=element < n)


@triton.jit
def masked_product_kernel(
    gate_ptr,  # (rows, m) products, as up_ptr
    up_ptr,
    h_ptr,
    threshold,
    n,
    M: tl.constexpr,  # neurons, where there is a threshold for each
    THRESHOLD: tl.constexpr,
    UP_DECIDES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """h = activation(gate) * up where the deciding one of both is kept, else 0: what lies between the products of the
    dense masked path."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = element < n
    gate = tl.load(gate_ptr + element, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + element, mask=mask, other=0.0).to(tl.float32)
    limit = threshold_of(threshold, element % M, mask, THRESHOLD)
    if UP_DECIDES:
        h = tl.where(kept(up, limit), activate(gate, ACTIVATION) * up, 0.0)
    else:
        v = activate(gate, ACTIVATION)
        h = tl.where(kept(v, limit), v * up, 0.0)
    tl.store(h_ptr + element, h.to(h_ptr.dtype.element_ty), mask=mask)
