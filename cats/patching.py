"""Apply a criterion to a live model and take it off again, bit for bit.

A patched gated MLP keeps its parameters and their names: its activation module is replaced by `CATSActivation`, masks
are added where the criterion needs others, and its class gets the forward of `cats.sparse_forward`. That hands rows to
the operator for decoding, which needs the down projection transposed; the parameter's storage is transposed in place of
the original, so memory does not grow, and state_dict still shows the original layout.
"""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from cats.activation import CATSActivation, Mask
from cats.checks import check_arguments, check_blocks, check_fit
from cats.criteria import Criterion, get
from cats.devices import execution_device
from cats.equation import OWN_ACTIVATION
from cats.kernel_choice import (
    compile_kernels,
    disable_kernel,
    enable_kernel,
    is_patched,
    kernel_activation,
    obstacles_of,
)
from cats.observe import input_mask
from cats.sparse_forward import INPUT, SparseForward, State, is_prompt, original_class, set_class, sparse_class
from cats.structure import gated_mlps, named_modules, parts_of
from cats.thresholds import Thresholds, Value


def _mask_input(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """The mask on the input of a block (equation 7) or of a linear layer of attention."""
    mask = module.cats_input
    name = "" if args else next(iter(kwargs))
    x = args[0] if args else kwargs[name]
    if mask.dense_prompts and not module.training and is_prompt(x):
        return None
    return ((mask(x), *args[1:]), kwargs) if args else (args, {**kwargs, name: mask(x)})


def _device_of(module: nn.Module) -> torch.device:
    device = execution_device(module)
    return torch.device("cpu") if device.type == "meta" else device


def _set_input_masks(model: nn.Module, values: Mapping[str, Value], criterion: Criterion, sparsity: float) -> None:
    """Put masks with ``values``, by module path, on the inputs of those modules, and take all others off."""
    module: Any
    changed = False
    for name, module in list(named_modules(model)):
        value, mask = values.get(name), input_mask(module)
        if value is not None and mask is not None:
            mask.criterion, mask.sparsity = criterion, sparsity
            mask.set_threshold(value)
        elif value is not None:
            module.cats_input = Mask(criterion, sparsity, value).to(_device_of(module))
            module.cats_input_handle = module.register_forward_pre_hook(_mask_input, with_kwargs=True)
            changed = True
        elif mask is not None:
            module.cats_input_handle.remove()
            del module.cats_input_handle, module.cats_input
            changed = True
    if changed:
        torch.compiler.reset()  # compiled code does not notice that a hook has come or gone


def _set_masks(mlp: Any, values: Mapping[str, Value], criterion: Criterion, sparsity: float) -> None:
    """Masks inside one MLP by place; those that stay are changed in place."""
    masks = mlp._modules.get("cats_masks")
    if masks is not None and set(masks) != set(values):
        del mlp.cats_masks
        masks = None
    if masks is None and values:
        new = {place: Mask(criterion, sparsity, value) for place, value in values.items()}
        mlp.cats_masks = nn.ModuleDict(new).to(_device_of(mlp))
    elif masks is not None:
        for place, value in values.items():
            masks[place].criterion, masks[place].sparsity = criterion, sparsity
            masks[place].set_threshold(value)


@torch.no_grad()
def swap_thresholds(model: nn.Module, thresholds: Thresholds) -> None:
    """Put ``thresholds``, which fit, into a patched model and leave the kernel and the rest as they are."""
    criterion, sparsity = get(thresholds.criterion), thresholds.sparsity
    with torch.inference_mode(False):
        for name, mlp in gated_mlps(model).items():
            state, of = mlp.cats_state, parts_of(mlp)
            activation = mlp._modules[state.activation_name]
            activation.active = name in thresholds.gate and criterion.activation is None
            activation.set_threshold(thresholds.gate.get(name, 0.0))
            places = {"up": thresholds.up.get(name), "neurons": thresholds.neurons.get(name)}
            places |= {INPUT + part: thresholds.mlp_linears.get(f"{name}.{part}") for part in of.linears}
            masks = {place: value for place, value in places.items() if value is not None}
            _set_masks(mlp, masks, criterion, thresholds.level_of(name))
            state.sparsity, state.level = sparsity, thresholds.levels.get(name)
            state.criterion, state.decider = criterion.name, thresholds.decider_of(name) or "gate"
            state.written_out = bool(masks) or of.activation is None
            state.known = None
        inputs = {**thresholds.mlp_input, **thresholds.attention_input, **thresholds.attention_linears}
        plain = get("cats") if not thresholds.attention_linears else criterion
        _set_input_masks(model, inputs, plain, sparsity)


def criterion_in_force(model: nn.Module) -> str:
    """Name of the criterion that `apply` has put on ``model``. Raises ValueError unless it has."""
    for name, mlp in gated_mlps(model).items():
        if not is_patched(mlp):
            raise ValueError(f"{name} has no threshold: call cats.apply(model, thresholds) first")
    return str(mlp.cats_state.criterion)


def sites_in_force(model: nn.Module) -> tuple[str, ...]:
    """Which of `cats.observe.SITES` have thresholds in ``model``. Raises ValueError unless `apply` has patched it."""
    criterion = get(criterion_in_force(model))
    if criterion.activation is not None:
        raise ValueError(f"{criterion.name} has no threshold: call cats.remove(model) and apply another one")
    attention = "attention_linears" if "attention_linears" in criterion.other_sites else "attention_input"
    sites = set()
    for module in _masked_modules(model):
        sites.add("mlp_input" if "cats_state" in module.__dict__ else attention)
    return (*criterion.sites, *sorted(sites))


def levels_in_force(model: nn.Module) -> tuple[float, dict[str, float]]:
    """`Thresholds.sparsity` and ``levels`` of what is applied to ``model``. Raises ValueError unless `apply` has."""
    criterion_in_force(model)
    states = {name: mlp.cats_state for name, mlp in gated_mlps(model).items()}
    own = {name: state.level for name, state in states.items() if state.level is not None}
    return next(iter(states.values())).sparsity, own


def _masked_modules(model: nn.Module) -> list[nn.Module]:
    """Modules with a mask on their input."""
    return [module for module in model.modules() if input_mask(module) is not None]


def _patch(mlp: Any, criterion: Criterion) -> None:
    of = parts_of(mlp)
    original: Any = mlp._modules[of.activation] if of.activation else copy.deepcopy(of.function)
    state = State(of, original if of.activation else None, activation=kernel_activation(original))
    inner = nn.ReLU() if criterion.activation == "relu" else original
    activation = CATSActivation(inner, 0.0)
    activation.threshold = activation.threshold.to(_device_of(mlp))
    mlp.cats_state = state
    setattr(mlp, state.activation_name, activation)
    cls: Any = type(mlp)
    if not issubclass(cls, SparseForward):  # a quantised block has it already
        set_class(mlp, sparse_class(cls))


def _unpatch(mlp: Any) -> None:
    disable_kernel(mlp)
    state: State = mlp.cats_state
    if state.original is None:
        mlp._modules.pop(OWN_ACTIVATION, None)
    else:
        setattr(mlp, state.activation_name, state.original)
    mlp._modules.pop("cats_masks", None)
    if issubclass(type(mlp), SparseForward) and "cats_quantized" not in mlp.__dict__:
        set_class(mlp, original_class(type(mlp)))
    del mlp.cats_state


@torch.inference_mode(False)
def apply(model: nn.Module, thresholds: Thresholds, kernel: str = "auto", prefill: str = "sparse") -> None:
    """Make ``model`` sparse in place; on a model that is patched already, swap thresholds, criterion and kernel only.

    Args:
        model: the model that ``thresholds`` were calibrated on, perhaps inside peft, torch.compile or DataParallel.
        thresholds: from `cats.calibrate` or `Thresholds.load`, of any criterion.
        kernel: ``auto`` takes Triton on a GPU, the compiled CPU kernel on a CPU, and the dense masked path with a
            warning where neither can serve; ``cpu`` and ``triton`` raise instead; ``reference`` is the dense path.
        prefill: ``sparse`` masks every token alike. ``dense`` leaves prompts alone: in evaluation mode a call with more
            than ``cats_kernels.MAX_ROWS`` (8) positions per sequence runs as the dense model, unmasked; shorter ones,
            and whatever one token more brings, are masked. Measured and calibrated is always what decoding does.

    Raises:
        TypeError: ``thresholds`` are none.
        ValueError: unknown kernel, criterion or prefill, no gated MLP, thresholds of another model, an MLP that does
            not compute equation 1 or whose activation or forward CATS cannot reach, a ReLUfied model, or a kernel that
            cannot serve this model or criterion. The model is then as it was, patched or not.
    """
    check_arguments(thresholds, kernel, prefill)
    mlps, criterion = gated_mlps(model), get(thresholds.criterion)
    check_fit(model, thresholds)
    check_blocks(mlps, criterion)
    obstacles = obstacles_of(mlps, thresholds, kernel)
    fresh = [mlp for mlp in mlps.values() if not is_patched(mlp)]
    try:
        for mlp in fresh:
            _patch(mlp, criterion)
        for name, mlp in mlps.items():
            mlp.cats_state.kernel = kernel
            if kernel == "reference" or name in obstacles:
                disable_kernel(mlp)
            else:
                enable_kernel(mlp)
        swap_thresholds(model, thresholds)
        _set_prefill(model, prefill == "dense")
        compile_kernels(mlps)
    except BaseException:  # no memory for a transposed weight, Ctrl-C
        for mlp in fresh:
            if is_patched(mlp):
                _unpatch(mlp)
        raise
    if obstacles:
        name, obstacle = next(iter(obstacles.items()))
        warnings.warn(
            f"{len(obstacles)} of {len(mlps)} MLPs run on the dense masked path, without speed-up ({name}: {obstacle})",
            stacklevel=3,
        )


def _set_prefill(model: nn.Module, dense: bool) -> None:
    for mlp in gated_mlps(model).values():
        mlp.cats_state.dense_prompts = dense
    for module in model.modules():
        if (mask := input_mask(module)) is not None:
            mask.dense_prompts = dense


@torch.inference_mode(False)
def remove(model: nn.Module) -> None:
    """Undo `apply` and `cats.relufy`: every weight, buffer, class and activation as before, bit for bit."""
    _set_input_masks(model, {}, get("cats"), 0.0)
    for mlp in gated_mlps(model).values():
        if is_patched(mlp):
            _unpatch(mlp)
