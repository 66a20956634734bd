"""Every table that experiments write and reports read: one class per table, one field per column, free of torch.

A row is one measurement. An unmeasured value is None and an empty cell; a measurement that came out as NaN is NaN and
the cell ``nan``. `schema` describes all tables as ``results/results.schema.json``, which is generated:

    python -m experiments.framework.tables > results/results.schema.json

Columns that many tables share:

- ``model``: as the profile names it; ``weights``: ``pretrained`` or ``random`` (a control, or a shape without weights);
- ``criterion``: what decides which neurons are skipped (``cats.criteria``), ``dense`` for the unmodified model;
- ``variant``: a criterion at a level, such as ``cats-50``, or at ReLUfication's own sparsity, ``cats-matched``;
- ``condition``: why the row was measured: ``figure`` (a figure or table of the paper), ``growth`` (what happens beyond
  its conditions) or ``check`` (correctness);
- ``path``: what really ran: ``sparse kernel``, ``dense masked`` (all products, then a mask) or ``dense``;
- ``sparsity_target`` and ``sparsity_measured``: fractions of neurons in [0, 1].
"""

import csv
import gzip
import io
import json
import typing
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

SCHEMA_VERSION = 2
"""1: the columns of release 0.1, without criterion, condition, path, active_neurons and samples."""

CONDITIONS = ("figure", "growth", "check")
PATHS = ("sparse kernel", "dense masked", "dense")
WEIGHTS = ("pretrained", "random")


@dataclass(frozen=True)
class Row:
    """Base of every table's row.

    Subclasses name their ``table`` (the CSV's name) and the columns that identify a row (``key``). ``samples`` marks a
    table of raw samples, which is kept compressed in ``results/samples/``.
    """

    table: ClassVar[str]
    key: ClassVar[tuple[str, ...]]
    samples: ClassVar[bool] = False


@dataclass(frozen=True)
class HistogramRow(Row):
    """One bar of Figure 1: how many of a layer's |gate activations| fell into [bin_left, bin_right)."""

    table: ClassVar[str] = "e01_histogram"
    key: ClassVar[tuple[str, ...]] = ("model", "weights", "layer", "bin_left")
    model: str
    weights: str
    layer: str
    layer_index: int
    bin_left: float
    bin_right: float
    count: int


@dataclass(frozen=True)
class ThresholdRow(Row):
    """A layer's threshold at one target, and the sparsity it gives on the calibration text and on held-out text."""

    table: ClassVar[str] = "e01_thresholds"
    key: ClassVar[tuple[str, ...]] = ("model", "weights", "criterion", "layer", "sparsity_target")
    model: str
    weights: str
    criterion: str
    layer: str
    layer_index: int
    sparsity_target: float
    threshold: float
    sparsity_calibration: float
    sparsity_heldout: float


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


@dataclass(frozen=True)
class LatencyRow(Row):
    """Latency of one implementation of the MLP; times in ms, bandwidths in GB/s (1e9 bytes).

    ``implementation``: ``dense`` (torch's three products), ``dense-compiled`` (the same through inductor with tuning),
    ``cats`` (this project's kernel), the paper's kernels, or its "Optimal". ``threshold``: ``number`` or ``vector``,
    for kernels with a threshold. ``active_neurons``: those that some row keeps. ``error`` says why it was not timed.
    """

    table: ClassVar[str] = "e05_mlp_latency"
    key: ClassVar[tuple[str, ...]] = (
        "machine", "shape", "dtype", "rows", "threads", "implementation", "decider", "threshold", "sparsity_target",
    )  # fmt: skip
    machine: str
    shape: str
    d: int
    m: int
    dtype: str
    rows: int
    threads: int | None
    condition: str
    implementation: str
    decider: str
    threshold: str
    path: str
    sparsity_target: float | None
    sparsity: float | None
    active_neurons: int | None
    geomean_ms: float | None
    p20_ms: float | None
    p50_ms: float | None
    p80_ms: float | None
    rounds: int | None
    bytes_moved: int | None
    gb_per_s: float | None
    bandwidth_gb_per_s: float | None
    bound_ms: float | None
    fraction_of_bound: float | None
    error: str


@dataclass(frozen=True)
class LatencySample(Row):
    """The times of all rounds, in ms with ``;`` between them; round i of all rows of a shape ran side by side."""

    table: ClassVar[str] = "e05_rounds"
    key: ClassVar[tuple[str, ...]] = LatencyRow.key
    samples: ClassVar[bool] = True
    machine: str
    shape: str
    dtype: str
    rows: int
    threads: int | None
    implementation: str
    decider: str
    threshold: str
    sparsity_target: float | None
    milliseconds: str


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


@dataclass(frozen=True)
class QuantizationRow(Row):
    """One criterion at one level on MLPs quantised to one format, on one task (metric acc) or on held-out text (metric
    perplexity).

    ``format``: ``none``, or bits and group size, such as ``int4-128`` and ``int8-row``; ``bits`` and ``group_size``
    (empty: a row is a group, or nothing is quantised). Thresholds are calibrated on the quantised model.
    ``mlp_bytes``: bytes of the MLPs' weights, scales included, that a token reads, as a fraction of the unquantised
    dense ones; ``mlp_memory``: those that are stored, likewise. Differences are from the unquantised dense model, and
    from the dense model of the same format: paired over items, for perplexity the logarithm of the ratio, paired over
    blocks of text.
    """

    table: ClassVar[str] = "e09_quantization"
    key: ClassVar[tuple[str, ...]] = ("model", "format", "variant", "task", "metric")
    model: str
    format: str
    bits: int | None
    group_size: int | None
    criterion: str
    variant: str
    path: str
    sparsity_target: float | None
    sparsity_measured: float | None
    mlp_bytes: float
    mlp_memory: float
    task: str
    metric: str
    value: float
    stderr: float | None = None
    difference: float | None = None
    difference_stderr: float | None = None
    format_difference: float | None = None
    format_difference_stderr: float | None = None
    items: int | None = None
    chance: float | None = None


@dataclass(frozen=True)
class QuantizationSample(Row):
    """`ItemSample` of one criterion at one level on one format."""

    table: ClassVar[str] = "e09_items"
    key: ClassVar[tuple[str, ...]] = ("model", "format", "variant", "task")
    samples: ClassVar[bool] = True
    model: str
    format: str
    criterion: str
    variant: str
    task: str
    correct: str


@dataclass(frozen=True)
class QuantizationTextSample(Row):
    """`TextSample` of one criterion at one level on one format."""

    table: ClassVar[str] = "e09_blocks"
    key: ClassVar[tuple[str, ...]] = ("model", "format", "variant")
    samples: ClassVar[bool] = True
    model: str
    format: str
    criterion: str
    variant: str
    tokens_per_block: int
    nats: str


@dataclass(frozen=True)
class QuantizationSpeedRow(Row):
    """Time of one implementation on weights of one format; times in ms, bandwidths in GB/s (1e9 bytes).

    ``what``: ``mlp``, one MLP block of random weights, or ``token``, one decoded token of a whole model. ``format`` as
    in `QuantizationRow`; ``dtype`` is that of the activations. ``implementation``: ``cats`` (this project's kernels),
    ``torch`` (torch's own kernels for the format; its dense products where the format is ``none``) or ``compiled``
    (inductor, tuned). ``bytes_moved`` and ``bytes_stored``: of weights and scales, read by one call and held in memory.
    ``error`` says why it was not timed.
    """

    table: ClassVar[str] = "e09_speed"
    key: ClassVar[tuple[str, ...]] = (
        "machine", "what", "shape", "dtype", "threads", "format", "implementation", "sparsity_target",
    )  # fmt: skip
    machine: str
    what: str
    shape: str
    d: int
    m: int
    dtype: str
    threads: int | None
    format: str
    bits: int | None
    group_size: int | None
    implementation: str
    path: str
    sparsity_target: float
    sparsity: float | None
    active_neurons: int | None
    p20_ms: float | None
    p50_ms: float | None
    p80_ms: float | None
    rounds: int | None
    bytes_moved: int | None
    bytes_stored: int | None
    bandwidth_gb_per_s: float | None
    bound_ms: float | None
    fraction_of_bound: float | None
    error: str


@dataclass(frozen=True)
class QuantizationSpeedSample(Row):
    """The times of all rounds, in ms with ``;`` between them; round i of all rows of a shape ran side by side."""

    table: ClassVar[str] = "e09_rounds"
    key: ClassVar[tuple[str, ...]] = QuantizationSpeedRow.key
    samples: ClassVar[bool] = True
    machine: str
    what: str
    shape: str
    dtype: str
    threads: int | None
    format: str
    implementation: str
    sparsity_target: float
    milliseconds: str


@dataclass(frozen=True)
class QuantizationThroughputRow(Row):
    """One prompt generated to one length by a model whose MLPs are in one format; otherwise as `ThroughputRow`.

    ``format`` as in `QuantizationRow`; ``dtype`` is that of the activations and of all other weights. ``weight_bytes``:
    all weights of the model as it is stored, scales included.
    """

    table: ClassVar[str] = "e09_generation"
    key: ClassVar[tuple[str, ...]] = (
        "machine", "model", "weights", "layers", "dtype", "threads", "attention", "format", "variant", "loop", "prompt",
        "repeat", "prompt_tokens", "generated_tokens",
    )  # fmt: skip
    machine: str
    model: str
    weights: str
    layers: int
    model_layers: int
    dtype: str
    threads: int | None
    attention: str
    format: str
    bits: int | None
    group_size: int | None
    criterion: str
    variant: str
    path: str
    sparsity_target: float | None
    sparsity_measured: float | None
    loop: str
    prompt: int
    repeat: int
    prompt_tokens: int
    generated_tokens: int
    prefill_s: float
    decode_s: float
    tokens_per_second: float
    compile_s: float
    peak_memory_bytes: int | None
    weight_bytes: int


def row_types() -> dict[str, type[Row]]:
    """Table name -> row class, for every class that has been defined, a third party's included."""
    types: dict[str, type[Row]] = {}
    pending = list(Row.__subclasses__())
    while pending:
        row_type = pending.pop(0)
        pending += row_type.__subclasses__()
        if "table" in vars(row_type):
            types[row_type.table] = row_type
    return types


def columns(row_type: type[Row]) -> dict[str, tuple[type, bool]]:
    """Column name -> (str, int, float or bool; whether it may be empty), in the CSV's order."""
    hints = typing.get_type_hints(row_type)
    described = {}
    for column in fields(row_type):
        alternatives = typing.get_args(hints[column.name]) or (hints[column.name],)
        (kind,) = (one for one in alternatives if one is not type(None))
        described[column.name] = kind, type(None) in alternatives
    return described


def schema() -> dict[str, Any]:
    """All tables of this file as JSON: version; per table what a row is, its key, and its columns with their types."""
    own = {name: row_type for name, row_type in sorted(row_types().items()) if row_type.__module__ == Row.__module__}
    return {
        "version": SCHEMA_VERSION,
        "tables": {
            name: {
                "row": " ".join((row_type.__doc__ or "").split()),
                "file": f"results/{file_name(row_type)}",
                "key": list(row_type.key),
                "columns": {
                    column: {"type": kind.__name__, "nullable": nullable}
                    for column, (kind, nullable) in columns(row_type).items()
                },
            }
            for name, row_type in own.items()
        },
    }


def file_name(row_type: type[Row]) -> str:
    """Where a table lies, relative to the directory ``results``."""
    return f"samples/{row_type.table}.csv.gz" if row_type.samples else f"{row_type.table}.csv"


def to_csv(rows: Sequence[Row]) -> bytes:
    """Rows of one table as the content of its file; a table of samples is compressed, the same bytes every time."""
    row_type = type(rows[0])
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns(row_type)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in asdict(row).items()} for row in rows)
    content = text.getvalue().encode()
    return gzip.compress(content, mtime=0) if row_type.samples else content


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.7g}" if isinstance(value, float) else value


def pack_flags(correct: Iterable[float]) -> str:
    """Whether items were answered correctly, as `ItemSample.correct`."""
    return "".join("1" if flag else "0" for flag in correct)


def pack_numbers(values: Iterable[float]) -> str:
    """Measurements in one cell, six significant digits, ``;`` between them."""
    return ";".join(f"{value:.6g}" for value in values)


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1))
