"""LoRA adapters on a model, patched or not, through peft: which projections they adapt, and with what rank."""

import warnings
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel, set_seed

from cats.extras import missing
from cats.random_states import random_states_kept
from cats.structure import gated_mlps

try:
    from peft import LoraConfig, PeftModel, get_peft_model
except ImportError as error:
    raise missing(__name__, "experiments", error) from error

PROJECTIONS = {
    "query": ("q_proj", "qkv_proj"),
    "key": ("k_proj", "qkv_proj"),
    "value": ("v_proj", "qkv_proj"),
    "gate": ("gate_proj", "gate_up_proj"),
    "up": ("up_proj", "gate_up_proj"),
    "down": ("down_proj",),
}
"""Names of each projection's module: of its own, or fused with its neighbours (Phi-3)."""


@dataclass(frozen=True)
class LoraSettings:
    """What LoRA adapts and with how many parameters.

    Attributes:
        projections: which of `PROJECTIONS`.
        rank: rank of each adapter; None chooses it so that ``share`` of the model's parameters are trained.
        share: trainable parameters over all parameters, used when ``rank`` is None.
        scale: adapters are multiplied by this, peft's ``lora_alpha / r``.
        dropout: on the adapters' input.
    """

    projections: tuple[str, ...]
    rank: int | None
    share: float
    scale: float
    dropout: float


PRESETS = {
    # section 5 of the paper; it names neither alpha nor dropout
    "paper": LoraSettings(("query", "key", "gate", "down"), None, 0.01, 2.0, 0.0),
    # the authors' repository: r = 64, alpha = 16
    "code": LoraSettings(("query", "value", "gate", "up", "down"), 64, 0.01, 16 / 64, 0.1),
}
"""Both sets are selectable; "paper" is the default because the text is what describes figures 2 and 5."""


def preset(name: str) -> LoraSettings:
    """One of `PRESETS`. Raises ValueError naming the allowed ones."""
    if name not in PRESETS:
        raise ValueError(f"unknown LoRA settings {name!r}: allowed are {', '.join(PRESETS)}")
    return PRESETS[name]


def lora_config(model: nn.Module, settings: LoraSettings) -> LoraConfig:
    """peft's configuration of ``settings`` on ``model``.

    Raises:
        ValueError: an unknown projection, or one that the model does not have; a model without gated MLP.
    """
    gated_mlps(model)
    unknown = sorted(set(settings.projections) - set(PROJECTIONS))
    if unknown or not settings.projections:
        raise ValueError(f"unknown projections {unknown}: allowed are {', '.join(PROJECTIONS)}")
    modules = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    present = {name.rpartition(".")[2] for name in modules}
    targets = set()
    for projection in settings.projections:
        found = [name for name in PROJECTIONS[projection] if name in present]
        if not found:
            raise ValueError(f"{type(model).__name__} has no {projection} projection for LoRA to adapt")
        targets.add(found[0])
    rank = settings.rank
    if rank is None:
        widths = [m.in_features + m.out_features for n, m in modules.items() if n.rpartition(".")[2] in targets]
        rank = max(1, round(settings.share * sum(p.numel() for p in model.parameters()) / sum(widths)))
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=settings.scale * rank,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=sorted(targets),
    )


def add_lora(model: PreTrainedModel, settings: LoraSettings, seed: int = 0) -> PeftModel:
    """Wrap ``model`` with fresh adapters, the same for the same seed, that do not change its output yet.

    Raises:
        ValueError: as `lora_config`.
    """
    config = lora_config(model, settings)
    with random_states_kept(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing.*"
        )  # peft asks transformers by its old name
        set_seed(seed)
        return get_peft_model(model, config)


def remove_lora(model: PeftModel) -> PreTrainedModel:
    """Take the adapters off without merging them: the model of before `add_lora`, its weights untouched."""
    return model.unload()
