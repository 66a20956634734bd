"""A weight as the kernels see it: m rows of d numbers, row-major, row j belonging to neuron j.

Gate, up and transposed down projection all have this layout, so that skipping a neuron skips one row of each. A weight
is a plain tensor, or `cats_kernels.quantized.QuantizedWeight`.
"""

from __future__ import annotations

from torch import Tensor

from cats_kernels.quantized import QuantizedWeight

Weight = Tensor | QuantizedWeight
MAX_ROWS = 8
"""Rows of x that share one load of a weight row in the kernels, in ours and in the paper's."""


def check_weights(x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight_t: Tensor) -> None:
    """Check that x is (..., d) and the weights (m, d), contiguous, with the dtype and device of x.

    Raises:
        TypeError, ValueError: one sentence naming the argument that is wrong and what is allowed.
    """
    if x.dim() == 0 or gate_weight.dim() != 2:
        _check_floating_point(x)
        raise ValueError(
            f"x is {tuple(x.shape)} and gate_weight {tuple(gate_weight.shape)}; they must be (..., d) and (m, d)."
        )
    _check_columns(x, *gate_weight.shape)
    m, d = gate_weight.shape
    for name, weight in (("gate_weight", gate_weight), ("up_weight", up_weight), ("down_weight_t", down_weight_t)):
        if weight.shape != gate_weight.shape:
            raise ValueError(f"{name} is {tuple(weight.shape)}; it must be (m, d) = ({m}, {d}) as gate_weight is.")
        if weight.dtype != x.dtype:
            raise TypeError(f"{name} is {weight.dtype}; it must be {x.dtype} as x is.")
        if weight.device != x.device:
            raise ValueError(f"{name} is on {weight.device}; it must be on {x.device} as x is.")
        if not weight.is_contiguous():
            raise ValueError(f"{name} is not contiguous; make it so once with .contiguous(), not at every call.")


def check_quantized_weights(
    x: Tensor, gate_weight: QuantizedWeight, up_weight: QuantizedWeight, down_weight_t: QuantizedWeight
) -> None:
    """Check that x is (..., d) and the quantised weights (m, d), contiguous, on the device of x.

    Raises:
        TypeError, ValueError: one sentence naming the argument that is wrong and what is allowed.
    """
    if x.dim() == 0:
        raise ValueError("x is (); it must be (..., d).")
    m, d = gate_weight.shape
    _check_columns(x, m, d)
    for name, weight in (("gate_weight", gate_weight), ("up_weight", up_weight), ("down_weight_t", down_weight_t)):
        if weight.shape != (m, d):
            raise ValueError(f"{name} is {weight.shape}; it must be (m, d) = ({m}, {d}) as gate_weight is.")
        if weight.device != x.device:
            raise ValueError(f"{name} is on {weight.device}; it must be on {x.device} as x is.")
        if not weight.is_contiguous():
            raise ValueError(f"{name} is not contiguous; make its data, scales and zeros so once, not at every call.")


def _check_floating_point(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}; it must be floating point.")


def _check_columns(x: Tensor, m: int, d: int) -> None:
    _check_floating_point(x)
    if x.shape[-1] != d or m == 0 or d == 0:
        raise ValueError(
            f"x has {x.shape[-1]} columns and gate_weight is ({m}, {d}); x must be (..., d), m and d positive."
        )


def bytes_per_row(weight: Weight) -> int:
    """Bytes that reading one neuron's row of ``weight`` (m, d) takes."""
    if isinstance(weight, QuantizedWeight):
        return weight.bytes_per_row
    return weight.shape[1] * weight.element_size()


def bytes_read(gate_weight: Weight, up_weight: Weight, down_weight_t: Weight, active: int, decider: str) -> int:
    """Bytes of weights that one call must read: the deciding product's weight whole, ``active`` rows of the others."""
    deciding, other = (gate_weight, up_weight) if decider == "gate" else (up_weight, gate_weight)
    return deciding.shape[0] * bytes_per_row(deciding) + active * (bytes_per_row(other) + bytes_per_row(down_weight_t))
