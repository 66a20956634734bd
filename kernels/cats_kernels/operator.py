"""`sparse_gated_mlp`: validates its arguments, picks a backend once, and is an operator of torch.library.

As an operator (``torch.ops.cats.sparse_gated_mlp``) it has a fake implementation, so ``torch.compile(fullgraph=True)``
and ``torch.export`` see one node and no graph break. It is for inference; training uses the dense masked path.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from cats_kernels.reference import ACTIVATIONS, sparse_gated_mlp_reference

BACKENDS = ("auto", "reference", "cpu", "triton")

MAX_ROWS = 8
"""Rows of ``x`` that share a kernel's loads of the weights. Any number of rows is allowed: each backend takes the dense
masked path where that is faster (``cats_kernels.cpu.DENSE_ROWS``, ``cats_kernels.triton_mlp.SPARSE_ROWS``)."""

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Implementation = Callable[[Tensor, Tensor, Tensor, Tensor, float, str], Tensor]


def sparse_gated_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: float,
    activation: str = "silu",
    backend: str = "auto",
) -> Tensor:
    """The gated MLP that skips neurons whose gate activation is below the threshold (eq. 1, 4, 5; figures 3 and 6).

    ``v = act(x Wg^T)``, kept where ``|v| >= threshold`` (ties and NaN too); ``y = (v * (x Wu^T)) @ down_weight_t``.
    Accumulates in float32. A dropped neuron's rows of ``up_weight`` and ``down_weight_t`` are not read.

    Args:
        x: (..., d), floating point; need not be contiguous.
        gate_weight, up_weight: (m, d), contiguous, dtype and device of ``x``.
        down_weight_t: (m, d), contiguous; the down projection transposed, row j = neuron j; finite.
        threshold: a number, not NaN.
        activation: "silu" or "gelu_tanh".
        backend: "auto" (triton on CUDA; cpu for float32 and bfloat16 on the CPU; else reference), "reference", "cpu"
            or "triton". The environment variable CATS_BACKEND replaces "auto".

    Returns:
        (..., d), contiguous, dtype and device of ``x``.

    Raises:
        TypeError, ValueError: one sentence naming the argument that is wrong and what is allowed.
        RuntimeError: when gradients are enabled and an argument requires them, or the backend cannot run here.
    """
    _validate(x, gate_weight, up_weight, down_weight_t, threshold, activation, backend)
    arguments = (x, gate_weight, up_weight, down_weight_t, float(threshold), activation, backend)
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or type(x) is not Tensor:
        return torch.ops.cats.sparse_gated_mlp(*arguments)
    return _run(*arguments)  # past the dispatcher, which costs 60 microseconds a call, more than a small MLP itself


def _validate(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: float,
    activation: str,
    backend: str,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; allowed: {', '.join(map(repr, ACTIVATIONS))}.")
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(map(repr, BACKENDS))}.")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float | torch.SymFloat):
        raise TypeError(f"threshold is a {type(threshold).__name__}; it must be a Python number.")
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}; it must be floating point.")
    if x.dim() == 0 or gate_weight.dim() != 2:
        raise ValueError(
            f"x is {tuple(x.shape)} and gate_weight {tuple(gate_weight.shape)}; they must be (..., d) and (m, d)."
        )
    m, d = gate_weight.shape
    if x.shape[-1] != d or m == 0 or d == 0:
        raise ValueError(
            f"x has {x.shape[-1]} columns and gate_weight is ({m}, {d}); x must be (..., d), m and d positive."
        )
    for name, weight in (("gate_weight", gate_weight), ("up_weight", up_weight), ("down_weight_t", down_weight_t)):
        if weight.shape != gate_weight.shape:
            raise ValueError(f"{name} is {tuple(weight.shape)}; it must be (m, d) = ({m}, {d}) as gate_weight is.")
        if weight.dtype != x.dtype:
            raise TypeError(f"{name} is {weight.dtype}; it must be {x.dtype} as x is.")
        if weight.device != x.device:
            raise ValueError(f"{name} is on {weight.device}; it must be on {x.device} as x is.")
        if not weight.is_contiguous():
            raise ValueError(f"{name} is not contiguous; make it so once with .contiguous(), not at every call.")
    if torch.is_grad_enabled() and (
        x.requires_grad or gate_weight.requires_grad or up_weight.requires_grad or down_weight_t.requires_grad
    ):
        raise RuntimeError(
            "sparse_gated_mlp is for inference and has no gradient; call it under torch.no_grad(), "
            "or train with the dense masked path."
        )


def _run(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: float,
    activation: str,
    backend: str,
) -> Tensor:
    if math.isnan(threshold):
        raise ValueError("threshold is NaN; it must be a number.")
    if backend == "auto":
        backend = os.environ.get("CATS_BACKEND", "auto")
    implementation = choose_backend(backend, x.device.type, x.dtype)
    if x.numel() == 0:
        return x.new_empty(x.shape)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return implementation(rows, gate_weight, up_weight, down_weight_t, threshold, activation).view(x.shape)


_operator = torch.library.custom_op("cats::sparse_gated_mlp", _run, mutates_args=())


@_operator.register_fake
def _fake(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: float,
    activation: str,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape)


@cache
def choose_backend(backend: str, device: str, dtype: torch.dtype) -> Implementation:
    """The implementation for a backend name, device type and dtype; decided once for each combination.

    Raises:
        ValueError: an unknown name, or one that cannot run on this device and dtype.
        RuntimeError: "triton" was asked for and is not installed.
    """
    cpu_kernel_fits = device == "cpu" and dtype in (torch.float32, torch.bfloat16)
    if backend == "auto":
        if device == "cuda" and dtype in TRITON_DTYPES:
            try:
                return _triton()
            except ImportError as error:
                warnings.warn(f"No Triton kernel ({error}); using the dense reference on CUDA.", stacklevel=2)
        return _cpu() if cpu_kernel_fits else sparse_gated_mlp_reference
    if backend == "reference":
        return sparse_gated_mlp_reference
    if backend == "cpu":
        if not cpu_kernel_fits:
            raise ValueError(f"backend 'cpu' takes float32 or bfloat16 on the CPU, not {dtype} on {device}.")
        return _cpu()
    if backend == "triton":
        if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"backend 'triton' needs CUDA tensors (or TRITON_INTERPRET=1), not {device}.")
        if dtype not in TRITON_DTYPES:
            raise ValueError(f"backend 'triton' takes float32, float16 or bfloat16, not {dtype}.")
        try:
            return _triton()
        except ImportError as error:
            raise RuntimeError(f"backend 'triton' cannot be imported: {error}.") from error
    raise ValueError(f"CATS_BACKEND is {backend!r}; allowed: {', '.join(map(repr, BACKENDS))}.")


# The kernels are imported at their first use: numba and Triton each take about a second to load.
def _cpu() -> Implementation:
    from cats_kernels.cpu import sparse_gated_mlp_cpu

    return sparse_gated_mlp_cpu


def _triton() -> Implementation:
    from cats_kernels.triton_mlp import VARIANTS

    return VARIANTS["cats"]
