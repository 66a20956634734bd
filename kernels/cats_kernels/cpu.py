"""The fused sparse gated MLP on the CPU, compiled by numba (first version; simple loops)."""

from __future__ import annotations

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

FASTMATH = {"reassoc", "contract", "nsz", "arcp"}
BLOCK = 256


@njit(fastmath=FASTMATH, cache=True)
def _activate(s, gelu):
    if gelu:
        return (
            np.float32(0.5)
            * s
            * (np.float32(1) + np.tanh(np.float32(0.7978845608028654) * (s + np.float32(0.044715) * s * s * s)))
        )
    return s / (np.float32(1) + np.exp(-s))


@njit(fastmath=FASTMATH, cache=True)
def _dot(w, x):
    s = np.float32(0)
    for k in range(x.size):
        s += w[k] * x[k]
    return s


@njit(fastmath=FASTMATH, parallel=True, cache=True)
def _kernel(x, gate, up, down, threshold, gelu, partial):
    m = gate.shape[0]
    for b in prange(partial.shape[0]):
        for j in range(b * BLOCK, min(m, (b + 1) * BLOCK)):
            for r in range(x.shape[0]):
                v = _activate(_dot(gate[j], x[r]), gelu)
                if not (abs(v) < threshold):
                    h = v * _dot(up[j], x[r])
                    row = down[j]
                    y = partial[b, r]
                    for k in range(y.size):
                        y[k] += h * row[k]


def sparse_gated_mlp_cpu(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight_t: Tensor, threshold: float, activation: str = "silu"
) -> Tensor:
    """The kernel; x (rows, d) float32 or bfloat16, contiguous."""
    rows = x.reshape(-1, x.shape[-1])
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    partial = torch.zeros(-(-gate_weight.shape[0] // BLOCK), *rows.shape)
    arrays = [t.detach().float().numpy() for t in (rows, gate_weight, up_weight, down_weight_t)]
    _kernel(*arrays, np.float32(threshold), activation == "gelu_tanh", partial.numpy())
    return partial.sum(0).to(x.dtype).view(x.shape)
