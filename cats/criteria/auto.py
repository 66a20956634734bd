"""auto: for each layer the side and the weights with the least error of the outputs, at the same bytes.

Which product decides best, and with what weights, differs between models and between the layers of one. `cats.search`
tries, on a sample of calibration tokens, the gate and the up product, each with the plain value, with the root mean
square of the other product, and with that and the norm of the down projection's row; what a text begins with counts as
much as all the rest of it. Ours. Sharing the target unequally among the layers was tried in two ways and lost on three
models (docs/LOG.md).
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

    def search(self, model: nn.Module, batches: Sequence[Any], targets: Sequence[float]) -> Searched:
        from cats.search import search

        return search(model, batches, targets)


CRITERION = Auto()
