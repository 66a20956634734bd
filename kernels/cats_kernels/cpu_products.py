"""Which products of x with one quantised weight on the CPU are computed by `cats_kernels.cpu`, which imports numba."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import has_torch_function_unary

from cats_kernels.calls import recording
from cats_kernels.quantized import QuantizedWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of x."""


def suits_cpu(x: Tensor, device: torch.device) -> bool:
    """Whether x is multiplied there with a weight on ``device``: both are on the CPU, no gradient is asked for, and
    nothing records, transforms or casts calls."""
    return (
        x.device.type == device.type == "cpu"
        and x.dtype in DTYPES
        and not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and not (x.requires_grad and torch.is_grad_enabled())
        and not has_torch_function_unary(x)
        and not recording()
        and not torch._C._is_any_autocast_enabled()
    )


def multiply(x: Tensor, weight: QuantizedWeight, transposed: bool) -> Tensor:
    """`cats_kernels.cpu.pieces.multiply` of x (..., columns)."""
    from cats_kernels.cpu import pieces

    y = pieces.multiply(x.reshape(-1, x.shape[-1]), weight, transposed)
    return y.view(*x.shape[:-1], y.shape[-1])


def multiply_int4(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor | None:
    """`cats_kernels.cpu.torch_int4.multiply_int4` of x (rows, d); None where it does not know torch's order of nibbles,
    or m is not a multiple of its blocks."""
    from cats_kernels.cpu import torch_int4

    rows = torch_int4.block_rows()
    return torch_int4.multiply_int4(x, packed, scales) if rows and scales.shape[1] % rows == 0 else None
