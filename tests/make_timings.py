"""Made-up timings, for `tests.make_results`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd

from experiments.framework.tables import (
    AmdahlRow,
    CriterionSpeedRow,
    GreedyRow,
    LatencyRow,
    LatencySample,
    QuantizationSpeedRow,
    Row,
    ShareRow,
    ThroughputRow,
    columns,
    pack_numbers,
)

NAN = math.nan
ROUNDS = 80


def frame(rows: Iterable[Row]) -> pd.DataFrame:
    """Rows as the report reads them: None is NaN in a column of numbers."""
    rows = list(rows)
    table = pd.DataFrame([asdict(row) for row in rows])
    for column, (kind, _) in columns(type(rows[0])).items():
        if kind in (int, float):
            table[column] = table[column].astype(float)
    return table


COST = {"cats": 1.05, "fused-mask": 1.1, "fused-compact": 1.25, "gather": 1.6}
SHAPES = (("Mistral-7B", 4096, 14336), ("Llama2-7B", 4096, 11008), ("Llama2-13B", 5120, 13824))


def latency(
    machine: str = "made-up machine", cost: dict[str, float] | None = None,
    dtypes: Sequence[str] = ("float32", "bfloat16"), rows: Sequence[int] = (1, 2, 4, 8), compiled: float | None = 0.95,
) -> pd.DataFrame:  # fmt: skip
    """Every kernel at its share of the bytes bound; the compiled dense takes `compiled` of dense's time."""
    cost, out = {**COST, **(cost or {})}, []

    def add(implementation: str, ms: float, target: float, place: dict) -> None:
        kernel = implementation in COST
        m, n = place["m"], place["rows"]
        out.append(
            LatencyRow(
                **place, implementation=implementation, decider="gate" if kernel else "",
                threshold="number" if kernel else "", path="sparse kernel" if kernel else "dense",
                sparsity_target=target, sparsity=target + 0.001 if kernel else target,
                active_neurons=round(m * (1 - target**n)) if kernel else None, geomean_ms=ms, p20_ms=ms * 0.97,
                p50_ms=ms, p80_ms=ms * 1.04, rounds=ROUNDS, bytes_moved=3 * place["d"] * m * 4, gb_per_s=20.0,
                bandwidth_gb_per_s=25.0, bound_ms=dense * (1 + 2 * (1 - target)) / 3 * 0.98, fraction_of_bound=0.9,
                error="",
            )
        )  # fmt: skip

    for shape, d, m in SHAPES:
        for dtype in dtypes:
            for n in rows:
                dense = 3 * d * m * 4 / 3e7
                place = {"machine": machine, "shape": shape, "d": d, "m": m, "dtype": dtype, "rows": n, "threads": 2,
                         "condition": "figure" if n == 1 else "growth"}  # fmt: skip
                add("dense", dense, 0.0, place)
                if compiled is not None:
                    add("dense-compiled", dense * compiled, 0.0, place)
                for target in (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
                    add("optimal-all-three-shrunk", dense * (1 - target) + 0.2, target, place)
                    for name, factor in cost.items():
                        add(name, factor * dense * (1 + 2 * (1 - target)) / 3, target, place)
    return frame(out)


def rounds(table: pd.DataFrame, noise: float = 0.01) -> pd.DataFrame:
    """Samples that go with `latency`: rounds that drift together, and `noise` that they do not share."""
    drift = np.linspace(1, 1.3, ROUNDS)
    samples = []
    for number, row in enumerate(table.to_dict("records")):
        own = 1 + noise * np.random.default_rng(number).standard_normal(ROUNDS)
        keys = {key: None if row[key] != row[key] else row[key] for key in LatencySample.key}
        samples.append(LatencySample(**keys, milliseconds=pack_numbers(row["geomean_ms"] * drift * own)))
    return frame(samples)


def throughput(
    machine: str = "made-up machine", speedup: float = 1.3, model: str = "mistral-7b", layers: int = 32,
    loops: Sequence[str] = ("eager", "compiled"), prompts: int = 3, repeats: int = 2, noise: float = 0.002,
) -> pd.DataFrame:  # fmt: skip
    """Figure 4's lengths in the loops (dense is faster in the later ones), and growth over batch, context, sparsity."""
    rows: list[ThroughputRow] = []

    def add(condition: str, dtype: str, loop: str, batch: int, prompt_tokens: int, new: int, target: float) -> None:
        for prompt in range(prompts):
            for repeat in range(repeats):
                dense = 8.0 * (1 + 0.25 * loops.index(loop)) * (1 + 0.01 * prompt) / (1 + prompt_tokens / 4000)
                gain = 1 + (speedup - 1) * target / 0.5 * (1.2 - batch * 0.2)
                gain *= 1 + noise * (prompt - 1) + noise / 2 * (2 * repeat - 1)
                for variant, rate in (("dense", dense), (f"cats-{100 * target:g}", dense * gain)):
                    is_dense = variant == "dense"
                    rows.append(
                        ThroughputRow(
                            machine=machine, model=model, weights="random", layers=layers, model_layers=32,
                            dtype=dtype, attention="sdpa", criterion="dense" if is_dense else "cats", variant=variant,
                            condition=condition, path="dense" if is_dense else "sparse kernel",
                            sparsity_target=None if is_dense else target,
                            sparsity_measured=None if is_dense else target + 0.002, loop=loop, batch=batch,
                            prompt=prompt, repeat=repeat, prompt_tokens=prompt_tokens, generated_tokens=new,
                            prefill_s=0.1, decode_s=new / rate, tokens_per_second=rate,
                            compile_s=0.0 if loop == "eager" else 30.0, peak_memory_bytes=3_000_000_000,
                            cache_tokens=256,
                        )
                    )  # fmt: skip

    for dtype in ("float32", "bfloat16"):
        for loop in loops:
            for new in (16, 32, 64):
                add("figure", dtype, loop, 1, 16, new, 0.5)
    for batch in (2, 4, 8):
        add("growth", "float32", loops[0], batch, 16, 16, 0.5)
    for context in (128, 512):
        add("growth", "float32", loops[0], 1, context, 16, 0.5)
    for target in (0.0, 0.7, 0.9):
        add("growth", "float32", loops[0], 1, 16, 16, target)
    return frame(rows)


def shares(machine: str = "made-up machine") -> pd.DataFrame:
    """Where a token's time goes."""
    parts = (("mlp", 0.7), ("attention", 0.15), ("head", 0.1), ("other", 0.05))
    return frame(
        ShareRow(machine, "mistral-7b", 32, "float32", "eager", name, 100 * share, share) for name, share in parts
    )


def amdahl(machine: str = "made-up machine") -> pd.DataFrame:
    """Two lines of Amdahl's law."""
    return frame(
        AmdahlRow(machine, "mistral-7b", 32, dtype, "eager", "cats", "cats-50", 0.5, 1.45, 0.7, 1.278, 1.2, 0.94)
        for dtype in ("float32", "bfloat16")
    )


def greedy(machine: str = "made-up machine") -> pd.DataFrame:
    """Two checks, one of them failed."""
    checks = (("cats-0 against dense", 16), ("cats-50 against masked reference", 11))
    return frame(GreedyRow(machine, "mistral-7b", 32, "float32", check, 16, same) for check, same in checks)


def criterion_speed(
    name: str, level: float, speedup: float, what: str = "token", machine: str = "NVIDIA Imaginary", loop: str = "graph"
) -> CriterionSpeedRow:
    """The speed of one criterion of e08 at one level; dense makes 100 tokens a second, or one MLP in 2 ms."""
    dense, unit = (100.0, "tokens/s") if what == "token" else (2.0, "ms")
    value = dense * speedup if what == "token" else dense / speedup
    return CriterionSpeedRow(
        machine, "a/model", name, f"{name}-{100 * level:g}", "sparse kernel", "triton", "bfloat16", None, what, loop,
        level, level, unit, value, dense, speedup, speedup - 0.01, speedup + 0.01, 80,
    )  # fmt: skip


def quantization_speed() -> pd.DataFrame:
    """Speeds of e09: bfloat16 0.1 ms dense, ours 0.08 at 50 %; int4 0.06 and 0.04; int8 in groups failed."""
    rows = []
    for name, bits, group, implementation, target, ms in (
        ("none", None, None, "torch", 0.0, 0.1),
        ("none", None, None, "cats", 0.5, 0.08),
        ("int4-128", 4, 128, "torch", 0.0, 0.06),
        ("int4-128", 4, 128, "cats", 0.5, 0.04),
        ("int8-128", 8, 128, "torch", 0.0, None),
    ):
        stored = 2 * 10**8 if bits is None else 53_200_000
        measured = (None,) * 9 if ms is None else (ms, ms, ms, 40, 10**8, stored, 3000.0, 0.9 * ms, 0.9)
        rows.append(QuantizationSpeedRow(
            "Imaginary GPU", "mlp", "Mistral-7B", 4096, 14336, "bfloat16", None, name, bits, group, implementation,
            "dense" if implementation == "torch" else "sparse kernel", target, target, 7168, *measured,
            "" if ms else "torch's int8 kernel takes one scale per row",
        ))  # fmt: skip
    return frame(rows)
