"""Host time of eager decoding: what a patched MLP costs Python, and the milliseconds of each token of `generate`.

Purpose: show that a patched model is never slower than the dense one where the host is the bottleneck, and what the
first tokens after `cats.apply` wait for. Cost: under 3 minutes on one H100 with the defaults.
Run: ``python -m experiments.gpu.host --output DIR [--model shape:mistral-7b --dtype bfloat16]``

Host time of an MLP: the clock around 20 calls of every layer's MLP, without a synchronisation in between.
"""

from __future__ import annotations

import argparse
import csv
import gc
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import StoppingCriteriaList

import cats
from cats.models import load_model
from cats.text_config import text_config
from experiments.e06_throughput.decoding import make_greedy

TOKENS = 60
SPARSITIES = (0.3, 0.5, 0.7, 0.9)


def synchronize(device: str) -> None:
    """Wait for a GPU; a CPU has nothing to wait for."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def token_times(model: Any, ids: Tensor, tokens: int, **options: Any) -> np.ndarray:
    """Milliseconds of each token of ``model.generate`` from the second on; the loop itself synchronises per token."""
    stamps: list[float] = []

    def stamp(input_ids: Tensor, _scores: Tensor, **_: Any) -> Tensor:
        stamps.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    model.generate(ids, max_new_tokens=tokens, stopping_criteria=StoppingCriteriaList([stamp]), **options)
    return 1e3 * np.diff(stamps)


@torch.inference_mode()
def host_us(mlps: Sequence[Callable[..., Any]], x: Tensor, rounds: int = 20) -> float:
    """Median host microseconds per MLP call, over rounds through all layers."""
    times = []
    for _ in range(rounds + 3):
        synchronize(str(x.device))
        begin = time.perf_counter()
        for mlp in mlps:
            mlp(x)
        times.append((time.perf_counter() - begin) / len(mlps) * 1e6)
    return float(np.median(times[3:]))


@contextmanager
def collections_timed(log: list[float]) -> Any:
    """Append the seconds of every garbage collection."""
    begun = [0.0]

    def note(phase: str, _info: dict[str, int]) -> None:
        if phase == "start":
            begun[0] = time.perf_counter()
        else:
            log.append(time.perf_counter() - begun[0])

    gc.callbacks.append(note)
    try:
        yield
    finally:
        gc.callbacks.remove(note)


@contextmanager
def host_split(model: nn.Module, seconds: dict[str, float]) -> Any:
    """Add up host time inside attention blocks and MLPs, by hooks around them."""
    handles, begun = [], [0.0]
    for layer in model.get_submodule("model.layers").children():
        for part in ("self_attn", "mlp"):

            def enter(*_: Any) -> None:
                begun[0] = time.perf_counter()

            def leave(*_: Any, part: str = part) -> None:
                seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - begun[0]

            module = layer.get_submodule(part)
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_tokens(model: Any, ids: Tensor, label: str) -> None:
    """Print tokens 2 to 60, by thirds, with what else the host did meanwhile."""
    cuda = ids.device.type == "cuda"
    collected: list[float] = []
    split: dict[str, float] = {}
    before = torch.cuda.memory_stats() if cuda else {}
    with collections_timed(collected), host_split(model, split):
        times = token_times(model, ids, TOKENS)
    after = torch.cuda.memory_stats() if cuda else {}
    thirds = " ".join(f"{np.median(part):.1f}" for part in np.array_split(times, 3))
    layers = len(list(model.get_submodule("model.layers").children()))
    parts = " ".join(f"{part} {1e6 * total / TOKENS / layers:.0f} us" for part, total in split.items())
    mallocs = after.get("num_device_alloc", 0) - before.get("num_device_alloc", 0)
    print(
        f"first tokens, {label}: ms {thirds}, largest {times.max():.1f}, per layer {parts}, "
        f"{len(collected)} collections {1e3 * sum(collected):.0f} ms, {mallocs} device allocations",
        flush=True,
    )


def timed_rows(model: Any, ids: Tensor, variant: str, batches: list[int], begun: float) -> list[dict[str, Any]]:
    """Milliseconds a token and host time per MLP at each batch size."""
    mlps: list[nn.Module] = list(cats.gated_mlps(model).values())
    rows = []
    for batch in batches:
        prompt = ids[:1].expand(batch, -1).contiguous()
        token_times(model, prompt, 6)
        times = token_times(model, prompt, TOKENS)
        width, dtype = text_config(model).hidden_size, next(model.parameters()).dtype
        x = torch.randn(batch, 1, width, device=ids.device, dtype=dtype)
        row = {
            "variant": variant,
            "batch": batch,
            "ms_p50": round(float(np.median(times)), 2),
            "ms_p20": round(float(np.percentile(times, 20)), 2),
            "ms_p80": round(float(np.percentile(times, 80)), 2),
            "mlp_host_us": round(host_us(mlps, x), 1),
        }
        rows.append(row)
        print(f"{time.perf_counter() - begun:.0f} s", row, flush=True)
    return rows


def others(model: Any, ids: Tensor, label: str) -> None:
    """Static cache with transformers' own compilation, and the MLPs compiled one by one."""
    mlps: list[Any] = list(cats.gated_mlps(model).values())
    x = torch.randn(1, 1, text_config(model).hidden_size, device=ids.device, dtype=next(model.parameters()).dtype)
    compiled = [torch.compile(mlp) for mlp in mlps]
    print(f"{label}: MLPs compiled one by one, host {host_us(compiled, x):.1f} us each", flush=True)
    options = {"cache_implementation": "static"}
    for _ in range(2):
        token_times(model, ids[:1], 40, **options)
    times = token_times(model, ids[:1], TOKENS, **options)
    print(f"{label}: static cache {np.median(times):.2f} ms a token, {len(mlps)} layers", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for host_MODEL_DTYPE.csv")
    parser.add_argument("--model", default="shape:mistral-7b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--others", action="store_true", help="static cache, and MLPs compiled one by one")
    options = parser.parse_args()
    begun = time.perf_counter()
    model, _ = load_model(options.model, options.dtype, options.device, options.layers, 0)
    make_greedy(model, 256)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, text_config(model).vocab_size, (2, 16), generator=generator).to(options.device)
    print(f"loaded in {time.perf_counter() - begun:.0f} s", flush=True)
    actions: list[tuple[str, Callable[[], None]]] = [("dense", lambda: cats.remove(model))]
    thresholds = cats.calibrate(model, [ids], list(options.sparsities))
    for sparsity in options.sparsities:
        label = f"cats-{100 * sparsity:g}"
        actions.append((label, lambda sparsity=sparsity: cats.apply(model, thresholds[sparsity])))  # type: ignore[misc]
    token_times(model, ids[:1], TOKENS)
    first_tokens(model, ids[:1], "dense")
    begin = time.perf_counter()
    cats.apply(model, thresholds[options.sparsities[0]])
    synchronize(options.device)
    print(f"cats.apply: {time.perf_counter() - begin:.2f} s", flush=True)
    for turn in ("first", "second", "third"):
        first_tokens(model, ids[:1], f"CATS, {turn} time after apply")
    rows: list[dict[str, Any]] = []
    for label, act in (*actions, *actions[:2]):
        act()
        rows += timed_rows(model, ids, label, options.batches, begun)
    if options.others:
        for label, act in actions[:2]:
            act()
            others(model, ids, label)
    cats.remove(model)
    options.output.mkdir(parents=True, exist_ok=True)
    name = options.model.removeprefix("shape:").replace("/", "--")
    with (options.output / f"host_{name}_{options.dtype}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
