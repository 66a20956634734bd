"""Device functions of the Triton kernel for quantised weights that take four bytes of a row at a time, as int32 words.

For x of 2 bytes an element. A tensor of weights is [1, TILE, CHUNKS, WORDS]: the words of the chunks of
`cats_kernels.triton.quantized_device`. In the products of x with rows, x is a pair of signed bytes per chunk (block
floating point), so that one instruction multiplies and adds four of its numbers; in the sums over rows a byte is
written into the mantissa of a float32, whose constant part is subtracted once at the end. That is two thirds of the
instructions that one weight at a time takes, or fewer.

BITS, GROUP, CHUNK, CHUNKS as there; WORDS: CHUNK // 4. ASM: with instructions of the GPU that Triton's interpreter has
not, and without which the same is computed in several.
"""

# mypy: disable-error-code=no-untyped-def

import triton
import triton.language as tl

SHIFT = tl.constexpr(13)
"""x is rounded to multiples of 2^-13 of the power of two that is at most its largest magnitude in a chunk: bfloat16
numbers down to a 64th of that are exact, float16 ones down to an eighth."""
NIBBLE_BIAS, BYTE_BIAS = tl.constexpr(128.0 + 8.0), tl.constexpr(32768.0 + 128.0)
"""What `byte_value` adds to nibbles - 8, and to int8 weights whose sign bit is flipped."""


@triton.jit
def dot_bytes(a, b, sums, BITS: tl.constexpr, ASM: tl.constexpr):
    """Sums plus products of the four bytes of words: those of a are signed, those of b with 8 bits only."""
    if ASM:
        name: tl.constexpr = "dp4a.s32.s32" if BITS == 8 else "dp4a.s32.u32"
        return tl.inline_asm_elementwise(
            name + " $0, $1, $2, $3;", "=r,r,r,r", [a, b, sums], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for k in tl.static_range(4):
            sums += ((a << (24 - 8 * k)) >> 24) * ((b << (24 - 8 * k)) >> 24)
        return sums


@triton.jit
def byte_value(word, BYTE: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """A byte of words as float32: 2^7 + the nibble that it holds, or with 8 bits 2^15 + the byte."""
    if ASM:
        exponent: tl.constexpr = 0x47000000 if BITS == 8 else 0x43000000
        selector: tl.constexpr = 0x7404 | BYTE << 4 if BITS == 8 else 0x7044 | BYTE << 8
        bits = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [word, exponent, selector], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        byte = (word >> (8 * BYTE)) & 0xFF
        bits = byte << 8 | 0x47000000 if BITS == 8 else byte << 16 | 0x43000000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def load_byte_columns(x_ptr, column, row, byte, ROWS: tl.constexpr, D: tl.constexpr):
    """x of the columns so many after the given ones, float32, 0 beyond D."""
    at = column + byte
    return tl.load(x_ptr + row * D + at, mask=(row < ROWS) & (at < D), other=0.0).to(tl.float32)


@triton.jit
def largest_of(a, b, c, d):
    """The bits of the largest magnitude in a chunk, int32: they are ordered as magnitudes are, NaN last."""
    a, b = a.to(tl.int32, bitcast=True) & 0x7FFFFFFF, b.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    c, d = c.to(tl.int32, bitcast=True) & 0x7FFFFFFF, d.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(tl.maximum(tl.maximum(a, b), tl.maximum(c, d)), axis=3, keep_dims=True)


@triton.jit
def fixed_words(a, b, c, d, inverse):
    """Fine and coarse bytes of four columns times inverse, and the sums of the four integers."""
    a, b = tl.floor(a * inverse + 0.5).to(tl.int32), tl.floor(b * inverse + 0.5).to(tl.int32)
    c, d = tl.floor(c * inverse + 0.5).to(tl.int32), tl.floor(d * inverse + 0.5).to(tl.int32)
    fine = (a & 0xFF) | (b & 0xFF) << 8 | (c & 0xFF) << 16 | d << 24
    coarse = (a + 128 >> 8 & 0xFF) | (b + 128 >> 8 & 0xFF) << 8 | (c + 128 >> 8 & 0xFF) << 16 | (d + 128 >> 8) << 24
    return fine, coarse, a + b + c + d


@triton.jit
def load_fixed(
    x_ptr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """x as integers q of two bytes, 256 * coarse + fine, and a power of two per chunk.

    Returns:
        fine and coarse bytes of the columns of low nibbles (or of all), then of high ones: words
        [BLOCK_ROWS, 1, CHUNKS, WORDS]; sum of q in a chunk, int32, and the value of q = 1, float32, NaN where x is not
        finite: [BLOCK_ROWS, 1, CHUNKS, 1].
    """
    first_byte = tl.arange(0, CHUNKS)[None, None, :, None] * CHUNK
    column = first_byte + tl.arange(0, CHUNK // 4)[None, None, None, :] * 4
    if BITS == 4:
        column += first_byte // (GROUP // 2) * (GROUP // 2)
    row = tl.arange(0, BLOCK_ROWS)[:, None, None, None]
    x0 = load_byte_columns(x_ptr, column, row, 0, ROWS, D)
    x1 = load_byte_columns(x_ptr, column, row, 1, ROWS, D)
    x2 = load_byte_columns(x_ptr, column, row, 2, ROWS, D)
    x3 = load_byte_columns(x_ptr, column, row, 3, ROWS, D)
    largest = largest_of(x0, x1, x2, x3)
    if BITS == 4:
        high0 = load_byte_columns(x_ptr, column, row, GROUP // 2, ROWS, D)
        high1 = load_byte_columns(x_ptr, column, row, GROUP // 2 + 1, ROWS, D)
        high2 = load_byte_columns(x_ptr, column, row, GROUP // 2 + 2, ROWS, D)
        high3 = load_byte_columns(x_ptr, column, row, GROUP // 2 + 3, ROWS, D)
        largest = tl.maximum(largest, largest_of(high0, high1, high2, high3))
    exponent = tl.maximum(largest & 0x7F800000, (SHIFT + 1) << 23) - (SHIFT << 23)
    finite = largest < 0x7F800000
    unit = exponent.to(tl.float32, bitcast=True)
    inverse = tl.where(finite, ((254 << 23) - exponent).to(tl.float32, bitcast=True), 0.0)
    fine_low, coarse_low, total = fixed_words(x0, x1, x2, x3, inverse)
    fine_high, coarse_high = fine_low, coarse_low
    if BITS == 4:
        fine_high, coarse_high, more = fixed_words(high0, high1, high2, high3, inverse)
        total += more
    unit = tl.where(finite, unit, float("nan"))
    return fine_low, coarse_low, fine_high, coarse_high, tl.sum(total, axis=3, keep_dims=True), unit


@triton.jit
def dot_words(x, w, scale, zero, BITS: tl.constexpr, ZEROS: tl.constexpr, ASM: tl.constexpr):
    """x of `load_fixed` times packed rows: float32 [BLOCK_ROWS, TILE]. Sums in a chunk are exact."""
    fine_low, coarse_low, fine_high, coarse_high, total, unit = x
    fine, coarse = tl.zeros_like(w), tl.zeros_like(w)
    if BITS == 8:
        low = w
    else:
        low, high = w & 0x0F0F0F0F, w >> 4 & 0x0F0F0F0F
        fine, coarse = dot_bytes(fine_high, high, fine, BITS, ASM), dot_bytes(coarse_high, high, coarse, BITS, ASM)
    fine, coarse = dot_bytes(fine_low, low, fine, BITS, ASM), dot_bytes(coarse_low, low, coarse, BITS, ASM)
    q = tl.sum(256 * coarse + fine, axis=3, keep_dims=True)
    if BITS == 4:
        q -= 8 * total
    z = q.to(tl.float32) * (scale * unit)
    if ZEROS:
        z += total.to(tl.float32) * unit * zero
    return tl.sum(tl.sum(z, axis=3), axis=2)


@triton.jit
def no_sums(BLOCK_ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """What `add_words` begins with."""
    none = tl.zeros([BLOCK_ROWS, 1, CHUNKS, CHUNK // 4], tl.float32)
    return none, none, none, none, none, none, none, none, tl.zeros([BLOCK_ROWS, 1, CHUNKS, 1], tl.float32)


@triton.jit
def add_words(sums, h, w, BITS: tl.constexpr, ASM: tl.constexpr):
    """Sums plus packed rows with coefficients h, scales included, [BLOCK_ROWS, TILE, CHUNKS, 1].

    Sums are of the four columns of low bytes' nibbles (or of bytes), of those of high nibbles, and of h."""
    s0, s1, s2, s3, t0, t1, t2, t3, total = sums
    low = w ^ -0x7F7F7F80 if BITS == 8 else w & 0x0F0F0F0F
    s0 += tl.sum(h * byte_value(low, 0, BITS, ASM), axis=1, keep_dims=True)
    s1 += tl.sum(h * byte_value(low, 1, BITS, ASM), axis=1, keep_dims=True)
    s2 += tl.sum(h * byte_value(low, 2, BITS, ASM), axis=1, keep_dims=True)
    s3 += tl.sum(h * byte_value(low, 3, BITS, ASM), axis=1, keep_dims=True)
    if BITS == 4:
        high = w >> 4 & 0x0F0F0F0F
        t0 += tl.sum(h * byte_value(high, 0, BITS, ASM), axis=1, keep_dims=True)
        t1 += tl.sum(h * byte_value(high, 1, BITS, ASM), axis=1, keep_dims=True)
        t2 += tl.sum(h * byte_value(high, 2, BITS, ASM), axis=1, keep_dims=True)
        t3 += tl.sum(h * byte_value(high, 3, BITS, ASM), axis=1, keep_dims=True)
    total += tl.sum(h, axis=1, keep_dims=True)
    return s0, s1, s2, s3, t0, t1, t2, t3, total


@triton.jit
def columns_of(sums, BITS: tl.constexpr, BLOCK_ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Sums of `add_words` by column, without what `byte_value` adds: low and high, [BLOCK_ROWS, 1, CHUNKS, CHUNK]."""
    s0, s1, s2, s3, t0, t1, t2, t3, total = sums
    bias = total * (BYTE_BIAS if BITS == 8 else NIBBLE_BIAS)
    low = tl.reshape(tl.join(tl.join(s0, s2), tl.join(s1, s3)), [BLOCK_ROWS, 1, CHUNKS, CHUNK])
    high = tl.reshape(tl.join(tl.join(t0, t2), tl.join(t1, t3)), [BLOCK_ROWS, 1, CHUNKS, CHUNK])
    return low - bias, high - bias
