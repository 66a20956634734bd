"""How one call of `cats.generate` generates."""

from dataclasses import dataclass, field
from typing import Any

import torch

from cats.generation.sampling import Sampling

GREEDY = Sampling()


@dataclass(frozen=True)
class Settings:
    """How one call generates.

    Attributes:
        loop: one of `LOOPS`.
        sampling: the choice of tokens.
        generator: of the draws; None for torch's own.
        stop: tokens that end a sequence.
        pad: the token after the end.
        room: tokens that the cache holds from the start, at least.
        own_attention: keep the model's own attention in every step.
        fused: join the weights of the query, key and value projections.
        kernel: attention of a step is one kernel; None for that on a GPU. See `DecodeBlock`.
        dependent_launch: as in `compile_options`.
        options: further options of inductor.
        backend: torch.compile's.
    """

    loop: str
    sampling: Sampling = GREEDY
    generator: torch.Generator | None = None
    stop: frozenset[int] = frozenset()
    pad: int = 0
    room: int = 0
    own_attention: bool = False
    fused: bool = True
    kernel: bool | None = None
    dependent_launch: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    backend: Any = "inductor"

    @property
    def of_step(self) -> tuple[Any, ...]:
        """Those that decide what a step is."""
        options = tuple(sorted(self.options.items()))
        attention = self.own_attention, self.fused, self.kernel
        return self.loop, self.sampling, attention, self.dependent_launch, options, self.backend
