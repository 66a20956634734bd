"""Where the gated MLPs of a Hugging Face model are: by structure, so that new model families need no code here.

A gated MLP is a module whose linear layers and activation compute equation 1, see `cats.equation`: ``gate_proj``,
``up_proj``, ``down_proj`` and ``act_fn`` (Llama, Mistral, Qwen, Gemma), a fused ``gate_up_proj`` (Phi-3, GLM), or other
names (LFM2).
"""

from collections.abc import Iterator
from typing import Any, cast

from torch import nn

from cats.devices import eval_mode, execution_device, resolve_device
from cats.equation import OWN_ACTIVATION, GatedMLP, Parts, check_equation_1, check_forward, parts, why_not_run

__all__ = [
    "GatedMLP",
    "activation_name",
    "attention_blocks",
    "attention_linears",
    "canonical_name",
    "check_equation_1",
    "check_forward",
    "check_module",
    "eval_mode",
    "execution_device",
    "gated_mlps",
    "mlp_linears",
    "named_modules",
    "parts_of",
    "resolve_device",
    "unwrapped",
]


def parts_of(mlp: GatedMLP) -> Parts:
    """The parts of one of `gated_mlps`."""
    of = parts(mlp)
    assert of is not None
    return of


def activation_name(mlp: GatedMLP) -> str:
    """Attribute under which ``mlp`` holds its activation module, or does while it is patched."""
    return parts_of(mlp).activation or OWN_ACTIVATION


def canonical_name(name: str) -> str:
    """Module path without what torch.compile and FSDP put into it, so that thresholds outlive both."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod").replace("_fsdp_wrapped_module.", "")


def check_module(model: Any) -> None:
    """Raise TypeError in one sentence for what is no module, such as a model's name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, as from_pretrained loads it, not a {type(model).__name__}")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what torch.compile, peft, DataParallel and DistributedDataParallel put around it.

    Raises:
        TypeError: as `check_module`.
    """
    check_module(model)
    while True:
        inner: Any = model._modules.get("_orig_mod")
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None and hasattr(model, "get_base_model"):  # peft: of LoRA and of prompts alike
            inner = cast(Any, model).get_base_model()
        if inner is None or inner is model:
            return model
        model = inner


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules of the `unwrapped` model by canonical path."""
    for name, module in unwrapped(model).named_modules():
        yield canonical_name(name), module


def gated_mlps(model: nn.Module) -> dict[str, GatedMLP]:
    """The gated MLPs of ``model`` in order, keyed by module path.

    Raises:
        ValueError: the model has none (GPT-2 or OPT style two-layer MLPs), none that runs here (it is named, with what
            it raises), or stacked experts beside them.
    """
    modules = dict(named_modules(model))
    stacked = [name for name, module in modules.items() if "down_proj" in module._parameters]
    name = type(unwrapped(model)).__name__
    if stacked:
        raise ValueError(
            f"{name} is a mixture of experts, stacked in {stacked[0]}, which is not yet supported: "
            "CATS takes only gated MLPs with projections of their own, and does not patch a part of a model"
        )
    mlps = {name: cast(GatedMLP, module) for name, module in modules.items() if parts(module) is not None}
    if not mlps:
        errors = ((path, module, why_not_run(module)) for path, module in modules.items())
        path, module, error = next((each for each in errors if each[2] is not None), ("", None, None))
        reason = f"; {path} ({type(module).__name__}) looks like one but does not run here: " if error else ""
        raise ValueError(
            f"{name} has no gated MLP: CATS needs modules that compute (act(x W_gate) * (x W_up)) W_down "
            "with linear layers of their own, as in Llama, Mistral, Qwen, Gemma or Phi-3"
            + (f"{reason}{type(error).__name__}: {' '.join(str(error).split())}" if error else "")
        ) from error
    return mlps


def mlp_linears(model: nn.Module) -> dict[str, tuple[GatedMLP, str]]:
    """Path of each linear layer of each gated MLP to the MLP and the layer's name in it."""
    return {f"{path}.{name}": (mlp, name) for path, mlp in gated_mlps(model).items() for name in parts_of(mlp).linears}


def attention_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The ``self_attn`` module beside each gated MLP, keyed by module path (appendix B applies CATS to their inputs).

    Raises:
        ValueError: a decoder layer has no ``self_attn``.
    """
    modules = dict(named_modules(model))
    blocks = {}
    for name in gated_mlps(model):
        attention = f"{name.rpartition('.')[0]}.self_attn"
        if attention not in modules:
            raise ValueError(
                f"{type(model).__name__} has no {attention}: the attention variant needs layers with self_attn"
            )
        blocks[attention] = modules[attention]
    return blocks


def attention_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers directly inside each of `attention_blocks` (query, key, value, output), by module path."""
    return {
        f"{path}.{name}": child
        for path, block in attention_blocks(model).items()
        for name, child in block.named_children()
        if isinstance(getattr(child, "in_features", None), int)
    }


def other_linears(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Path of each of torch's own linear layers outside of the gated MLPs (attention, the output matrix) to the module
    that holds it and its name in it.

    Raises:
        ValueError: as `gated_mlps`.
    """
    mlps = set(gated_mlps(model).values())
    holders = ((path, module) for path, module in named_modules(model) if module not in mlps)
    return {
        f"{path}.{name}".removeprefix("."): (module, name)
        for path, module in holders
        for name, child in module.named_children()
        if type(child) is nn.Linear
    }
