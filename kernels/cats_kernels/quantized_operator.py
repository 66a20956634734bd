"""`quantized_mlp`: the sparse gated MLP on quantised weights, at once or as one operator wherever calls are recorded.

The same function as `cats_kernels.operator` has for plain weights, by the same rules; the recorded operator is
``torch.ops.cats.sparse_gated_mlp_quantized``, which takes the weights' tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cats_kernels.calls import GRADIENT, check_number, check_options, recording, refuse_gradient
from cats_kernels.dispatch import compute_quantized, resolve_quantized
from cats_kernels.quantized import QuantizedWeight
from cats_kernels.thresholds import Threshold, as_tensor, check_shape
from cats_kernels.weights import check_quantized_weights


def quantized_mlp(
    x: Tensor,
    gate_weight: QuantizedWeight,
    up_weight: QuantizedWeight,
    down_weight_t: QuantizedWeight,
    threshold: Threshold,
    activation: str = "silu",
    backend: str = "auto",
    decider: str = "gate",
) -> Tensor:
    """`sparse_gated_mlp` with quantised weights, which are read packed; the mask is that of the dequantised weights.

    Args:
        x: (..., d), floating point; need not be contiguous.
        gate_weight, up_weight, down_weight_t: (m, d), contiguous, on the device of ``x``; row j is neuron j. Their
            formats may differ: bits, group sizes, with and without zero points, and their scales need not have the
            dtype of ``x``. Where a backend does not take such a mixture, the dequantised weights are multiplied.
        threshold, activation, backend, decider: as in `sparse_gated_mlp`; backend "cpu" takes float32 and bfloat16
            x, "triton" float32, float16 and bfloat16.

    Returns:
        (..., d), contiguous, dtype and device of ``x``; autocast's dtype under ``torch.autocast``.

    Raises:
        TypeError, ValueError: one sentence naming the argument that is wrong and what is allowed.
        RuntimeError: when gradients are enabled and ``x`` requires them, or the backend cannot run here.
    """
    arguments = (x, gate_weight, up_weight, down_weight_t, threshold, activation, backend, decider)
    _check_kinds(*arguments[:4])
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            return quantized_mlp(x.to(dtype), *arguments[1:])
    if torch.compiler.is_compiling() or recording() or type(x) is not Tensor:
        return _record(*arguments)
    _validate(*arguments)
    if torch.autograd._profiler_enabled():
        with torch.profiler.record_function("cats::sparse_gated_mlp_quantized"):
            return _compute(*arguments)
    return _compute(*arguments)


def _check_kinds(x: Tensor, *weights: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}; it must be a tensor.")
    names = ("gate_weight", "up_weight", "down_weight_t")
    for name, weight in zip(names, weights, strict=True):
        if not isinstance(weight, QuantizedWeight):
            kind = type(weight).__name__
            raise TypeError(f"{name} is a {kind}; the weights must be tensors or QuantizedWeight, all three alike.")


def _validate(
    x: Tensor,
    gate_weight: QuantizedWeight,
    up_weight: QuantizedWeight,
    down_weight_t: QuantizedWeight,
    threshold: Threshold,
    activation: str,
    backend: str,
    decider: str,
) -> None:
    check_options(threshold, activation, backend, decider)
    check_number(threshold)
    check_quantized_weights(x, gate_weight, up_weight, down_weight_t)
    check_shape(threshold, gate_weight.shape[0], x.device)
    refuse_gradient(x, threshold)


def _compute(
    x: Tensor,
    gate_weight: QuantizedWeight,
    up_weight: QuantizedWeight,
    down_weight_t: QuantizedWeight,
    threshold: Threshold,
    activation: str,
    backend: str,
    decider: str,
) -> Tensor:
    chosen = resolve_quantized(backend, x)
    if x.numel() == 0:
        return x.new_empty(x.shape)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = compute_quantized(chosen, rows, gate_weight, up_weight, down_weight_t, threshold, activation, decider)
    return y.view(x.shape)


def _record(
    x: Tensor,
    gate_weight: QuantizedWeight,
    up_weight: QuantizedWeight,
    down_weight_t: QuantizedWeight,
    threshold: Threshold,
    activation: str,
    backend: str,
    decider: str,
) -> Tensor:
    """The call as one operator; an ONNX exporter, which knows none such, gets plain products of dequantised weights."""
    check_options(threshold, activation, backend, decider)
    weights = (gate_weight, up_weight, down_weight_t)
    if torch.onnx.is_in_onnx_export():
        return compute_quantized("reference", x, *weights, threshold, activation, decider)
    refuse_gradient(x, threshold)
    tensors: list[Any] = [tensor for weight in weights for tensor in weight.tensors]
    result: Tensor = torch.ops.cats.sparse_gated_mlp_quantized(
        x,
        *tensors,
        [weight.bits for weight in weights],
        [weight.group_size for weight in weights],
        as_tensor(threshold, x.device),
        activation,
        backend,
        decider,
    )
    return result


def _weights(d: int, tensors: tuple[Any, ...], bits: list[int], group_sizes: list[int]) -> Any:
    """The three weights of a recorded call."""
    weights = []
    for i in range(3):
        data, scales, zeros = tensors[3 * i : 3 * i + 3]
        weights.append(QuantizedWeight(data, scales, zeros, bits[i], group_sizes[i], d))
    return weights


@torch.library.custom_op("cats::sparse_gated_mlp_quantized", mutates_args=())
def _operator(
    x: Tensor,
    gate_data: Tensor,
    gate_scales: Tensor,
    gate_zeros: Tensor | None,
    up_data: Tensor,
    up_scales: Tensor,
    up_zeros: Tensor | None,
    down_data: Tensor,
    down_scales: Tensor,
    down_zeros: Tensor | None,
    bits: list[int],
    group_sizes: list[int],
    threshold: Tensor,
    activation: str,
    backend: str,
    decider: str,
) -> Tensor:
    tensors = (gate_data, gate_scales, gate_zeros, up_data, up_scales, up_zeros, down_data, down_scales, down_zeros)
    gate, up, down_t = _weights(x.shape[-1], tensors, bits, group_sizes)
    _validate(x, gate, up, down_t, threshold, activation, backend, decider)
    return _compute(x, gate, up, down_t, threshold, activation, backend, decider)


@_operator.register_fake
def _fake(x: Tensor, *arguments: Any) -> Tensor:
    *tensors, bits, group_sizes, threshold, _activation, _backend, _decider = arguments
    gate, up, down_t = _weights(x.shape[-1], tuple(tensors), bits, group_sizes)
    check_quantized_weights(x, gate, up, down_t)
    check_shape(threshold, gate.shape[0], x.device)
    return x.new_empty(x.shape)


def _no_gradient(_context: Any, *_gradients: Tensor) -> Any:
    raise RuntimeError(GRADIENT)


_operator.register_autograd(_no_gradient)


@_operator.register_vmap
def _batched(info: Any, in_dims: tuple[Any, ...], x: Tensor, *arguments: Any) -> tuple[Tensor, int]:
    """A batch of x is more leading dimensions; a batch of thresholds a call for each of its members."""
    x_dim, *other_dims = in_dims
    threshold = len(arguments) - 4
    if any(dim is not None for i, dim in enumerate(other_dims) if i != threshold and not isinstance(dim, list)):
        raise ValueError("sparse_gated_mlp with quantised weights maps over x and the threshold only.")
    operator = torch.ops.cats.sparse_gated_mlp_quantized
    if other_dims[threshold] is None:
        return operator(x.movedim(x_dim, 0), *arguments), 0
    each = []
    for i in range(info.batch_size):
        one = x if x_dim is None else x.select(x_dim, i)
        own = list(arguments)
        own[threshold] = own[threshold].select(other_dims[threshold], i).contiguous()
        each.append(operator(one, *own))
    return torch.stack(each), 0
