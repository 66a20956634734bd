"""up-norm: ``|u_j| rms_j(act(g)) ||D_j|| >= T``, ours: as gate-norm, with the up product deciding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cats.criteria.base import Criterion, Layer

if TYPE_CHECKING:
    from torch import Tensor


class UpNorm(Criterion):
    name, title, source = "up-norm", "up-norm", "this project"
    sites = ("up",)
    decider = "up"
    rms_of = ("gate",)

    def weights(self, layer: Layer) -> Tensor | None:
        return layer.rms("gate") * layer.norms()


CRITERION = UpNorm()
