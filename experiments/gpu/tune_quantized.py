"""Check, time and tune the GPU kernel for quantised weights on the card at hand.

Purpose: choose the configurations in cats_kernels.triton.quantized_configs, and measure what they reach against our own
kernel on bfloat16 weights and torch's dense kernels on the same bits, in one command.
Cost: about four minutes on one H100, compilation included (in parallel processes).
Run: ``python -m experiments.gpu.tune_quantized --output DIR [--no-compile] [--rows 2]``
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cats_kernels.problem import TOLERANCE, Problem, relative_error
from cats_kernels.quantized_problem import QuantizedProblem
from cats_kernels.triton.mlp import sparse_gated_mlp_triton
from cats_kernels.triton.quantized import sparse_gated_mlp_quantized
from cats_kernels.triton.quantized_configs import QuantizedConfig

from experiments.e05_mlp_latency import SHAPES
from experiments.e05_mlp_latency.compiled import compiled_dense_mlp
from experiments.e09_quantization.dense import DenseWeights, compiled_int8_mlp, int8_call, torch_kernels_mlp
from experiments.framework.bandwidth import read_bandwidth
from experiments.framework.timing import measure

SPARSITIES = (0.0, 0.5, 0.7, 0.9)
FORMATS: tuple[tuple[int, int | None], ...] = ((8, None), (8, 128), (4, 32), (4, 128))
COPIES = {8: 4, 4: 6}
"""Of the weights, by bits: together several times the L2 cache, with what lies between."""

# (gate_tile, gate_stages, tile, stages, warps, programs, paired, chunk, words)
SPACE: dict[int, tuple[tuple[int, ...], ...]] = {
    8: (
        *((4, 3, 2, 3, 4, 2, 1, 16, 1), (2, 4, 2, 3, 4, 3, 1, 16, 1), (2, 4, 1, 4, 4, 3, 1, 16, 1)),
        *((2, 4, 1, 4, 4, 2, 1, 16, 1), (1, 6, 1, 4, 4, 3, 1, 16, 1), (2, 5, 1, 5, 4, 3, 1, 16, 1)),
        *((4, 3, 1, 4, 4, 2, 1, 16, 1), (2, 4, 1, 4, 8, 2, 1, 16, 1), (2, 4, 1, 4, 4, 3, 0, 16, 1)),
        *((1, 6, 1, 4, 4, 3, 1, 0, 1), (1, 6, 1, 4, 4, 3, 1, 0, 0), (2, 4, 1, 4, 4, 2, 1, 16, 0)),
        *((2, 3, 1, 3, 4, 3, 1, 16, 1), (4, 3, 1, 3, 4, 2, 1, 16, 1)),
    ),
    4: (
        *((2, 4, 1, 4, 4, 3, 1, 16, 1), (2, 4, 2, 3, 4, 2, 1, 16, 1), (4, 3, 2, 3, 4, 2, 1, 16, 1)),
        *((2, 4, 1, 4, 4, 4, 1, 16, 1), (4, 3, 1, 4, 4, 3, 1, 16, 1), (2, 6, 1, 6, 4, 3, 1, 16, 1)),
        *((4, 4, 2, 4, 4, 3, 1, 16, 1), (4, 3, 2, 3, 4, 4, 1, 16, 1), (1, 8, 1, 6, 4, 4, 1, 16, 1)),
        *((2, 4, 1, 4, 4, 3, 0, 16, 1), (2, 4, 1, 4, 4, 4, 1, 16, 0), (4, 3, 2, 3, 4, 2, 1, 16, 0)),
        *((2, 4, 1, 4, 4, 2, 1, 16, 1), (4, 3, 1, 3, 4, 2, 1, 16, 1)),
    ),
}


def fused(
    gate_tile: int,
    gate_stages: int,
    tile: int,
    stages: int,
    warps: int,
    programs: int,
    paired: int,
    chunk: int,
    words: int,
) -> QuantizedConfig:
    """A configuration of the kernel."""
    return QuantizedConfig(
        gate_tile, tile, warps, programs, gate_stages, stages, paired=bool(paired), chunk=chunk, words=bool(words)
    )


@dataclass(frozen=True)
class Kind:
    """What a compiled kernel depends on."""

    d: int
    m: int
    rows: int
    bits: int
    group_size: int | None
    symmetric: bool = True
    dtype: torch.dtype = torch.bfloat16
    decider: str = "gate"

    def problem(self, seed: int = 0, activation: str = "silu") -> QuantizedProblem:
        """Weights and inputs at random."""
        shape = (self.d, self.m, self.rows, self.bits, self.group_size, self.symmetric)
        return QuantizedProblem(*shape, self.dtype, "cuda", seed, activation, self.decider)


def compile_task(task: tuple[Kind, QuantizedConfig | None]) -> str:
    """Compile into Triton's cache; a message if that fails."""
    from cats_kernels.triton.launch import target_of
    from cats_kernels.triton.quantized import meta_call, plan_quantized

    kind, config = task
    try:
        shape = (kind.rows, kind.d, kind.m, kind.bits, kind.group_size or kind.d, kind.symmetric)
        call = meta_call(*shape, kind.dtype, target_of(torch.device("cuda", 0)), decider=kind.decider)
        for launch in plan_quantized(call, config):
            launch.compile()
    except Exception as error:
        return f"{task}: {type(error).__name__}: {error}"[:400]
    return ""


def precompile(tasks: Sequence[tuple[Kind, QuantizedConfig | None]]) -> None:
    """Compile all tasks in processes."""
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=multiprocessing.get_context("spawn")) as pool:
        for message in filter(None, pool.map(compile_task, tasks)):
            print("FAILED", message, flush=True)


def checked() -> list[Kind]:
    """What `check` runs: every format, dtype, number of rows and decider at an odd and at a usual width."""
    formats = (*((bits, group, True) for bits, group in FORMATS), (4, 64, False), (8, 64, False))
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    kinds = [
        Kind(1000, 803, rows, *form, dtype, decider)
        for form, dtype, rows, decider in itertools.product(formats, dtypes, (1, 2), ("gate", "up"))
    ]
    return kinds + [Kind(4096, 4000, rows, *form) for form, rows in itertools.product(formats, (1, 2))]


def check(kinds: Sequence[Kind]) -> None:
    """Errors against the float64 reference on dequantised weights; says what is over its tolerance."""
    worst: dict[torch.dtype, float] = {}
    wrong = 0
    for kind in kinds:
        problem = kind.problem(activation="gelu_tanh" if kind.rows == 2 else "silu")
        for threshold in (problem.threshold(0.6), problem.thresholds(0.6), 0.0):
            y = sparse_gated_mlp_quantized(*problem.quantized_arguments(threshold))
            again = sparse_gated_mlp_quantized(*problem.quantized_arguments(threshold))
            error = problem.error(y, threshold)
            worst[kind.dtype] = max(error, worst.get(kind.dtype, 0.0))
            if not error <= TOLERANCE[kind.dtype] or not torch.equal(y, again):
                wrong += 1
                print(f"WRONG {kind}: {error:.2e}, same again {torch.equal(y, again)}", flush=True)
    print(f"checked {len(kinds)} kinds, {wrong} wrong; largest errors {worst}", flush=True)


@dataclass(frozen=True)
class Result:
    """One timed implementation; times in microseconds."""

    shape: str
    bits: int
    group_size: int
    sparsity: float
    implementation: str
    config: str
    p20_us: float
    p50_us: float
    p80_us: float
    bytes_read: int
    bound_us: float


def time_shape(shape: str, bandwidth: float, compiled: bool, rows: int = 1) -> list[Result]:
    """Everything at one shape: our bfloat16 and dense first, then each format beside them in the same rounds."""
    d, m = SHAPES[shape]
    plain = [Problem(d, m, rows, torch.bfloat16, "cuda", seed) for seed in range(3)]
    results: list[Result] = []
    works: dict[tuple[int, int, float, str, str], tuple[Sequence[Callable[[], Any]], int]] = {}
    whole = 3 * d * m * 2
    works[16, 0, 0.0, "torch dense", ""] = ([p.dense() for p in plain], whole)
    if compiled:
        mlp = compiled_dense_mlp("cuda")
        works[16, 0, 0.0, "compiled dense", ""] = ([partial(mlp, p.x, p.gate, p.up, p.down) for p in plain], whole)
        attempt(works[16, 0, 0.0, "compiled dense", ""][0][0], "compiled dense")
    for sparsity in SPARSITIES:
        thresholds = [p.threshold(sparsity) for p in plain]
        calls = [partial(sparse_gated_mlp_triton, *p.arguments(t)) for p, t in zip(plain, thresholds, strict=True)]
        works[16, 0, sparsity, "cats", ""] = (calls, plain[0].bytes_read(thresholds[0]))
    for bits, group_size in FORMATS:
        works |= dense_works(plain, bits, group_size, compiled)
        problems = [Kind(d, m, rows, bits, group_size).problem(seed) for seed in range(COPIES[bits])]
        for sparsity in SPARSITIES:
            configs: list[tuple[int, ...] | None] = [None]
            if sparsity in (0.5, 0.9):
                configs += SPACE[bits]
            thresholds = [p.threshold(sparsity) for p in problems]
            for config in configs:
                chosen = fused(*config) if config else None
                words = " ".join(map(str, config)) if config else ""
                work = [quantized_call(p, t, chosen) for p, t in zip(problems, thresholds, strict=True)]
                if attempt(work[0], f"{shape} {bits} {group_size} {words}"):
                    key = (bits, group_size or d, sparsity, "cats", words)
                    works[key] = (work, problems[0].bytes_read(thresholds[0]))
        print(f"{shape} int{bits} group {group_size or d}: configurations ready", flush=True)
        for problem in problems:  # the float64 truth of a 7B shape is 100 MB no longer needed
            del problem.v, problem.u, problem.gate, problem.up, problem.down_t, problem.original, problem.down
    timings = measure(
        {str(i): calls for i, (calls, _) in enumerate(works.values())}, warmups=3, rounds=20, flush=False, device="cuda"
    )
    for i, (key, (_, moved)) in enumerate(works.items()):
        times = timings[str(i)]
        p20, p50, p80 = (1e3 * t for t in (times.p20_ms, times.p50_ms, times.p80_ms))
        results.append(Result(shape, *key, p20, p50, p80, moved, moved / bandwidth / 1e3))
    return results


def quantized_call(problem: QuantizedProblem, threshold: float, config: QuantizedConfig | None) -> Callable[[], Any]:
    """A call of our kernel."""
    arguments = problem.quantized_arguments(threshold)
    return lambda: sparse_gated_mlp_quantized(*arguments, config)


def attempt(call: Callable[[], Any], name: str) -> bool:
    """Whether a call runs; says why not."""
    try:
        call()
        torch.cuda.synchronize()
    except Exception as error:
        print(f"FAILED {name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
        return False
    return True


def dense_works(plain: Sequence[Problem], bits: int, group_size: int | None, compiled: bool) -> dict[Any, Any]:
    """Torch's dense kernels on the same bits."""
    copies = COPIES[bits]
    weights = [DenseWeights(p.gate, p.up, p.down, bits, group_size) for p in [*plain, *plain][:copies]]
    x, d = plain[0].x, plain[0].x.shape[1]
    expected = weights[0].expected(x)
    made: dict[str, Callable[[], list[Callable[[], Any]]]] = {
        f"torch int{bits} kernel": lambda: [torch_kernels_mlp(w, x) for w in weights]
    }
    if compiled and bits == 8 and group_size is None:
        mlp = compiled_int8_mlp()
        made["compiled int8"] = lambda: [int8_call(mlp, w, x) for w in weights]
    works: dict[Any, Any] = {}
    for name, make in made.items():
        try:
            calls = make()
            error = relative_error(calls[0](), expected)
        except Exception as problem:
            print(f"FAILED {name} {group_size}: {type(problem).__name__}: {' '.join(str(problem).split())[:300]}")
            continue
        print(f"{name} group {group_size}: error {error:.1e}", flush=True)
        works[bits, group_size or d, 0.0, name, ""] = (calls, weights[0].nbytes)
    return works


def table(results: Sequence[Result]) -> None:
    """Medians, ratios over our bfloat16 at the same sparsity and over the fastest dense of the same bits."""
    for shape in dict.fromkeys(r.shape for r in results):
        own = {
            r.sparsity: r.p50_us for r in results if r.shape == shape and r.bits == 16 and r.implementation == "cats"
        }
        part = [r for r in results if r.shape == shape]
        for form in dict.fromkeys((r.bits, r.group_size) for r in part):
            dense = [r for r in part if r.bits == form[0] and r.implementation not in ("cats",)]
            fastest = min((r.p50_us for r in dense), default=float("nan"))
            for sparsity in SPARSITIES:
                rows = [r for r in part if (r.bits, r.group_size, r.sparsity) == (*form, sparsity)]
                for r in sorted(rows, key=lambda r: (r.config != "", r.p50_us))[: 14 if sparsity in (0.5, 0.9) else 4]:
                    print(
                        f"{shape} int{r.bits} group {r.group_size} {100 * sparsity:.0f} % {r.implementation:18} "
                        f"{r.config:20} {r.p50_us:7.1f} ({r.p20_us:.1f} {r.p80_us:.1f}) us, "
                        f"{r.bound_us / r.p50_us:.2f} of bound, {own[sparsity] / r.p50_us:.2f}x ours in bf16, "
                        f"{fastest / r.p50_us:.2f}x dense int{r.bits}"
                    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for tune_quantized.csv")
    parser.add_argument("--no-compile", action="store_true", help="without inductor's dense MLPs")
    parser.add_argument("--no-check", action="store_true", help="without errors against float64, which the tests check")
    parser.add_argument("--shapes", nargs="+", default=["Mistral-7B", "Llama2-7B"])
    parser.add_argument("--rows", type=int, default=1, choices=(1, 2), help="of x")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    kinds = [] if options.no_check else checked()
    tasks: list[tuple[Kind, QuantizedConfig | None]] = [(kind, None) for kind in kinds]
    for shape, (bits, group_size) in itertools.product(options.shapes, FORMATS):
        kind = Kind(*SHAPES[shape], options.rows, bits, group_size)
        tasks += [(kind, None), *((kind, fused(*config)) for config in SPACE[bits])]
    precompile(tasks)
    print(f"compiled {len(tasks)} plans in {time.perf_counter() - begin:.0f} s", flush=True)
    with torch.inference_mode():
        if kinds:
            check(kinds)
        print(f"checked after {time.perf_counter() - begin:.0f} s", flush=True)
        bandwidth = read_bandwidth()
        print(f"{torch.cuda.get_device_name()}, read bandwidth {bandwidth:.0f} GB/s", flush=True)
        results: list[Result] = []
        for shape in options.shapes:
            results += time_shape(shape, bandwidth, not options.no_compile, options.rows)
            print(f"{shape} after {time.perf_counter() - begin:.0f} s", flush=True)
            with (options.output / "tune_quantized.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(Result.__dataclass_fields__)
                writer.writerows(astuple(r) for r in results)
            table([r for r in results if r.shape == shape])


if __name__ == "__main__":
    main()
