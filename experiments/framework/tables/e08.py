"""Tables of e08: every criterion."""

from dataclasses import dataclass
from typing import ClassVar

from experiments.framework.tables.row import Row


@dataclass(frozen=True)
class CriterionRow(Row):
    """One criterion at one level on one task or on held-out text.

    ``metric``: ``acc``; ``exact_match`` of generated answers in the form that the prompt's examples show, and
    ``exact_match_flexible`` of the last number in them; ``perplexity``; and ``continuation_perplexity``, of the second
    half of each block of text after the first.

    ``scope``: ``mlp``, or ``model`` with the attention's linear layers too. ``sparsity_target`` is the k of a
    neuron criterion that reads as many bytes per token: of the MLPs, or of the model where the scope is that. Measured
    the same way on held-out text: the fraction of neurons skipped, or the k of as many bytes where inputs are skipped,
    whose fraction s is ``input_sparsity``. ``on_target``: whether the two are within a point of each other; empty
    without a target. ``mlp_bytes`` and ``model_bytes``: fraction of the weights (of all MLPs; of everything that a
    token reads) that is read, as if the criterion could be decided from what it reads. Differences are from the dense
    model, and from cats at the same target and prompt: paired over items, for perplexity the logarithm of the ratio,
    paired over blocks of text. ``prompt``: ``masked`` where every token is masked alike, also for the dense model,
    which masks none; ``dense`` where the tokens of the prompt run unmasked and those after it masked.
    """

    table: ClassVar[str] = "e08_criteria"
    key: ClassVar[tuple[str, ...]] = ("model", "variant", "scope", "prompt", "task", "metric")
    model: str
    criterion: str
    variant: str
    scope: str
    path: str
    sparsity_target: float | None
    sparsity_measured: float | None
    on_target: bool | None
    input_sparsity: float | None
    mlp_bytes: float
    model_bytes: float
    task: str
    metric: str
    value: float
    stderr: float | None = None
    difference: float | None = None
    difference_stderr: float | None = None
    cats_difference: float | None = None
    cats_difference_stderr: float | None = None
    items: int | None = None
    chance: float | None = None
    prompt: str = "masked"


@dataclass(frozen=True)
class CriterionSample(Row):
    """`ItemSample` of one criterion at one level; ``prompt`` and ``metric`` as in `CriterionRow`."""

    table: ClassVar[str] = "e08_items"
    key: ClassVar[tuple[str, ...]] = ("model", "variant", "scope", "prompt", "task", "metric")
    samples: ClassVar[bool] = True
    model: str
    criterion: str
    variant: str
    scope: str
    task: str
    correct: str
    prompt: str = "masked"
    metric: str = "acc"


@dataclass(frozen=True)
class CriterionTextSample(Row):
    """`TextSample` of one criterion at one level; ``prompt`` and ``metric`` as in `CriterionRow`.

    ``tokens_per_block``: tokens of a block; scored are all but its first, or its second half.
    """

    table: ClassVar[str] = "e08_blocks"
    key: ClassVar[tuple[str, ...]] = ("model", "variant", "scope", "prompt", "metric")
    samples: ClassVar[bool] = True
    model: str
    criterion: str
    variant: str
    scope: str
    tokens_per_block: int
    nats: str
    prompt: str = "masked"
    metric: str = "perplexity"


@dataclass(frozen=True)
class CriterionSpeedRow(Row):
    """How fast one criterion at one level is at batch 1, against the dense model timed in the same rounds.

    ``what``: ``mlp``, all MLPs of the model for one token, weights cold, on inputs from held-out text; ``token``, one
    decode step of the whole model in ``loop``. ``unit``: ``ms`` or ``tokens/s``; ``value`` and ``dense_value`` are in
    it, medians over the rounds. ``speedup``: the dense time over this one's, the median over paired rounds, with the
    bounds of its 95 % interval from order statistics. The thresholds are those that accuracy was measured with;
    ``sparsity`` is the mean over layers of what they skip: on the timed tokens for ``mlp``, on held-out text for
    ``token``. ``backend``: what computed the sparse MLPs, ``cpu`` or ``triton``. ``threads``: of a CPU.
    """

    table: ClassVar[str] = "e08_speed"
    key: ClassVar[tuple[str, ...]] = ("machine", "model", "dtype", "threads", "backend", "what", "loop", "variant")
    machine: str
    model: str
    criterion: str
    variant: str
    path: str
    backend: str
    dtype: str
    threads: int | None
    what: str
    loop: str
    sparsity_target: float
    sparsity: float | None
    unit: str
    value: float
    dense_value: float
    speedup: float
    speedup_low: float | None
    speedup_high: float | None
    rounds: int


@dataclass(frozen=True)
class CriterionSpeedSample(Row):
    """The times of all rounds behind `CriterionSpeedRow`, in ms with ``;`` between them.

    Round i of all variants of one ``what`` and ``loop``, dense (variant ``dense``) included, ran side by side.
    """

    table: ClassVar[str] = "e08_rounds"
    key: ClassVar[tuple[str, ...]] = CriterionSpeedRow.key
    samples: ClassVar[bool] = True
    machine: str
    model: str
    criterion: str
    variant: str
    backend: str
    dtype: str
    threads: int | None
    what: str
    loop: str
    milliseconds: str
