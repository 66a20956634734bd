"""Tables of e05: latency of one MLP."""

from dataclasses import dataclass
from typing import ClassVar

from experiments.framework.tables.row import Row


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
