"""Inputs shared by the tests of the Triton kernels, interpreted or on a card."""

import torch
from cats_kernels.problem import Problem
from cats_kernels.thresholds import Threshold
from torch import Tensor

from tests.mlp_cases import threshold_of_kind

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = ("silu", "gelu_tanh")
Case = tuple[Tensor, Tensor, Tensor, Tensor, Threshold, str, str]


def case(
    rows: int,
    d: int,
    m: int,
    dtype: torch.dtype,
    sparsity: float,
    activation: str = "silu",
    seed: int = 0,
    device: str = "cpu",
    kind: str = "number",
    decider: str = "gate",
) -> Case:
    """Arguments of a random problem with a threshold of some kind that drops about that share of the neurons."""
    made = Problem(d, m, rows, dtype, device, seed, activation, decider)
    return made.arguments(threshold_of_kind(made, kind, sparsity))


def tie_case(device: str = "cpu", decider: str = "gate") -> tuple[Case, Case]:
    """Deciding products that are exactly 32 or 0, once with the threshold at 32 (kept) and once one float above it
    (dropped).

    SiLU(32) is 32 in float32, since sigmoid(32) rounds to 1; so these two have no float64 reference. The outputs are
    8 active neurons * 32 * 64 = 16384, and 0.
    """
    d, m = 32, 24
    x = torch.full((1, d), 2.0, device=device)
    deciding = torch.zeros(m, d, device=device)
    deciding[::3, :16] = 1.0
    other, down_t = torch.ones(m, d, device=device), torch.ones(m, d, device=device)
    gate, up = (deciding, other) if decider == "gate" else (other, deciding)
    above = float(torch.nextafter(torch.tensor(32.0), torch.tensor(33.0)))
    return (x, gate, up, down_t, 32.0, "silu", decider), (x, gate, up, down_t, above, "silu", decider)
