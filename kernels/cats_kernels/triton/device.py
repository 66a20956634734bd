"""Device functions that the Triton kernels share: the gate activation, the mask rule, products with weight rows (by
multiply-adds, or on tensor cores where DOT is set), and the even division of the active neurons among programs.

UP_DECIDES: the up projection decides and the gate's is the other product, else the reverse. THRESHOLD: what the
argument threshold is: "number" a float32, "one" a pointer to one float32, "vector" a pointer to one per neuron."""

# mypy: disable-error-code=no-untyped-def

import triton
import triton.language as tl

from cats_kernels.triton.launch import INTERPRETED

UPCAST = tl.constexpr(INTERPRETED)
"""The interpreter holds bfloat16 as integers, which its dot would multiply as such."""


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The gate activation in float32 (eq. 2 of the paper): SiLU, or GELU's tanh form written as z * sigmoid(2 t)."""
    if ACTIVATION == "silu":
        return z * tl.sigmoid(z)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))


@triton.jit
def kept(v, threshold):
    """The mask (eq. 5), negated so that ties and NaN are kept: not (|v| < threshold), compared in float32."""
    return (tl.abs(v) < threshold) == 0


@triton.jit
def threshold_of(threshold, neuron, valid, THRESHOLD: tl.constexpr):
    """The threshold of the neurons, in the shape of `neuron` or one for all."""
    if THRESHOLD == "number":
        return threshold
    elif THRESHOLD == "one":
        return tl.load(threshold)
    else:
        tl.static_assert(THRESHOLD == "vector")
        return tl.load(threshold + neuron, mask=valid, other=0.0)


@triton.jit
def append_active(v, keep, neuron, last, v_ptr, indices_ptr, m, row, ROWS: tl.constexpr):
    """Write the neurons that a row keeps, and their v [BLOCK_ROWS, neurons], to the slots from ``last`` on; the new end
    of the list."""
    active = tl.max(keep.to(tl.int32), 0)
    slot = last + tl.cumsum(active, 0) - active
    tl.store(indices_ptr + slot, neuron, mask=active == 1)
    mask = (active == 1)[None, :] & (row < ROWS)
    tl.store(v_ptr + row * m + slot[None, :], tl.where(keep, v, 0.0), mask=mask)
    return last + tl.sum(active, 0)


@triton.jit
def deciding(z, ACTIVATION: tl.constexpr, UP_DECIDES: tl.constexpr):
    """The value that is compared with the threshold, of the deciding product z."""
    if UP_DECIDES:
        return z
    else:
        return activate(z, ACTIVATION)


@triton.jit
def load_x(x_ptr, first_column, ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns [first_column, first_column + BLOCK_D) of every row of x as float32 [BLOCK_ROWS, BLOCK_D]."""
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    column = first_column + tl.arange(0, BLOCK_D)[None, :]
    if ROWS == BLOCK_ROWS and D % BLOCK_D == 0:
        x = tl.load(x_ptr + row * D + column)
    else:
        x = tl.load(x_ptr + row * D + column, mask=(row < ROWS) & (column < D), other=0.0)
    return x.to(tl.float32)


@triton.jit
def load_rows(w_ptr, row, valid, first_column, D: tl.constexpr, BLOCK_D: tl.constexpr, ALL_VALID: tl.constexpr):
    """Weight rows [TILE, BLOCK_D] in their own dtype. A weight is read once a call, so it should leave L2 first."""
    column = first_column + tl.arange(0, BLOCK_D)[None, :]
    pointers = w_ptr + row.to(tl.int64)[:, None] * D + column
    if D % BLOCK_D == 0:
        if ALL_VALID:
            return tl.load(pointers, eviction_policy="evict_first")
        else:
            return tl.load(pointers, mask=valid[:, None], other=0.0, eviction_policy="evict_first")
    else:
        mask = valid[:, None] & (column < D)
        return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def dot_rows(x, w):
    """x [BLOCK_ROWS, BLOCK_D] (float32) times w [TILE, BLOCK_D] transposed: float32 [BLOCK_ROWS, TILE].

    Plain multiply-adds: for one or two rows the tensor cores would wait for memory all the same, and float32 is exact.
    """
    return tl.sum(x[:, None, :] * w.to(tl.float32)[None, :, :], axis=2)


@triton.jit
def dot(a, b, sums):
    """sums + a b on tensor cores. float32 goes in three TF32 products, each chunk added to sums in full float32."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
    else:
        return tl.dot(a, b, sums, input_precision="tf32x3")


@triton.jit
def add_rows(sums, h, w, DOT: tl.constexpr):
    """sums [BLOCK_ROWS, BLOCK_D] + h [BLOCK_ROWS, TILE] (float32) times w [TILE, BLOCK_D]."""
    if DOT:
        return dot(h.to(w.dtype), w, sums)
    else:
        return sums + tl.sum(h[:, :, None] * w.to(tl.float32)[None, :, :], axis=1)


@triton.jit
def gated(v, z, ACTIVATION: tl.constexpr, UP_DECIDES: tl.constexpr):
    """The deciding value v times the other product z (its activation, where up decides), and 0 where v is 0, as dropped
    ones are stored: a dropped neuron must not bring in an infinite z."""
    if UP_DECIDES:
        return tl.where(v == 0, 0.0, v * activate(z, ACTIVATION))
    else:
        return tl.where(v == 0, 0.0, v * z)


@triton.jit
def project(
    x_ptr,
    w_ptr,
    row,
    valid,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    ALL_VALID: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x times the weight rows `row` transposed, for any D: float32 [BLOCK_ROWS, TILE].

    DOT: a pipeline of STAGES asynchronous copies feeds the tensor cores.
    """
    if DOT:
        x_row = tl.arange(0, BLOCK_ROWS)[None, :]
        z = tl.zeros([TILE, BLOCK_ROWS], tl.float32)
        for first_column in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            column = first_column + tl.arange(0, BLOCK_D)[:, None]
            x_mask = (x_row < ROWS) & (column < D)
            x = tl.load(x_ptr + x_row * D + column, mask=x_mask, other=0.0)
            w = load_rows(w_ptr, row, valid, first_column, D, BLOCK_D, ALL_VALID)
            z = dot(w, x, z)
        return tl.trans(z)
    else:
        w = load_rows(w_ptr, row, valid, 0, D, BLOCK_D, ALL_VALID)
        sums = dot_rows(load_x(x_ptr, 0, ROWS, BLOCK_ROWS, D, BLOCK_D), w)
        for first_column in tl.static_range(BLOCK_D, D, BLOCK_D):
            x = load_x(x_ptr, first_column, ROWS, BLOCK_ROWS, D, BLOCK_D)
            sums += dot_rows(x, load_rows(w_ptr, row, valid, first_column, D, BLOCK_D, ALL_VALID))
        return sums


@triton.jit
def list_active(words_ptr, indices_ptr, words, BLOCK_WORDS: tl.constexpr, WORD_ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Write this program's even share of the active neurons to indices[start:end] and return (start, end, total).

    words[k] describes neurons k * WORD_ROWS ...: a bit for each active one below bit 16, their number from bit 16 up.
    Active neurons are numbered in order, so the division does not depend on how the deciding kernel was scheduled.
    Every program reads all words (7 KB at m = 14336, from L2) but expands only those of its own share, usually one
    chunk.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    word = tl.arange(0, BLOCK_WORDS)
    counts = tl.load(words_ptr + word, mask=word < words, other=0) >> 16
    ends = tl.cumsum(counts, 0)
    total = tl.sum(counts, 0)
    start = program * total // programs
    end = (program + 1) * total // programs
    before = (ends <= start) & (word < words)
    first = tl.sum(before.to(tl.int32), 0)
    position = tl.max(tl.where(before, ends, 0), 0)
    element = tl.arange(0, CHUNK)
    while position < end:
        mine = first + element // WORD_ROWS
        bits = tl.load(words_ptr + mine, mask=mine < words, other=0)
        active = (bits >> (element % WORD_ROWS)) & 1
        slot = position + tl.cumsum(active, 0) - active
        inside = (active == 1) & (slot >= start) & (slot < end)
        tl.store(indices_ptr + slot, first * WORD_ROWS + element, mask=inside)
        position += tl.sum(active, 0)
        first += CHUNK // WORD_ROWS
    tl.debug_barrier()  # other threads of this program read the indices back
    return start, end, total


@triton.jit
def await_previous_kernel(PDL: tl.constexpr, EARLY: tl.constexpr):
    """Under programmatic dependent launch: wait for the previous kernel's results, then let the next kernel start; or
    let it start at once (EARLY), which is as safe: it waits for this kernel, which waits for the previous one."""
    if PDL:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
        if not EARLY:
            tl.extra.cuda.gdc_launch_dependents()
