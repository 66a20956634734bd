"""Figures 3 and 6: latency of one MLP block against sparsity: dense, ours, the paper's kernels, and two bounds.

Purpose: what skipping neurons saves in the kernel itself, over three baselines: torch's dense MLP, the same compiled by
inductor with all of its tuning (several times if asked to, since tuning goes by timings of its own: the fastest counts,
the notes name all), and our own kernel at sparsity 0. Random weights of the true shapes, scaled by
1/sqrt(fan_in); the threshold is the exact quantile of this input's activations. Every implementation is checked against
a float64 reference and then timed in the same interleaved rounds with cold caches; the times of all rounds are kept.
Two bounds: the paper's "Optimal" (a dense MLP whose three matrices are all shrunk; no CATS kernel can reach it), and
the bytes that must be read, (1 + 2 (1 - s)) / 3 of dense, at the best rate that anything read at in the same rounds
(`experiments.framework.bandwidth`). At 50 % a vector of thresholds and the up projection as decider are timed too.
Cost: about five minutes for the pocket profile on two cores; on one H200 about 20 minutes for the paper profile, most
of it compilation.

    nox -s experiment -- e05
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Annotated, Any

import torch
from cats_kernels import path_of
from cats_kernels.problem import Problem
from torch import Tensor

from experiments.e05_mlp_latency.cases import CHECKED, COMPILED, OURS, Case, Cases, gate_read
from experiments.framework.bandwidth import BUFFER_BYTES, Read, best_rate, plain_reads
from experiments.framework.config import Config
from experiments.framework.cost import BYTES, Cost
from experiments.framework.options import Count, MayBeEmpty, OneOf, Sparsity, Whole
from experiments.framework.provenance import machine_name
from experiments.framework.tables import LatencyRow, LatencySample, Row, pack_numbers
from experiments.framework.timing import Timing, flush_bytes, measure
from experiments.gpu.precompile import Task, precompile

SHAPES = {
    "Mistral-7B": (4096, 14336),
    "Llama2-7B": (4096, 11008),
    "Llama2-13B": (5120, 13824),
    "small": (512, 1408),
}
COMPILE_SECONDS, COMPILE_SECONDS_OF_A_ROW = {"cpu": 30.0, "cuda": 22.0}, 5.0
"""To compile the dense baseline, which is most of it; on a GPU for several rows and for one."""
KERNEL_SECONDS, UNIT_SECONDS = 25.0, 5.0
"""On a GPU: to compile all our kernels in parallel, and the rest of a unit."""
COPIES = {"cpu": 1, "cuda": 3}  # of the weights, taken in turn; on a GPU one copy would leave a third of itself in L2

DtypeName = Annotated[str, OneOf(("float32", "float16", "bfloat16"))]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of e05.

    Attributes:
        shapes: names in `SHAPES`.
        rows: rows of x at once.
        warmups, rounds: of the timing.
        compilations: of the dense MLP, each tuned anew; the fastest is the baseline.
        sparsities: dtype to targets of our kernel and of "Optimal".
        ablations: dtype to targets of the paper's kernels.
    """

    shapes: tuple[Annotated[str, OneOf(tuple(SHAPES))], ...]
    rows: tuple[Count, ...] = (1,)
    warmups: Whole = 20
    rounds: Count = 80
    compilations: Count = 1
    sparsities: dict[DtypeName, tuple[Sparsity, ...]]
    ablations: Annotated[dict[DtypeName, tuple[Sparsity, ...]], MayBeEmpty()] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if more := sorted(set(self.ablations) - set(self.sparsities)):
            raise ValueError(f"ablations has {', '.join(more)}, which sparsities lacks: give the dtype in both")

    def units(self) -> list[tuple[str, str, int]]:
        """(shape, dtype, rows) of every comparison."""
        return [(s, t, r) for t in self.sparsities for s in self.shapes for r in self.rows]


def variants(device: str) -> dict[str, Callable[..., Tensor]]:
    """The sparse implementations of a device by name: "cats" and the ablations."""
    if torch.device(device).type == "cuda":
        from cats_kernels.ablation.triton import VARIANTS

        return dict(VARIANTS)
    from cats_kernels.ablation.cpu import VARIANTS

    return dict(VARIANTS)


def run(config: Config[Options]) -> Iterable[Row]:
    """Rows of every shape, dtype and number of rows.

    Raises:
        ValueError: an implementation that disagrees with the reference.
    """
    units = config.options.units()
    compile_once = cache(partial(compile_kernels, units))

    def compute(shape: str, dtype: str, rows: int) -> list[Row]:
        if torch.device(config.device).type == "cuda":
            compile_once()
        return time_shape(config, shape, dtype, rows)

    for shape, dtype, rows in config.progress(units, "MLP latency", total=len(units)):
        key = f"{shape}/{dtype}/{rows}"
        yield from config.unit(key, partial(compute, shape, dtype, rows), (LatencyRow, LatencySample))


def cost(config: Config[Options]) -> Cost:
    """Time does not depend on the models: on a GPU it is that of compilation; on a CPU weights and the flushed buffer
    are read, beside half a minute to compile the dense baseline."""
    options, on_gpu = config.options, config.device.startswith("cuda")
    read = memory = 0.0
    for shape, dtype, _ in options.units():
        d, m = SHAPES[shape]
        weights, targets = 3.0 * d * m * BYTES[dtype], options.sparsities[dtype]
        # W_down twice, and a part of it for each "Optimal"
        copy = weights * (4 + sum(1 - target for target in targets)) / 3
        memory = max(memory, copy * COPIES["cuda" if on_gpu else "cpu"])
        calls = 7 + 2 * len(targets) + 3 * len(options.ablations.get(dtype, ()))
        read += calls * (options.warmups + options.rounds) * (0.7 * weights + flush_bytes())
    if on_gpu:
        each = [COMPILE_SECONDS["cuda"] if rows > 1 else COMPILE_SECONDS_OF_A_ROW for _, _, rows in options.units()]
        seconds = KERNEL_SECONDS + UNIT_SECONDS * len(each) + options.compilations * sum(each)
        memory += BUFFER_BYTES
        return Cost(fixed_seconds=seconds, fixed_memory=memory, uses_models=False)
    seconds, memory = COMPILE_SECONDS["cpu"] * len(options.units()), memory + flush_bytes()
    return Cost(fixed_bytes=read, fixed_seconds=seconds, fixed_memory=memory, uses_models=False)


def compile_kernels(units: Sequence[tuple[str, str, int]]) -> None:
    """Compile the GPU kernels of all units in parallel; one by one they took 10 s per unit on an H200's host."""
    tasks = []
    for shape, dtype, rows in units:
        problem = (*SHAPES[shape], getattr(torch, dtype), rows)
        tasks += [Task(name, *problem) for name in variants("cuda")]
        tasks += [Task(OURS, *problem, vector=True), Task(OURS, *problem, decider="up")]
    precompile(tasks)  # what does not compile says so again where it is timed


def time_shape(config: Config[Options], shape: str, dtype: str, rows: int) -> list[Row]:
    """Check, then time, everything at one shape, dtype and number of rows."""
    kind = torch.device(config.device).type
    with torch.inference_mode():
        seeds = range(config.seed, config.seed + COPIES[kind])
        problems = [Problem(*SHAPES[shape], rows, getattr(torch, dtype), config.device, seed) for seed in seeds]
        cases = cases_of(config, problems, dtype)
        reads = plain_reads([(problem.gate, problem.up, problem.down) for problem in problems])
        if kind == "cpu":
            reads["read of one matrix, our kernel"] = Read([gate_read(problems[0])], problems[0].gate.nbytes)
        works = {str(i): (case.calls, case.bytes_moved) for i, case in enumerate(cases) if not case.error}
        works |= {name: (read.calls, read.bytes_moved) for name, read in reads.items()}
        calls: dict[str, Any] = {name: work if kind == "cuda" else work[0] for name, (work, _) in works.items()}
        timings = measure(calls, config.options.warmups, config.options.rounds, device=config.device)
    fastest, bandwidth = best_rate(timings, {name: moved for name, (_, moved) in works.items()})
    implementation = cases[int(fastest)].implementation if fastest.isdigit() else fastest
    config.notes.setdefault("bandwidth", {})[f"{shape}/{dtype}/{rows}"] = f"{bandwidth:.1f} GB/s, {implementation}"
    threads = torch.get_num_threads() if kind == "cpu" else None
    common = {"machine": machine_name(config.device), "shape": shape, "dtype": dtype, "rows": rows, "threads": threads}
    compiled = fastest_last(
        [(case, timings.get(str(i))) for i, case in enumerate(cases) if case.implementation == COMPILED]
    )
    if len(compiled) > 1:
        times = [f"{timing.geomean_ms:.4f}" if timing else case.error for case, timing in reversed(compiled)]
        config.notes.setdefault("compiled dense, ms", {})[f"{shape}/{dtype}/{rows}"] = times
    slower = [case for case, _ in compiled[:-1]]
    timed = [(case, timings.get(str(i))) for i, case in enumerate(cases) if not any(case is other for other in slower)]
    return [row for case, timing in timed for row in latency_rows(common, case, timing, bandwidth)]


def fastest_last(timed: Sequence[tuple[Case, Timing | None]]) -> list[tuple[Case, Timing | None]]:
    """Cases with their timings, slowest first; before all those that were not timed."""
    return sorted(timed, key=lambda pair: -pair[1].geomean_ms if pair[1] else -math.inf)


def cases_of(config: Config[Options], problems: Sequence[Problem], dtype: str) -> list[Case]:
    """All cases of one unit, in the order in which the table shows them."""
    options, made = config.options, Cases(problems, config.device)
    targets, ablations = options.sparsities[dtype], options.ablations.get(dtype, ())
    cases = made.dense(targets, options.compilations)
    for name, implementation in variants(config.device).items():
        if name == OURS:
            cases += own_cases(made, implementation, targets, rows=problems[0].x.shape[0], device=config.device)
        elif (torch.device(config.device).type, dtype, name) == ("cpu", "bfloat16", "gather"):
            reason = "torch rounds v to bfloat16 before the mask: over the tolerance; its product takes 1 s"
            labels: dict[str, Any] = {"decider": "gate", "threshold": "number", "error": reason}
            cases += [Case(name, "sparse kernel", target, **labels) for target in ablations]
        else:
            cases += made.sparse(name, implementation, ablations)
    largest = config.notes.setdefault("largest_error", {})
    for label, error in made.largest_error.items():
        largest[label] = max(error, largest.get(label, 0.0))
    return cases


def own_cases(
    made: Cases, implementation: Callable[..., Tensor], targets: Sequence[float], rows: int, device: str
) -> list[Case]:
    """Our kernel at each target, and at 0, where what it gains over dense is not sparsity's; its checks at 50 %."""
    path = path_of(rows, made.dtype, device)
    cases = made.sparse(OURS, implementation, sorted({0.0, *targets}), path)
    cases += made.sparse(OURS, implementation, [CHECKED], path, vector=True, check=True)
    path = path_of(rows, made.dtype, device, decider="up")
    return cases + made.sparse(OURS, implementation, [CHECKED], path, decider="up", check=True)


def latency_rows(common: dict[str, Any], case: Case, timing: Timing | None, bandwidth: float) -> list[Row]:
    """The row of one case and, if it was timed, its sample."""
    names: dict[str, Any] = {key: getattr(case, key) for key in ("implementation", "decider", "threshold")}
    d, m = SHAPES[common["shape"]]
    measured: dict[str, Any] = dict.fromkeys(
        ("geomean_ms", "p20_ms", "p50_ms", "p80_ms", "rounds", "bytes_moved", "gb_per_s", "bandwidth_gb_per_s",
         "bound_ms", "fraction_of_bound")
    )  # fmt: skip
    rows: list[Row] = []
    if timing is not None:
        bound = case.bytes_moved / bandwidth / 1e6
        measured = {
            **{name: getattr(timing, name) for name in ("geomean_ms", "p20_ms", "p50_ms", "p80_ms", "rounds")},
            "bytes_moved": case.bytes_moved,
            "gb_per_s": case.bytes_moved / timing.geomean_ms / 1e6,
            "bandwidth_gb_per_s": bandwidth,
            "bound_ms": bound,
            "fraction_of_bound": bound / timing.geomean_ms,
        }
        milliseconds = pack_numbers(timing.times_ms)
        rows.append(LatencySample(**common, **names, sparsity_target=case.target, milliseconds=milliseconds))
    row = LatencyRow(
        **common,
        **names,
        d=d,
        m=m,
        condition="check" if case.check else "figure" if common["rows"] == 1 else "growth",
        path=case.path,
        sparsity_target=case.target,
        sparsity=case.sparsity,
        active_neurons=case.active,
        **measured,
        error=case.error,
    )
    return [row, *rows]
