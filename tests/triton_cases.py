"""Inputs and the float64 oracle shared by the tests of the Triton kernels, interpreted or on a card."""

import torch
from cats_kernels.reference import gate_activation, sparse_gated_mlp_reference
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
ACTIVATIONS = ("silu", "gelu_tanh")
Case = tuple[Tensor, Tensor, Tensor, Tensor, float, str]


def case(
    rows: int,
    d: int,
    m: int,
    dtype: torch.dtype,
    sparsity: float,
    activation: str = "silu",
    seed: int = 0,
    device: str = "cpu",
) -> Case:
    """Arguments with normal weights of variance 1/fan_in and a threshold that drops about that share of the neurons.

    The threshold lies in the middle of a gap between two activations, so that rounding cannot move one across it.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(n: int, k: int, fan_in: int) -> Tensor:
        return (torch.randn(n, k, generator=generator, device=device, dtype=torch.float64) * fan_in**-0.5).to(dtype)

    x, gate, up, down_t = normal(rows, d, 1), normal(m, d, d), normal(m, d, d), normal(m, d, m)
    magnitudes = gate_activation(activation)(x.double() @ gate.double().T).abs().flatten().sort().values
    edges = torch.cat([magnitudes.new_zeros(1), magnitudes, 2 * magnitudes[-1:] + 1])
    k = round(sparsity * magnitudes.numel())
    # between two activations, so that something is kept and something dropped
    some = 0 < sparsity < 1 < magnitudes.numel()
    near = edges[max(1, k - 8) : min(k + 10, magnitudes.numel() + 1)] if some else edges[k : k + 2]
    widest = int(near.diff().argmax())
    threshold = float((near[widest] + near[widest + 1]) / 2) if sparsity > 0 else 0.0
    return x, gate, up, down_t, threshold, activation


def expected(x: Tensor, gate: Tensor, up: Tensor, down_t: Tensor, threshold: float, activation: str) -> Tensor:
    """The reference in float64."""
    return sparse_gated_mlp_reference(x.double(), gate.double(), up.double(), down_t.double(), threshold, activation)


def relative_error(y: Tensor, reference: Tensor) -> float:
    """Norm of the difference over norm of the reference; where the reference is 0, the norm of y."""
    norm = float(reference.norm())
    return float((y.double() - reference).norm()) / (norm if norm > 0 else 1.0)


def tie_case(device: str = "cpu") -> tuple[Case, Case]:
    """Gates that are exactly 32 or 0, once with the threshold at 32 (kept) and once one float above it (dropped).

    SiLU(32) is 32 in float32, since sigmoid(32) rounds to 1; so these two have no float64 reference. The outputs are
    8 active neurons * 32 * 64 = 16384, and 0.
    """
    d, m = 32, 24
    x = torch.full((1, d), 2.0, device=device)
    gate = torch.zeros(m, d, device=device)
    gate[::3, :16] = 1.0
    up, down_t = torch.ones(m, d, device=device), torch.ones(m, d, device=device)
    above = float(torch.nextafter(torch.tensor(32.0), torch.tensor(33.0)))
    return (x, gate, up, down_t, 32.0, "silu"), (x, gate, up, down_t, above, "silu")
