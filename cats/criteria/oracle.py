"""oracle: the (1 - k) m neurons of each token with the largest ``|a_j u_j| ||D_j||``. The ceiling of a comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cats.criteria.base import Criterion, Layer

if TYPE_CHECKING:
    from torch import Tensor


class Oracle(Criterion):
    name, title = "oracle", "oracle"
    sites = ("neurons",)
    decider = None
    scored = False
    no_kernel = "oracle runs as masks only: nobody can decide it without both products, which it was to save"

    def weights(self, layer: Layer) -> Tensor | None:
        return layer.norms()

    def parameter(self, sparsity: float, weights: Tensor | None, quantile: Callable[[float], float]) -> float | Tensor:
        """The norms: the level is that of the thresholds, `cats.Thresholds.level_of`."""
        assert weights is not None
        return weights

    def mask(self, values: Tensor, parameter: Tensor, sparsity: float) -> Tensor:
        """Exactly round((1 - k) m) of each row are kept, NaN before all."""
        import torch

        score = values.abs().float() * parameter
        kept = score.topk(round((1 - sparsity) * values.shape[-1]), dim=-1).indices
        dropped = torch.ones_like(score, dtype=torch.bool).scatter(-1, kept, False)
        return values.masked_fill(dropped, 0.0)


CRITERION = Oracle()
