"""random: every neuron of every token is skipped with probability k. The floor that any criterion must beat."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cats.criteria.base import Criterion

if TYPE_CHECKING:
    from torch import Tensor


class Random(Criterion):
    name, title = "random", "random"
    sites = ("neurons",)
    decider = None
    scored = False
    no_kernel = "random runs as masks only: it is the floor of a comparison and nothing to speed up"

    def parameter(self, sparsity: float, weights: Tensor | None, quantile: Callable[[float], float]) -> float | Tensor:
        """The probability k itself."""
        return sparsity

    def mask(self, values: Tensor, parameter: Tensor, sparsity: float) -> Tensor:
        """Drawn anew in every call from torch's global generator, which `torch.manual_seed` sets."""
        import torch

        dropped = torch.rand(values.shape, device=values.device) < parameter
        return values.masked_fill(dropped, 0.0)


CRITERION = Random()
