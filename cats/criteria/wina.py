"""WINA: ``|x_i| ||W_:i|| >= T`` on the inputs of linear layers, arXiv 2505.19427."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cats.criteria.base import Criterion, Layer

if TYPE_CHECKING:
    from torch import Tensor


class Wina(Criterion):
    name, title, source = "wina", "WINA", "arXiv 2505.19427"
    sites = ("mlp_linears",)
    other_sites = ("attention_linears",)
    decider = None
    no_kernel = "wina runs as masks only: skipping inputs, that is columns of weights, needs another kernel than ours"

    def weights(self, layer: Layer) -> Tensor | None:
        return layer.norms()


CRITERION = Wina()
