"""auto: for each layer the side and the weights with the least error of the outputs, at the same bytes.

Which product decides best, and with what weights, differs between models and between the layers of one. `cats.search`
tries, on a sample of calibration tokens, the gate and the up product, each with the plain value, with the root mean
square of the other product, and with that and the norm of the down projection's row. Layers differ as much in how much
they can skip: with ``allocation="output"`` `cats.allocation` gives each a level of its own, by these errors scaled with
what the model's output suffers, so that all MLPs together skip the target. Ours; TEAL (arXiv 2408.14690) allocates
within a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cats.criteria.base import Criterion, Searched

if TYPE_CHECKING:
    from torch import nn


class Auto(Criterion):
    name, title, source = "auto", "auto", "this project"
    sites = ("gate", "up")
    other_sites = ()
    decider = "mixed"
    scored = False
    searches = True
    allocations = ("uniform", "output")

    def search(self, model: nn.Module, batches: Sequence[Any], targets: Sequence[float], allocation: str) -> Searched:
        from cats.search import search

        return search(model, batches, targets, allocation)


CRITERION = Auto()
