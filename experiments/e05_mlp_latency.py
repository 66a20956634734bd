"""Figures 3 and 6: latency of one MLP block against sparsity: dense, ours, the paper's kernels, and two bounds.

Random weights of the true shapes, scaled by 1/sqrt(fan_in); the threshold is the exact quantile of this input's
activations. Every implementation is checked against a float64 reference and then timed in the same interleaved rounds
with cold caches. Two bounds: the paper's "Optimal" (a dense MLP whose three matrices are all shrunk; no CATS kernel can
reach it), and the bytes that must be read, (1 + 2 (1 - s)) / 3 of dense, at this machine's own read bandwidth.
Cost: about four minutes for the pocket profile on two cores.

    nox -s experiment -- e05
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar

import cats_kernels
import torch
from cats_kernels.problem import TOLERANCE, Problem
from torch import Tensor

from experiments.config import Config
from experiments.precompile import Task, precompile
from experiments.results import Row, machine_name
from experiments.timing import Timing, measure, read_bandwidth

SHAPES = {
    "Mistral-7B": (4096, 14336),
    "Llama2-7B": (4096, 11008),
    "Llama2-13B": (5120, 13824),
    "small": (512, 1408),
}
COPIES = {"cpu": 1, "cuda": 3}  # of the weights, taken in turn; on a GPU one copy would leave a third of itself in L2
OPTIMAL = "optimal-all-three-shrunk"


@dataclass(frozen=True)
class LatencyRow(Row):
    """Latency of one implementation; times in ms, bandwidths in GB/s (1e9). ``error`` says why it was not timed."""

    table: ClassVar[str] = "e05_mlp_latency"
    machine: str
    shape: str
    d: int
    m: int
    dtype: str
    rows: int
    threads: int | None
    sparsity_target: float | None
    sparsity: float | None
    implementation: str
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


def variants(device: str) -> dict[str, Callable[..., Tensor]]:
    """The sparse implementations of a device by name: "cats" and the ablations."""
    if torch.device(device).type == "cuda":
        from cats_kernels.ablation.triton import VARIANTS

        return dict(VARIANTS)
    from cats_kernels.ablation.cpu import VARIANTS

    return dict(VARIANTS)


def run(config: Config) -> Iterable[Row]:
    """Rows of every shape, dtype and number of rows.

    Options: shapes (names), rows (list), warmups, rounds; sparsities and ablations, each a table dtype -> list of
    targets (ours and "Optimal", and the ablations).

    Raises:
        ValueError: an unknown shape or dtype, or an implementation that disagrees with the reference.
    """
    options = config.options
    unknown = sorted(set(options["shapes"]) - set(SHAPES))
    if unknown:
        raise ValueError(f"e05 does not know the shapes {unknown}; allowed: {', '.join(SHAPES)}")
    for dtype in options["sparsities"]:
        if getattr(torch, dtype, None) not in TOLERANCE:
            raise ValueError(f"e05 cannot time {dtype!r}; allowed: float32, float16, bfloat16")
    units = [(s, t, r) for t in options["sparsities"] for s in options["shapes"] for r in options["rows"]]
    compile_once = cache(partial(compile_kernels, units))

    def compute(shape: str, dtype: str, rows: int) -> list[Row]:
        if torch.device(config.device).type == "cuda":
            compile_once()
        return time_shape(config, shape, dtype, rows)

    for shape, dtype, rows in config.progress(units, "MLP latency", total=len(units)):
        yield from config.unit(f"{shape}/{dtype}/{rows}", partial(compute, shape, dtype, rows), (LatencyRow,))


def compile_kernels(units: Sequence[tuple[str, str, int]]) -> None:
    """Compile the GPU kernels of all units in parallel; one by one they took 10 s a unit on an H200's host."""
    tasks = [
        Task(name, *SHAPES[shape], getattr(torch, dtype), rows)
        for shape, dtype, rows in units
        for name in variants("cuda")
    ]
    precompile(tasks)  # what does not compile says so again where it is timed


@dataclass
class Case:
    """One thing to time: its calls (one a copy of the weights), or why there are none."""

    implementation: str
    target: float | None
    sparsity: float | None
    bytes_moved: int
    calls: list[Callable[[], object]]
    error: str = ""


def time_shape(config: Config, shape: str, dtype_name: str, rows: int) -> list[Row]:
    """Check, then time, everything at one shape, dtype and number of rows."""
    d, m = SHAPES[shape]
    dtype = getattr(torch, dtype_name)
    kind = torch.device(config.device).type
    options = config.options
    with torch.inference_mode():
        problems = [Problem(d, m, rows, dtype, config.device, config.seed + i) for i in range(COPIES[kind])]
        cases = dense_cases(problems, options["sparsities"][dtype_name])
        for name, implementation in variants(config.device).items():
            targets = options["sparsities" if name == "cats" else "ablations"][dtype_name]
            if (kind, dtype, name) == ("cpu", torch.bfloat16, "gather"):
                reason = "torch rounds v to bfloat16 before the mask: over the tolerance; its product takes 1 s"
                cases += [Case(name, target, None, 0, [], reason) for target in targets]
            else:
                cases += sparse_cases(config, name, implementation, problems, targets)
        calls: dict[str, Any] = {
            str(i): case.calls if kind == "cuda" else case.calls[0] for i, case in enumerate(cases) if not case.error
        }
        reads = {} if kind == "cuda" else cpu_reads(problems[0])
        timings = measure({**calls, **reads}, options["warmups"], options["rounds"], device=config.device)
        bandwidth = read_bandwidth() if kind == "cuda" else cpu_bandwidth(problems[0], timings, reads)
    threads = torch.get_num_threads() if kind == "cpu" else None
    common = (machine_name(config.device), shape, d, m, dtype_name, rows, threads)
    return [_row(common, case, timings.get(str(i)), bandwidth) for i, case in enumerate(cases)]


def dense_cases(problems: list[Problem], targets: list[float]) -> list[Case]:
    """The dense MLP, and the paper's "Optimal" at each target."""
    gate = problems[0].gate
    m, neuron = gate.shape[0], 3 * gate.shape[1] * gate.element_size()
    cases = [Case("dense", 0.0, 0.0, m * neuron, [p.dense() for p in problems])]
    for target in targets:
        # a multiple of 128: with 11469 neurons, 80 % of Mistral-7B's, the bfloat16 MLP ran at 0.79x dense on an H200
        width = min(m, max(128, 128 * round(m * (1 - target) / 128)))
        cases.append(Case(OPTIMAL, target, 1 - width / m, width * neuron, [p.dense(width) for p in problems]))
    return cases


def sparse_cases(
    config: Config, name: str, implementation: Callable[..., Tensor], problems: list[Problem], targets: list[float]
) -> list[Case]:
    """One implementation at each target, after a check against the float64 reference."""
    thresholds = [[problem.threshold(target) for problem in problems] for target in targets]
    first = problems[0]
    try:
        outputs = {ts[0]: implementation(*first.arguments(ts[0])) for ts in thresholds}
    except RuntimeError as error:  # it does not compile or fit here: that is a result, told in the table
        return [Case(name, target, None, 0, [], " ".join(str(error).split())[:200]) for target in targets]
    errors = first.errors(outputs, rounds_before_comparing(name, first))
    worst, tolerance = max(errors.values()), TOLERANCE[first.gate.dtype]
    if not worst <= tolerance:
        raise ValueError(f"{name} is wrong by {worst:.1e} against the float64 reference; allowed: {tolerance:.0e}")
    largest = config.notes.setdefault("largest_error", {})
    dtype = str(first.gate.dtype).removeprefix("torch.")
    largest[f"{name}, {dtype}"] = max(worst, largest.get(f"{name}, {dtype}", 0.0))
    row = first.gate.shape[1] * first.gate.element_size()
    cases = []
    for target, ts in zip(targets, thresholds, strict=True):
        moved = row * (first.gate.shape[0] + 2 * first.active(ts[0]))
        calls: list[Callable[[], object]] = [
            partial(implementation, *problem.arguments(t)) for problem, t in zip(problems, ts, strict=True)
        ]
        cases.append(Case(name, target, first.sparsity(ts[0]), moved, calls))
    return cases


def rounds_before_comparing(name: str, problem: Problem) -> bool:
    """Whether "cats" takes so many rows through the dense masked path of a GPU, which rounds v before it compares."""
    if name != "cats" or problem.x.device.type != "cuda" or problem.x.dtype == torch.float32:
        return False
    return cats_kernels.path_of(problem.x.shape[0], problem.x.dtype, "cuda", "triton") == "dense masked"


def cpu_reads(problem: Problem) -> dict[str, Callable[[], object]]:
    """Plain reads of W_gate: torch's sum, and our kernel with nothing kept, which was up to 30 % faster."""
    from cats_kernels.cpu.launch import sparse_gated_mlp_cpu

    words = problem.gate.view(torch.float32)
    return {"sum": words.sum, "gate": partial(sparse_gated_mlp_cpu, *problem.arguments(math.inf))}


def cpu_bandwidth(problem: Problem, timings: dict[str, Timing], reads: Iterable[str]) -> float:
    """Read bandwidth in GB/s: the best of the plain reads, timed in the same rounds as everything else."""
    return problem.gate.nbytes / 1e6 / min(timings[name].p50_ms for name in reads)


def _row(common: tuple[Any, ...], case: Case, timing: Timing | None, bandwidth: float) -> LatencyRow:
    values: tuple[Any, ...] = (None,) * 10
    if timing is not None:
        bound, speed = case.bytes_moved / bandwidth / 1e6, case.bytes_moved / timing.geomean_ms / 1e6
        times = (timing.geomean_ms, timing.p20_ms, timing.p50_ms, timing.p80_ms, timing.rounds)
        values = (*times, case.bytes_moved, speed, bandwidth, bound, bound / timing.geomean_ms)
    return LatencyRow(*(*common, case.target, case.sparsity, case.implementation, *values, case.error))
