"""ReLUfication, the CATS paper's baseline: the gate's activation becomes ReLU, and what is not positive is skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cats.criteria.base import Criterion

if TYPE_CHECKING:
    from torch import Tensor


class Relufication(Criterion):
    name, title, source = "relufication", "ReLUfication", "arXiv 2404.08763"
    other_sites = ()
    scored = has_level = False
    activation = "relu"
    no_kernel = "relufication runs as the dense block with ReLU: the sparse kernels know SiLU and tanh-GELU only"

    def parameter(self, sparsity: float, weights: Tensor | None, quantile: Callable[[float], float]) -> float | Tensor:
        """No threshold at all: ReLU has made the zeros."""
        return 0.0


CRITERION = Relufication()
