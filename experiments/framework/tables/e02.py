"""Tables of e02: zero-shot accuracy and perplexity."""

from dataclasses import dataclass
from typing import ClassVar

from experiments.framework.tables.row import Row


@dataclass(frozen=True)
class ZeroShotRow(Row):
    """One variant on one task (metric acc), or on the held-out text (metric perplexity).

    ``difference`` is from the dense model: paired over items for accuracy; for perplexity the logarithm of the ratio,
    paired over blocks of text. ``chance`` is the accuracy of guessing.
    """

    table: ClassVar[str] = "e02_zero_shot"
    key: ClassVar[tuple[str, ...]] = ("model", "variant", "task", "metric")
    model: str
    criterion: str
    variant: str
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


@dataclass(frozen=True)
class ItemSample(Row):
    """Whether each item of a task was answered correctly: a string of 0 and 1, in the order of the task's documents."""

    table: ClassVar[str] = "e02_items"
    key: ClassVar[tuple[str, ...]] = ("model", "variant", "task")
    samples: ClassVar[bool] = True
    model: str
    criterion: str
    variant: str
    task: str
    correct: str


@dataclass(frozen=True)
class TextSample(Row):
    """Mean negative log-likelihood of each block of held-out text, in nats per token; ``;`` between blocks."""

    table: ClassVar[str] = "e02_blocks"
    key: ClassVar[tuple[str, ...]] = ("model", "variant")
    samples: ClassVar[bool] = True
    model: str
    criterion: str
    variant: str
    tokens_per_block: int
    nats: str
