"""Equation 1, ``(act(x W_gate) * (x W_up)) W_down``: which attributes of a block play which part, and whether it holds.

Parts are told apart by shapes and by running the block, so that the names of a family do not matter; two sets of names
that most families share save the search.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cats.devices import compute_dtype, eval_mode, execution_device

ACTIVATION_NAMES = ("act_fn", "activation_fn")
OWN_ACTIVATION = "cats_activation"
"""Where the activation of a block that has no module for it stands while the block is patched."""
TOLERANCE = 0.02
"""Of the norm of the output; bfloat16 rounding made at most 0.0054 (random Llama, Gemma and Phi-3 blocks)."""
FUNCTIONS = (nn.SiLU(), nn.GELU("tanh"), nn.GELU(), nn.ReLU())
"""Activations that a block without a module for it is tried with."""


class GatedMLP(nn.Module):
    """For type checkers only: a module with a gated MLP's parts, under the names that `parts` gives.

    Attributes:
        cats_state: while it is patched, `cats.sparse_forward.State`.
    """

    cats_state: Any
    _modules: dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """Attributes of a block that play the parts of equation 1.

    Attributes:
        gate, down: names of linear layers.
        up: likewise; None where ``gate`` is one layer for both, the gate's rows before those of up.
        activation: name of the activation module; None where the block has no module for it.
        function: what it computes there.
    """

    gate: str
    up: str | None
    down: str
    activation: str | None = None
    function: nn.Module | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the linear layers, two or three."""
        return (self.gate, self.down) if self.up is None else (self.gate, self.up, self.down)


_PARTS: "WeakKeyDictionary[nn.Module, Parts | None]" = WeakKeyDictionary()


def parts(module: Any) -> Parts | None:
    """The parts of ``module``, or None where it is no gated MLP."""
    if "cats_state" in module.__dict__:
        return module.cats_state.parts
    named = _by_name(module)
    if named is not None:
        return named
    if module not in _PARTS:
        candidates = list(_by_shape(module))
        if candidates and not _runs_alone(module):
            return candidates[0]  # the shapes must do
        errors = {candidate: _error(module, candidate) for candidate in candidates}
        best = min(errors, key=errors.__getitem__, default=None)  # tanh-GELU is within the tolerance of GELU
        _PARTS[module] = best if best is not None and errors[best] <= TOLERANCE else None
    return _PARTS[module]


def _by_name(module: nn.Module) -> Parts | None:
    own = module._modules  # a block that torch.compile or peft has wrapped shows its attributes on the wrapper too
    activation = next((name for name in ACTIVATION_NAMES if own.get(name) is not None), None)
    if activation is None or own.get("down_proj") is None:
        return None
    if own.get("gate_up_proj") is not None:
        return Parts("gate_up_proj", None, "down_proj", activation)
    if own.get("gate_proj") is not None and own.get("up_proj") is not None:
        return Parts("gate_proj", "up_proj", "down_proj", activation)
    return None


def _by_shape(module: GatedMLP) -> Iterator[Parts]:
    """Every way in which the children of ``module`` could play the parts; none for most modules."""
    sizes: dict[str, tuple[int, int]] = {}
    others = []
    for name, child in module._modules.items():
        width, out = getattr(child, "in_features", None), getattr(child, "out_features", None)
        if isinstance(width, int) and isinstance(out, int):
            sizes[name] = width, out
        elif child is not None and not isinstance(child, nn.Dropout | nn.Identity):
            others.append(name)
    if not 2 <= len(sizes) <= 3 or len(others) > 1 or any(list(module._modules[name].parameters()) for name in others):
        return
    activations: list[tuple[str | None, nn.Module | None]] = [(name, None) for name in others]
    activations = activations or [(None, function) for function in FUNCTIONS]
    for names, (activation, function) in product(permutations(sizes), activations):
        gate, *up, down = names
        (d, width), (m, out) = sizes[gate], sizes[down]
        if out == d and (sizes[up[0]] == (d, width) and width == m if up else width == 2 * m):
            yield Parts(gate, up[0] if up else None, down, activation, function)


def activation_of(mlp: GatedMLP, of: Parts) -> Any:
    """The activation as a module: the block's own, or the function that it computes."""
    return mlp._modules[of.activation] if of.activation is not None else of.function


def inner_activation(mlp: GatedMLP, of: Parts) -> Any:
    """`activation_of`, also of a patched MLP, without its thresholds."""
    if "cats_state" in mlp.__dict__:
        return mlp._modules[mlp.cats_state.activation_name].inner
    return activation_of(mlp, of)


def gate_and_up(mlp: GatedMLP, x: Tensor, of: Parts) -> tuple[Tensor, Tensor]:
    """``x W_gate`` and ``x W_up``, each (..., m), through the module's own (perhaps adapter-wrapped) projections."""
    if of.up is None:
        gate, up = mlp._modules[of.gate](x).chunk(2, dim=-1)
        return gate, up
    return mlp._modules[of.gate](x), mlp._modules[of.up](x)


def random_input(mlp: GatedMLP, of: Parts) -> Tensor:
    """Two rows of normal numbers, always the same, (1, 2, d)."""
    width = mlp._modules[of.gate].in_features
    x = torch.randn(1, 2, width, generator=torch.Generator().manual_seed(0))
    return x.to(execution_device(mlp), compute_dtype(mlp))


def _is(actual: Tensor, expected: Tensor) -> bool:
    """Whether they are the same within `TOLERANCE`."""
    tolerance = TOLERANCE * expected.float().norm()
    return actual.shape == expected.shape and bool((actual.float() - expected.float()).norm() <= tolerance)


def _runs_alone(mlp: GatedMLP) -> bool:
    """Whether the block can be run by itself: not on the meta device, nor while fully_shard keeps its weights apart."""
    sharded = any(hasattr(parameter, "full_tensor") for parameter in mlp.parameters())
    return not sharded and execution_device(mlp).type != "meta"


@torch.no_grad()
def _error(mlp: GatedMLP, of: Parts) -> float:
    """How far the block is from equation 1 with these parts, relative to the norm of that; infinite if it cannot be."""
    try:
        with eval_mode(mlp):
            x = random_input(mlp, of)
            gate, up = gate_and_up(mlp, x, of)
            expected = mlp._modules[of.down](activation_of(mlp, of)(gate) * up)
            actual = mlp(x)
            if actual.shape != expected.shape:
                return math.inf
            error = float((actual.float() - expected.float()).norm() / expected.float().norm())
            return math.inf if math.isnan(error) else error
    except Exception:  # whatever another kind of block needs
        return math.inf


@torch.no_grad()
def why_not_run(module: Any) -> Exception | None:
    """What ``module``, which has the shapes of a gated MLP, raises when it is run; None if it runs or is nothing like
    one."""
    of = next(_by_shape(module), None)
    if of is None or not _runs_alone(module):
        return None
    try:
        with eval_mode(module):
            module(random_input(module, of))
    except Exception as error:
        return error
    return None


class _Negative(nn.Module):
    """An activation with the other sign."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, gate: Tensor) -> Tensor:
        negative: Tensor = -self.activation(gate)
        return negative


def check_forward(name: str, mlp: GatedMLP) -> None:
    """Raise ValueError if ``mlp`` has a forward of its own, as Liger installs: a patched class cannot reach it."""
    # accelerate's hooks keep the forward that they wrap under this name
    own = mlp.__dict__.get("_old_forward", mlp.__dict__.get("forward"))
    if own is not None and getattr(own, "__func__", None) is not type(mlp).forward:
        raise ValueError(
            f"{name} ({type(mlp).__name__}) has had its forward replaced, so CATS cannot act on it: "
            "load the model without what replaces it"
        )


@torch.no_grad()
def check_equation_1(name: str, mlp: GatedMLP) -> None:
    """Run ``mlp`` on random input and compare it with ``(act(x W_gate) * (x W_up)) W_down`` (equation 1).

    It is run with the negative of its activation in place of it: a block may compute equation 1 without calling its
    activation module, and CATS, which replaces that module, would do nothing.

    Raises:
        ValueError: the module has the right attributes but computes something else (clipping, extra norms, dropout),
            does not call its activation, or has had its forward replaced.
    """
    check_forward(name, mlp)
    of = parts(mlp)
    if of is None or of.activation is None or not _runs_alone(mlp):
        return  # without an activation module it was found by running it
    x, activation, down = random_input(mlp, of), mlp._modules[of.activation], mlp._modules[of.down]
    with eval_mode(mlp):
        gate, up = gate_and_up(mlp, x, of)
        hidden = activation(gate) * up
        if _is(_with_negative(mlp, of.activation, x), down(-hidden)):
            return
        calls_another = _is(mlp(x), down(hidden))
    if calls_another:
        raise ValueError(
            f"{name} ({type(mlp).__name__}) does not call its {of.activation}, "
            "so CATS, which replaces it, would do nothing"
        )
    broken = [key for key, weight in mlp.named_parameters() if not bool(weight.isfinite().all())]
    if broken:
        raise ValueError(f"{name}.{broken[0]} has NaN or infinite numbers: the model is broken")
    raise ValueError(
        f"{name} ({type(mlp).__name__}) looks like a gated MLP but does not compute "
        "(act(x W_gate) * (x W_up)) W_down; CATS supports only blocks that do"
    )


def _with_negative(mlp: GatedMLP, name: str, x: Tensor) -> Tensor:
    """What a block gives with the negative of its activation, whose name this is."""
    activation = mlp._modules[name]
    setattr(mlp, name, _Negative(activation))
    try:
        y: Tensor = mlp(x)
    finally:
        setattr(mlp, name, activation)
    return y
