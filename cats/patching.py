"""Apply CATS to a live model and take it off again, bit for bit.

A patched gated MLP keeps its parameters, its names and its own forward code: only its activation module is replaced
by `CATSActivation` (the dense masked path: training, a long prompt on a GPU, what peft has wrapped). For decoding, in
eval mode without gradients and with few rows (at most ``cats_kernels.MAX_ROWS`` on a GPU), the class's forward hands
over to the operator, which needs the down projection transposed; the parameter's storage is transposed in place of the
original, so memory does not grow, and state_dict still shows the original layout.
"""

import warnings
from dataclasses import dataclass, field
from functools import cache
from types import MethodType
from typing import Any

import cats_kernels
import torch
from cats_kernels.dispatch import choose_backend
from torch import Tensor, nn

from cats.activation import CATSActivation, threshold_activation
from cats.calibration import Thresholds, fingerprint
from cats.structure import (
    GatedMLP,
    activation_name,
    attention_blocks,
    canonical_name,
    check_equation_1,
    check_forward,
    gated_mlps,
)

KERNELS = cats_kernels.BACKENDS
LINEARS, FUSED_LINEARS = ("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj")


@dataclass
class State:
    """What a patched MLP remembers, and what `remove` needs to undo the patch."""

    original: nn.Module  # the model's own activation
    kernel: str = "reference"
    activation: str | None = None  # the kernel's name for the activation, None when it has none
    sparse: bool = False  # whether small inputs go to the sparse kernel
    handles: list[Any] = field(default_factory=list)


def kernel_activation(module: nn.Module) -> str | None:
    """The sparse kernel's name for an activation module, found by what it computes; None if it has no such kernel."""
    x = torch.linspace(-6, 6, 101)
    try:
        y = module(x)
    except Exception:
        return None
    if torch.allclose(y, nn.functional.silu(x), atol=1e-6):
        return "silu"
    if torch.allclose(y, nn.functional.gelu(x, approximate="tanh"), atol=1e-6):
        return "gelu_tanh"
    return None


def _linears(mlp: GatedMLP) -> list[nn.Module]:
    modules: Any = mlp._modules  # looking here takes a tenth of the microsecond that an attribute of a module takes
    return [modules[name] for name in (FUSED_LINEARS if "gate_up_proj" in modules else LINEARS)]


def _obstacle(mlp: GatedMLP, kernel: str) -> str | None:
    """Why the sparse kernel cannot serve ``mlp``, or None if it can."""
    patched = hasattr(mlp, "cats_state")
    activation = mlp.cats_state.activation if patched else kernel_activation(getattr(mlp, activation_name(mlp)))
    if activation is None:
        return "its activation is neither SiLU nor tanh-GELU"
    for linear in _linears(mlp):
        if type(linear) is not nn.Linear:
            return f"a projection is a {type(linear).__module__}.{type(linear).__qualname__}, not torch's nn.Linear"
        if linear.bias is not None:
            return "a projection has a bias"
    weight = mlp.down_proj.weight
    try:
        backend = choose_backend(kernel, weight.device.type, weight.dtype)
    except (ValueError, RuntimeError) as error:
        return str(error).rstrip(".")
    if backend == "reference":
        return f"there is no kernel for {weight.dtype} on {weight.device.type}"
    return None


def _obstacles(mlps: dict[str, GatedMLP], kernel: str) -> dict[str, str]:
    """What stands in ``kernel``'s way, by module path; raises ValueError if it was asked for by name."""
    if kernel == "reference":
        return {}
    found = {name: obstacle for name, mlp in mlps.items() if (obstacle := _obstacle(mlp, kernel))}
    if found and kernel != "auto":
        name, obstacle = next(iter(found.items()))
        raise ValueError(f'kernel="{kernel}" cannot serve {name}: {obstacle}; use kernel="auto" or "reference"')
    return found


class _SparseForward:
    """Mixin put in front of a gated MLP's class: small inputs without gradient go to the sparse kernel."""

    cats_state: State
    training: bool

    def _sparse_weights(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Gate, up and transposed down weight if ``x`` goes to the sparse kernel, else None.

        Looked at in every call: since the patch peft may have wrapped a projection, a hook may have come that must see
        what a projection or the activation computes, accelerate may have offloaded the block, and
        ``load_state_dict(assign=True)`` may have put a weight in its place that is not transposed.
        """
        if (
            not self.cats_state.sparse
            or torch.is_grad_enabled()
            or self.training  # reentrant gradient checkpointing runs forward first without gradients
            # on a CPU the operator chooses by rows itself: torch took 1 to 4 s for 2 to 8 bfloat16 rows times a
            # transposed down projection of Mistral-7B's shape, a whole dense MLP 0.04 to 0.13 s
            or (x.device.type != "cpu" and x.numel() > cats_kernels.MAX_ROWS * x.shape[-1])
        ):
            return None
        linears: Any = _linears(self)
        activation = getattr(self, activation_name(self))
        if activation._forward_hooks or activation._forward_pre_hooks:
            return None
        for linear in linears:
            if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks:
                return None
        *first, down = (linear.weight for linear in linears)
        gate, up = first if len(first) == 2 else first[0].chunk(2)
        weights = gate, up, down.t()
        for weight in weights:
            if weight.device != x.device or weight.dtype != x.dtype or not weight.is_contiguous():
                return None
        return weights

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        weights = self._sparse_weights(args[0]) if len(args) == 1 and not kwargs else None
        if weights is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        state = self.cats_state
        threshold = getattr(self, activation_name(self)).threshold
        return cats_kernels.sparse_gated_mlp(args[0], *weights, threshold, str(state.activation), state.kernel)

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        """pickle cannot find a class made while running: `_rebuild` makes it again."""
        return _rebuild, (type(self).__mro__[2],), self.__getstate__()


@cache
def _sparse_class(original: Any) -> Any:
    """The subclass of an MLP's class that takes the sparse path; one for each, so that compiled code is shared."""
    return type(f"CATS{original.__name__}", (_SparseForward, original), {"__module__": original.__module__})


def _rebuild(original: Any) -> Any:
    """An empty patched MLP, for pickle and deepcopy to fill."""
    cls = _sparse_class(original)
    return cls.__new__(cls)


def _set_class(mlp: GatedMLP, cls: Any) -> None:
    mlp.__class__ = cls
    # accelerate's hooks call the forward that they found first, and leave it behind as "forward" when they go
    for name in ("_old_forward", "forward"):
        if isinstance(mlp.__dict__.get(name), MethodType):
            setattr(mlp, name, MethodType(cls.forward, mlp))


def _contiguous_in_state_dict(_module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """State-dict hook of a transposed projection: safetensors refuses non-contiguous tensors."""
    weight = state_dict.get(f"{prefix}weight")
    if isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter):
        state_dict[f"{prefix}weight"] = weight.contiguous()


def _enable_kernel(mlp: GatedMLP) -> None:
    if not mlp.cats_state.handles:
        mlp.cats_state.handles.append(mlp.down_proj._register_state_dict_hook(_contiguous_in_state_dict))
    weight = mlp.down_proj.weight
    if not weight.t().is_contiguous():
        weight.data = weight.data.t().contiguous().t()
    mlp.cats_state.sparse = True


def _disable_kernel(mlp: GatedMLP) -> None:
    mlp.cats_state.sparse = False
    if mlp.cats_state.handles:
        for handle in mlp.cats_state.handles:
            handle.remove()
        mlp.cats_state.handles.clear()
        down = getattr(mlp.down_proj, "base_layer", mlp.down_proj)
        down.weight.data = down.weight.data.contiguous()


def _threshold_input(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Equation 7: CATS on the input of an attention or MLP block."""
    threshold = module.cats_input_threshold
    if args:
        return (threshold_activation(args[0], threshold), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": threshold_activation(kwargs["hidden_states"], threshold)}


def _set_input_thresholds(model: nn.Module, thresholds: dict[str, float]) -> None:
    """Put ``thresholds``, by module path, on the inputs of those modules, and take all others off."""
    module: Any
    changed = False
    for name, module in model.named_modules():
        threshold, hooked = thresholds.get(canonical_name(name)), "cats_input_handle" in module.__dict__
        changed |= hooked != (threshold is not None)
        if threshold is not None:
            module.cats_input_threshold = threshold
            if not hooked:
                module.cats_input_handle = module.register_forward_pre_hook(_threshold_input, with_kwargs=True)
        elif hooked:
            module.cats_input_handle.remove()
            del module.cats_input_handle, module.cats_input_threshold
    if changed:
        torch.compiler.reset()  # compiled code does not notice that a hook has come or gone


def swap_thresholds(model: nn.Module, thresholds: Thresholds) -> None:
    """Put ``thresholds``, which fit, into a patched model and leave the rest of the patch as it is."""
    for name, mlp in gated_mlps(model).items():
        getattr(mlp, activation_name(mlp)).threshold = thresholds.gate[name]
    _set_input_thresholds(model, {**thresholds.mlp_input, **thresholds.attention_input})


def sites_in_force(model: nn.Module) -> tuple[str, ...]:
    """Which of `cats.observe.SITES` have thresholds in ``model``. Raises ValueError unless `apply` has patched it."""
    for name, mlp in gated_mlps(model).items():
        if not isinstance(getattr(mlp, activation_name(mlp)), CATSActivation):
            raise ValueError(f"{name} has no threshold: call cats.apply(model, thresholds) first")
    hooked = [module for module in model.modules() if "cats_input_handle" in module.__dict__]
    sites = {"mlp_input" if hasattr(module, "cats_state") else "attention_input" for module in hooked}
    return ("gate", *sorted(sites))


def _check(model: nn.Module, mlps: dict[str, GatedMLP], thresholds: Thresholds, kernel: str) -> None:
    """Everything about the arguments of `apply` but the model's own blocks."""
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}: allowed are {', '.join(KERNELS)}")
    actual = fingerprint(model)
    if any(actual.get(key) != value for key, value in thresholds.model.items()):
        raise ValueError(
            f"these thresholds were made for another model: they are for {thresholds.model}, this one is {actual}"
        )
    missing = [name for name in mlps if name not in thresholds.gate]
    unknown = [name for name in thresholds.gate if name not in mlps]
    unknown += [name for name in thresholds.mlp_input if name not in mlps]
    if thresholds.attention_input:
        attention = attention_blocks(model)
        unknown += [name for name in thresholds.attention_input if name not in attention]
    if missing or unknown:
        raise ValueError(
            "these thresholds were made for another model: "
            f"they lack {', '.join(missing) or 'none'} of its layers, and it lacks {', '.join(unknown) or 'none'}"
        )


def _check_blocks(mlps: dict[str, GatedMLP]) -> None:
    for name, mlp in mlps.items():
        activation = getattr(mlp, activation_name(mlp))
        if isinstance(activation, CATSActivation) != hasattr(mlp, "cats_state"):
            raise ValueError(f"{name} already has a {type(activation).__name__} patch: call cats.remove(model) first")
        if hasattr(mlp, "cats_state"):
            check_forward(name, mlp)
        else:
            check_equation_1(name, mlp)


def _patch(mlp: GatedMLP) -> None:
    attribute = activation_name(mlp)
    original = getattr(mlp, attribute)
    mlp.cats_state = State(original, activation=kernel_activation(original))
    setattr(mlp, attribute, CATSActivation(original, 0.0))
    cls: Any = type(mlp)
    _set_class(mlp, _sparse_class(cls))


def _unpatch(mlp: GatedMLP) -> None:
    _disable_kernel(mlp)
    setattr(mlp, activation_name(mlp), mlp.cats_state.original)
    if isinstance(mlp, _SparseForward):
        _set_class(mlp, type(mlp).__mro__[2])
    del mlp.cats_state


def apply(model: nn.Module, thresholds: Thresholds, kernel: str = "auto") -> None:
    """Make ``model`` sparse in place; on a model that is patched already, swap the thresholds (and kernel) only.

    Args:
        model: the model that ``thresholds`` were calibrated on, perhaps inside peft.
        thresholds: from `cats.calibrate` or `Thresholds.load`.
        kernel: ``auto`` takes Triton on a GPU, the compiled CPU kernel on a CPU, and the dense masked path with a
            warning where neither can serve; ``cpu`` and ``triton`` raise instead; ``reference`` is the dense path.

    Raises:
        ValueError: unknown kernel, no gated MLP, thresholds of another model, an MLP that does not compute equation 1
            or whose activation or forward CATS cannot reach, a ReLUfied model, or a kernel that cannot serve this
            model. The model is then as it was, patched or not.
    """
    mlps = gated_mlps(model)
    _check(model, mlps, thresholds, kernel)
    _check_blocks(mlps)
    obstacles = _obstacles(mlps, kernel)
    fresh = [mlp for mlp in mlps.values() if not hasattr(mlp, "cats_state")]
    try:
        for mlp in fresh:
            _patch(mlp)
        for name, mlp in mlps.items():
            mlp.cats_state.kernel = kernel
            if kernel == "reference" or name in obstacles:
                _disable_kernel(mlp)
            else:
                _enable_kernel(mlp)
        swap_thresholds(model, thresholds)
    except BaseException:  # no memory for a transposed weight, Ctrl-C
        for mlp in fresh:
            if hasattr(mlp, "cats_state"):
                _unpatch(mlp)
        raise
    if obstacles:
        name, obstacle = next(iter(obstacles.items()))
        warnings.warn(
            f"{len(obstacles)} of {len(mlps)} MLPs run on the dense masked path, without speed-up ({name}: {obstacle})",
            stacklevel=2,
        )


def remove(model: nn.Module) -> None:
    """Undo `apply` and `cats.relufy`: every weight, buffer, class and activation as before, bit for bit."""
    _set_input_thresholds(model, {})
    for mlp in gated_mlps(model).values():
        if hasattr(mlp, "cats_state"):
            _unpatch(mlp)
