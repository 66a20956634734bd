"""Launch of the CPU kernel on quantised weights: `QuantizedWeight` in, `Packed` to numba, a tensor out."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cats_kernels.cpu.launch import as_array, as_thresholds, launch
from cats_kernels.cpu.quantized import BFLOAT16, FLOAT16, FLOAT32, WIDTH, Packed, sum_groups
from cats_kernels.cpu.threads import threads_for
from cats_kernels.quantized import QuantizedWeight
from cats_kernels.reference import check_decider, gate_activation
from cats_kernels.thresholds import Threshold
from cats_kernels.weights import MAX_ROWS

KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}


def pack(weight: QuantizedWeight) -> Packed:
    """The weight's numbers and addresses, before any x; valid as long as the weight is."""
    zeros = 0 if weight.zeros is None else weight.zeros.data_ptr()
    return Packed(
        data=weight.data.data_ptr(),
        scales=weight.scales.data_ptr(),
        zeros=zeros,
        kind=KINDS[weight.scales.dtype],
        row_bytes=weight.data.shape[1],
        row_halves=weight.groups * weight.scales.element_size() // 2,
        bits=weight.bits,
        group=weight.group_size,
        groups=weight.groups,
        m=weight.shape[0],
        d=weight.d,
        x=0,
        sums=0,
        direct=0,
        scratch=0,
    )


def with_row(weight: Packed, x: np.ndarray, sums: np.ndarray) -> Packed:
    """The weight with one row of x (width,), padded with zeros, and memory for its sums; valid as long as both are."""
    direct = sum_groups(x, weight.group, sums)
    return weight._replace(x=x.ctypes.data, sums=sums.ctypes.data, direct=int(direct))


def sparse_gated_mlp_quantized_cpu(
    x: Tensor,
    gate_weight: QuantizedWeight,
    up_weight: QuantizedWeight,
    down_weight_t: QuantizedWeight,
    threshold: Threshold,
    activation: str = "silu",
    decider: str = "gate",
) -> Tensor:
    """`sparse_gated_mlp_cpu` on quantised weights (m, d), whose formats may differ; x float32 or bfloat16."""
    gate_activation(activation)
    check_decider(decider)
    rows, d = x.shape
    inputs = as_array(F.pad(x.float(), (0, -d % WIDTH)))
    y = torch.empty(inputs.shape)
    output = as_array(y)
    deciding, other = (gate_weight, up_weight) if decider == "gate" else (up_weight, gate_weight)
    weights = pack(deciding), pack(other), pack(down_weight_t)
    options = as_thresholds(threshold), activation == "gelu_tanh", decider == "up"
    threads = threads_for(3 * gate_weight.shape[0] * d)
    for i in range(0, rows, MAX_ROWS):
        some = inputs[i : i + MAX_ROWS]
        given: tuple[Packed, ...] = weights
        if len(some) == 1:
            sums = [np.empty(weight.groups, np.float32) for weight in weights[:2]]
            given = (*map(with_row, weights[:2], (some[0], some[0]), sums), weights[2])
        launch(threads, some, *given, *options, output[i : i + MAX_ROWS])
    return y[:, :d].to(x.dtype).contiguous()
