"""The Triton kernel of the sparse gated MLP on quantised weights, for one or two rows of x.

The same structure as `cats_kernels.triton.kernels.fused_kernel`; packed weights are read once and unpacked in
registers."""

# mypy: disable-error-code=no-untyped-def

import triton
import triton.language as tl

from cats_kernels.triton.device import append_active, await_previous_kernel, deciding, gated, kept, threshold_of
from cats_kernels.triton.quantized_device import (
    add_packed,
    chunk_columns,
    dot_packed,
    empty_sums,
    load_activations,
    load_packed,
    load_scales,
    sums_by_column,
)


@triton.jit
def fused_quantized_kernel(
    x_ptr,
    deciding_ptr,  # packed rows, uint8 (m, ROW_BYTES)
    deciding_scales_ptr,  # (m, GROUPS)
    deciding_zeros_ptr,  # likewise, with ZEROS
    other_ptr,
    other_scales_ptr,
    other_zeros_ptr,
    down_ptr,
    down_scales_ptr,
    down_zeros_ptr,
    z_ptr,  # float32 (ROWS, m): products with the deciding weight
    v_ptr,  # float32 (ROWS, m): of the active neurons, by slot
    indices_ptr,  # int32 (m,): the active neurons, by slot; a program's slots begin at its first neuron
    partial_ptr,  # float32 (programs, ROWS, D)
    threshold,
    m,
    low_bits,  # LOW_BITS and HIGH_BITS
    high_bits,
    THRESHOLD: tl.constexpr,
    UP_DECIDES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ZEROS: tl.constexpr,
    PAIRED: tl.constexpr,
    GATE_TILE: tl.constexpr,
    GATE_STAGES: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
    LIST: tl.constexpr,
    WORDS: tl.constexpr,
    ASM: tl.constexpr,
):
    """All three products over this program's even share of the neurons: first its rows of the deciding weight, listing
    the active neurons, then their rows of the other weight and of W_down^T, summed in registers. The list is made of
    all products at once, LIST at a time: for each tile by itself it took a third of the instructions there."""
    await_previous_kernel(PDL, False)
    x = load_activations(x_ptr, ROWS, BLOCK_ROWS, D, BITS, GROUP, CHUNK, CHUNKS, WORDS)
    program = tl.program_id(0)
    start = program * m // tl.num_programs(0)
    end = (program + 1) * m // tl.num_programs(0)
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    sums = empty_sums(BLOCK_ROWS, CHUNK, CHUNKS, WORDS)
    sums_zero = tl.zeros([BLOCK_ROWS, 1, CHUNKS, 1], tl.float32)  # what zero points add to each column of a chunk
    for first in tl.range(start, end, GATE_TILE, num_stages=GATE_STAGES):
        neuron = first + tl.arange(0, GATE_TILE)
        valid = neuron < end
        w = load_packed(deciding_ptr, neuron, valid, ROW_BYTES, CHUNK, CHUNKS, WORDS)
        scale = load_scales(deciding_scales_ptr, neuron, valid, GROUP_BYTES, GROUPS, CHUNK, CHUNKS, PAIRED)
        zero = scale
        if ZEROS:
            zero = load_scales(deciding_zeros_ptr, neuron, valid, GROUP_BYTES, GROUPS, CHUNK, CHUNKS, PAIRED)
        z = dot_packed(x, w, scale, zero, low_bits, high_bits, BITS, ZEROS, WORDS, ASM)
        tl.store(z_ptr + row * m + neuron[None, :], z, mask=valid[None, :] & (row < ROWS))
    tl.debug_barrier()  # other threads of this program read the products back
    last = start  # the end of this program's list
    for first in range(start, end, LIST):
        neuron = first + tl.arange(0, LIST)
        valid = (neuron < end)[None, :] & (row < ROWS)
        z = tl.load(z_ptr + row * m + neuron[None, :], mask=valid, other=0.0)
        v = deciding(z, ACTIVATION, UP_DECIDES)
        keep = kept(v, threshold_of(threshold, neuron[None, :], (neuron < end)[None, :], THRESHOLD)) & valid
        last = append_active(v, keep, neuron, last, v_ptr, indices_ptr, m, row, ROWS)
    tl.debug_barrier()  # and the list
    for first in tl.range(start, last, TILE, num_stages=STAGES):
        slot = first + tl.arange(0, TILE)
        valid = slot < last
        neuron = tl.load(indices_ptr + slot, mask=valid, other=0)
        other = load_packed(other_ptr, neuron, valid, ROW_BYTES, CHUNK, CHUNKS, WORDS)
        down = load_packed(down_ptr, neuron, valid, ROW_BYTES, CHUNK, CHUNKS, WORDS)
        other_scale = load_scales(other_scales_ptr, neuron, valid, GROUP_BYTES, GROUPS, CHUNK, CHUNKS, PAIRED)
        down_scale = load_scales(down_scales_ptr, neuron, valid, GROUP_BYTES, GROUPS, CHUNK, CHUNKS, PAIRED)
        v = tl.load(v_ptr + row * m + slot[None, :], mask=valid[None, :] & (row < ROWS), other=0.0)
        other_zero = other_scale
        if ZEROS:
            other_zero = load_scales(other_zeros_ptr, neuron, valid, GROUP_BYTES, GROUPS, CHUNK, CHUNKS, PAIRED)
            down_zero = load_scales(down_zeros_ptr, neuron, valid, GROUP_BYTES, GROUPS, CHUNK, CHUNKS, PAIRED)
        z = dot_packed(x, other, other_scale, other_zero, low_bits, high_bits, BITS, ZEROS, WORDS, ASM)
        h = gated(v, z, ACTIVATION, UP_DECIDES)[:, :, None, None]
        sums = add_packed(sums, h * down_scale, down, low_bits, high_bits, BITS, WORDS, ASM)
        if ZEROS:
            sums_zero += tl.sum(h * down_zero, axis=1, keep_dims=True)
    low, high = sums_by_column(sums, BITS, BLOCK_ROWS, CHUNK, CHUNKS, WORDS)
    column = chunk_columns(GROUP, BITS, CHUNK, CHUNKS)
    partial = partial_ptr + program * (ROWS * D) + tl.arange(0, BLOCK_ROWS)[:, None, None, None] * D
    mask = tl.arange(0, BLOCK_ROWS)[:, None, None, None] < ROWS
    tl.store(partial + column, low + sums_zero, mask=mask & (column < D))
    if BITS == 4:
        column += GROUP // 2
        tl.store(partial + column, high + sums_zero, mask=mask & (column < D))
