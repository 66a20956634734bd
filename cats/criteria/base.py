"""What a criterion says of itself. A new one is one file in this package with a subclass and an instance of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

BLOCK_INPUTS = ("attention_input", "mlp_input")
"""Sites that any criterion may have in addition: plain thresholds on the inputs of whole blocks (appendix B)."""


class Layer(Protocol):
    """What calibration knows of one layer when it asks a criterion for weights; tensors are float32 on the CPU."""

    def rms(self, site: str) -> Tensor:
        """Root mean square over the calibration tokens of each neuron's value at ``site``, "gate" or "up": (m,)."""

    def norms(self) -> Tensor:
        """Norms of the weights that the scored values are multiplied with, (n,): at sites of neurons, of the columns of
        the down projection (m of them); at the input of a linear layer, of its own columns."""


@dataclass(frozen=True)
class Searched:
    """What `Criterion.search` found.

    Attributes:
        sites: target to site to module path to value, as `cats.Thresholds` holds them.
        tokens: how many were looked at.
    """

    sites: dict[float, dict[str, dict[str, float | Tensor]]]
    tokens: int


class Criterion:
    """Decides which neurons, or inputs of linear layers, are skipped. The defaults are those of CATS.

    A value v_j at one of ``sites`` is kept where ``|v_j| w_j >= T``, with weights w_j from `weights` and T the quantile
    of that score per layer. What `parameter` makes of T and w is what `cats.Thresholds` stores.

    Attributes:
        name: as ``criterion=`` takes it, and the columns of result files hold it.
        title: what reports print in front of the level.
        source: the paper.
        sites: where its thresholds act when calibration is not told otherwise, of `cats.observe.SITES`.
        other_sites: where they may act as well when asked for.
        decider: the product that is read whole and decides, "gate" or "up", or "mixed" where each MLP has its own; None
            where none of the two can.
        rms_of: the sites whose root mean square `weights` asks for: these take a second pass over the text.
        scored: whether T is needed, a pass over the calibration text.
        searches: whether `search` makes the thresholds, in place of one score for all layers.
        has_level: whether it has a target sparsity.
        activation: what replaces the model's own activation: None, or "relu".
        no_kernel: why no sparse kernel serves it, in one sentence; empty where one does.
    """

    name: str
    title: str
    source: str = ""
    sites: tuple[str, ...] = ("gate",)
    other_sites: tuple[str, ...] = BLOCK_INPUTS
    decider: Literal["gate", "up", "mixed"] | None = "gate"
    rms_of: tuple[str, ...] = ()
    scored: bool = True
    searches: bool = False
    has_level: bool = True
    activation: Literal["relu"] | None = None
    no_kernel: str = ""

    def label(self, sparsity: float | None = None) -> str:
        """What reports print, such as "CATS-50" at 0.5; the title alone without a level."""
        return self.title if sparsity is None or not self.has_level else f"{self.title}-{100 * sparsity:g}"

    def weights(self, layer: Layer) -> Tensor | None:
        """Weights w_j >= 0 of the score of one layer, float32 (n,) on the CPU; None where all are 1."""
        return None

    def parameter(self, sparsity: float, weights: Tensor | None, quantile: Callable[[float], float]) -> float | Tensor:
        """What is stored for one layer: by default the threshold t_j = T / w_j of ``|v_j|``, a number without weights.

        A weight of 0 gives infinity: that value never matters. T = 0 keeps everything, whatever the weights.

        Args:
            sparsity: the target k.
            weights: from `weights`.
            quantile: gives the score's quantile T at a fraction; only where ``scored``.
        """
        threshold = quantile(sparsity)
        if weights is None or threshold == 0:
            return threshold
        return threshold / weights  # torch: a positive number over 0 is infinity

    def search(self, model: nn.Module, batches: Sequence[Any], targets: Sequence[float]) -> Searched:
        """Thresholds of ``model`` at each of ``targets``, for a criterion that `searches`; see `cats.calibrate`."""
        raise NotImplementedError(f"{self.name} says that it searches, but has no search")

    def mask(self, values: Tensor, parameter: Tensor, sparsity: float) -> Tensor:
        """``values`` (..., n) with 0 for what is skipped; ``parameter`` () or (n,) float32 on their device."""
        from cats.activation import threshold_activation

        return threshold_activation(values, parameter)
