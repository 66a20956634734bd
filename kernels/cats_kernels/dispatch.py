"""Which path computes what: one table of how many rows of x the sparse kernels take, by backend and dtype.

The mask is not known before the gate product is, and a GPU's host never learns it, so rows and dtype decide. Each path
computes the same function: the sparse kernel, or three dense products and a mask ("dense masked").
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from cats_kernels.quantized import QuantizedWeight
from cats_kernels.reference import (
    check_decider,
    multiplies_bfloat16,
    quantized_mlp_reference,
    sparse_gated_mlp_reference,
)
from cats_kernels.thresholds import Threshold

BACKENDS = ("auto", "reference", "cpu", "triton")
SPARSE, DENSE_MASKED = "sparse kernel", "dense masked"
"""What `path_of` answers."""

SPARSE_ROWS: dict[tuple[str, torch.dtype], float] = {
    ("cpu", torch.float32): 64,
    ("cpu", torch.bfloat16): 8 if multiplies_bfloat16() else math.inf,
    ("triton", torch.float32): 8,
    ("triton", torch.float16): 4,
    ("triton", torch.bfloat16): 4,
}
"""(backend, dtype) -> most rows of x for which its sparse kernel is the faster path; what is missing it does not take.

CPU, on two AVX2 cores (d=4096, m=14336, about 50 % sparsity): float32 takes 360 ms here and 388 ms dense at 64 rows,
100 and 234 at 16, 55 and 215 at 8. bfloat16 has no such number: without bfloat16 arithmetic the dense path takes 2.3
to 2.7 times as long at 8 to 32 rows alike. With it (two cores, AMX, d=1536, m=8960, in a large cache, no neuron
dropped) the kernel takes 4.9, 8.5, 14 and 115 ms at 2, 4, 8 and 64 rows, the dense masked path 4.7, 5.1, 5.0 and
7.0; calls of up to 8 rows are repeated without a look at their arguments, and stay with the kernel. Triton, on an
H200 (Mistral-7B): a neuron's rows are read if any row of x keeps it, so at 50 % sparsity a batch of 4 reads 94 % of
them and a batch of 8 all. The sparse kernels were 1.06x dense at 4 rows and 50 % in bfloat16, but 0.99x at 8 rows,
where the dense masked path was 1.04x; in float32 1.8x."""

QUANTIZED_ROWS: dict[tuple[str, torch.dtype], float] = {
    ("cpu", torch.float32): 8,
    ("cpu", torch.bfloat16): 2 if multiplies_bfloat16() else 8,
    ("triton", torch.float32): 8,
    ("triton", torch.float16): 8,
    ("triton", torch.bfloat16): 8,
}
"""The same for quantised weights, whose dense path dequantises them first, some neurons at a time.

CPU, one core with AMX (d=1536, m=8960, int4 in groups of 128, about half of the neurons dropped): bfloat16 takes 27, 32
and 40 ms in the kernel at 2, 4 and 8 rows, and 20, 25 and 24 ms dequantised; float32 27, 32, 40 and 162 ms at 2, 4, 8
and 32 rows, and 29, 27, 32 and 54 ms."""

KERNEL_GROUP_SIZES: dict[str, tuple[int, ...]] = {"cpu": (32, 64, 128, 256), "triton": (32, 64, 128, 256)}
"""Columns of a group that a backend's kernels on quantised weights take, beside whole rows; others are dequantised."""

Implementation = Callable[[Tensor, Tensor, Tensor, Tensor, Threshold, str, str], Tensor]


@cache
def choose_backend(backend: str, device: str, dtype: torch.dtype) -> str:
    """The backend for a backend's name ("auto" included), device type and dtype; decided once for each combination.

    Returns:
        "reference", "cpu" or "triton".

    Raises:
        ValueError: an unknown name, or one that cannot run on this device and dtype.
        RuntimeError: "triton" was asked for and is not installed.
    """
    takes = {name for name, kind in SPARSE_ROWS if kind == dtype}
    if backend == "auto":
        if device == "cuda" and "triton" in takes:
            try:
                _triton()
                return "triton"
            except ImportError as error:
                warnings.warn(f"No Triton kernel ({error}); using the dense reference on CUDA.", stacklevel=2)
        return "cpu" if device == "cpu" and "cpu" in takes else "reference"
    if backend == "reference":
        return backend
    if backend == "cpu":
        if device != "cpu" or "cpu" not in takes:
            raise ValueError(f"backend 'cpu' takes float32 or bfloat16 on the CPU, not {dtype} on {device}.")
        return backend
    if backend == "triton":
        if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"backend 'triton' needs CUDA tensors (or TRITON_INTERPRET=1), not {device}.")
        if "triton" not in takes:
            raise ValueError(f"backend 'triton' takes float32, float16 or bfloat16, not {dtype}.")
        try:
            _triton()
        except ImportError as error:
            raise RuntimeError(f"backend 'triton' cannot be imported: {error}.") from error
        return backend
    raise ValueError(f"CATS_BACKEND is {backend!r}; allowed: {', '.join(map(repr, BACKENDS))}.")


# The kernels are imported at their first use: numba and Triton each take about a second to load.
@cache
def _cpu() -> tuple[Implementation, Implementation]:
    from cats_kernels.cpu.launch import sparse_gated_mlp_cpu

    return sparse_gated_mlp_cpu, sparse_gated_mlp_reference


@cache
def _triton() -> tuple[Implementation, Implementation]:
    from cats_kernels.triton.mlp import dense_masked, sparse_gated_mlp_triton

    return sparse_gated_mlp_triton, dense_masked


@cache
def repeat_by(backend: str) -> Callable[..., Callable[[Tensor], Tensor | None] | None]:
    """What makes a `cats_kernels.repeated.Repeat` for calls of the sparse kernel of a resolved backend."""
    if backend == "triton":
        from cats_kernels.triton.mlp import repeated

        return repeated
    if backend == "cpu":
        from cats_kernels.cpu.launch import repeated as repeated_cpu

        return repeated_cpu
    return lambda *_: None


@cache
def repeat_dense_by(backend: str) -> Callable[..., Callable[..., Tensor | None] | None]:
    """The same for calls of the dense masked path."""
    if backend == "triton":
        from cats_kernels.triton.dense import repeated_dense

        return repeated_dense
    return lambda *_: None


@cache
def repeat_quantized_by(backend: str) -> Callable[..., Callable[[Tensor], Tensor | None] | None]:
    """`repeat_by` for quantised weights."""
    if backend == "triton":
        from cats_kernels.triton.quantized import repeated_quantized

        return repeated_quantized
    if backend == "cpu":
        from cats_kernels.cpu.quantized_launch import repeated_quantized as repeated_quantized_cpu

        return repeated_quantized_cpu
    return lambda *_: None


@cache
def _quantized(backend: str) -> Callable[..., Tensor]:
    if backend == "cpu":
        from cats_kernels.cpu.quantized_launch import sparse_gated_mlp_quantized_cpu

        return sparse_gated_mlp_quantized_cpu
    from cats_kernels.triton.quantized import sparse_gated_mlp_quantized

    return sparse_gated_mlp_quantized


@cache
def _quantized_dense(backend: str) -> Callable[..., Tensor]:
    if backend == "cpu":
        from cats_kernels.cpu.many_rows import quantized_mlp_many_rows

        return quantized_mlp_many_rows
    return quantized_mlp_reference


def asked_for(backend: str) -> str:
    """The backend's name, or for "auto" what the environment variable CATS_BACKEND says in its place now."""
    return os.environ.get("CATS_BACKEND", "auto") if backend == "auto" else backend


def resolve(backend: str, x: Tensor) -> str:
    """The backend for ``x``; the environment variable CATS_BACKEND replaces "auto"."""
    return choose_backend(asked_for(backend), x.device.type, x.dtype)


def compute(
    backend: str,
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: Threshold,
    activation: str = "silu",
    decider: str = "gate",
) -> Tensor:
    """The sparse gated MLP of contiguous rows x (rows, d), rows >= 1, by a resolved backend's path for so many rows."""
    arguments = (x, gate_weight, up_weight, down_weight_t, threshold, activation, decider)
    if backend == "reference":
        return sparse_gated_mlp_reference(*arguments)
    sparse, dense = _cpu() if backend == "cpu" else _triton()
    return sparse(*arguments) if x.shape[0] <= SPARSE_ROWS[backend, x.dtype] else dense(*arguments)


resolve_quantized = resolve
"""The kernels on quantised weights take x of the same dtypes."""


def compute_quantized(
    backend: str,
    x: Tensor,
    gate_weight: QuantizedWeight,
    up_weight: QuantizedWeight,
    down_weight_t: QuantizedWeight,
    threshold: Threshold,
    activation: str = "silu",
    decider: str = "gate",
) -> Tensor:
    """`compute` on quantised weights."""
    arguments = (x, gate_weight, up_weight, down_weight_t, threshold, activation, decider)
    if backend == "reference":
        return quantized_mlp_reference(*arguments)
    few = x.shape[0] <= QUANTIZED_ROWS[backend, x.dtype]
    if few and kernels_take(backend, gate_weight, up_weight, down_weight_t):
        return _quantized(backend)(*arguments)
    return _quantized_dense(backend)(*arguments)


def kernels_take(backend: str, *weights: QuantizedWeight) -> bool:
    """Whether the kernels of "cpu" or "triton" take weights of these formats."""
    mixed = len({(w.bits, w.group_size, w.zeros is None, w.scales.dtype) for w in weights}) > 1
    if backend == "triton" and mixed:  # its kernels are compiled for one format
        return False
    sizes = KERNEL_GROUP_SIZES[backend]
    return all(w.group_size in sizes or (w.bits == 8 and w.group_size == w.d) for w in weights)


def path_of(
    rows: int,
    dtype: torch.dtype,
    device: str | torch.device,
    backend: str = "auto",
    decider: str = "gate",
    quantized: bool = False,
) -> str:
    """Which path a call of `sparse_gated_mlp` takes: "sparse kernel" or "dense masked".

    Args:
        rows: rows of x, that is x.numel() / d.
        dtype, device: of x and the weights.
        backend, decider: as in the call.
        quantized: whether the weights are (all of one format).

    Raises:
        ValueError, RuntimeError: as the call would.
    """
    check_decider(decider)
    if backend not in BACKENDS:  # `choose_backend` takes it for what the environment says
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(map(repr, BACKENDS))}.")
    chosen = choose_backend(asked_for(backend), torch.device(device).type, dtype)
    table = QUANTIZED_ROWS if quantized else SPARSE_ROWS
    return SPARSE if rows <= table.get((chosen, dtype), 0) else DENSE_MASKED
