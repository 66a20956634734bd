"""Where time goes on a GPU: hardware counters of each kernel of the MLP, and the kernels of a decoded token.

Purpose: show why a figure of e05 or e06 is what it is. Cost: a minute each on an H200.

    ncu --profile-from-start off --clock-control none --cache-control none --csv --log-file ncu.csv \\
        --metrics $(python -m experiments.gpu.profile metrics) python -m experiments.gpu.profile mlp
    python -m experiments.gpu.profile token --model shape:mistral-7b --output DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from cats_kernels.problem import Problem
from torch import Tensor

import cats
from cats.models import load_model
from cats.text_config import text_config
from experiments.e05_mlp_latency import SHAPES, variants
from experiments.e06_throughput.decoding import ATTENTION, Decoder, make_greedy
from experiments.framework.files import write_text_atomically
from experiments.framework.timing import FLUSH_BYTES

METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "lts__t_bytes.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__occupancy_limit_registers",
    "launch__occupancy_limit_shared_mem",
    "launch__registers_per_thread",
    "launch__grid_size",
)
"""Time, bytes from memory and through L2, achieved occupancy, and what limits it."""
TOKENS = 17


def profile_mlp() -> None:
    """One cold call of the dense MLP and of "cats" at 50 and 90 %, per 7B shape in bfloat16, as profiled ranges."""
    flush = torch.ones(FLUSH_BYTES // 4, device="cuda")
    for shape in ("Mistral-7B", "Llama2-7B"):
        problem = Problem(*SHAPES[shape], 1, torch.bfloat16, "cuda", 0)
        cats_mlp = variants("cuda")["cats"]
        calls: list[Callable[[], Tensor]] = [problem.dense()]
        calls += [partial(cats_mlp, *problem.arguments(problem.threshold(s))) for s in (0.5, 0.9)]
        for call in calls:
            call()
        for call in calls:
            flush.sum()
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStart()
            call()
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()


def profile_token(name: str, dtype: str, attention: str, loop: str, sparsity: float) -> pd.DataFrame:
    """Kernels of a decoded token, dense and CATS: launches and microseconds a token, longest first; prefill excluded by
    subtraction of a run of one token."""
    model, _ = load_model(name, dtype, "cuda", None, 0)
    model.set_attn_implementation("sdpa" if attention == ATTENTION else attention)
    make_greedy(model, 128)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, text_config(model).vocab_size, (4, 64), generator=generator)
    thresholds = cats.calibrate(model, [ids], sparsity)
    # without dependent launch, else kernels that wait would be timed waiting
    decoder = Decoder(model, loop, 128, dependent_launch=False, attention=attention)
    tables = []
    for variant in ("dense", f"cats-{100 * sparsity:g}"):
        if variant != "dense":
            cats.apply(model, thresholds)
        decoder.warm_up(ids[:1])
        long, short = (kernels(decoder, ids[:1], tokens) for tokens in (TOKENS, 1))
        table = long.sub(short, fill_value=0) / (TOKENS - 1)
        tables.append(table[table["us"] > 0.05].sort_values("us", ascending=False).assign(variant=variant))
        wall = decoder.timed(ids[:1], [TOKENS]).decode_s[TOKENS] / (TOKENS - 1) * 1e6
        print(f"{name} {variant}: {wall:.0f} us per token, kernels {table['us'].sum():.0f} us", flush=True)
        with pd.option_context("display.width", 200, "display.max_colwidth", 90):
            longest = tables[-1].reset_index()[["kernel", "launches", "us"]].head(16)
            print(longest.to_string(index=False, float_format="%.1f"), flush=True)
    cats.remove(model)
    return pd.concat(tables).reset_index().assign(model=name, dtype=dtype, loop=loop)


def kernels(decoder: Decoder, ids: Tensor, tokens: int) -> pd.DataFrame:
    """Launches and microseconds of each kernel in one generation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        decoder.generate(ids, tokens)
    rows = [(event.key, event.count, event.self_device_time_total) for event in profiler.key_averages()]
    return pd.DataFrame(rows, columns=["kernel", "launches", "us"]).groupby("kernel").sum()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("metrics", "mlp", "token"))
    parser.add_argument("--model", default="shape:mistral-7b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", default=ATTENTION, help="as in e06.attention of the paper profile")
    parser.add_argument("--loop", default="graph")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--output", type=Path, help="folder for token_MODEL_DTYPE_LOOP.csv")
    options = parser.parse_args()
    if options.what == "metrics":
        print(",".join(METRICS))
    elif options.what == "mlp":
        profile_mlp()
    else:
        table = profile_token(options.model, options.dtype, options.attention, options.loop, options.sparsity)
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
            name = options.model.removeprefix("shape:").replace("/", "--")
            path = options.output / f"token_{name}_{options.dtype}_{options.loop}.csv"
            write_text_atomically(path, table.to_csv(index=False, float_format="%.3f"))


if __name__ == "__main__":
    main()
