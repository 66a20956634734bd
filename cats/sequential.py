"""Thresholds made layer by layer, each behind those of the layers before it.

Calibration looks at the dense model. Once its thresholds are in force later layers read other values, and skip more of
them than their target, by up to four points on small models. Here one pass over the text with the thresholds in force
moves those of each layer as it goes: a layer's scores are counted before its own threshold acts, the threshold is set
to their quantile so far, and the layers behind it see what that leaves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cats.criteria import Criterion, get
from cats.histogram import Histogram
from cats.kernel_choice import is_patched
from cats.observe import count_tokens, input_mask, masks_of, observe
from cats.patching import apply, remove
from cats.sparse_forward import INPUT
from cats.structure import gated_mlps, named_modules
from cats.thresholds import Thresholds, Value

SAMPLE = 8192
"""Tokens, evenly spread over each batch, whose scores are counted."""


def settle(model: nn.Module, thresholds: Thresholds, batches: Sequence[Any]) -> Thresholds:
    """``thresholds`` moved, those of each layer by one factor, to where the model that they make sparse is on target.

    What has no threshold to move stays as it is: criteria without one, or with a mask of their own (oracle, random).

    Args:
        model: that they were calibrated on, not patched; it is left as it was.
        thresholds: from `cats.calibrate`.
        batches: as `cats.observe.observe`, gone through once.

    Raises:
        TypeError, ValueError: a patched model, as `cats.apply`, and as `cats.observe.observe`.
    """
    criterion = get(thresholds.criterion)
    movable = criterion.has_level and type(criterion).mask is Criterion.mask
    sites = {site: values for site, values in thresholds.sites.items() if site != "neurons"} if movable else {}
    check_dense(model)
    if not sites:
        return replace(thresholds, sequential=True)
    apply(model, thresholds, kernel="reference")
    try:
        modules = dict(named_modules(model))
        layers = {
            (site, path): _Layer(_holder(modules, site, path), thresholds.level_of(path))
            for site, values in sites.items()
            for path in values
        }
        stride = max(1, -(-count_tokens(batches) // SAMPLE))

        def record(site: str, path: str, values: Tensor) -> None:
            if (site, path) in layers:
                layers[site, path].see(values[::stride])

        observe(model, batches, record, tuple(sites))
    finally:
        remove(model)
    moved: dict[str, Any] = {
        site: {path: layers[site, path].value() for path in values} for site, values in sites.items()
    }
    return replace(thresholds, sequential=True, **moved)


def check_dense(model: nn.Module) -> None:
    """Raise ValueError if ``model`` is patched."""
    if any(is_patched(mlp) for mlp in gated_mlps(model).values()):
        raise ValueError("sequential calibration starts from the dense model: call cats.remove(model) first")


class _Layer:
    """One threshold, or vector of them, on its way.

    Attributes:
        holder: the module that compares with it.
        level: the quantile of the scores that it is to be.
        first: where it began, float32 () or (n,).
        factor: of what it is now over ``first``.
        scores: values over ``first``.
        moves: a threshold of 0 keeps everything, and no factor moves it.
    """

    def __init__(self, holder: Any, level: float) -> None:
        self.holder, self.level, self.factor = holder, level, 1.0
        self.first: Tensor = holder.threshold.clone()
        self.scores = Histogram(self.first.device)
        self.moves = bool((self.first > 0).all())

    def see(self, values: Tensor) -> None:
        """Count ``values`` (tokens, n), which come next to be compared, and move."""
        if not self.moves:
            return
        self.scores.add(values.float() / self.first)
        self.factor = self.scores.threshold(self.level)
        self.holder.threshold.copy_(self._now())

    def _now(self) -> Tensor:
        # what is always skipped stays so, whatever the factor: infinity times 0 is NaN
        return torch.where(self.first.isinf(), self.first, self.first * self.factor)

    def value(self) -> Value:
        """What `cats.Thresholds` holds for it."""
        return self._now().cpu() if self.first.dim() else float(self._now())


def _holder(modules: Mapping[str, Any], site: str, path: str) -> Any:
    """The module whose ``threshold`` acts at ``site`` of ``path``: see `cats.patching.swap_thresholds`."""
    if site == "gate":
        return modules[path]._modules[modules[path].cats_state.activation_name]
    if site == "up":
        return masks_of(modules[path])["up"]
    if site == "mlp_linears":
        block, part = path.rsplit(".", 1)
        return masks_of(modules[block])[INPUT + part]
    return input_mask(modules[path])
