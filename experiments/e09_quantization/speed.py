"""e09: one MLP block on weights of every format, this project's kernels beside torch's, in the same rounds."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from cats_kernels import path_of, sparse_gated_mlp
from cats_kernels.problem import TOLERANCE, Problem, relative_error
from cats_kernels.quantized_problem import QuantizedProblem

from experiments.e05_mlp_latency import COPIES, SHAPES
from experiments.e05_mlp_latency.cases import sentence
from experiments.e05_mlp_latency.compiled import compiled_dense_mlp
from experiments.e09_quantization.dense import DenseWeights, compiled_int8_mlp, int8_call, torch_kernels_mlp
from experiments.e09_quantization.formats import PLAIN, Format, format_of
from experiments.framework.bandwidth import best_rate, plain_reads
from experiments.framework.config import Config
from experiments.framework.provenance import machine_name
from experiments.framework.tables import QuantizationSpeedRow, QuantizationSpeedSample, Row, pack_numbers
from experiments.framework.timing import Timing, measure

ROWS = (QuantizationSpeedRow, QuantizationSpeedSample)
OURS, TORCH, COMPILED = "cats", "torch", "compiled"
DENSE_TOLERANCE = 0.02
"""Of torch's kernels, which round every product to the activations' dtype."""
MORE_COPIES = {None: 1, 8: 2, 4: 3}
"""Of quantised weights on a GPU, by bits: as many bytes as those of unquantised ones, beyond the cache."""


@dataclass
class Timed:
    """One thing to time, or why it is not."""

    format: Format
    implementation: str
    path: str = "dense"
    target: float = 0.0
    sparsity: float | None = None
    active: int | None = None
    bytes_moved: int = 0
    bytes_stored: int = 0
    calls: Sequence[Callable[[], object]] = field(default_factory=list)
    error: str = ""


def time_shape(config: Config[Any], shape: str, dtype: str) -> list[Row]:
    """Check, then time, everything at one shape and dtype.

    Raises:
        ValueError: an implementation of ours that disagrees with the reference.
    """
    on_gpu, options = torch.device(config.device).type == "cuda", config.options
    with torch.inference_mode():
        copies = COPIES["cuda" if on_gpu else "cpu"]
        seeds = range(config.seed, config.seed + copies)
        plain = [Problem(*SHAPES[shape], 1, getattr(torch, dtype), config.device, seed) for seed in seeds]
        made = [
            *plain_dense(plain, config.device, options.compiled),
            *own_plain(plain, options.sparsities, config.device),
        ]
        for form in map(format_of, options.formats):
            if form.linears == "all":
                continue
            made += torch_dense(plain, form, config.device, options.compiled)
            made += own_quantized(config, shape, dtype, form)
        reads = plain_reads([(problem.gate, problem.up, problem.down) for problem in plain])
        works = {str(i): (timed.calls, timed.bytes_moved) for i, timed in enumerate(made) if not timed.error}
        works |= {name: (read.calls, read.bytes_moved) for name, read in reads.items()}
        calls: dict[str, Any] = {name: list(work) if on_gpu else work[0] for name, (work, _) in works.items()}
        timings = measure(calls, options.warmups, options.rounds, device=config.device)
    fastest, bandwidth = best_rate(timings, {name: moved for name, (_, moved) in works.items()})
    name = made[int(fastest)].implementation if fastest.isdigit() else fastest
    config.notes.setdefault("bandwidth", {})[f"{shape}/{dtype}"] = f"{bandwidth:.1f} GB/s, {name}"
    threads = None if on_gpu else torch.get_num_threads()
    d, m = SHAPES[shape]
    place = {"machine": machine_name(config.device), "what": "mlp", "shape": shape, "dtype": dtype, "threads": threads}
    rows = [speed_rows(place, (d, m), timed, timings.get(str(i)), bandwidth) for i, timed in enumerate(made)]
    return [row for group in rows for row in group]


def plain_dense(problems: Sequence[Problem], device: str, compiled: bool) -> Iterator[Timed]:
    """The unquantised dense MLP as torch runs it, and compiled."""
    first, form = problems[0], format_of(PLAIN)
    whole = first.gate.nbytes + first.up.nbytes + first.down_t.nbytes
    yield Timed(form, TORCH, bytes_moved=whole, bytes_stored=whole, calls=[p.dense() for p in problems])
    if not compiled:
        return
    timed = Timed(form, COMPILED, bytes_moved=whole, bytes_stored=whole)
    try:
        mlp = compiled_dense_mlp(device)
        timed.calls = [partial(mlp, p.x, p.gate, p.up, p.down) for p in problems]
        timed.calls[0]()
    except Exception as error:  # inductor fails in many ways: that is a result, stated in the table
        timed = Timed(form, COMPILED, error=sentence(error))
    yield timed


def own_plain(problems: Sequence[Problem], targets: Sequence[float], device: str) -> Iterator[Timed]:
    """Our kernel on unquantised weights at 0 and each target."""
    first = problems[0]
    path, whole = path_of(1, first.x.dtype, device), 3 * first.gate.nbytes
    for target in sorted({0.0, *targets}):
        thresholds = [p.threshold(target) for p in problems]
        arguments = [p.arguments(t) for p, t in zip(problems, thresholds, strict=True)]
        calls = [partial(own_call, *a) for a in arguments]
        yield own_timed(format_of(PLAIN), first, thresholds[0], target, path, whole, calls)


def own_quantized(config: Config[Any], shape: str, dtype: str, form: Format) -> list[Timed]:
    """Our kernel on weights of one format at 0 and each target, its output checked at each."""
    on_gpu, kind = torch.device(config.device).type == "cuda", getattr(torch, dtype)
    copies = COPIES["cuda"] * MORE_COPIES[form.bits] if on_gpu else 1
    assert form.bits is not None
    problems = [
        QuantizedProblem(*SHAPES[shape], 1, form.bits, form.group_size, True, kind, config.device, config.seed + i)
        for i in range(copies)
    ]
    path, stored = path_of(1, kind, config.device), sum(weight.nbytes for weight in problems[0].weights)
    made = []
    for target in sorted({0.0, *config.options.sparsities}):
        thresholds = [p.threshold(target) for p in problems]
        arguments = [p.quantized_arguments(t) for p, t in zip(problems, thresholds, strict=True)]
        calls = [partial(own_call, *a) for a in arguments]
        made.append(own_timed(form, problems[0], thresholds[0], target, path, stored, calls))
    return made


def own_call(x: Any, gate: Any, up: Any, down_t: Any, threshold: Any, activation: str, decider: str) -> Any:
    """The operator, with the arguments in the order of the implementations."""
    return sparse_gated_mlp(x, gate, up, down_t, threshold, activation, decider=decider)


def own_timed(
    form: Format,
    first: Problem,
    threshold: float,
    target: float,
    path: str,
    stored: int,
    calls: Sequence[Callable[[], Any]],
) -> Timed:
    """A case of ours, checked. Raises ValueError if it is wrong."""
    error = first.error(calls[0](), threshold)
    if not error <= TOLERANCE[first.x.dtype]:
        raise ValueError(f"{form.name} at {target:g} is wrong by {error:.1e} against the float64 reference")
    sparsity, active, moved = first.sparsity(threshold), first.active(threshold), first.bytes_read(threshold)
    return Timed(form, OURS, path, target, sparsity, active, moved, stored, calls)


def torch_dense(problems: Sequence[Problem], form: Format, device: str, compiled: bool) -> Iterator[Timed]:
    """Torch's dense MLP on the same bits: its own kernel, and for int8 by rows inductor's."""
    assert form.bits is not None
    copies = MORE_COPIES[form.bits] if torch.device(device).type == "cuda" else 1
    weights = [DenseWeights(p.gate, p.up, p.down, form.bits, form.group_size) for p in [*problems] * copies]
    x, stored = problems[0].x, weights[0].nbytes
    expected = weights[0].expected(x)
    made: dict[str, Callable[[DenseWeights], Callable[[], Any]]] = {TORCH: lambda w: torch_kernels_mlp(w, x)}
    if compiled and form.bits == 8 and form.group_size is None:
        tuned = compiled_int8_mlp()
        made[COMPILED] = lambda w: int8_call(tuned, w, x)
    for name, make in made.items():
        timed = Timed(form, name, bytes_moved=stored, bytes_stored=stored)
        try:
            timed.calls = [make(w) for w in weights]
            error = relative_error(timed.calls[0](), expected)  # type: ignore[arg-type]
            if not error <= DENSE_TOLERANCE:
                raise ValueError(f"wrong by {error:.1e} against the float64 reference")
        except Exception as problem:  # it takes no such format here: a result, stated in the table
            timed = Timed(form, name, error=sentence(problem))
        yield timed


def speed_rows(
    place: dict[str, Any], shape: tuple[int, int], timed: Timed, timing: Timing | None, bandwidth: float
) -> list[Row]:
    """The row of one case and, if it was timed, its sample."""
    d, m = shape
    names: dict[str, Any] = {
        "format": timed.format.name,
        "implementation": timed.implementation,
        "sparsity_target": timed.target,
    }
    measured: dict[str, Any] = dict.fromkeys(
        ("p20_ms", "p50_ms", "p80_ms", "rounds", "bytes_moved", "bytes_stored", "bandwidth_gb_per_s", "bound_ms",
         "fraction_of_bound")
    )  # fmt: skip
    rows: list[Row] = []
    if timing is not None:
        bound = timed.bytes_moved / bandwidth / 1e6
        measured = {
            **{name: getattr(timing, name) for name in ("p20_ms", "p50_ms", "p80_ms", "rounds")},
            "bytes_moved": timed.bytes_moved,
            "bytes_stored": timed.bytes_stored,
            "bandwidth_gb_per_s": bandwidth,
            "bound_ms": bound,
            "fraction_of_bound": bound / timing.geomean_ms,
        }
        rows.append(QuantizationSpeedSample(**place, **names, milliseconds=pack_numbers(timing.times_ms)))
    row = QuantizationSpeedRow(
        **place,
        **{**timed.format.columns, **names},
        d=d,
        m=m,
        path=timed.path,
        sparsity=timed.sparsity,
        active_neurons=timed.active,
        **measured,
        error=timed.error,
    )
    return [row, *rows]
