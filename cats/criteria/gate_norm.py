"""gate-norm: ``|act(g)_j| rms_j(u) ||D_j|| >= T``, ours: the expected size of what neuron j adds to the output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cats.criteria.base import Criterion, Layer

if TYPE_CHECKING:
    from torch import Tensor


class GateNorm(Criterion):
    name, title, source = "gate-norm", "gate-norm", "this project"
    rms_of = ("up",)

    def weights(self, layer: Layer) -> Tensor | None:
        return layer.rms("up") * layer.norms()


CRITERION = GateNorm()
