"""Tables of e03: LoRA fine-tuning."""

from dataclasses import dataclass
from typing import ClassVar

from experiments.framework.tables.row import Row


@dataclass(frozen=True)
class FinetuningRow(Row):
    """Accuracy on one task after ``step`` steps of LoRA; losses in nats per token, ``eval_loss`` on held-out text."""

    table: ClassVar[str] = "e03_finetuning"
    key: ClassVar[tuple[str, ...]] = ("model", "variant", "seed", "step", "task")
    model: str
    criterion: str
    variant: str
    seed: int
    step: int
    learning_rate: float
    task: str
    accuracy: float
    stderr: float
    items: int
    train_loss: float | None
    eval_loss: float


@dataclass(frozen=True)
class FinetuningSample(Row):
    """`ItemSample` of one training run at one step."""

    table: ClassVar[str] = "e03_items"
    key: ClassVar[tuple[str, ...]] = ("model", "variant", "seed", "step", "task")
    samples: ClassVar[bool] = True
    model: str
    criterion: str
    variant: str
    seed: int
    step: int
    task: str
    correct: str


@dataclass(frozen=True)
class SparsityRow(Row):
    """Sparsity of one layer on held-out text, and the mean accuracy of the model it was measured in (Figure 5)."""

    table: ClassVar[str] = "e03_sparsity"
    key: ClassVar[tuple[str, ...]] = ("model", "variant", "seed", "step", "layer", "recalibrated")
    model: str
    criterion: str
    variant: str
    seed: int
    step: int
    layer: str
    layer_index: int
    sparsity_target: float | None
    sparsity_measured: float
    recalibrated: bool
    accuracy_mean: float


@dataclass(frozen=True)
class SweepRow(Row):
    """One short run of the learning-rate sweep; ``eval_loss`` in nats per token of text set aside for it."""

    table: ClassVar[str] = "e03_sweep"
    key: ClassVar[tuple[str, ...]] = ("model", "variant", "learning_rate")
    model: str
    criterion: str
    variant: str
    learning_rate: float
    step: int
    eval_loss: float
    chosen: bool
