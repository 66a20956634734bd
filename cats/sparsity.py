"""What a patched model really skips, per layer (Figure 5, Table 3)."""

from torch import Tensor, nn

from cats.observe import Batches, observe


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
