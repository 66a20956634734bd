"""Calibrating a patched model again, each layer at its own target."""

from typing import Any

from torch import nn

from cats.calibration import calibrate
from cats.observe import Batches
from cats.patching import criterion_in_force, levels_in_force, sites_in_force
from cats.thresholds import SITES, Thresholds, check_sparsity


def calibrate_in_force(model: nn.Module, batches: Batches, sparsity: float) -> Thresholds:
    """`cats.calibrate` of a patched ``model`` with the criterion, the sites and the levels per layer that it has.

    Raises:
        ValueError: the model is not patched by `cats.apply`; its layers have levels of their own, made for another
            target than ``sparsity``; and as `cats.calibrate`.
    """
    sites, criterion = sites_in_force(model), criterion_in_force(model)
    target, levels = levels_in_force(model)
    if not levels:
        return calibrate(model, batches, sparsity, sites, criterion)
    check_sparsity(sparsity)
    if sparsity != target:
        raise ValueError(
            f"the layers have levels of their own, made for the target {target:g}: calibrate them again at that, "
            f"not at {sparsity:g}, or apply other thresholds first"
        )
    at = calibrate(model, batches, sorted({target, *levels.values()}), sites, criterion)
    own: dict[str, Any] = {site: {} for site in SITES}
    for level, thresholds in at.items():
        for site, values in thresholds.sites.items():
            own[site] |= {name: value for name, value in values.items() if _level_of(name, levels, target) == level}
    whole = at[target]
    return Thresholds(target, model=whole.model, tokens=whole.tokens, criterion=criterion, levels=levels, **own)


def _level_of(name: str, levels: dict[str, float], target: float) -> float:
    """Of the MLP that module path ``name`` is or lies in; ``target`` where it has no level of its own."""
    return levels.get(name, levels.get(name.rpartition(".")[0], target))
