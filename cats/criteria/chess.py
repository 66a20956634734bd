"""CHESS: ``|act(g)_j| rms_j(u) >= T``, arXiv 2409.01366: what neuron j multiplies is, on average, so large."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cats.criteria.base import Criterion, Layer

if TYPE_CHECKING:
    from torch import Tensor


class Chess(Criterion):
    name, title, source = "chess", "CHESS", "arXiv 2409.01366"
    rms_of = ("up",)

    def weights(self, layer: Layer) -> Tensor | None:
        return layer.rms("up")


CRITERION = Chess()
