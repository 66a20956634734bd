"""`sparse_gated_mlp`: validates its arguments, computes at once, or is one operator wherever calls are recorded.

In plain eager mode a call goes straight to its kernel: torch's dispatcher costs 60 microseconds a call, more than a
small MLP itself. Where anything records or transforms calls (torch.compile, torch.export, torch.jit.trace, fx, dispatch
and function modes such as FlopCounterMode, torch.func, tensor subclasses) the call is
``torch.ops.cats.sparse_gated_mlp``, an operator of torch.library with a fake implementation, a batching rule and a FLOP
formula. There a threshold is a tensor input, so that one graph serves all its values. The profiler shows the call as
``cats::sparse_gated_mlp``.

It is for inference; training uses the dense masked path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from cats_kernels.calls import GRADIENT, check_number, check_options, recording, refuse_gradient
from cats_kernels.dispatch import compute, resolve
from cats_kernels.flops import register_flops
from cats_kernels.quantized import QuantizedWeight
from cats_kernels.quantized_operator import quantized_mlp
from cats_kernels.reference import sparse_gated_mlp_reference
from cats_kernels.repeated import compute_kept
from cats_kernels.thresholds import Threshold, as_tensor, check_shape
from cats_kernels.weights import check_weights

PLAIN = (Tensor, torch.nn.Parameter)


def sparse_gated_mlp(
    x: Tensor,
    gate_weight: Tensor | QuantizedWeight,
    up_weight: Tensor | QuantizedWeight,
    down_weight_t: Tensor | QuantizedWeight,
    threshold: Threshold,
    activation: str = "silu",
    backend: str = "auto",
    decider: str = "gate",
) -> Tensor:
    """The gated MLP that skips neurons whose deciding product is below the threshold (eq. 1, 4, 5; figures 3 and 6).

    With ``g = x Wg^T`` and ``u = x Wu^T``: ``y = sum over kept j of act(g_j) u_j down_weight_t[j]``. Neuron j is kept
    where ``|act(g_j)| >= t_j`` (decider "gate") or ``|u_j| >= t_j`` (decider "up"); ties and NaN are kept. Accumulates
    in float32, and compares in float32. The deciding weight is read whole; a dropped neuron's rows of the other two are
    not read.

    Args:
        x: (..., d), floating point; need not be contiguous.
        gate_weight, up_weight: (m, d), contiguous, dtype and device of ``x``.
        down_weight_t: (m, d), contiguous; the down projection transposed, row j = neuron j; finite. All three weights
            may be `QuantizedWeight` instead, of one format or of several: see `quantized_mlp`.
        threshold: a number, not NaN; or a float32 tensor of shape () or (m,) on the device of ``x``, whose values the
            kernels read on that device, without a synchronisation (so a NaN in it is not refused: its neuron is kept).
        activation: "silu" or "gelu_tanh".
        backend: "auto" (triton on CUDA; cpu for float32 and bfloat16 on the CPU; else reference), "reference", "cpu"
            or "triton". The environment variable CATS_BACKEND, read in every call, replaces "auto" (but not in a CUDA
            graph that was captured before).
        decider: "gate" or "up": the product that is compared with the threshold.

    Returns:
        (..., d), contiguous, dtype and device of ``x``. Under ``torch.autocast`` the dtype that the dense block would
        give, autocast's; the weights are read and computed with in their own dtype (no copy of them is made, so a mask
        can differ from the dense block's where a rounded product crosses the threshold).

    Raises:
        TypeError, ValueError: one sentence naming the argument that is wrong and what is allowed.
        RuntimeError: when gradients are enabled and an argument requires them, or the backend cannot run here.
    """
    arguments: Any = (x, gate_weight, up_weight, down_weight_t, threshold, activation, backend, decider)
    if isinstance(gate_weight, QuantizedWeight):
        return quantized_mlp(*arguments)
    if torch.compiler.is_compiling():
        return _record(*arguments)
    if has_torch_function(arguments[:5]):  # fx's proxies, function modes, tensor subclasses
        result: Tensor = handle_torch_function(sparse_gated_mlp, arguments[:5], *arguments)
        return result
    if (
        recording()
        or type(x) is not Tensor
        or type(gate_weight) not in PLAIN
        or type(up_weight) not in PLAIN
        or type(down_weight_t) not in PLAIN
    ):
        return _record(*arguments)
    if torch.is_autocast_enabled(x.device.type) and _autocast_applies(x, gate_weight):
        return _autocast(*arguments)
    _validate(*arguments)
    if torch.autograd._profiler_enabled():
        with torch.profiler.record_function("cats::sparse_gated_mlp"):
            return _compute(*arguments)
    return _compute(*arguments)


def _record(
    x: Tensor,
    gate_weight: Any,
    up_weight: Any,
    down_weight_t: Any,
    threshold: Threshold,
    activation: str,
    backend: str,
    decider: str,
) -> Tensor:
    """The call as one operator, whose implementations validate what only they can see: tensors. An ONNX exporter, which
    knows no such operator, gets the reference's plain products instead."""
    if isinstance(up_weight, QuantizedWeight) or isinstance(down_weight_t, QuantizedWeight):
        # which says that all three must be
        return quantized_mlp(x, gate_weight, up_weight, down_weight_t, threshold, activation, backend, decider)
    check_options(threshold, activation, backend, decider)
    tensors = (x, gate_weight, up_weight, down_weight_t)
    for name, tensor in zip(("x", "gate_weight", "up_weight", "down_weight_t"), tensors, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a tensor.")
    if torch.is_autocast_enabled(x.device.type) and _autocast_applies(x, gate_weight):
        return _autocast(*tensors, threshold, activation, backend, decider)
    if torch.onnx.is_in_onnx_export():
        return sparse_gated_mlp_reference(*tensors, threshold, activation, decider)
    refuse_gradient(*tensors, threshold)
    if not torch.compiler.is_compiling():
        register_flops()
    result: Tensor = torch.ops.cats.sparse_gated_mlp(
        *tensors, as_tensor(threshold, x.device), activation, backend, decider
    )
    return result


def _autocast_applies(x: Tensor, weight: Tensor) -> bool:
    """Autocast leaves float64 alone."""
    return x.is_floating_point() and torch.float64 not in (x.dtype, weight.dtype)


def _autocast(x: Tensor, gate_weight: Tensor, *arguments: Any) -> Tensor:
    """Compute in the dtype of the weights, which are not copied, and return the dtype of the dense block."""
    device, dtype = x.device.type, torch.get_autocast_dtype(x.device.type)
    with torch.autocast(device, enabled=False):
        return sparse_gated_mlp(x.to(gate_weight.dtype), gate_weight, *arguments).to(dtype)


def _validate(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: Threshold,
    activation: str,
    backend: str,
    decider: str,
) -> None:
    check_options(threshold, activation, backend, decider)
    check_number(threshold)
    check_weights(x, gate_weight, up_weight, down_weight_t)
    check_shape(threshold, gate_weight.shape[0], x.device)
    refuse_gradient(x, gate_weight, up_weight, down_weight_t, threshold)


def _compute(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: Threshold,
    activation: str,
    backend: str,
    decider: str,
) -> Tensor:
    chosen = resolve(backend, x)
    if x.numel() == 0:
        return x.new_empty(x.shape)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = compute(chosen, rows, gate_weight, up_weight, down_weight_t, threshold, activation, decider)
    return y.view(x.shape)


@torch.library.custom_op("cats::sparse_gated_mlp", mutates_args=())
def _operator(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: Tensor,
    activation: str,
    backend: str,
    decider: str,
) -> Tensor:
    _validate(x, gate_weight, up_weight, down_weight_t, threshold, activation, backend, decider)
    return compute_kept(x, gate_weight, up_weight, down_weight_t, threshold, activation, backend, decider, _compute)


@_operator.register_fake
def _fake(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: Tensor,
    activation: str,
    backend: str,
    decider: str,
) -> Tensor:
    check_weights(x, gate_weight, up_weight, down_weight_t)
    check_shape(threshold, gate_weight.shape[0], x.device)
    return x.new_empty(x.shape)


def _no_gradient(_context: Any, *_gradients: Tensor) -> Any:
    raise RuntimeError(GRADIENT)


_operator.register_autograd(_no_gradient)


@_operator.register_vmap
def _batched(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *arguments: Any) -> tuple[Tensor, int]:
    """Rows of x are independent, so a batch of x is more leading dimensions. A batch of weights or thresholds is a call
    for each of its members."""
    x_dim, *other_dims = in_dims
    if all(dim is None for dim in other_dims):
        assert x_dim is not None
        return torch.ops.cats.sparse_gated_mlp(x.movedim(x_dim, 0), *arguments), 0
    each = []
    for i in range(info.batch_size):
        chosen = [
            value if dim is None else value.select(dim, i).contiguous()
            for value, dim in zip((x, *arguments), in_dims, strict=True)
        ]
        each.append(torch.ops.cats.sparse_gated_mlp(*chosen))
    return torch.stack(each), 0


register_flops()
