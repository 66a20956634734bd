"""Tables of e09: quantised weights."""

from dataclasses import dataclass
from typing import ClassVar

from experiments.framework.tables.row import Row


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
    ``fraction_of_bound``: ``bound_ms`` over the geometric mean of the rounds; over their median in files before
    2026-11-27, which is why the report computes it from the rounds.
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

    ``format`` as in `QuantizationRow`, with ``-all`` at its end where attention projections and the output matrix are
    quantised too (in int8 with one scale per row); ``dtype`` is that of the activations and of all other weights.
    ``weight_bytes``: all weights of the model as it is stored, scales included.
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
