"""What the tests of the sparse gated MLP on the CPU share beside `cats_kernels.problem`."""

import torch
from cats_kernels import problem
from torch import Tensor


def gate_threshold(x: Tensor, gate: Tensor, sparsity: float, activation: str = "silu") -> float:
    """A threshold near the wanted sparsity that no gate activation comes near, so that rounding cannot flip a
    neuron."""
    return problem.clear_threshold(problem.products(x, gate, gate, activation)[0].abs(), sparsity)


def threshold_of_kind(made: problem.Problem, kind: str, sparsity: float) -> problem.Threshold:
    """A threshold of a problem that is a "number", a tensor of "one" element, or a "vector"."""
    if kind == "vector":
        return made.thresholds(sparsity)
    number = made.threshold(sparsity)
    return number if kind == "number" else torch.tensor(number, device=made.x.device)


def same_pattern(a: Tensor, b: Tensor) -> bool:
    """NaN where NaN, infinity of the same sign where infinity."""
    return all(torch.equal(kind(a), kind(b)) for kind in (torch.isnan, torch.isposinf, torch.isneginf))
