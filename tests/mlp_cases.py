"""Problems and the float64 oracle for the tests of the sparse gated MLP on the CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def weights(d: int, m: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up (m, d) scaled by 1/sqrt(d), and the transposed down projection (m, d) by 1/sqrt(m)."""
    generator = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(m, d, generator=generator) * n**-0.5).to(dtype) for n in (d, d, m))


def inputs(rows: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


def oracle(x: Tensor, gate: Tensor, up: Tensor, down_t: Tensor, threshold: float, activation: str = "silu") -> Tensor:
    """The formula in float64, one kept neuron at a time, sharing no code with the package."""
    x, gate, up, down_t = (t.double() for t in (x, gate, up, down_t))
    s = x @ gate.T
    v = s * torch.sigmoid(s) if activation == "silu" else F.gelu(s, approximate="tanh")
    y = torch.zeros_like(x)
    for r in range(x.shape[0]):
        for j in range(gate.shape[0]):
            if not abs(v[r, j]) < threshold:
                y[r] += v[r, j] * torch.dot(x[r], up[j]) * down_t[j]
    return y


def clear_threshold(x: Tensor, gate: Tensor, sparsity: float, activation: str = "silu") -> float:
    """A threshold near the wanted sparsity that no activation comes near, so that rounding cannot flip a neuron."""
    s = x.double() @ gate.double().T
    v = s * torch.sigmoid(s) if activation == "silu" else F.gelu(s, approximate="tanh")
    v = v.abs().flatten().sort().values
    v = torch.cat([torch.zeros(1, dtype=v.dtype), v, v[-1:] * 2 + 1])
    wanted = round(sparsity * (len(v) - 2))
    first, last = max(0, wanted - 3), min(len(v) - 1, wanted + 4)
    gap = first + int((v[first + 1 : last + 1] - v[first:last]).argmax())
    return float((v[gap] + v[gap + 1]) / 2)


def error(y: Tensor, expected: Tensor) -> float:
    """Scale-free: norm of the difference over norm of the expected; 0 over 0 is 0."""
    difference = (y.double() - expected).norm()
    return 0.0 if difference == 0 else float(difference / expected.norm())


def same_pattern(a: Tensor, b: Tensor) -> bool:
    """NaN where NaN, infinity of the same sign where infinity."""
    return all(torch.equal(kind(a), kind(b)) for kind in (torch.isnan, torch.isposinf, torch.isneginf))
