"""Check, time and tune the GPU kernels at the paper's shapes on the card at hand.

Purpose: choose the configurations in cats_kernels.triton.configs, and measure what they reach, in one command.
Cost: about a minute on one H100 for the search near the present choice, half of it for "early", 8 minutes for the wide
one, compilation included (in parallel processes).
Run: ``python -m experiments.gpu.tune --output DIR [--search wide] [--rows 1 --shapes Mistral-7B --dtypes bf16]``

Weights, thresholds, reference and timing are those of e05: random weights, rotating copies, CUDA graphs, interleaved
rounds.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cats_kernels import MAX_ROWS
from cats_kernels.ablation.triton import VARIANTS, launch, launch_counted
from cats_kernels.problem import TOLERANCE, Problem
from cats_kernels.triton.configs import CONFIGS, Config, choose_config
from cats_kernels.triton.launch import run
from cats_kernels.triton.mlp import dense_masked, make_call, plan
from torch import Tensor

from experiments.e05_mlp_latency import COPIES, SHAPES
from experiments.framework.bandwidth import read_bandwidth
from experiments.framework.timing import Timing, eager_times, measure
from experiments.gpu.precompile import Task, precompile

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}

# (gate_tile, gate_stages, tile, stages, warps, programs, parts) of the fused kernel, by bytes of a weight: what was
# within 5 % of the best in wider searches on an H200, and its neighbours
FUSED = {
    2: (
        *((2, 4, 1, 4, 4, 2, 1), (2, 4, 1, 4, 4, 2, 2), (2, 4, 1, 4, 4, 2, 4), (2, 4, 1, 4, 4, 2, 8)),
        *((2, 3, 1, 4, 4, 2, 1), (2, 6, 1, 4, 4, 2, 1), (4, 3, 1, 4, 4, 2, 1), (4, 4, 1, 4, 4, 2, 1)),
        *((1, 6, 1, 4, 4, 2, 1), (1, 8, 1, 4, 4, 2, 1), (2, 4, 1, 3, 4, 2, 1), (2, 4, 1, 5, 4, 2, 1)),
        *((2, 4, 1, 6, 4, 2, 1), (2, 4, 2, 3, 4, 2, 1), (2, 4, 2, 4, 4, 2, 1), (2, 4, 1, 4, 4, 3, 1)),
        *((2, 3, 1, 3, 4, 3, 1), (1, 6, 1, 4, 4, 3, 1)),
        *((4, 4, 2, 4, 4, 1, 1), (4, 4, 2, 4, 4, 1, 8), (2, 6, 2, 5, 4, 1, 1), (2, 6, 2, 5, 4, 1, 8)),
        *((4, 4, 2, 4, 8, 1, 8), (4, 4, 4, 3, 8, 1, 8), (2, 4, 1, 4, 8, 2, 1), (4, 3, 2, 3, 8, 2, 1)),
    ),
    4: (
        *((1, 6, 2, 3, 8, 1, 1), (1, 6, 2, 3, 8, 1, 4), (1, 6, 2, 3, 8, 1, 8), (1, 6, 2, 3, 8, 1, 16)),
        *((1, 8, 2, 3, 8, 1, 8), (2, 4, 2, 3, 8, 1, 8), (1, 6, 1, 5, 8, 1, 8), (2, 3, 1, 3, 8, 1, 1)),
        *((2, 4, 1, 4, 8, 1, 8), (1, 6, 1, 5, 4, 1, 1), (1, 6, 1, 5, 4, 1, 8), (1, 4, 1, 3, 4, 2, 1)),
        *((1, 4, 1, 3, 4, 2, 8), (1, 5, 1, 4, 4, 2, 1), (2, 3, 1, 3, 16, 1, 1)),
    ),
}
# (gate_tile = tile, warps, bytes of columns, stages, programs), then (bytes of down_block, down_tile), on tensor cores
PROJECTIONS = (
    *((64, 4, 256, 4, 2), (64, 4, 256, 6, 2), (64, 4, 512, 3, 2), (64, 4, 128, 6, 2), (64, 4, 128, 8, 3)),
    *((32, 2, 256, 4, 4), (32, 2, 512, 3, 4), (32, 4, 256, 4, 4), (16, 1, 256, 4, 6), (16, 1, 512, 3, 6)),
    *((128, 8, 128, 4, 1), (128, 8, 256, 3, 1)),
)
DOWNS = ((256, 32), (256, 64), (512, 16), (512, 32), (512, 64), (1024, 16), (1024, 32))


def fused(gate_tile: int, gate_stages: int, tile: int, stages: int, warps: int, programs: int, parts: int) -> Config:
    """A configuration of the fused kernel."""
    return Config(gate_tile, tile, warps, programs, gate_stages, stages, parts)


# the fused kernel for four rows, whose x and sums fill the registers of 8 or 16 warps
FUSED_4 = (
    *((2, 4, 1, 4, 8, 1, 1), (1, 6, 1, 5, 8, 1, 1), (2, 4, 1, 4, 16, 1, 1), (1, 6, 1, 5, 16, 1, 1)),
    *((1, 6, 2, 3, 16, 1, 1), (2, 4, 2, 3, 16, 1, 1)),
)
# changes to the present choice of the fused kernel
CHANGES: tuple[dict[str, Any], ...] = ({"dependent": False}, {"reduce_block": 16}, {"reduce_block": 64})
# (bytes of a weight, rows) -> changes with early; all but those marked leave a multiprocessor of a Hopper no room for
# more than its own programs, by shared memory or by registers
EARLY: dict[tuple[int, int], tuple[dict[str, Any], ...]] = {
    (2, 1): (
        *({}, {"parts": 8}),  # the first: room for half of the next kernel's programs, which then start unevenly
        *({"gate_stages": 6}, {"gate_stages": 7}, {"stages": 6}, {"gate_stages": 6, "stages": 5}),
        *({"gate_stages": 6, "parts": 2}, {"gate_stages": 6, "parts": 8}),
        *({"gate_tile": 4, "gate_stages": 4}, {"gate_tile": 1, "gate_stages": 11}, {"programs": 3}),
        {"warps": 8, "programs": 1, "gate_stages": 8, "stages": 8},
    ),
    (4, 1): ({}, {"parts": 1}, {"gate_stages": 8}, {"gate_tile": 2, "gate_stages": 5}),
    (2, 2): ({}, {"gate_stages": 5}, {"gate_stages": 6}),  # the first: room
    (4, 4): ({}, {"gate_stages": 5}),
}


def configs(rows: int, element_size: int, d: int, search: str) -> list[Config]:
    """The search space for "cats" on a Hopper: around the present choice ("near"), only what starts before the kernel
    before it has ended ("early"), or everything that was ever near the best ("wide")."""
    best = choose_config(element_size, rows, d)
    early = [replace(best, early=True, **changes) for changes in EARLY.get((element_size, rows), ())]
    if search == "early":
        return [best, *early]
    if search == "near":
        fused_best = [best] if not best.dot else [fused(*parameters) for parameters in FUSED_4 if rows <= 4]
        near = [best, *fused_best, *(replace(one, **change) for one in fused_best[:1] for change in CHANGES), *early]
        if rows == 1:
            near += [replace(best, programs=best.programs + 1), replace(best, gate_stages=best.gate_stages + 2)]
        return list(dict.fromkeys(near))
    candidates = [best, replace(best, dependent=False)]
    if rows <= 2:
        candidates += [fused(*parameters) for parameters in FUSED[element_size]]
        candidates += [replace(best, reduce_block=block) for block in (16, 64)]
    if rows >= 2:
        dot = CONFIGS[element_size, MAX_ROWS]
        for tile, warps, size, stages, programs in PROJECTIONS:
            both = replace(dot, gate_tile=tile, tile=tile, warps=warps)
            candidates.append(replace(both, columns=size // element_size, stages=stages, programs=programs))
        candidates += [replace(dot, down_block=size // element_size, down_tile=tile) for size, tile in DOWNS]
    return list(dict.fromkeys(candidates))


def first_launches(arguments: tuple[Any, ...], count: int) -> Tensor:
    """Only the first launches of "cats": differences of their times say what each kernel costs."""
    call = make_call(*arguments)
    run(plan(call)[:count], call.x.device)
    return call.y


@dataclass(frozen=True)
class Result:
    """One timed implementation; times in microseconds."""

    shape: str
    dtype: str
    rows: int
    sparsity: float
    active: float
    implementation: str
    config: str
    p20_us: float
    p50_us: float
    p80_us: float
    bound_us: float
    error: float | None


def bound_us(d: int, m: int, element_size: int, active: float, bandwidth: float) -> float:
    """The time to read W_gate whole and the active rows of the other two, at the card's read bandwidth in GB/s."""
    return d * m * element_size * (1 + 2 * active) / bandwidth / 1e3


def cases(options: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """(shape, dtype, rows) in the order of their importance."""
    for rows in options.rows:
        yield from ((shape, dtype, rows) for shape in options.shapes for dtype in options.dtypes)


def run_case(
    shape: str, dtype: str, rows: int, bandwidth: float, options: argparse.Namespace, deadline: float
) -> Iterator[Result]:
    """Check and time dense, the variants and every configuration of the search, until the deadline."""
    d, m = SHAPES[shape]
    kind = DTYPES[dtype]
    problems = [Problem(d, m, rows, kind, "cuda", seed) for seed in range(COPIES["cuda"])]
    for sparsity in options.sparsities:
        if time.perf_counter() > deadline:
            print(f"NOT RUN for lack of time: {shape} {dtype} rows={rows} s={sparsity}", flush=True)
            continue
        arguments = [problem.arguments(problem.threshold(sparsity)) for problem in problems]
        works: dict[tuple[str, str], list[Callable[[], Tensor]]] = {
            ("dense", ""): [problem.dense() for problem in problems],
            ("dense-masked", ""): [partial(dense_masked, *a) for a in arguments],
            **{(name, ""): [partial(launch, name, *a) for a in arguments] for name in options.variants},
        }
        for config in configs(rows, kind.itemsize, d, options.search) if options.search != "none" else ():
            key = ("config", " ".join(map(str, astuple(config))))
            works[key] = [partial(launch, "cats", *a, config=config) for a in arguments]
        errors: dict[tuple[str, str], float | None] = {}
        for key, work in list(works.items()):
            try:
                errors[key] = check(problems[0], sparsity, work[0], key[0])
            except Exception as error:
                print(f"FAILED {shape} {dtype} rows={rows} s={sparsity} {key}: {type(error).__name__}: {error}"[:300])
                del works[key]
        if ("cats", "") in works:
            for count in range(1, len(plan(make_call(*arguments[0])))):
                works["first launches", str(count)] = [partial(first_launches, a, count) for a in arguments]
        timings = measure(
            {str(key): work for key, work in works.items()},
            warmups=5,
            rounds=options.rounds,
            flush=False,
            device="cuda",
        )
        if options.eager:
            for name, times in run_eager(problems[0], sparsity, options).items():
                key = (f"eager {name}", "")
                works[key], timings[str(key)] = [], Timing.of(times)
        active = sum(p.active(p.threshold(sparsity)) for p in problems) / m / len(problems)
        bound = bound_us(d, m, kind.itemsize, active, bandwidth)
        for key in works:
            timing = timings[str(key)]
            p20, p50, p80 = (1e3 * t for t in (timing.p20_ms, timing.p50_ms, timing.p80_ms))
            yield Result(shape, dtype, rows, sparsity, active, *key, p20, p50, p80, bound, errors.get(key))


def run_eager(problem: Problem, sparsity: float, options: argparse.Namespace) -> dict[str, list[float]]:
    """The authors' protocol: everything launched from Python; their compacting kernel waits for the host."""
    arguments = problem.arguments(problem.threshold(sparsity))
    calls: dict[str, Callable[[], Tensor]] = {"dense": problem.dense()}
    calls |= {name: partial(launch, name, *arguments) for name in options.variants}
    calls["fused-compact, counted by the host"] = partial(launch_counted, *arguments)
    check(problem, sparsity, calls["fused-compact, counted by the host"], "fused-compact")
    return eager_times(calls, warmups=10, rounds=options.rounds)


def check(problem: Problem, sparsity: float, work: Callable[[], Tensor], name: str) -> float | None:
    """Scale-free error against the float64 reference; None for the dense MLP, which is another function.

    Raises:
        ValueError: it is over the tolerance. Not for "dense-masked", which rounds v before it compares, so that neurons
            at the threshold may differ.
    """
    y = work()
    if name == "dense":
        return None
    threshold = problem.threshold(sparsity)
    error = problem.errors({threshold: y})[threshold]
    if name != "dense-masked" and not error <= TOLERANCE[y.dtype]:
        raise ValueError(f"error {error:.2e} over {TOLERANCE[y.dtype]:.0e}")
    return error


def table(results: list[Result]) -> None:
    """Variants against dense, then the best configurations of each search."""
    groups = itertools.groupby(results, lambda r: (r.shape, r.dtype, r.rows, r.sparsity))
    for (shape, dtype, rows, sparsity), group in groups:
        members = list(group)
        dense = next((r.p50_us for r in members if r.implementation == "dense"), float("nan"))
        variants = [r for r in members if r.implementation != "config"]
        cells = " | ".join(
            f"{r.implementation}{' ' * bool(r.config)}{r.config} {r.p50_us:.1f} ({dense / r.p50_us:.2f}x)"
            for r in variants
        )
        ours = next((r for r in members if r.implementation == "cats"), None)
        reached = f"{ours.bound_us / ours.p50_us:.2f} of bound" if ours else "no cats"
        print(f"{shape} {dtype} rows={rows} s={sparsity:.2f} active={members[0].active:.2f} {reached} | {cells}")
        searched = sorted((r for r in members if r.implementation == "config"), key=lambda r: r.p50_us)
        for r in searched[:8]:
            share = r.bound_us / r.p50_us
            print(f"    {r.p50_us:7.1f} ({r.p20_us:.1f} {r.p80_us:.1f}) us {share:.2f} config {r.config}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for tune_gpu.csv")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["Mistral-7B", "Llama2-7B"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.9, 0.3, 0.7])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["cats"])
    parser.add_argument("--search", choices=("near", "early", "wide", "none"), default="near")
    parser.add_argument("--eager", action="store_true", help="also launched from Python, as the paper's authors time")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing more after so long")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    tasks: list[Task] = []
    for shape, dtype, rows in cases(options):
        problem = (*SHAPES[shape], DTYPES[dtype], rows)
        tasks += [Task(name, *problem) for name in options.variants]
        if options.search != "none":
            searched = configs(rows, DTYPES[dtype].itemsize, problem[0], options.search)
            tasks += [Task("cats", *problem, config) for config in searched]
    for message in precompile(tasks):
        print(message, flush=True)
    print(f"compiled {len(tasks)} plans in {time.perf_counter() - begin:.0f} s", flush=True)
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, read bandwidth {bandwidth:.0f} GB/s", flush=True)
    results: list[Result] = []
    for shape, dtype, rows in cases(options):
        results += run_case(shape, dtype, rows, bandwidth, options, begin + options.seconds)
        with (options.output / "tune_gpu.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(Result.__dataclass_fields__)
            writer.writerows(astuple(r) for r in results)
        print(f"{shape} {dtype} rows={rows}: done after {time.perf_counter() - begin:.0f} s", flush=True)
    table(results)


if __name__ == "__main__":
    main()
