"""Where the gated MLPs of a Hugging Face model are: found by structure, so that new model families need no code here.

A gated MLP is a module with ``down_proj``, an activation (``act_fn`` or ``activation_fn``) and either ``gate_proj`` and
``up_proj`` (Llama, Mistral, Qwen, Gemma) or a fused ``gate_up_proj`` (Phi-3, GLM). That it really computes equation 1
is checked by running it (`check_equation_1`).
"""

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

_ACTIVATION_NAMES = ("act_fn", "activation_fn")
GatedMLP: TypeAlias = Any
"""A torch module with the attributes above; they vary by family, and torch types a module's attributes too widely."""


def _is_gated_mlp(module: nn.Module) -> bool:
    split = hasattr(module, "gate_proj") and hasattr(module, "up_proj")
    projections = hasattr(module, "down_proj") and (split or hasattr(module, "gate_up_proj"))
    return projections and any(isinstance(getattr(module, name, None), nn.Module) for name in _ACTIVATION_NAMES)


def activation_name(mlp: GatedMLP) -> str:
    """Attribute under which ``mlp`` holds its activation module."""
    return next(name for name in _ACTIVATION_NAMES if isinstance(getattr(mlp, name, None), nn.Module))


def canonical_name(name: str) -> str:
    """Module path without the prefix that peft adds, so that thresholds outlive ``get_peft_model``."""
    return name.removeprefix("base_model.model.")


def gated_mlps(model: nn.Module) -> dict[str, GatedMLP]:
    """The gated MLPs of ``model`` in order, keyed by module path.

    Raises:
        ValueError: the model has none (GPT-2 or OPT style two-layer MLPs, stacked experts).
    """
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


@torch.no_grad()
def check_equation_1(name: str, mlp: GatedMLP) -> None:
    """Run ``mlp`` on random input and compare it with ``(act(x W_gate) * (x W_up)) W_down`` (equation 1).

    Raises:
        ValueError: the module has the right attributes but computes something else (clipping, extra norms, dropout).
    """
    parameter = next(mlp.parameters())
    if parameter.device.type == "meta":
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, hidden_size(mlp), generator=generator).to(parameter.device, parameter.dtype)
    modes = {module: module.training for module in mlp.modules()}
    mlp.eval()
    try:
        gate, up = gate_and_up(mlp, x)
        expected = mlp.down_proj(getattr(mlp, activation_name(mlp))(gate) * up)
        actual = mlp(x)
    finally:
        for module, training in modes.items():
            module.training = training
    if actual.shape != expected.shape or not torch.allclose(actual.float(), expected.float(), rtol=2e-2, atol=1e-3):
        raise ValueError(
            f"{name} ({type(mlp).__name__}) looks like a gated MLP but does not compute "
            "(act(x W_gate) * (x W_up)) W_down; CATS supports only blocks that do"
        )
