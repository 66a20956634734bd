"""What a patched model really skips, per layer (Figure 5, Table 3)."""

from torch import Tensor, nn

from cats.observe import Batches, observe


def measure_sparsity(model: nn.Module, batches: Batches) -> dict[str, float]:
    """Fraction of gate activations that are exactly zero behind the activation, over the real tokens of ``batches``.

    Works on a model patched by `cats.apply` or `cats.relufy`, and on an unpatched one (where it is about 0).

    Returns:
        Module path of each gated MLP to a fraction in [0, 1].

    Raises:
        TypeError, ValueError: no gated MLP, and as `cats.observe.observe`.
    """
    zeros: dict[str, int] = {}
    counts: dict[str, int] = {}

    def record(_site: str, name: str, values: Tensor) -> None:
        zeros[name] = zeros.get(name, 0) + int((values == 0).sum())
        counts[name] = counts.get(name, 0) + values.numel()

    observe(model, batches, record, after_threshold=True)
    return {name: zeros[name] / counts[name] for name in zeros}
