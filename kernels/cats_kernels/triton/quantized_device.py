"""Device functions of the Triton kernels for quantised weights: loads of packed rows, and products with them.

A tensor of weights is [1, TILE, CHUNKS, CHUNK]: rows, and the bytes of a row in chunks, each of one group, so that one
thread loads a chunk and needs one scale for it. A chunk has as many bytes as a load of 16 bytes has columns of x: the
compiler then gives x and the weights to threads in the same way, and moves neither in the loops. x and the sums are
[BLOCK_ROWS, 1, CHUNKS, CHUNK], in two parts where a byte holds two columns: that of the low nibbles, the first half of
each group, and that of the high ones.

With WORDS the tensors are those of `cats_kernels.triton.quantized_words` instead, x and sums being tuples either way.

GROUP: columns that share a scale, in GROUP_BYTES bytes; GROUPS: of a row, in ROW_BYTES bytes; CHUNKS: a power of two.
"""

# mypy: disable-error-code=no-untyped-def

import triton
import triton.language as tl

from cats_kernels.triton.quantized_words import add_words, columns_of, dot_words, load_fixed, no_sums

LOW_BITS, HIGH_BITS = 0x4B000000, 0x49000000
"""2^23 and 2^19 as float32: what `low_values` and `high_values` write into."""


@triton.jit
def low_values(w, low_bits, BITS: tl.constexpr):
    """q of int8 data read as uint8, or nibble - 8 of the low nibbles, as float32.

    Written into the mantissa of 2^23, of which one float addition takes it out exactly: fewer instructions than a
    conversion, and not on the few units that convert. ``low_bits`` are those of 2^23 (`LOW_BITS`): an argument, since
    one instruction does the masking and the writing only if one of its two numbers is no constant."""
    if BITS == 8:
        bits = (w.to(tl.int32) ^ 0x80) | low_bits
        return bits.to(tl.float32, bitcast=True) - 8388736.0  # 2^23 + 128
    else:
        bits = (w.to(tl.int32) & 0x0F) | low_bits
        return bits.to(tl.float32, bitcast=True) - 8388616.0  # 2^23 + 8


@triton.jit
def high_values(w, high_bits):
    """nibble - 8 of the high nibbles, as float32: not shifted, but in the mantissa of 2^19, whose bit 4 is worth 1."""
    bits = (w.to(tl.int32) & 0xF0) | high_bits
    return bits.to(tl.float32, bitcast=True) - 524296.0  # 2^19 + 8


@triton.jit
def chunk_columns(GROUP: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The column of each byte [1, 1, CHUNKS, CHUNK], that of its low nibble if it has two."""
    first_byte = tl.arange(0, CHUNKS)[None, None, :, None] * CHUNK
    byte = tl.arange(0, CHUNK)[None, None, None, :]
    column = first_byte + byte
    if BITS == 4:
        column += first_byte // (GROUP // 2) * (GROUP // 2)
    return tl.max_contiguous(tl.multiple_of(column, [1, 1, 1, CHUNK]), [1, 1, 1, CHUNK])


@triton.jit
def load_columns(x_ptr, column, ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, D: tl.constexpr):
    """Columns of every row of x as float32 [BLOCK_ROWS, 1, CHUNKS, CHUNK], 0 beyond D."""
    row = tl.arange(0, BLOCK_ROWS)[:, None, None, None]
    return tl.load(x_ptr + row * D + column, mask=(row < ROWS) & (column < D), other=0.0).to(tl.float32)


@triton.jit
def load_activations(
    x_ptr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Every row of x as `dot_packed` takes it: columns of low nibbles (or all), of high ones, and sums of chunks."""
    if WORDS:
        return load_fixed(x_ptr, ROWS, BLOCK_ROWS, D, BITS, GROUP, CHUNK, CHUNKS)
    else:
        column = chunk_columns(GROUP, BITS, CHUNK, CHUNKS)
        low = load_columns(x_ptr, column, ROWS, BLOCK_ROWS, D)
        high = load_columns(x_ptr, column + GROUP // 2, ROWS, BLOCK_ROWS, D) if BITS == 4 else low
        return low, high, tl.sum(low + high if BITS == 4 else low, axis=3, keep_dims=True)


@triton.jit
def load_packed(
    w_ptr, row, valid, ROW_BYTES: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, WORDS: tl.constexpr
):
    """Packed rows [1, TILE, CHUNKS, CHUNK], or words. A weight is read once a call, so it should leave L2 first."""
    size: tl.constexpr = 4 if WORDS else 1
    if WORDS:
        w_ptr = w_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    first = tl.arange(0, CHUNKS)[None, None, :, None] * (CHUNK // size)
    place = first + tl.arange(0, CHUNK // size)[None, None, None, :]
    pointers = w_ptr + row.to(tl.int64)[None, :, None, None] * (ROW_BYTES // size) + place
    mask = valid[None, :, None, None]
    if ROW_BYTES == CHUNK * CHUNKS:
        return tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first")
    else:
        return tl.load(pointers, mask=mask & (place < ROW_BYTES // size), other=0, eviction_policy="evict_first")


@triton.jit
def load_scales(
    scale_ptr,
    row,
    valid,
    GROUP_BYTES: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PAIRED: tl.constexpr,
):
    """The scale (or zero point) of each chunk of rows, float32 [1, TILE, CHUNKS, 1], or [1, TILE, 1, 1] of a group per
    row; 0 where a row is not valid.

    PAIRED: scales of 2 bytes are loaded as words of two, since an asynchronous copy has at least 4 bytes."""
    if GROUPS == 1:
        group = tl.zeros([1, 1, 1, 1], tl.int32)
    else:
        group = tl.arange(0, CHUNKS)[None, None, :, None] * CHUNK // GROUP_BYTES
    row = row.to(tl.int64)[None, :, None, None]
    mask = valid[None, :, None, None] & (group < GROUPS)
    if PAIRED:
        if GROUPS % 2 == 0:
            word, second = row * (GROUPS // 2) + (group >> 1), group & 1
        else:
            word, second = (row * GROUPS + group) >> 1, (row.to(tl.int32) * GROUPS + group) & 1
        words = tl.load(scale_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + word, mask=mask, other=0)
        return (words >> (16 * second)).to(tl.int16).to(scale_ptr.dtype.element_ty, bitcast=True).to(tl.float32)
    else:
        return tl.load(scale_ptr + row * GROUPS + group, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def dot_packed(
    x,
    w,
    scale,
    zero,
    low_bits,
    high_bits,
    BITS: tl.constexpr,
    ZEROS: tl.constexpr,
    WORDS: tl.constexpr,
    ASM: tl.constexpr,
):
    """x of `load_activations` times packed rows: float32 [BLOCK_ROWS, TILE]. A thread sums its chunk before it
    multiplies with its scale."""
    if WORDS:
        return dot_words(x, w, scale, zero, BITS, ZEROS, ASM)
    else:
        x_low, x_high, x_sum = x
        z = tl.sum(x_low * low_values(w, low_bits, BITS), axis=3, keep_dims=True)
        if BITS == 4:
            z += tl.sum(x_high * high_values(w, high_bits), axis=3, keep_dims=True)
        z *= scale
        if ZEROS:
            z += x_sum * zero
        return tl.sum(tl.sum(z, axis=3), axis=2)


@triton.jit
def empty_sums(BLOCK_ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, WORDS: tl.constexpr):
    """What `add_packed` begins with."""
    if WORDS:
        return no_sums(BLOCK_ROWS, CHUNK, CHUNKS)
    else:
        none = tl.zeros([BLOCK_ROWS, 1, CHUNKS, CHUNK], tl.float32)
        return none, none


@triton.jit
def add_packed(sums, h, w, low_bits, high_bits, BITS: tl.constexpr, WORDS: tl.constexpr, ASM: tl.constexpr):
    """Sums plus packed rows with coefficients h, scales included, [BLOCK_ROWS, TILE, CHUNKS, 1]."""
    if WORDS:
        return add_words(sums, h, w, BITS, ASM)
    else:
        low, high = sums
        low += tl.sum(h * low_values(w, low_bits, BITS), axis=1, keep_dims=True)
        if BITS == 4:
            high += tl.sum(h * high_values(w, high_bits), axis=1, keep_dims=True)
        return low, high


@triton.jit
def sums_by_column(
    sums, BITS: tl.constexpr, BLOCK_ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, WORDS: tl.constexpr
):
    """The sums of the columns of low nibbles (or all) and of high ones, [BLOCK_ROWS, 1, CHUNKS, CHUNK]."""
    if WORDS:
        return columns_of(sums, BITS, BLOCK_ROWS, CHUNK, CHUNKS)
    else:
        return sums
