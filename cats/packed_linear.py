"""A linear layer outside of the gated MLPs with a quantised weight, multiplied by torch's own kernels, and many rows on
a CPU by pieces that are dequantised first.

int8 has one scale per row. On a CPU the product is torch's `_weight_int8pack_mm`; on a GPU torch has none for one row
(1.6 ms where an H100 reads the weights in 0.06), so torch.compile makes one of plain operations. int4 has groups along
the inputs; the product is `_weight_int4pack_mm` on a GPU (bfloat16 only) and `_weight_int4pack_mm_for_cpu` on a CPU,
each with an order of nibbles of its own, which `unpacked` finds by packing the numbers of the nibbles themselves.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from cats_kernels.cpu_products import multiply, multiply_int4, suits_cpu
from cats_kernels.quantized import QuantizedWeight, pack, row_chunks, unpack
from torch import Tensor, nn

from cats.quantized_linear import QuantizedLinear

INNER_TILES = 8
"""Of `_convert_weight_to_int4pack` on a GPU, each 16 inputs: the most that it takes, and the fastest."""
GPU_DTYPE = torch.bfloat16
"""Of x, for torch's int4 product on a GPU."""
BLOCK = 64
"""Rows that every order of nibbles keeps together; only a last block may have fewer."""
MULTIPLE_OF_ROWS = 16
"""Of int4 weights, by torch's kernel for a CPU."""
MULTIPLE_OF_COLUMNS = {8: 32, 4: 16 * INNER_TILES}
"""What torch's kernels read at a time: for a CPU in int8 (without a check, in bfloat16), for a GPU in int4."""
MOST_ROWS = {("cpu", 8): 64, ("cpu", 4): 512, ("cuda", 8): 0, ("cuda", 4): 256}
"""Rows of x up to which torch's kernel is used, by bits; for more the weight is dequantised piece by piece, by torch's
operations. On a GPU torch's int4 reads the weight once per 16 rows."""
FEWEST_ROWS, FEWEST_ROWS_WIDE = {8: 16, 4: 32}, {8: 1, 4: 1}
"""Rows from which this project's CPU kernels dequantise pieces instead, by bits, in half precision and in float32. On
one core (4096 x 4096, bfloat16) torch's int4 takes 1.5 ms for one row, 9 for 16 and 36 for 64, pieces 14, 13 and 18;
int8 2, 9 and 32, pieces 8, 9 and 10. In float32 (one row) 38 and 19 ms in int4, 13 and 8 in int8."""
MOST_ROWS_WIDE = {8: 2, 4: 16}
"""The same in float32 on a CPU, where torch's kernels are plain loops: 44 ms for one row in int4, 20 in int8."""


def unsuited(out_features: int, in_features: int, bits: int, group_size: int | None) -> str | None:
    """Why torch's kernels cannot multiply with such a weight; None where they can."""
    columns = MULTIPLE_OF_COLUMNS[bits]
    if in_features % columns:
        return f"it has {in_features} inputs, and torch's int{bits} products take multiples of {columns}"
    if bits == 4 and out_features % MULTIPLE_OF_ROWS:
        return f"it has {out_features} outputs, and torch's int4 products take multiples of {MULTIPLE_OF_ROWS}"
    if bits == 4 and (group_size is None or in_features % group_size):
        return f"it has {in_features} inputs, and torch's int4 products take whole groups of {group_size}"
    return None


def check_dtype(bits: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError where torch has no product of such bits for activations of this dtype."""
    if bits == 4 and device.type != "cpu" and dtype != GPU_DTYPE:
        raise ValueError(
            f'the model is {dtype}: torch\'s int4 product on a GPU takes {GPU_DTYPE} alone, for linears="all"'
        )


class PackedLinear(nn.Module):
    """``x W^T + b`` with W quantised, in place of `nn.Linear`; for inference.

    A cast (``model.to(torch.float32)``) rounds the scales to the new dtype; a move to another kind of device packs them
    anew.

    Attributes:
        packed: int8 (out_features, in_features), or nibbles as torch's int4 product on this device takes them.
        scales: (out_features,) in int8; (groups, out_features, 2) in int4, scales and zero points, where the value of a
            nibble n is (n - 8) * scale + zero. In the dtype of x.
        bits, group_size, symmetric: of the quantised weight; in int8 a group is the whole row.
        in_features, out_features, bias: as in `nn.Linear`.
        trained: whether the weight that was quantised required gradients, as that of `dense` then does.
        original: the layer that was quantised, where it is kept; not part of the module tree, neither moved nor saved.
    """

    packed: Tensor
    scales: Tensor
    bias: nn.Parameter | None
    original: nn.Linear | None

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype, bias: nn.Parameter | None = None) -> None:
        """``weight``: (out_features, in_features), not `unsuited`; in int8 symmetric, one group per row."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bits, self.group_size, self.symmetric = weight.bits, weight.group_size, weight.zeros is None
        if self.bits == 8 and not (weight.groups == 1 and self.symmetric):
            raise ValueError("int8 weights of such a layer must be symmetric, with one scale per row")
        if reason := unsuited(*weight.shape, self.bits, self.group_size):
            raise ValueError(f"the layer cannot be quantised: {reason}")
        check_dtype(self.bits, dtype, weight.device)
        self._take(weight, dtype)
        self.register_parameter("bias", bias)
        self.__dict__["original"] = None
        self.trained = False

    def _take(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        scales = weight.scales
        if self.bits == 8:
            self.register_buffer("packed", weight.data)
            self.register_buffer("scales", scales.flatten().to(dtype))
            return
        zeros = torch.zeros_like(scales) if weight.zeros is None else weight.zeros
        self.register_buffer("packed", _packed(unpack(weight.data, self.group_size)))
        self.register_buffer("scales", torch.stack([scales, zeros], -1).transpose(0, 1).contiguous().to(dtype))

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of x and of the output."""
        return self.scales.dtype

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight (out_features, in_features) in the format of this project."""
        if self.bits == 8:
            return QuantizedWeight(self.packed, self.scales[:, None], None, 8, self.in_features, self.in_features)
        shape = self.out_features, self.in_features
        chunks = _chunks(*shape, self.packed.device)
        data = torch.cat([pack(unpacked(self.packed, *shape, *chunk), self.group_size) for chunk in chunks])
        scales, zeros = (tensor.t().contiguous() for tensor in self.scales.unbind(-1))
        return QuantizedWeight(data, scales, None if self.symmetric else zeros, 4, self.group_size, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return packed_product(x, self.packed, self.scales, self.bits, self.bias)

    def dense(self) -> nn.Linear:
        """The layer that was quantised, on this device, or one of the dequantised weight where it was not kept."""
        if self.original is not None:
            return self.original.to(self.packed.device)
        linear = QuantizedLinear(self.quantized, False, self.compute_dtype, self.bias)
        linear.trained = self.trained
        return linear.train(self.training).dense()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        device = fn(self.scales[:0]).device
        if self.bits == 8 or device.type in (self.packed.device.type, "meta"):
            return super()._apply(fn, recurse)
        weight = self.quantized.to(device)
        super()._apply(fn, recurse)
        self._take(weight, self.compute_dtype)
        return self

    def extra_repr(self) -> str:
        kind = "symmetric" if self.symmetric else "with zero points"
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bits={self.bits}, group_size={self.group_size}, {kind}"


def packed_product(x: Tensor, packed: Tensor, scales: Tensor, bits: int, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``, x (..., in_features), with W and its scales as a `PackedLinear` keeps them."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = _product_by_pieces(rows, packed, scales, bits)
    if y is None and (torch.compiler.is_compiling() or len(rows) <= _most_rows(rows, bits)):
        y = _product_8(rows, packed, scales) if bits == 8 else _product_4(rows, packed, scales)
    elif y is None:
        y = _dequantised_product(rows, packed, scales, bits)
    y = y.view(*x.shape[:-1], y.shape[-1])
    return y if bias is None else y + bias


def _product_by_pieces(x: Tensor, packed: Tensor, scales: Tensor, bits: int) -> Tensor | None:
    """The product by pieces of W that this project's CPU kernels dequantise; None where another way is faster or the
    only one."""
    fewest = FEWEST_ROWS_WIDE if x.dtype == torch.float32 else FEWEST_ROWS
    if torch.compiler.is_compiling() or len(x) < fewest[bits] or not suits_cpu(x, packed.device):
        return None
    if bits == 4:
        return multiply_int4(x, packed, scales)
    ones = torch.ones(len(scales), 1)
    return multiply(x, QuantizedWeight(packed, ones, None, 8, x.shape[1], x.shape[1]), False) * scales


def _most_rows(x: Tensor, bits: int) -> int:
    if x.device.type != "cpu":
        return MOST_ROWS["cuda", bits]
    return MOST_ROWS_WIDE[bits] if x.dtype == torch.float32 else MOST_ROWS["cpu", bits]


def _product_8(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    if x.device.type == "cpu":
        made: Tensor = torch.ops.aten._weight_int8pack_mm(x, packed, scales)
        return made
    return _one_row_of_8_bits(x, packed, scales) if len(x) == 1 else F.linear(x, packed.to(x.dtype)) * scales


def _one_row_of_8_bits(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """Of plain operations, which compiled are one kernel that reads int8."""
    return ((packed.to(x.dtype) * x).sum(-1, dtype=torch.float32) * scales).to(x.dtype)[None]


def _product_4(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    group_size = x.shape[1] // scales.shape[0]
    aten: Any = torch.ops.aten
    product = aten._weight_int4pack_mm_for_cpu if x.device.type == "cpu" else aten._weight_int4pack_mm
    made: Tensor = product(x, packed, group_size, scales)
    return made


def _dequantised_product(x: Tensor, packed: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The product in pieces of W that are dequantised one after another."""
    m, d = scales.shape[bits == 4], x.shape[1]
    pieces = []
    for first, last in _chunks(m, d, x.device):
        if bits == 8:
            pieces.append(F.linear(x, packed[first:last].to(x.dtype)) * scales[first:last])
            continue
        scale, zero = scales[:, first:last].float().permute(2, 1, 0).unsqueeze(-1)
        nibbles = unpacked(packed, m, d, first, last).view(last - first, len(scales), -1)
        weight = ((nibbles.float() - 8) * scale + zero).to(x.dtype)
        pieces.append(F.linear(x, weight.view(last - first, d)))
    return torch.cat(pieces, -1)


def _chunks(m: int, d: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges of rows by whole blocks, about as many weights each as `row_chunks` gives."""
    first, last = next(row_chunks(m, d, device))
    step = max(BLOCK, (last - first) // BLOCK * BLOCK)
    for first in range(0, m, step):
        yield first, min(m, first + step)


def _packed(nibbles: Tensor) -> Tensor:
    """Nibbles uint8 (m, d) in the order of torch's int4 product on their device."""
    if nibbles.device.type == "cpu":
        made: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles.int(), 1)
        return made
    pairs = (nibbles[:, ::2] << 4) | nibbles[:, 1::2]
    made = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), INNER_TILES)
    return made


def unpacked(packed: Tensor, m: int, d: int, first: int, last: int) -> Tensor:
    """Rows [first, last) of the nibbles, uint8 (last - first, d), of a weight (m, d); first is a multiple of `BLOCK`,
    and so is last or it is m."""
    nibbles = _nibbles(packed.view(-1).view(torch.uint8)[first * d // 2 : last * d // 2])
    whole = (last - first) // BLOCK * BLOCK
    parts = []
    for begin, end, rows in ((0, whole, BLOCK), (whole, last - first, last - first - whole)):
        if begin < end:
            blocks = nibbles[begin * d : end * d].view(-1, rows * d)
            parts.append(blocks[:, _places(rows, d, packed.device)].view(-1, d))
    return torch.cat(parts)


def _nibbles(data: Tensor) -> Tensor:
    """The nibbles of bytes, two neighbours for each."""
    return torch.stack([data & 15, data >> 4], -1).flatten()


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _places(rows: int, d: int, device: torch.device) -> Tensor:
    """int64 (rows * d,): where the nibbles of a block lie once they are packed. What is packed are four bits at a time
    of each nibble's own number."""
    number = torch.arange(rows * d, device=device)
    at = torch.zeros_like(number)
    for shift in range(0, max(1, (rows * d - 1).bit_length()), 4):
        bits = ((number >> shift) & 15).to(torch.uint8).view(rows, d)
        at |= _nibbles(_packed(bits).view(-1).view(torch.uint8)).long() << shift
    places = torch.empty_like(number)
    places[at] = number
    return places
