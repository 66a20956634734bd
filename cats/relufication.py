"""ReLUfication, the paper's baseline: the gate's activation replaced by ReLU, with no threshold."""

from torch import nn

from cats.patching import apply
from cats.structure import gated_mlps
from cats.thresholds import Thresholds


def relufy(model: nn.Module) -> None:
    """Replace the activation of every gated MLP by ReLU, in place; `cats.remove` undoes it.

    Raises:
        ValueError: no gated MLP, one that does not compute equation 1, or the model is patched already.
    """
    mlps = gated_mlps(model)
    patched = [name for name, mlp in mlps.items() if hasattr(mlp, "cats_state")]
    if patched:
        raise ValueError(f"{patched[0]} is patched already: call cats.remove(model) first")
    apply(model, Thresholds(0.0, dict.fromkeys(mlps, 0.0), criterion="relufication"), kernel="reference")
