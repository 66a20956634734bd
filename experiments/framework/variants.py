"""The variants that accuracy experiments compare: a criterion at a level, and how a model becomes one."""

from dataclasses import dataclass

import torch

import cats
from cats import criteria
from cats.calibration import Thresholds, check_sparsity

ALL_SITES = ("gate", "attention_input", "mlp_input")
"""Of the attention variant (appendix B)."""


@dataclass(frozen=True)
class Variant:
    """One curve of a figure.

    Attributes:
        name: as result files hold it, such as ``cats-50``.
        criterion: a name in `cats.criteria`, or ``dense`` for the unmodified model.
        sparsity: the target; None for the dense model and for criteria without a level.
        sites: where its thresholds act; none for the criterion's own.
    """

    name: str
    criterion: str
    sparsity: float | None = None
    sites: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """What runs: accuracy is measured on the dense masked path, the one that training uses. lm-eval's batches are
        longer than the sparse kernel's limit in any case."""
        return "dense" if self == DENSE else "dense masked"


DENSE, RELUFICATION = Variant("dense", "dense"), Variant("relufication", "relufication")


def variant(criterion: str, sparsity: float, sites: tuple[str, ...] = ()) -> Variant:
    """A criterion at a level: CATS-50 and so on.

    Raises:
        ValueError: a sparsity outside [0, 1), or an unknown criterion.
    """
    check_sparsity(sparsity)
    if not criteria.get(criterion).has_level:
        return Variant(criterion, criterion)
    suffix = "-attention" if sites == ALL_SITES else ""
    return Variant(f"{criterion}-{100 * sparsity:g}{suffix}", criterion, sparsity, sites)


def make(model: torch.nn.Module, wanted: Variant, thresholds: Thresholds | None = None) -> None:
    """Make ``model`` this variant, whatever it is now."""
    cats.remove(model)
    if wanted == RELUFICATION:
        cats.relufy(model)
    elif wanted != DENSE:
        assert thresholds is not None
        cats.apply(model, thresholds, kernel="reference")
