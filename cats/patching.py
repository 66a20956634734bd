"""Apply a criterion to a live model and take it off again, bit for bit.

A patched gated MLP keeps its parameters and their names: its activation module is replaced by `CATSActivation`, masks
are added where the criterion needs others, and its class gets the forward of `cats.sparse_forward`. That hands rows to
the operator for decoding, which needs the down projection transposed; the parameter's storage is transposed in place of
the original, so memory does not grow, and state_dict still shows the original layout.
"""

import copy
import warnings
from collections.abc import Mapping
from typing import Any, cast

import cats_kernels
import torch
from cats_kernels.dispatch import choose_backend
from torch import Tensor, nn

from cats.activation import CATSActivation, Mask
from cats.calibration import fingerprint
from cats.criteria import Criterion, get
from cats.devices import execution_device
from cats.equation import OWN_ACTIVATION
from cats.observe import input_mask
from cats.quantized_linear import QuantizedLinear
from cats.sparse_forward import (
    INPUT,
    SparseForward,
    State,
    is_prompt,
    original_class,
    set_class,
    sparse_class,
)
from cats.structure import (
    GatedMLP,
    activation_name,
    attention_blocks,
    attention_linears,
    check_equation_1,
    check_forward,
    gated_mlps,
    mlp_linears,
    named_modules,
    parts_of,
)
from cats.thresholds import ByModule, Thresholds, Value

KERNELS = cats_kernels.BACKENDS
PREFILLS = ("sparse", "dense")


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


def _is_patched(mlp: GatedMLP) -> bool:
    return "cats_state" in mlp.__dict__


def _original_activation(mlp: GatedMLP) -> Any:
    of = parts_of(mlp)
    if _is_patched(mlp):
        return mlp.cats_state.original or mlp._modules[OWN_ACTIVATION].inner
    return mlp._modules[of.activation] if of.activation else of.function


def _obstacle(mlp: GatedMLP, kernel: str) -> str | None:
    """Why the sparse kernel cannot serve ``mlp``, or None if it can."""
    if kernel_activation(_original_activation(mlp)) is None:
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


def _obstacles(mlps: dict[str, GatedMLP], thresholds: Thresholds, kernel: str) -> dict[str, str]:
    """What stands in ``kernel``'s way, by module path; raises ValueError if it was asked for by name."""
    if kernel == "reference":
        return {}
    criterion = get(thresholds.criterion)
    if criterion.no_kernel:
        obstacles = dict.fromkeys(mlps, criterion.no_kernel)
    else:
        obstacles = {name: obstacle for name, mlp in mlps.items() if (obstacle := _obstacle(mlp, kernel))}
    if obstacles and kernel != "auto":
        name, obstacle = next(iter(obstacles.items()))
        raise ValueError(f'kernel="{kernel}" cannot serve {name}: {obstacle}; use kernel="auto" or "reference"')
    return obstacles


def _contiguous_in_state_dict(_module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """State-dict hook of a transposed projection: safetensors refuses non-contiguous tensors."""
    weight = state_dict.get(f"{prefix}weight")
    if isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter):
        state_dict[f"{prefix}weight"] = weight.contiguous()


def _enable_kernel(mlp: GatedMLP) -> None:
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
    if _is_patched(mlp):
        _disable_kernel(mlp)


def refresh_kernels(mlp: GatedMLP) -> None:
    """Take the sparse path again with the layers that are now there, where the kernel asked for can serve them."""
    if _is_patched(mlp):
        state = mlp.cats_state
        if state.kernel != "reference" and not get(state.criterion).no_kernel and _obstacle(mlp, state.kernel) is None:
            _enable_kernel(mlp)


def _disable_kernel(mlp: GatedMLP) -> None:
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
            _set_masks(mlp, masks, criterion, sparsity)
            state.criterion, state.decider = criterion.name, thresholds.decider_of(name) or "gate"
            state.written_out = bool(masks) or of.activation is None
            state.known = None
        inputs = {**thresholds.mlp_input, **thresholds.attention_input, **thresholds.attention_linears}
        plain = get("cats") if not thresholds.attention_linears else criterion
        _set_input_masks(model, inputs, plain, sparsity)


def criterion_in_force(model: nn.Module) -> str:
    """Name of the criterion that `apply` has put on ``model``. Raises ValueError unless it has."""
    for name, mlp in gated_mlps(model).items():
        if not _is_patched(mlp):
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


def _masked_modules(model: nn.Module) -> list[nn.Module]:
    """Modules with a mask on their input."""
    return [module for module in model.modules() if input_mask(module) is not None]


def _check_arguments(thresholds: Thresholds, kernel: str, prefill: str) -> None:
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


def _check_fit(model: nn.Module, thresholds: Thresholds) -> None:
    """Whether the thresholds were made for this model."""
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
    if missing or unknown:
        missing = list(dict.fromkeys(missing))
        raise ValueError(
            "these thresholds were made for another model: "
            f"they lack {', '.join(missing) or 'none'} of its layers, and it lacks {', '.join(unknown) or 'none'}"
        )


def _check_blocks(mlps: dict[str, GatedMLP], criterion: Criterion) -> None:
    for name, mlp in mlps.items():
        activation = mlp._modules.get(activation_name(mlp))
        if isinstance(activation, CATSActivation) != _is_patched(mlp):
            raise ValueError(f"{name} already has a {type(activation).__name__} patch: call cats.remove(model) first")
        if not _is_patched(mlp):
            check_equation_1(name, mlp)
            continue
        check_forward(name, mlp)
        own = get(mlp.cats_state.criterion)
        if own.activation != criterion.activation:
            raise ValueError(f"{name} is patched for {own.name} already: call cats.remove(model) first")


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
    _disable_kernel(mlp)
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
    _check_arguments(thresholds, kernel, prefill)
    mlps, criterion = gated_mlps(model), get(thresholds.criterion)
    _check_fit(model, thresholds)
    _check_blocks(mlps, criterion)
    obstacles = _obstacles(mlps, thresholds, kernel)
    fresh = [mlp for mlp in mlps.values() if not _is_patched(mlp)]
    try:
        for mlp in fresh:
            _patch(mlp, criterion)
        for name, mlp in mlps.items():
            mlp.cats_state.kernel = kernel
            if kernel == "reference" or name in obstacles:
                _disable_kernel(mlp)
            else:
                _enable_kernel(mlp)
        swap_thresholds(model, thresholds)
        _set_prefill(model, prefill == "dense")
        _compile_kernels(mlps)
    except BaseException:  # no memory for a transposed weight, Ctrl-C
        for mlp in fresh:
            if _is_patched(mlp):
                _unpatch(mlp)
        raise
    if obstacles:
        name, obstacle = next(iter(obstacles.items()))
        warnings.warn(
            f"{len(obstacles)} of {len(mlps)} MLPs run on the dense masked path, without speed-up ({name}: {obstacle})",
            stacklevel=3,
        )


@torch.no_grad()
def _compile_kernels(mlps: Mapping[str, Any]) -> None:
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
        if _is_patched(mlp):
            _unpatch(mlp)
