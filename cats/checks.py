"""Whether thresholds, a kernel's name and a model go together: what `cats.apply` checks before it changes anything."""

from typing import Any, cast

import cats_kernels
from torch import Tensor, nn

from cats.activation import CATSActivation
from cats.criteria import Criterion, get
from cats.kernel_choice import is_patched
from cats.structure import (
    GatedMLP,
    activation_name,
    attention_blocks,
    attention_linears,
    check_equation_1,
    check_forward,
    gated_mlps,
    mlp_linears,
    parts_of,
)
from cats.text_config import fingerprint
from cats.thresholds import ByModule, Thresholds

KERNELS = cats_kernels.BACKENDS
PREFILLS = ("sparse", "dense")


def check_arguments(thresholds: Thresholds, kernel: str, prefill: str) -> None:
    """Raise TypeError or ValueError in one sentence for arguments of `cats.apply` that no model could be given."""
    if not isinstance(thresholds, Thresholds):
        raise TypeError(f"thresholds must be cats.Thresholds, not a {type(thresholds).__name__}: see cats.calibrate")
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}: allowed are {', '.join(KERNELS)}")
    if prefill not in PREFILLS:
        raise ValueError(f"unknown prefill {prefill!r}: allowed are {', '.join(PREFILLS)}")
    criterion = get(thresholds.criterion)
    allowed = (*criterion.sites, *criterion.other_sites)
    wrong = [site for site in thresholds.sites if site not in allowed]
    if wrong:
        raise ValueError(f"criterion {criterion.name!r} has no site {wrong[0]}: allowed are {', '.join(allowed)}")


def _widths(model: nn.Module, site: str) -> dict[str, int]:
    """Module path to the number of values there, of every module that ``site`` can have thresholds for."""
    mlps = gated_mlps(model)
    if site == "mlp_linears":
        return {path: mlp._modules[part].in_features for path, (mlp, part) in mlp_linears(model).items()}
    if site == "attention_linears":
        return {path: cast(Any, linear).in_features for path, linear in attention_linears(model).items()}
    if site == "mlp_input":
        return {path: mlp._modules[parts_of(mlp).gate].in_features for path, mlp in mlps.items()}
    if site == "attention_input":
        width = next(iter(_widths(model, "mlp_input").values()))
        return dict.fromkeys(attention_blocks(model), width)
    return {path: mlp._modules[parts_of(mlp).down].in_features for path, mlp in mlps.items()}


def check_fit(model: nn.Module, thresholds: Thresholds) -> None:
    """Raise ValueError unless the thresholds were made for this model."""
    actual = fingerprint(model)
    if any(actual.get(key) != value for key, value in thresholds.model.items()):
        raise ValueError(
            f"these thresholds were made for another model: they are for {thresholds.model}, this one is {actual}"
        )
    missing: list[str] = []
    unknown: list[str] = []
    for site in dict.fromkeys((*get(thresholds.criterion).sites, *thresholds.sites)):
        values: ByModule = getattr(thresholds, site)
        widths = _widths(model, site)
        if site not in ("attention_input", "mlp_input"):
            present = {**thresholds.gate, **thresholds.up} if site in ("gate", "up") else values
            missing += [name for name in widths if name not in present]
        unknown += [name for name in values if name not in widths]
        for name, value in values.items():
            if isinstance(value, Tensor) and name in widths and len(value) != widths[name]:
                raise ValueError(
                    "these thresholds were made for another model: "
                    f"{site} has {len(value)} of them for {name}, which has {widths[name]} values"
                )
    mlps = gated_mlps(model)
    unknown += [name for name in thresholds.levels if name not in mlps]
    if missing or unknown:
        missing, unknown = list(dict.fromkeys(missing)), list(dict.fromkeys(unknown))
        raise ValueError(
            "these thresholds were made for another model: "
            f"they lack {', '.join(missing) or 'none'} of its layers, and it lacks {', '.join(unknown) or 'none'}"
        )


def check_blocks(mlps: dict[str, GatedMLP], criterion: Criterion) -> None:
    """Raise ValueError for a block that computes something else, or is patched for another activation."""
    for name, mlp in mlps.items():
        activation = mlp._modules.get(activation_name(mlp))
        if isinstance(activation, CATSActivation) != is_patched(mlp):
            raise ValueError(f"{name} already has a {type(activation).__name__} patch: call cats.remove(model) first")
        if not is_patched(mlp):
            check_equation_1(name, mlp)
            continue
        check_forward(name, mlp)
        own = get(mlp.cats_state.criterion)
        if own.activation != criterion.activation:
            raise ValueError(f"{name} is patched for {own.name} already: call cats.remove(model) first")
