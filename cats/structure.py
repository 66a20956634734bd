"""Where the gated MLPs of a Hugging Face model are: found by structure, so that new model families need no code here.

A gated MLP is a module with ``down_proj``, an activation (``act_fn`` or ``activation_fn``) and either ``gate_proj`` and
``up_proj`` (Llama, Mistral, Qwen, Gemma) or a fused ``gate_up_proj`` (Phi-3, GLM). That it really computes equation 1
is checked by running it (`check_equation_1`).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

_ACTIVATION_NAMES = ("act_fn", "activation_fn")
GatedMLP: TypeAlias = Any
"""A torch module with the attributes above; they vary by family, and torch types a module's attributes too widely."""


def _is_gated_mlp(module: nn.Module) -> bool:
    own = module._modules  # a block that torch.compile or peft has wrapped shows its attributes on the wrapper too
    projections = "down_proj" in own and ({"gate_proj", "up_proj"} <= set(own) or "gate_up_proj" in own)
    return projections and any(own.get(name) is not None for name in _ACTIVATION_NAMES)


def activation_name(mlp: GatedMLP) -> str:
    """Attribute under which ``mlp`` holds its activation module."""
    return next(name for name in _ACTIVATION_NAMES if mlp._modules.get(name) is not None)


def canonical_name(name: str) -> str:
    """Module path without what torch.compile and peft put into it, so that thresholds outlive both."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod").removeprefix("base_model.model.")


def gated_mlps(model: nn.Module) -> dict[str, GatedMLP]:
    """The gated MLPs of ``model`` in order, keyed by module path.

    Raises:
        ValueError: the model has none (GPT-2 or OPT style two-layer MLPs), or stacked experts beside them.
    """
    stacked = [name for name, module in model.named_modules() if "down_proj" in module._parameters]
    if stacked:
        raise ValueError(
            f"{type(model).__name__} is a mixture of experts, stacked in {canonical_name(stacked[0])}: "
            "CATS supports only gated MLPs with projections of their own, and does not patch a part of a model"
        )
    found = {canonical_name(name): module for name, module in model.named_modules() if _is_gated_mlp(module)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no gated MLP: CATS needs modules with gate_proj, up_proj (or gate_up_proj), "
            "down_proj and an activation act_fn or activation_fn, as in Llama, Mistral, Qwen, Gemma or Phi-3"
        )
    return found


def attention_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The ``self_attn`` module beside each gated MLP, keyed by module path (appendix B applies CATS to their inputs).

    Raises:
        ValueError: a decoder layer has no ``self_attn``.
    """
    modules = {canonical_name(name): module for name, module in model.named_modules()}
    found = {}
    for name in gated_mlps(model):
        attention = f"{name.rpartition('.')[0]}.self_attn"
        if attention not in modules:
            raise ValueError(
                f"{type(model).__name__} has no {attention}: the attention variant needs layers with self_attn"
            )
        found[attention] = modules[attention]
    return found


def gate_and_up(mlp: GatedMLP, x: Tensor) -> tuple[Tensor, Tensor]:
    """``x W_gate`` and ``x W_up``, each (..., m), through the module's own (perhaps adapter-wrapped) projections."""
    if hasattr(mlp, "gate_up_proj"):
        gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
        return gate, up
    return mlp.gate_proj(x), mlp.up_proj(x)


def hidden_size(mlp: GatedMLP) -> int:
    """Width d of the block's input."""
    first = mlp.gate_up_proj if hasattr(mlp, "gate_up_proj") else mlp.gate_proj
    return int(first.in_features)


def resolve_device(device: str, *more: str) -> str:
    """``auto`` becomes ``cuda`` where there is one, else ``cpu``; ``cpu``, ``cuda``, ``cuda:N`` and ``more`` stay.

    Raises:
        ValueError: another name, or a CUDA device that is not there.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if there else "cpu"
    if device not in more and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(
            f"unknown device {device!r}: allowed are {', '.join(('auto', 'cpu', 'cuda', 'cuda:N', *more))}"
        )
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= there:
        seen = {0: "no CUDA device", 1: "only cuda:0"}.get(there, f"only cuda:0 to cuda:{there - 1}")
        raise ValueError(f"device {device!r} was asked for, but torch {torch.__version__} sees {seen} here")
    return device


def execution_device(module: nn.Module) -> torch.device:
    """Where ``module`` computes: its first parameter's device or, when accelerate has offloaded that, its hooks'."""
    device = next(module.parameters()).device
    if device.type == "meta":
        for part in module.modules():
            hook: Any = getattr(part, "_hf_hook", None)
            for single in getattr(hook, "hooks", (hook,)):  # accelerate chains several in a SequentialHook
                if getattr(single, "execution_device", None) is not None:
                    return torch.device(single.execution_device)
    return device


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of ``model`` into eval mode, and each back into its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class _Zeros(nn.Module):
    """The activation that keeps nothing."""

    def forward(self, gate: Tensor) -> Tensor:
        return torch.zeros_like(gate)


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

    It is run with its own activation and with one that gives zeros: a block may compute equation 1 without calling its
    activation module, and CATS, which replaces that module, would do nothing. The tolerance is 2 % of the norm of the
    output; bfloat16 rounding made at most 0.54 % (Llama, Gemma and Phi-3 blocks of random weights).

    Raises:
        ValueError: the module has the right attributes but computes something else (clipping, extra norms, dropout),
            does not call its activation, or has had its forward replaced.
    """
    check_forward(name, mlp)
    device, attribute = execution_device(mlp), activation_name(mlp)
    if device.type == "meta":
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, hidden_size(mlp), generator=generator).to(device, next(mlp.parameters()).dtype)
    activation = getattr(mlp, attribute)
    with eval_mode(mlp):
        gate, up = gate_and_up(mlp, x)
        expected = mlp.down_proj(activation(gate) * up).float()
        actual = mlp(x).float()
        setattr(mlp, attribute, _Zeros())
        try:
            expected_zeros, actual_zeros = mlp.down_proj(torch.zeros_like(up)).float(), mlp(x).float()
        finally:
            setattr(mlp, attribute, activation)
    tolerance = 0.02 * expected.norm()
    if actual.shape != expected.shape or not (actual - expected).norm() <= tolerance:
        raise ValueError(
            f"{name} ({type(mlp).__name__}) looks like a gated MLP but does not compute "
            "(act(x W_gate) * (x W_up)) W_down; CATS supports only blocks that do"
        )
    if not (actual_zeros - expected_zeros).norm() <= tolerance:
        raise ValueError(
            f"{name} ({type(mlp).__name__}) does not call its {attribute}, so CATS, which replaces it, would do nothing"
        )
