"""Tables of e04: task fine-tuning."""

from dataclasses import dataclass
from typing import ClassVar

from experiments.framework.tables.row import Row


@dataclass(frozen=True)
class TaskFinetuningRow(Row):
    """Accuracy of one variant fine-tuned on one task (Table 2), and its sparsity on the test prompts (Table 3)."""

    table: ClassVar[str] = "e04_task_finetuning"
    key: ClassVar[tuple[str, ...]] = ("model", "task", "variant", "seed")
    model: str
    criterion: str
    variant: str
    task: str
    seed: int
    accuracy: float
    stderr: float
    items: int
    sparsity_target: float | None
    sparsity_measured: float
    chance: float


@dataclass(frozen=True)
class TaskFinetuningSample(Row):
    """`ItemSample` of one model fine-tuned on one task."""

    table: ClassVar[str] = "e04_items"
    key: ClassVar[tuple[str, ...]] = ("model", "task", "variant", "seed")
    samples: ClassVar[bool] = True
    model: str
    criterion: str
    variant: str
    task: str
    seed: int
    correct: str


@dataclass(frozen=True)
class TaskSweepRow(Row):
    """One short run of the learning-rate sweep; ``eval_loss`` in nats per token of the answer, on items set aside."""

    table: ClassVar[str] = "e04_sweep"
    key: ClassVar[tuple[str, ...]] = ("model", "task", "variant", "learning_rate")
    model: str
    criterion: str
    variant: str
    task: str
    learning_rate: float
    step: int
    eval_loss: float
    chosen: bool
