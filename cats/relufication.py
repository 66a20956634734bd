"""ReLUfication, the paper's baseline: the gate's activation replaced by ReLU, with no threshold."""

from torch import nn

from cats.patching import State
from cats.structure import activation_name, check_equation_1, gated_mlps


def relufy(model: nn.Module) -> None:
    """Replace the activation of every gated MLP by ReLU, in place; `cats.remove` undoes it.

    Raises:
        ValueError: no gated MLP, one that does not compute equation 1, or the model is patched already.
    """
    mlps = gated_mlps(model)
    patched = [name for name, mlp in mlps.items() if hasattr(mlp, "cats_state")]
    if patched:
        raise ValueError(f"{patched[0]} is patched already: call cats.remove(model) first")
    for name, mlp in mlps.items():
        check_equation_1(name, mlp)
    for mlp in mlps.values():
        attribute = activation_name(mlp)
        mlp.cats_state = State(getattr(mlp, attribute))
        setattr(mlp, attribute, nn.ReLU())
