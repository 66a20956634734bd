"""Weight-only quantisation of a weight (m, d): int8 or int4 along d, so that a neuron's row stays whole.

Groups of ``group_size`` neighbouring columns of a row share a scale and, where it is not symmetric, a zero point. The
last group of a row may be ragged, where ``group_size`` does not divide d. The value of a weight is

    int8:  w = q * scale + zero          q in [-128, 127]
    int4:  w = (n - 8) * scale + zero    n in [0, 15], a nibble

with zero = 0 where there are no zero points. In a group of G int4 columns byte j, 0 <= j < G / 2, holds column j in its
low nibble and column j + G / 2 in its high one, which is the layout of llama.cpp's Q4_0; a ragged last group is padded
with nibble 8, the value zero. llama.cpp's Q8_0 and Q4_0 blocks (groups of 32, float16 scales) are taken byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

BITS = (8, 4)
GROUP_SIZES = (32, 64, 128, 256)
"""Columns of a group; int8 may have one group of a whole row besides."""
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ZERO_NIBBLE = 8
CHUNK = 2**18
"""Weights at a time while quantising, so that float32 copies of a large weight never exist whole."""
GPU_CHUNK = 2**23
"""On a GPU, where each piece is some ten launches: in pieces of 2**18 a prompt took 3.5 s on an H100, nearly all of it
launches (Mistral-7B's shape)."""


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A quantised weight (m, d); row j belongs to neuron j.

    Attributes:
        data: int8 (m, d), or for 4 bits uint8 (m, groups * group_size // 2), two columns to the byte as above.
        scales: (m, groups), float32, bfloat16 or float16; groups = ceil(d / group_size).
        zeros: (m, groups) in the dtype of ``scales``, or None: symmetric.
        bits: 8 or 4.
        group_size: 32, 64, 128 or 256; for 8 bits d as well, one group per row.
        d: columns.

    Raises:
        TypeError, ValueError: one sentence naming what is wrong and what is allowed.
    """

    data: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int
    d: int

    def __post_init__(self) -> None:
        check_format(self.bits, self.group_size, self.d)
        data, scales, zeros = self.data, self.scales, self.zeros
        wanted = torch.int8 if self.bits == 8 else torch.uint8
        if data.dtype != wanted:
            raise TypeError(f"data is {data.dtype}; with {self.bits} bits it must be {wanted}.")
        columns = data_columns(self.bits, self.group_size, self.d)
        if data.dim() != 2 or data.shape[0] == 0 or data.shape[1] != columns:
            raise ValueError(f"data is {tuple(data.shape)}; it must be (m, {columns}) for d = {self.d}, m positive.")
        if scales.dtype not in SCALE_DTYPES:
            raise TypeError(f"scales are {scales.dtype}; they must be float32, bfloat16 or float16.")
        shape = (data.shape[0], self.groups)
        for name, tensor in (("scales", scales), ("zeros", zeros)):
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} are {tuple(tensor.shape)}; they must be (m, groups) = {shape}.")
            if tensor.device != data.device:
                raise ValueError(f"{name} are on {tensor.device}; they must be on {data.device} as data is.")
        if zeros is not None and zeros.dtype != scales.dtype:
            raise TypeError(f"zeros are {zeros.dtype}; they must be {scales.dtype} as scales are.")

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return count_groups(self.group_size, self.d)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, d)."""
        return self.data.shape[0], self.d

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """data, scales and zeros."""
        return self.data, self.scales, self.zeros

    @property
    def bytes_per_row(self) -> int:
        """Bytes that reading one neuron's row takes, scales and zero points included."""
        parts = [tensor for tensor in self.tensors if tensor is not None]
        return sum(tensor.shape[1] * tensor.element_size() for tensor in parts)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.data.shape[0] * self.bytes_per_row

    def is_contiguous(self) -> bool:
        """Whether all its tensors are."""
        return all(tensor is None or tensor.is_contiguous() for tensor in self.tensors)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same on another device."""
        return self._with([None if tensor is None else tensor.to(device) for tensor in self.tensors])

    def rows(self, first: int, last: int) -> QuantizedWeight:
        """Rows [first, last), as a view."""
        return self._with([None if tensor is None else tensor[first:last] for tensor in self.tensors])

    def _with(self, tensors: list[Tensor | None]) -> QuantizedWeight:
        data, scales, zeros = tensors
        assert data is not None and scales is not None
        return QuantizedWeight(data, scales, zeros, self.bits, self.group_size, self.d)

    def __repr__(self) -> str:
        names = [field.name for field in fields(self)[3:]]
        shown = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        kind = "symmetric" if self.zeros is None else "with zero points"
        return f"QuantizedWeight({self.shape[0]} x {self.d}, {shown}, {kind}, scales {self.scales.dtype})"


def check_format(bits: int, group_size: int, d: int) -> None:
    """Raise ValueError in one sentence unless a weight with d columns can be so quantised."""
    if isinstance(bits, bool) or bits not in BITS:
        raise ValueError(f"bits is {bits!r}; allowed: 8 or 4.")
    if isinstance(d, bool) or not isinstance(d, int | torch.SymInt) or d < 1:
        raise ValueError(f"d is {d!r}; it must be a positive whole number.")
    if group_size in GROUP_SIZES and not isinstance(group_size, bool):
        return
    if bits != 8 or isinstance(group_size, bool) or group_size != d:
        per_row = f" or d = {d}, one group per row" if bits == 8 else ""
        raise ValueError(f"group_size is {group_size!r}; allowed: {', '.join(map(str, GROUP_SIZES))}{per_row}.")


def count_groups(group_size: int, d: int) -> int:
    """Groups of a row of d columns, the last one perhaps ragged."""
    return -(-d // group_size)


def data_columns(bits: int, group_size: int, d: int) -> int:
    """Bytes of ``data`` per row."""
    return d if bits == 8 else count_groups(group_size, d) * group_size // 2


def pack(nibbles: Tensor, group_size: int) -> Tensor:
    """Nibbles (m, groups * group_size), values 0 to 15 -> uint8 (m, groups * group_size // 2)."""
    m, columns = nibbles.shape
    low, high = nibbles.to(torch.uint8).view(m, columns // group_size, 2, group_size // 2).unbind(2)
    return (low | (high << 4)).reshape(m, columns // 2)


def unpack(data: Tensor, group_size: int) -> Tensor:
    """The inverse of `pack`: uint8 (m, groups * group_size // 2) -> uint8 (m, groups * group_size)."""
    m, half = data.shape
    grouped = data.view(m, half // (group_size // 2), 1, group_size // 2)
    return torch.cat([grouped & 15, grouped >> 4], 2).reshape(m, 2 * half)


def quantize(
    weight: Tensor,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    scale_dtype: torch.dtype | None = None,
) -> QuantizedWeight:
    """Round a weight to the nearest value of each group's grid.

    Symmetric int8 has scale = max|w| / 127. Symmetric int4 lets the weight of largest magnitude be -8 times its scale,
    whose sign is chosen for it, as Q4_0 does; all 16 values are used. With zero points the grid spans [min w, max w].
    Weights are rounded to the grid of the scales as they are stored, so that their own rounding adds no error.

    Args:
        weight: (m, d), floating point and finite.
        bits: 8 or 4.
        group_size: columns that share a scale: 32, 64, 128 or 256; None: d for 8 bits (one group per row), else 128.
        symmetric: without zero points.
        scale_dtype: of scales and zero points; None: that of the weight, float32 for a float64 one.

    Raises:
        TypeError, ValueError: one sentence naming what is wrong, a weight that is not finite among it.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight is {kind}; it must be a floating point tensor.")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight is {tuple(weight.shape)}; it must be (m, d), m and d positive.")
    m, d = weight.shape
    if group_size is None:
        group_size = d if bits == 8 else 128
    check_format(bits, group_size, d)
    dtype = scale_dtype or (torch.float32 if weight.dtype == torch.float64 else weight.dtype)
    if dtype not in SCALE_DTYPES:
        raise TypeError(f"scale_dtype is {dtype}; it must be float32, bfloat16 or float16.")
    groups, device = count_groups(group_size, d), weight.device
    wanted = torch.int8 if bits == 8 else torch.uint8
    data = torch.empty(m, data_columns(bits, group_size, d), dtype=wanted, device=device)
    scales = torch.empty(m, groups, dtype=dtype, device=device)
    zeros = None if symmetric else torch.empty_like(scales)
    result = QuantizedWeight(data, scales, zeros, bits, group_size, d)
    for first, last in row_chunks(m, d, device):
        # contiguous: sums over groups of a transposed weight took three times as long
        _quantize_rows(weight.detach()[first:last].float().contiguous(), result.rows(first, last))
    return result


def from_ggml_blocks(blocks: Tensor, bits: int, d: int) -> QuantizedWeight:
    """Rows of llama.cpp's Q8_0 (8 bits) or Q4_0 (4 bits) blocks as they lie in a GGUF file, without a change of a bit.

    Args:
        blocks: uint8 (m, d / 32 * 34), or with 4 bits (m, d / 32 * 18): per 32 columns a float16 scale and their data.
        bits: 8 or 4.
        d: columns, a multiple of 32.

    Raises:
        TypeError, ValueError: one sentence naming what is wrong.
    """
    check_format(bits, 32, d)
    size = 2 + 32 * bits // 8
    if blocks.dtype != torch.uint8:
        raise TypeError(f"blocks are {blocks.dtype}; they must be torch.uint8.")
    if d % 32 or blocks.dim() != 2 or blocks.shape[1] != d // 32 * size:
        raise ValueError(
            f"blocks are {tuple(blocks.shape)}; they must be (m, d / 32 * {size}), d = {d} by whole blocks."
        )
    parts = blocks.reshape(blocks.shape[0], d // 32, size)
    scales = parts[:, :, :2].contiguous().view(torch.float16).squeeze(2)
    data = parts[:, :, 2:].reshape(blocks.shape[0], -1)
    return QuantizedWeight(data.view(torch.int8) if bits == 8 else data, scales, None, bits, 32, d)


def row_chunks(m: int, d: int, device: torch.device | None = None) -> Iterator[tuple[int, int]]:
    """Ranges of rows with about `CHUNK` weights each, on a GPU about `GPU_CHUNK`."""
    chunk = CHUNK if device is None or device.type == "cpu" else GPU_CHUNK
    step = max(1, chunk // d)
    for first in range(0, m, step):
        yield first, min(m, first + step)


def _quantize_rows(weight: Tensor, out: QuantizedWeight) -> None:
    """Quantise float32 rows into ``out``'s tensors."""
    m, d = weight.shape
    missing = out.groups * out.group_size - d
    # repeats of the last column change neither the smallest nor the largest value of its group
    if missing:
        weight = torch.cat([weight, weight[:, -1:].expand(m, missing)], 1)
    grouped = weight.reshape(m, out.groups, out.group_size)
    low, high = grouped.amin(2), grouped.amax(2)
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise ValueError("weight has NaN or infinity; it must be finite.")
    scales, zeros = _grid(low, high, out)
    out.scales.copy_(scales)
    if out.zeros is not None:
        out.zeros.copy_(zeros)
    scales, zeros = out.scales.float(), zeros if out.zeros is None else out.zeros.float()
    if not bool((scales.isfinite() & zeros.isfinite()).all()):
        raise ValueError(f"weight is too large for scales of {out.scales.dtype}; use a scale_dtype of float32.")
    steps = (grouped - zeros.unsqueeze(2)) / torch.where(scales == 0, 1, scales).unsqueeze(2)
    if out.bits == 8:
        smallest = -127 if out.zeros is None else -128
        out.data.copy_(steps.round_().clamp_(smallest, 127).view(m, -1)[:, :d])
        return
    nibbles = steps.round_().clamp_(-8, 7).view(m, -1) + ZERO_NIBBLE
    nibbles[:, d:] = ZERO_NIBBLE
    out.data.copy_(pack(nibbles, out.group_size))


def _grid(low: Tensor, high: Tensor, out: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Scales and zero points (m, groups) in float32 for groups between low and high."""
    if out.zeros is None:
        if out.bits == 8:
            return torch.maximum(-low, high) / 127, torch.zeros_like(low)
        return torch.where(high > -low, high, low) / -8, torch.zeros_like(low)
    levels = 2**out.bits
    scales = high / (levels - 1) - low / (levels - 1)
    return scales, low + (levels // 2) * scales


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight (m, d): computed in float32, rounded once to ``dtype``."""
    m, d = weight.shape
    result = torch.empty(m, d, dtype=dtype, device=weight.device)
    for first, last in row_chunks(m, d, weight.device):
        result[first:last] = _dequantize_rows(weight.rows(first, last))
    return result


def _dequantize_rows(weight: QuantizedWeight) -> Tensor:
    d, group = weight.d, weight.group_size
    q = weight.data.float() if weight.bits == 8 else unpack(weight.data, group).float() - ZERO_NIBBLE
    values = q[:, :d] * weight.scales.float().repeat_interleave(group, 1)[:, :d]
    if weight.zeros is not None:
        values += weight.zeros.float().repeat_interleave(group, 1)[:, :d]
    return values
