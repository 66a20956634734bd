"""Apply CATS to a live model and take it off again, bit for bit.

A patched gated MLP keeps its parameters, its names and its own forward code: only its activation module is replaced
by `CATSActivation` (the dense masked path: training, prefill, anything peft has wrapped). For decoding, when no
gradient is wanted and few rows come in (at most ``cats_kernels.MAX_ROWS`` on a GPU), the class's forward hands over to
the operator, which needs the down projection transposed; the parameter's storage is transposed in place of the
original, so memory does not grow, and state_dict still shows the original layout.
"""

import warnings
from dataclasses import dataclass, field
from functools import cache
from types import MethodType
from typing import Any

import cats_kernels
import torch
from torch import Tensor, nn

from cats.activation import CATSActivation, threshold_activation
from cats.calibration import Thresholds, fingerprint
from cats.structure import GatedMLP, activation_name, attention_blocks, check_equation_1, gated_mlps

KERNELS = ("auto", "reference", "cpu", "triton")
_KERNEL_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.float16, torch.bfloat16)}


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
    names = ("gate_up_proj", "down_proj") if hasattr(mlp, "gate_up_proj") else ("gate_proj", "up_proj", "down_proj")
    return [getattr(mlp, name) for name in names]


def _obstacle(mlp: GatedMLP, activation: str | None) -> str | None:
    """Why the sparse kernel cannot serve ``mlp``, or None if it can."""
    if activation is None:
        return "its activation is neither SiLU nor tanh-GELU"
    for linear in _linears(mlp):
        if type(linear) is not nn.Linear:
            return f"a projection is a {type(linear).__name__}, not nn.Linear"
        if linear.bias is not None:
            return "a projection has a bias"
    weight = mlp.down_proj.weight
    if weight.device.type not in _KERNEL_DTYPES or weight.dtype not in _KERNEL_DTYPES[weight.device.type]:
        return f"there is no kernel for {weight.dtype} on {weight.device.type}"
    return None


def _gate_and_up_weights(mlp: GatedMLP) -> tuple[Tensor, Tensor]:
    if hasattr(mlp, "gate_up_proj"):
        gate, up = mlp.gate_up_proj.weight.chunk(2, dim=0)
        return gate, up
    return mlp.gate_proj.weight, mlp.up_proj.weight


class _SparseForward:
    """Mixin put in front of a gated MLP's class: small inputs without gradient go to the sparse kernel."""

    cats_state: State

    def _takes_sparse_path(self, x: Tensor) -> bool:
        # the projections' types are looked at in every call, since peft may have wrapped one after the patch
        return (
            self.cats_state.sparse
            and not torch.is_grad_enabled()
            # on a CPU the operator chooses by rows itself: torch took 1 to 4 s for 2 to 8 bfloat16 rows times a
            # transposed down projection of Mistral-7B's shape, a whole dense MLP 0.04 to 0.13 s
            and (x.device.type == "cpu" or x.numel() <= cats_kernels.MAX_ROWS * x.shape[-1])
            and all(type(linear) is nn.Linear for linear in _linears(self))
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._takes_sparse_path(x):
            mlp: Any = self
            state = self.cats_state
            gate_weight, up_weight = _gate_and_up_weights(mlp)
            threshold = getattr(mlp, activation_name(mlp)).threshold
            return cats_kernels.sparse_gated_mlp(
                x, gate_weight, up_weight, mlp.down_proj.weight.t(), threshold, str(state.activation), state.kernel
            )
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]


@cache
def _sparse_class(original: Any) -> Any:
    """The subclass of an MLP's class that takes the sparse path; one for each, so that compiled code is shared."""
    return type(f"CATS{original.__name__}", (_SparseForward, original), {"__module__": original.__module__})


def _set_class(mlp: GatedMLP, cls: Any) -> None:
    mlp.__class__ = cls
    if "_old_forward" in mlp.__dict__:  # accelerate's device_map hooks call the forward they found first
        mlp._old_forward = MethodType(cls.forward, mlp)


def _contiguous_in_state_dict(_module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """State-dict hook of a transposed projection: safetensors refuses non-contiguous tensors."""
    weight = state_dict.get(f"{prefix}weight")
    if isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter):
        state_dict[f"{prefix}weight"] = weight.contiguous()


def _enable_kernel(name: str, mlp: GatedMLP, state: State, kernel: str) -> str | None:
    """Put ``mlp`` on the sparse path if ``kernel`` asks for it and can serve it; else say what stands in the way."""
    state.kernel = kernel
    if kernel == "reference":
        _disable_kernel(mlp, state)
        return None
    obstacle = _obstacle(mlp, state.activation)
    if obstacle:
        _disable_kernel(mlp, state)
        if kernel != "auto":
            raise ValueError(f'kernel="{kernel}" cannot serve {name}: {obstacle}; use kernel="auto" or "reference"')
        return obstacle
    if not state.handles:
        weight = mlp.down_proj.weight
        weight.data = weight.data.t().contiguous().t()
        state.handles.append(mlp.down_proj._register_state_dict_hook(_contiguous_in_state_dict))
    state.sparse = True
    return None


def _disable_kernel(mlp: GatedMLP, state: State) -> None:
    state.sparse = False
    if state.handles:
        for handle in state.handles:
            handle.remove()
        state.handles.clear()
        down = getattr(mlp.down_proj, "base_layer", mlp.down_proj)
        down.weight.data = down.weight.data.contiguous()


def _threshold_input(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Equation 7: CATS on the input of an attention or MLP block."""
    threshold = module.cats_input_threshold
    if args:
        return (threshold_activation(args[0], threshold), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": threshold_activation(kwargs["hidden_states"], threshold)}


def _set_input_thresholds(modules: dict[str, Any], thresholds: dict[str, float]) -> None:
    for name, module in modules.items():
        if "cats_input_handle" in module.__dict__ and name not in thresholds:
            module.cats_input_handle.remove()
            del module.cats_input_handle, module.cats_input_threshold
        if name in thresholds:
            module.cats_input_threshold = thresholds[name]
            if "cats_input_handle" not in module.__dict__:
                module.cats_input_handle = module.register_forward_pre_hook(_threshold_input, with_kwargs=True)


def _check(model: nn.Module, mlps: dict[str, GatedMLP], thresholds: Thresholds, kernel: str) -> None:
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}: allowed are {', '.join(KERNELS)}")
    actual = fingerprint(model)
    different = [key for key, value in thresholds.model.items() if actual.get(key) != value]
    if different or set(thresholds.gate) != set(mlps):
        made_for = thresholds.model or f"{len(thresholds.gate)} layers"
        raise ValueError(f"these thresholds were made for another model: they are for {made_for}, this one is {actual}")
    for name, mlp in mlps.items():
        activation = getattr(mlp, activation_name(mlp))
        if isinstance(activation, CATSActivation) != hasattr(mlp, "cats_state"):
            raise ValueError(f"{name} already has a {type(activation).__name__} patch: call cats.remove(model) first")


def apply(model: nn.Module, thresholds: Thresholds, kernel: str = "auto") -> None:
    """Make ``model`` sparse in place; on a model that is patched already, swap the thresholds (and kernel) only.

    Args:
        model: the model that ``thresholds`` were calibrated on, perhaps inside peft.
        thresholds: from `cats.calibrate` or `Thresholds.load`.
        kernel: ``auto`` takes Triton on a GPU, the compiled CPU kernel on a CPU, and the dense masked path with a
            warning where neither can serve; ``cpu`` and ``triton`` raise instead; ``reference`` is the dense path.

    Raises:
        ValueError: unknown kernel, no gated MLP, thresholds of another model, an MLP that does not compute equation 1,
            a ReLUfied model, or a kernel that cannot serve this model.
    """
    mlps = gated_mlps(model)
    _check(model, mlps, thresholds, kernel)
    fresh = {name: mlp for name, mlp in mlps.items() if not hasattr(mlp, "cats_state")}
    for name, mlp in fresh.items():
        check_equation_1(name, mlp)
    obstacles: dict[str, str] = {}
    try:
        for name, mlp in mlps.items():
            attribute = activation_name(mlp)
            if name in fresh:
                original = getattr(mlp, attribute)
                mlp.cats_state = State(original, activation=kernel_activation(original))
                setattr(mlp, attribute, CATSActivation(original, 0.0))
                cls: Any = type(mlp)
                _set_class(mlp, _sparse_class(cls))
            getattr(mlp, attribute).threshold = thresholds.gate[name]
            obstacle = _enable_kernel(name, mlp, mlp.cats_state, kernel)
            if obstacle:
                obstacles[name] = obstacle
        _set_input_thresholds(mlps, thresholds.mlp_input)
        if thresholds.attention_input or any("cats_input_handle" in m.__dict__ for m in model.modules()):
            _set_input_thresholds(attention_blocks(model), thresholds.attention_input)
    except BaseException:
        remove(model)
        raise
    if obstacles:
        name, obstacle = next(iter(obstacles.items()))
        warnings.warn(
            f"{len(obstacles)} of {len(mlps)} MLPs run on the dense masked path, without speed-up ({name}: {obstacle})",
            stacklevel=2,
        )


def remove(model: nn.Module) -> None:
    """Undo `apply` and `cats.relufy`: every weight, buffer, class and activation as before, bit for bit."""
    module: Any
    for module in model.modules():
        if "cats_input_handle" in module.__dict__:
            module.cats_input_handle.remove()
            del module.cats_input_handle, module.cats_input_threshold
    for mlp in gated_mlps(model).values():
        if not hasattr(mlp, "cats_state"):
            continue
        state = mlp.cats_state
        _disable_kernel(mlp, state)
        setattr(mlp, activation_name(mlp), state.original)
        if isinstance(mlp, _SparseForward):
            _set_class(mlp, type(mlp).__mro__[2])
        del mlp.cats_state
