"""What a patched model really skips, per layer (Figure 5, Table 3)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cats.observe import Batches, observe
from cats.structure import named_modules, parts_of


def measure_sparsity(model: nn.Module, batches: Batches, rows: int = 1) -> dict[str, float]:
    """Fraction of neurons that are skipped in each gated MLP, over the real tokens of ``batches``.

    Neurons are counted as skipped where the value that decides is exactly zero behind the criterion. Works on a model
    patched by `cats.apply` or `cats.relufy`, and on an unpatched one (where it is about 0).

    Args:
        model: a causal language model.
        batches: as `cats.observe.observe`.
        rows: a kernel that gets several rows together skips only what all of them skip: the fraction is over groups of
            so many consecutive tokens of the text (those of an incomplete last group in a batch are left out).

    Returns:
        Module path of each gated MLP to a fraction in [0, 1]; of criteria that skip inputs (teal, wina) module path of
        each linear layer to the fraction of its inputs.

    Raises:
        TypeError, ValueError: ``rows`` below 1, batches of fewer tokens than ``rows``, no gated MLP, and as
            `cats.observe.observe`.
    """
    if not isinstance(rows, int) or rows < 1:
        raise ValueError(f"rows must be a whole number of at least 1, not {rows!r}")
    zeros: dict[str, int] = {}
    counts: dict[str, int] = {}

    def record(_site: str, name: str, values: Tensor) -> None:
        skipped = values == 0
        if rows > 1:
            skipped = skipped[: len(skipped) // rows * rows].unflatten(0, (-1, rows)).all(1)
        zeros[name] = zeros.get(name, 0) + int(skipped.sum())
        counts[name] = counts.get(name, 0) + skipped.numel()

    observe(model, batches, record, after_threshold=True)
    if not all(counts.values()):
        raise ValueError(f"no batch has {rows} tokens: give longer ones, or fewer rows")
    return {name: zeros[name] / counts[name] for name in zeros}


def overall_sparsity(model: nn.Module, fractions: Mapping[str, float]) -> float:
    """What is skipped in all modules together: their mean, each counted by its number of weights.

    Args:
        model: a causal language model, patched or not.
        fractions: module path of a gated MLP or a linear layer to the fraction skipped, as `measure_sparsity` gives it.
    """
    modules = dict(named_modules(model))
    sizes = {path: _weights(modules[path]) for path in fractions}
    return sum(sizes[path] * fraction for path, fraction in fractions.items()) / sum(sizes.values())


def _weights(module: Any) -> int:
    """Of a gated MLP or of one linear layer."""
    if hasattr(module, "in_features"):
        return int(module.in_features * module.out_features)
    of = parts_of(module)
    down = module._modules[of.down]
    return int(3 * down.in_features * down.out_features)
