"""Tables of e06: generation."""

from dataclasses import dataclass
from typing import ClassVar

from experiments.framework.tables.row import Row


@dataclass(frozen=True)
class ThroughputRow(Row):
    """One prompt (or batch of prompts) generated to one length; ``decode_s`` holds ``generated_tokens - 1`` steps.

    ``model_layers``: how many layers the published model has; ``layers``: how many were run. ``repeat``: dense and
    sparse take turns on the same prompt so many times. Lengths of one repeat are read from one generation: they are
    not independent of each other.
    """

    table: ClassVar[str] = "e06_throughput"
    key: ClassVar[tuple[str, ...]] = (
        "machine", "model", "weights", "layers", "dtype", "attention", "variant", "condition", "loop", "batch",
        "prompt", "repeat", "prompt_tokens", "generated_tokens", "cache_tokens",
    )  # fmt: skip
    machine: str
    model: str
    weights: str
    layers: int
    model_layers: int
    dtype: str
    attention: str
    criterion: str
    variant: str
    condition: str
    path: str
    sparsity_target: float | None
    sparsity_measured: float | None
    loop: str
    batch: int
    prompt: int
    repeat: int
    prompt_tokens: int
    generated_tokens: int
    prefill_s: float
    decode_s: float
    tokens_per_second: float
    compile_s: float
    peak_memory_bytes: int | None
    cache_tokens: int


@dataclass(frozen=True)
class ShareRow(Row):
    """One component's part of a decoded token's time in the dense model, all layers together."""

    table: ClassVar[str] = "e06_shares"
    key: ClassVar[tuple[str, ...]] = ("machine", "model", "layers", "dtype", "loop", "component")
    machine: str
    model: str
    layers: int
    dtype: str
    loop: str
    component: str
    milliseconds: float
    share: float


@dataclass(frozen=True)
class AmdahlRow(Row):
    """What the MLP's share and the kernel's gain allow, and what was measured end to end, as ratios to dense."""

    table: ClassVar[str] = "e06_amdahl"
    key: ClassVar[tuple[str, ...]] = ("machine", "model", "layers", "dtype", "loop", "variant")
    machine: str
    model: str
    layers: int
    dtype: str
    loop: str
    criterion: str
    variant: str
    sparsity_target: float
    kernel_speedup: float
    mlp_share: float
    predicted_speedup: float
    measured_speedup: float
    fraction_of_predicted: float


@dataclass(frozen=True)
class GreedyRow(Row):
    """How many of the first generated tokens two ways of computing the same function agree on (float32)."""

    table: ClassVar[str] = "e06_greedy"
    key: ClassVar[tuple[str, ...]] = ("machine", "model", "layers", "dtype", "check")
    machine: str
    model: str
    layers: int
    dtype: str
    check: str
    tokens: int
    identical_tokens: int
