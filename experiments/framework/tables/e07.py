"""Tables of e07: CATS on attention inputs."""

from dataclasses import dataclass
from typing import ClassVar

from experiments.framework.tables.row import Row


@dataclass(frozen=True)
class AttentionRow(Row):
    """`ZeroShotRow` for the attention variant (appendix B), also after fine-tuning.

    ``metric`` is also ``sparsity_SITE``: the share of zeros at one site. ``seed``: of the training; of what is not
    fine-tuned that of the run.
    """

    table: ClassVar[str] = "e07_attention"
    key: ClassVar[tuple[str, ...]] = ("model", "variant", "finetuned", "seed", "task", "metric")
    model: str
    criterion: str
    variant: str
    sites: str
    finetuned: bool
    path: str
    sparsity_target: float | None
    sparsity_measured: float | None
    task: str
    metric: str
    value: float
    stderr: float | None = None
    difference: float | None = None
    difference_stderr: float | None = None
    items: int | None = None
    chance: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class AttentionSample(Row):
    """`ItemSample` for the attention variant."""

    table: ClassVar[str] = "e07_items"
    key: ClassVar[tuple[str, ...]] = ("model", "variant", "finetuned", "seed", "task")
    samples: ClassVar[bool] = True
    model: str
    criterion: str
    variant: str
    finetuned: bool
    task: str
    correct: str
    seed: int = 0


@dataclass(frozen=True)
class AttentionTextSample(Row):
    """`TextSample` for the attention variant."""

    table: ClassVar[str] = "e07_blocks"
    key: ClassVar[tuple[str, ...]] = ("model", "variant", "finetuned", "seed")
    samples: ClassVar[bool] = True
    model: str
    criterion: str
    variant: str
    finetuned: bool
    tokens_per_block: int
    nats: str
    seed: int = 0
