"""Check, time and tune the attention of a decoded token on the card at hand.

Purpose: choose `cats.generation.triton_attention.choose_attention_config`, and show what it reaches beside torch's own
attention. Cost: under a minute on one H100, compilation included (in parallel processes).
Run: ``python -m experiments.gpu.attention --output DIR``

Heads of 128 as Llama2-7B's (32 key-value heads) and Mistral-7B's (8, of four queries each), one sequence. Calls rotate
over so many caches that none is still in the L2 cache, as the layers of a model do; a CUDA graph of them, interleaved
rounds. Bytes: keys and values before the token. ``torch`` is scaled_dot_product_attention alone over exactly the filled
part, without the rotary embedding and the cache write that the kernel does, too.
"""

from __future__ import annotations

import argparse
import csv
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
import torch.nn.functional as F
from cats_kernels.triton.launch import on, target_of
from torch import Tensor

from cats.generation.attention import rotate
from cats.generation.triton_attention import (
    AttentionConfig,
    choose_attention_config,
    constants_of,
    decode_attention_kernel,
    decode_attention_triton,
)
from experiments.framework.bandwidth import read_bandwidth
from experiments.framework.timing import measure

D = 128
SHAPES = {"Llama2-7B": (32, 1), "Mistral-7B": (8, 4)}
"""Key-value heads, queries of each."""
POSITIONS = (160, 512, 1100, 2048)
CAPACITY = 2304
COLD_BYTES = 200 * 10**6
"""Of all caches together: four times an H100's L2 cache."""
TOLERANCE = {torch.bfloat16: 0.01, torch.float16: 0.002, torch.float32: 1e-5}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FEWER_WAITS = ((2, True), (1, False), (1, True))
"""Stages and `AttentionConfig.together` beside the chosen configuration's own: fewer reads wait for another."""
CONFIGS = {
    1: (
        *(AttentionConfig(tile, programs=programs) for tile in (16, 32, 64) for programs in (1, 2, 4)),
        *(AttentionConfig(tile, warps=8, programs=programs) for tile in (32, 64) for programs in (1, 2)),
        *(AttentionConfig(tile, warps=2, programs=programs) for tile in (16, 32) for programs in (4, 8)),
        AttentionConfig(32, ahead=False),
        AttentionConfig(32, warps=2, programs=4, together=True),
    ),
    4: (
        *(AttentionConfig(tile, programs=programs) for tile in (8, 16, 32) for programs in (1, 2, 4)),
        *(AttentionConfig(tile, warps=8, programs=programs) for tile in (16, 32) for programs in (1, 2)),
        *(AttentionConfig(tile, warps=2, programs=4) for tile in (8, 16)),
        AttentionConfig(16, ahead=False),
        *(AttentionConfig(tile, programs=programs, dot=True) for tile in (32, 64) for programs in (1, 2)),
        *(AttentionConfig(32, dot=True, stages=stages, together=together) for stages, together in FEWER_WAITS),
        *(AttentionConfig(tile, warps=2, programs=4, together=True) for tile in (8, 16)),
        *(AttentionConfig(16, warps, 8 // warps, dot=True, stages=1, together=True) for warps in (2, 4)),
    ),
}
"""By queries per key-value head."""


@dataclass(frozen=True)
class Result:
    """One timed implementation; times in microseconds."""

    shape: str
    dtype: str
    position: int
    implementation: str
    config: str
    p20_us: float
    p50_us: float
    p80_us: float
    bound_us: float
    error: float


def problem(kv_heads: int, group: int, position: int, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """Random arguments of `decode_attention`, without scale and window."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    sizes = [n * kv_heads * D for n in (group, 1, 1)]
    q, k, v = random(1, 1, sum(sizes)).split(sizes, -1)
    angle = random(1, 1, D).float()
    capacity = max(CAPACITY, position + 1)
    return {
        "q": q, "k": k, "v": v, "cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype),
        "keys": random(1, kv_heads, capacity, D), "values": random(1, kv_heads, capacity, D),
        "position": torch.tensor([position], device=device), "first": torch.zeros(1, dtype=torch.int64, device=device),
    }  # fmt: skip


def exact(given: dict[str, Any]) -> Tensor:
    """(1, 1, heads * d) in float64, from new queries and keys rounded as the cache holds them."""
    position, kv_heads = int(given["position"]), given["keys"].shape[1]
    cos, sin = (given[name].double().view(1, 1, 1, D) for name in ("cos", "sin"))
    dtype = given["q"].dtype
    q, k = (rotate(given[n].double().view(1, -1, 1, D), cos, sin).to(dtype).double() for n in ("q", "k"))
    keys = torch.cat((given["keys"][:, :, :position].double(), k), 2)
    values = torch.cat((given["values"][:, :, :position].double(), given["v"].double().view(1, -1, 1, D)), 2)
    weights = (q.view(1, kv_heads, -1, D) @ keys.mT * D**-0.5).softmax(-1)
    return (weights @ values).reshape(given["q"].shape)


def call(given: dict[str, Any], arrived: Tensor, config: AttentionConfig | None = None) -> Tensor:
    """The kernel."""
    return decode_attention_triton(**given, arrived=arrived, scale=D**-0.5, window=0, config=config)


def torch_call(given: dict[str, Any], position: int) -> Callable[[], Tensor]:
    """Torch's attention over the filled part; ``position`` is a number, since a CUDA graph cannot wait for one."""
    keys, values = (given[name][:, :, :position] for name in ("keys", "values"))
    q = given["q"].view(1, -1, 1, D)
    grouped = q.shape[1] != keys.shape[1]
    return partial(F.scaled_dot_product_attention, q, keys, values, enable_gqa=grouped)


def error_of(given: dict[str, Any], arrived: Tensor, config: AttentionConfig | None) -> float:
    """Relative error of two calls, which must agree bit for bit and leave the counters at zero."""
    expected = exact(given)
    first, second = call(given, arrived, config), call(given, arrived, config)
    if not torch.equal(first, second) or bool(arrived.any()):
        return float("nan")
    return float((first.double() - expected).norm() / expected.norm())


def compile_config(task: tuple[int, int, torch.dtype, AttentionConfig]) -> str:
    """Fill Triton's cache; a message if it does not compile."""
    kv_heads, group, dtype, config = task
    device = torch.device("cuda", 0)
    constants, options = constants_of(kv_heads, kv_heads, group, D, dtype.itemsize, target_of(device), config)
    integers = {"position_ptr": torch.int64, "first_ptr": torch.int64, "arrived_ptr": torch.int32}
    numbers = {"capacity": CAPACITY, "window": 2**30, "scale": 0.1275}
    strides = (group + 2) * kv_heads * D
    types: list[Any] = []
    for name in decode_attention_kernel.arg_names:
        if name.endswith("_stride"):
            types.append(D if name == "cos_stride" else strides)
        elif name in ("partial_ptr", "stats_ptr"):
            types.append(torch.float32)
        elif name not in constants:
            types.append(integers.get(name) or numbers.get(name) or dtype)
    try:
        with on(device):
            decode_attention_kernel.warmup(*types, grid=(1, 1), **constants, **options)
    except Exception as error:
        return f"{task}: {type(error).__name__}: {error}"[:300]
    return ""


def run_case(shape: str, dtype: torch.dtype, position: int, bandwidth: float, rounds: int) -> list[Result]:
    """Check and time every configuration."""
    kv_heads, group = SHAPES[shape]
    bytes_read = 2 * kv_heads * position * D * dtype.itemsize
    copies = min(400, -(-COLD_BYTES // bytes_read))
    given = [problem(kv_heads, group, position, dtype, "cuda", 0)]
    for _ in range(copies - 1):
        given.append({**given[0], "keys": given[0]["keys"].clone(), "values": given[0]["values"].clone()})
    arrived = torch.zeros(kv_heads, dtype=torch.int32, device="cuda")
    works: dict[tuple[str, str], Sequence[Callable[[], Tensor]]] = {
        ("torch", ""): [torch_call(one, position) for one in given]
    }
    errors = {("torch", ""): 0.0}
    for config in (None, *CONFIGS[group]):
        key = ("cats" if config is None else "config", "" if config is None else str(config))
        try:
            errors[key] = error_of(given[0], arrived, config)
        except Exception as error:
            print(f"FAILED {shape} {position} {config}: {type(error).__name__}: {error}"[:300], flush=True)
            continue
        if not errors[key] <= TOLERANCE[dtype]:
            print(f"WRONG {shape} {position} {config}: {errors[key]:.1e}", flush=True)
            continue
        works[key] = [partial(call, one, arrived, config) for one in given]
    named = {str(key): calls for key, calls in works.items()}
    timings = measure(named, warmups=3, rounds=rounds, flush=False, device="cuda")
    results = []
    for key in works:
        timing = timings[str(key)]
        p20, p50, p80 = (1e3 * t for t in (timing.p20_ms, timing.p50_ms, timing.p80_ms))
        name = str(dtype).removeprefix("torch.")
        results.append(Result(shape, name, position, *key, p20, p50, p80, bytes_read / bandwidth / 1e3, errors[key]))
    return results


def table(results: Sequence[Result]) -> None:
    """The chosen configuration and torch, then the best of the search; last the best over all positions."""
    for shape in dict.fromkeys(r.shape for r in results):
        total: dict[str, float] = {}
        for position in dict.fromkeys(r.position for r in results if r.shape == shape):
            rows = [r for r in results if (r.shape, r.position) == (shape, position)]
            fastest = min(r.p50_us for r in rows)
            for r in sorted(rows, key=lambda r: (r.implementation == "config", r.p50_us))[:7]:
                times = f"{r.p50_us:6.2f} us, bound {r.bound_us:5.2f}"
                print(f"{shape} {position:5} {r.implementation:6} {times} {r.config}")
            for r in rows:
                total[r.config or r.implementation] = total.get(r.config or r.implementation, 0) + r.p50_us / fastest
        for config, sum_of_ratios in sorted(total.items(), key=lambda pair: pair[1])[:6]:
            print(f"{shape} all positions: {sum_of_ratios / len(POSITIONS):.3f} of the fastest, {config}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for attention_gpu.csv")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--positions", nargs="+", type=int, default=POSITIONS)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    dtype = DTYPES[options.dtype]
    tasks = []
    for kv_heads, group in SHAPES.values():
        chosen = choose_attention_config(group, D, dtype.itemsize)
        tasks += [(kv_heads, group, dtype, config) for config in dict.fromkeys((chosen, *CONFIGS[group]))]
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=multiprocessing.get_context("spawn")) as pool:
        for message in filter(None, pool.map(compile_config, tasks)):
            print("FAILED", message, flush=True)
    print(f"compiled {len(tasks)} configurations in {time.perf_counter() - begin:.0f} s", flush=True)
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, read bandwidth {bandwidth:.0f} GB/s", flush=True)
    results: list[Result] = []
    with torch.inference_mode():
        for shape in SHAPES:
            for position in options.positions:
                results += run_case(shape, dtype, position, bandwidth, options.rounds)
            print(f"{shape} after {time.perf_counter() - begin:.0f} s", flush=True)
            with (options.output / "attention_gpu.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(Result.__dataclass_fields__)
                writer.writerows(astuple(r) for r in results)
    table(results)


if __name__ == "__main__":
    main()
