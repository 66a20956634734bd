"""Whether the sparse kernel can serve a gated MLP, and handing the block to it and back.

The kernel wants the down projection transposed: its parameter's storage is transposed in place, and a hook shows the
original layout in state_dict.
"""

from collections.abc import Mapping
from typing import Any

import torch
from cats_kernels.dispatch import choose_backend
from torch import Tensor, nn

from cats.criteria import get
from cats.equation import OWN_ACTIVATION
from cats.quantized_linear import QuantizedLinear
from cats.structure import GatedMLP, parts_of
from cats.thresholds import Thresholds


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


def is_patched(mlp: GatedMLP) -> bool:
    """Whether `cats.apply` has patched this block."""
    return "cats_state" in mlp.__dict__


def original_activation(mlp: GatedMLP) -> Any:
    """The block's own activation, module or function, patched or not."""
    of = parts_of(mlp)
    if is_patched(mlp):
        return mlp.cats_state.original or mlp._modules[OWN_ACTIVATION].inner
    return mlp._modules[of.activation] if of.activation else of.function


def obstacle_of(mlp: GatedMLP, kernel: str) -> str | None:
    """Why the sparse kernel cannot serve ``mlp``, or None if it can."""
    if kernel_activation(original_activation(mlp)) is None:
        return "its activation is neither SiLU nor tanh-GELU"
    weight: Any = None
    linears: list[Any] = [mlp._modules[name] for name in parts_of(mlp).linears]
    quantized = all(type(linear) is QuantizedLinear for linear in linears)
    for linear in linears:
        if type(linear) is not nn.Linear and not quantized:
            return f"a projection is a {type(linear).__module__}.{type(linear).__qualname__}, not torch's nn.Linear"
        if linear.bias is not None:
            return "a projection has a bias"
        if quantized:
            weight = linear.like
            continue
        weight = linear._parameters.get("weight")
        if type(weight) is not nn.Parameter:
            kind = "computed by hooks" if weight is None else f"a {type(weight).__module__}.{type(weight).__qualname__}"
            return f"the weight of a projection is {kind}, not a plain parameter"
    try:
        backend = choose_backend(kernel, weight.device.type, weight.dtype)
    except (ValueError, RuntimeError) as error:
        return str(error).rstrip(".")
    if backend == "reference":
        return f"there is no kernel for {weight.dtype} on {weight.device.type}"
    return None


def obstacles_of(mlps: dict[str, GatedMLP], thresholds: Thresholds, kernel: str) -> dict[str, str]:
    """What stands in ``kernel``'s way, by module path; raises ValueError if it was asked for by name."""
    if kernel == "reference":
        return {}
    criterion = get(thresholds.criterion)
    if criterion.no_kernel:
        obstacles = dict.fromkeys(mlps, criterion.no_kernel)
    else:
        obstacles = {name: obstacle for name, mlp in mlps.items() if (obstacle := obstacle_of(mlp, kernel))}
    if obstacles and kernel != "auto":
        name, obstacle = next(iter(obstacles.items()))
        raise ValueError(f'kernel="{kernel}" cannot serve {name}: {obstacle}; use kernel="auto" or "reference"')
    return obstacles


def _contiguous_in_state_dict(_module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """State-dict hook of a transposed projection: safetensors refuses non-contiguous tensors."""
    weight = state_dict.get(f"{prefix}weight")
    if isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter):
        state_dict[f"{prefix}weight"] = weight.contiguous()


def enable_kernel(mlp: GatedMLP) -> None:
    """Hand few rows to the sparse kernel from now on; transposes the storage of the down projection."""
    down = mlp._modules[parts_of(mlp).down]
    mlp.cats_state.sparse = True
    if isinstance(down, QuantizedLinear):
        return
    if not mlp.cats_state.handles:
        mlp.cats_state.handles.append(down._register_state_dict_hook(_contiguous_in_state_dict))
    if not down.weight.t().is_contiguous():
        down.weight.data = down.weight.data.t().contiguous().t()


def suspend_kernels(mlp: GatedMLP) -> None:
    """Put the layers of a block, if it is patched, back as they were, before they are replaced; the patch stays."""
    if is_patched(mlp):
        disable_kernel(mlp)


def refresh_kernels(mlp: GatedMLP) -> None:
    """Take the sparse path again with the layers that are now there, where the kernel asked for can serve them."""
    if is_patched(mlp):
        state = mlp.cats_state
        if (
            state.kernel != "reference"
            and not get(state.criterion).no_kernel
            and obstacle_of(mlp, state.kernel) is None
        ):
            enable_kernel(mlp)


def disable_kernel(mlp: GatedMLP) -> None:
    """Take the dense masked path from now on, the down projection laid out as it was."""
    mlp.cats_state.sparse = False
    mlp.cats_state.known = None
    if mlp.cats_state.handles:
        for handle in mlp.cats_state.handles:
            handle.remove()
        mlp.cats_state.handles.clear()
        down = mlp._modules[parts_of(mlp).down]
        down = getattr(down, "base_layer", down)
        if isinstance(down._parameters.get("weight"), nn.Parameter):
            down.weight.data = down.weight.data.contiguous()


@torch.no_grad()
def compile_kernels(mlps: Mapping[str, Any]) -> None:
    """On a GPU, one call for each kind of block that the kernel serves: it compiles for one row of x, for seconds where
    Triton's cache is empty, which the first token would wait for."""
    compiled = set()
    for mlp in mlps.values():
        gate = mlp._modules[parts_of(mlp).gate]._parameters.get("weight")
        if not mlp.cats_state.sparse or gate is None or gate.device.type != "cuda":
            continue
        kind = gate.device, gate.dtype, gate.shape, mlp.cats_state.decider, mlp._deciding_threshold().dim()
        if kind not in compiled:
            compiled.add(kind)
            mlp._run_kernel(torch.zeros(1, gate.shape[1], dtype=gate.dtype, device=gate.device))
