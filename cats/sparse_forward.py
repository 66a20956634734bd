"""The forward of a patched MLP: which rows go to the sparse kernel, and the dense masked path of every criterion.

The class's own forward code stays in charge wherever `CATSActivation`, which stands in for the activation module, is
all that a criterion needs. Where the up product decides, inputs or neurons are masked, or a block calls no activation
module, the dense masked path is equation 1 written out over the block's own (perhaps wrapped) linear layers.
"""

from dataclasses import dataclass, field
from functools import cache
from types import MethodType
from typing import Any

import cats_kernels
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from cats.equation import OWN_ACTIVATION, GatedMLP, Parts
from cats.quantized_linear import QuantizedLinear, quantized_weights
from cats.repeated_calls import Arguments, Repeats, as_given, know

INPUT = "input_"
"""Prefix of a mask on the input of one of the block's linear layers; the others are "up" and "neurons"."""


@dataclass
class State(Repeats):
    """What a patched MLP remembers, and what `cats.remove` needs to undo the patch.

    Attributes:
        parts: of the block, as they were before.
        original: the block's own activation module; None where it has none.
        kernel: the backend asked for.
        activation: the kernel's name for the activation, None when it has none.
        sparse: whether rows may go to the sparse kernel.
        criterion: name of the criterion in force.
        decider: the product that decides, as the operator takes it.
        sparsity, level: the target of the thresholds in force, and that of this block where it has its own.
        written_out: whether the dense masked path is equation 1 written out here.
        dense_prompts: whether prompts run dense and unmasked, see `is_prompt`.
        handles: of the hooks on the down projection.
    """

    parts: Parts
    original: nn.Module | None
    kernel: str = "reference"
    activation: str | None = None
    sparse: bool = False
    criterion: str = "cats"
    decider: str = "gate"
    sparsity: float = 0.0
    level: float | None = None
    written_out: bool = False
    dense_prompts: bool = False
    handles: list[Any] = field(default_factory=list)

    @property
    def activation_name(self) -> str:
        """Attribute that holds the `CATSActivation`."""
        return self.parts.activation or OWN_ACTIVATION


@dataclass
class QuantizedState(Repeats):
    """What a quantised MLP remembers, patched or not, as its attribute ``cats_quantized``.

    Attributes:
        parts: of the block.
        original: the block's own activation module; None where it has none.
        activation: the kernel's name for the activation, None when it has none.
    """

    parts: Parts
    original: nn.Module | None
    activation: str | None


def is_prompt(x: Tensor) -> bool:
    """Whether ``x`` (..., length, d) has more positions per sequence than decoding has: over ``cats_kernels.MAX_ROWS``.

    A shorter prompt cannot be told from the rows that speculative decoding checks together, and is treated as those.
    """
    return x.dim() > 1 and x.shape[-2] > cats_kernels.MAX_ROWS


def masked_equation_1(mlp: GatedMLP, x: Tensor, activation: nn.Module, masks: dict[str, Any]) -> Tensor:
    """``(act(x W_gate) * (x W_up)) W_down`` through the block's own modules, with ``masks`` by place in between."""
    of: Parts = mlp.cats_state.parts
    modules = mlp._modules

    def masked(place: str, values: Tensor) -> Tensor:
        mask = masks.get(place)
        return values if mask is None else mask(values)

    if of.up is None:
        gate, up = modules[of.gate](masked(INPUT + of.gate, x)).chunk(2, dim=-1)
    else:
        gate, up = modules[of.gate](masked(INPUT + of.gate, x)), modules[of.up](masked(INPUT + of.up, x))
    neurons = masked("neurons", activation(gate) * masked("up", up))
    return modules[of.down](masked(INPUT + of.down, neurons))


class SparseForward:
    """Mixin put in front of a gated MLP's class: small inputs without gradient go to the sparse kernel."""

    cats_state: State
    training: bool
    _modules: dict[str, Any]

    def _sparse_weights(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Gate, up and transposed down weight if ``x`` goes to the sparse kernel, else None.

        Looked at in every call: since the patch peft may have wrapped a projection, a hook may have come that must see
        what a projection or the activation computes, accelerate may have offloaded the block, a weight may have become
        another kind of tensor, and ``load_state_dict(assign=True)`` may have put a weight in its place that is not
        transposed.
        """
        state, device = self.cats_state, x.device
        if (
            not state.sparse
            or torch.is_grad_enabled()
            or self.training  # reentrant gradient checkpointing runs forward first without gradients
            # on a CPU the operator chooses by rows itself: torch took 1 to 4 s for 2 to 8 bfloat16 rows times a
            # transposed down projection of Mistral-7B's shape, a whole dense MLP 0.04 to 0.13 s
            or (device.type != "cpu" and x.numel() > cats_kernels.MAX_ROWS * x.shape[-1])
        ):
            return None
        modules = self._modules  # looking here takes a tenth of the microsecond that an attribute of a module takes
        activation = modules[state.activation_name]
        if activation._forward_hooks or activation._forward_pre_hooks:
            return None
        if type(modules[state.parts.gate]) is QuantizedLinear:
            return quantized_weights(modules, state.parts, device)
        weights: list[Any] = []
        for name in state.parts.linears:
            linear = modules[name]
            if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks:
                return None
            weight = linear._parameters.get("weight")
            kind = type(weight)
            if kind is not nn.Parameter and kind is not Tensor and kind is not FakeTensor:
                return None
            weights.append(weight)
        given = as_given(weights)
        for one in given:
            if one.device != device or one.dtype != x.dtype or not one.is_contiguous():
                return None
        return given

    def _deciding_threshold(self) -> Tensor:
        """The threshold of the product that decides, as it is now."""
        state, modules = self.cats_state, self._modules
        by = modules[state.activation_name] if state.decider == "gate" else modules["cats_masks"]._modules["up"]
        return by._buffers["threshold"]

    def _repeat(self, x: Any) -> Tensor | None:
        """y of a patched block by `Known.repeat`, if it has a call to repeat."""
        state, modules = self.cats_state, self._modules
        if state.known is None or self.training:
            return None
        layers = [modules[name] for name in state.parts.linears]
        return state.known.repeat(x, layers, modules[state.activation_name], self._deciding_threshold(), state.kernel)

    def _run_kernel(self, x: Tensor) -> Tensor | None:
        """y by the operator, if ``x`` goes to the sparse kernel, else None."""
        state, weights = self.cats_state, self._sparse_weights(x)
        if weights is None:
            return None
        threshold = self._deciding_threshold()
        return self._call(state, (x, *weights, threshold, str(state.activation), state.kernel, state.decider))

    def _call(self, state: State | QuantizedState, arguments: Arguments) -> Tensor:
        """y by the operator, which is remembered to be repeated."""
        y = cats_kernels.sparse_gated_mlp(*arguments)
        if not torch.compiler.is_compiling():
            state.known = know(state.known, [self._modules[name] for name in state.parts.linears], arguments)
        return y

    def _dense_quantized(self, x: Any) -> Tensor | None:
        """The output of a quantised block that is not patched if the operator computes it, with threshold 0, else None:
        as `_sparse_weights`, and where the activation is no longer the block's own."""
        state: QuantizedState = self.__dict__["cats_quantized"]
        of, modules = state.parts, self._modules
        activation = None if of.activation is None else modules[of.activation]
        if state.activation is None or self.training or activation is not state.original:
            return None
        if not torch.compiler.is_compiling() and state.known is not None:
            y = state.known.repeat(x, [modules[name] for name in of.linears], activation, None, "auto")
            if y is not None:
                return y
        if (
            type(x) not in (Tensor, FakeTensor)
            or torch.is_grad_enabled()
            or (activation is not None and (activation._forward_hooks or activation._forward_pre_hooks))
            or (x.device.type != "cpu" and x.numel() > cats_kernels.MAX_ROWS * x.shape[-1])
        ):
            return None
        weights = quantized_weights(modules, of, x.device)
        return None if weights is None else self._call(state, (x, *weights, 0.0, state.activation, "auto", "gate"))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        mlp: Any = self
        if "cats_state" not in self.__dict__:  # quantised, and not patched
            y = self._dense_quantized(args[0]) if len(args) == 1 and not kwargs else None
            return super().forward(*args, **kwargs) if y is None else y  # type: ignore[misc]
        if len(args) == 1 and not kwargs and not torch.compiler.is_compiling():
            y = self._repeat(args[0])
            if y is not None:
                return y
        state, modules = self.cats_state, self._modules
        x = args[0] if args else next(iter(kwargs.values()))
        activation = modules[state.activation_name]
        if state.dense_prompts and not self.training and is_prompt(x):
            return masked_equation_1(mlp, x, activation.inner, {})
        y = self._run_kernel(x) if len(args) == 1 and not kwargs else None
        if y is not None:
            return y
        if state.written_out:
            masks = modules.get("cats_masks")
            return masked_equation_1(mlp, x, activation, {} if masks is None else masks._modules)
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        """pickle cannot find a class made while running: `_rebuild` makes it again."""
        return _rebuild, (original_class(type(self)),), self.__getstate__()


@cache
def sparse_class(original: Any) -> Any:
    """The subclass of an MLP's class that takes the sparse path; one for each, so that compiled code is shared."""
    return type(f"CATS{original.__name__}", (SparseForward, original), {"__module__": original.__module__})


def original_class(cls: Any) -> Any:
    """The class that was patched to become ``cls``, which others (FSDP's fully_shard) may have put a subclass upon."""
    if cls.__bases__[0] is SparseForward:
        return cls.__bases__[1]
    bases = tuple(original_class(base) if issubclass(base, SparseForward) else base for base in cls.__bases__)
    content = {key: value for key, value in cls.__dict__.items() if key not in ("__dict__", "__weakref__")}
    return type(cls.__name__.replace("CATS", "", 1), bases, content)


def _rebuild(original: Any) -> Any:
    """An empty patched MLP, for pickle and deepcopy to fill."""
    cls = sparse_class(original)
    return cls.__new__(cls)


def set_class(mlp: GatedMLP, cls: Any) -> None:
    """Make ``mlp`` an instance of ``cls``, also where accelerate's hooks hold on to its forward."""
    mlp.__class__ = cls
    # accelerate's hooks call the forward that they found first, and leave it behind as "forward" when they go
    for name in ("_old_forward", "forward"):
        if isinstance(mlp.__dict__.get(name), MethodType):
            setattr(mlp, name, MethodType(cls.forward, mlp))
