"""What the tests of the kernels for quantised weights share."""

import itertools

import torch
from cats_kernels.quantized import QuantizedWeight, pack
from cats_kernels.quantized_problem import QuantizedProblem
from cats_kernels.thresholds import Threshold

from tests.mlp_cases import threshold_of_kind

FORMATS = ((8, None, True), (8, 32, True), (8, 64, False), (4, 32, True), (4, 64, False), (4, 128, True))
"""(bits, group size, symmetric) of the tests of the Triton kernels, which take them."""
CPU_FORMATS = [(8, None), (8, 32), (8, 128), (4, 32), (4, 64), (4, 128), (4, 256)]
"""(bits, group size) of the tests of the CPU's kernels, which take them."""
KINDS = tuple(itertools.product(("number", "one", "vector"), ("gate", "up")))


def quantized_case(
    rows: int,
    d: int,
    m: int,
    form: tuple[int, int | None, bool],
    dtype: torch.dtype,
    sparsity: float,
    activation: str = "silu",
    seed: int = 0,
    device: str = "cpu",
    kind: str = "number",
    decider: str = "gate",
) -> tuple[QuantizedProblem, Threshold]:
    """A problem on quantised weights, and a threshold that drops about that share of its neurons."""
    problem = QuantizedProblem(d, m, rows, *form, dtype, device, seed, activation, decider)
    return problem, threshold_of_kind(problem, kind, sparsity)


def quantized_tie_case(
    bits: int, decider: str = "gate", device: str = "cpu"
) -> list[tuple[torch.Tensor, QuantizedWeight, QuantizedWeight, QuantizedWeight, float, str, str]]:
    """`tests.triton_cases.tie_case` on weights that quantising leaves as they are: outputs 16384 and 0."""
    d, m = 32, 24
    x = torch.full((1, d), 2.0, device=device)
    deciding = torch.zeros(m, d, device=device)
    deciding[::3, :16] = 1.0
    ones = torch.ones(m, d, device=device)
    decide, plain = (exactly(weight, bits) for weight in (deciding, ones))
    gate, up = (decide, plain) if decider == "gate" else (plain, decide)
    above = float(torch.nextafter(torch.tensor(32.0), torch.tensor(33.0)))
    return [(x, gate, up, plain, threshold, "silu", decider) for threshold in (32.0, above)]


def exactly(weight: torch.Tensor, bits: int) -> QuantizedWeight:
    """A weight of small whole numbers, with scales of 1."""
    m, d = weight.shape
    scales = torch.ones(m, d // 32, device=weight.device)
    data = weight.to(torch.int8) if bits == 8 else pack((weight + 8).to(torch.uint8), 32)
    return QuantizedWeight(data, scales, None, bits, 32, d)
