"""Made-up results with the experiments' columns, for the tests of the report. No number here was measured.

Run `python -m tests.make_results DIR` to look at a report drawn from them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from reports.load import TABLES

ACCURACY = {
    "dense": 0.70,
    "cats-50": 0.69,
    "cats-70": 0.67,
    "cats-90": 0.50,
    "cats-matched": 0.52,
    "relufication": 0.40,
}
TARGET = {"dense": np.nan, "cats-50": 0.5, "cats-70": 0.7, "cats-90": 0.9, "cats-matched": 0.88, "relufication": np.nan}
TASKS = [
    "next_line",
    "docstring",
    "attribute_of_import",
    "keyword",
    "exception",
    "name_in_scope",
    "belongs",
    "operator",
]
UNPAIRED = (np.nan, np.nan, 20000, np.nan)  # difference, difference_stderr, items, chance
OTHER_SITES = {"attention_input": 0.498, "mlp_input": 0.499}
PERPLEXITY = {"dense": 10, "cats-50": 10.5, "cats-70": 12, "cats-90": 30, "cats-matched": 28, "relufication": 20}


def histogram(model: str = "made-up", scale: float = 0.05, layers: tuple[int, ...] = (0, 2, 4)) -> pd.DataFrame:
    """Exponential activations of mean `scale` in 400 bins over [0, 20 scale]."""
    edges = np.linspace(0, 20 * scale, 401)
    mass = np.diff(-np.exp(-edges / scale)) * 1e6
    frames = [
        pd.DataFrame(
            {
                "model": model,
                "layer": f"model.layers.{layer}.mlp",
                "layer_index": layer,
                "bin_left": edges[:-1],
                "bin_right": edges[1:],
                "count": mass.round(),
            }
        )
        for layer in layers
    ]
    return pd.concat(frames)


def thresholds(model: str = "made-up", scale: float = 0.05, layers: int = 5) -> pd.DataFrame:
    """The exponential's own quantiles."""
    return pd.DataFrame(
        [
            (model, f"model.layers.{i}.mlp", i, s, -np.log(1 - s) * scale, s, s + 0.004 * (i - 2))
            for i in range(layers)
            for s in (0.5, 0.7, 0.9)
        ],
        columns=TABLES["e01_thresholds"],
    )


def zero_shot(model: str = "made-up", accuracy: dict[str, float] | None = None, stderr: float = 0.02) -> pd.DataFrame:
    """Eight tasks around the given means (their mean is exact), and held-out perplexity."""
    accuracy = accuracy or ACCURACY
    offsets = np.linspace(-0.1, 0.1, len(TASKS))
    rows = []
    for variant, mean in accuracy.items():
        target = TARGET.get(variant, 0.5)
        measured = {"relufication": 0.88, "dense": 0.0}.get(variant, target + 0.003)
        for task, offset in zip(TASKS, offsets, strict=True):
            difference = (np.nan, np.nan) if variant == "dense" else (mean - accuracy["dense"], stderr / 2)
            rows.append((model, variant, target, measured, task, "acc", mean + offset, stderr, *difference, 500, 0.3))
        if variant in PERPLEXITY:
            rows.append(
                (model, variant, target, measured, "heldout_text", "perplexity", PERPLEXITY[variant], 0.1, *UNPAIRED)
            )
    return pd.DataFrame(rows, columns=TABLES["e02_zero_shot"])


def finetuning(model: str = "made-up", final: dict[str, float] | None = None, seeds: int = 3) -> pd.DataFrame:
    """Curves from ACCURACY to `final`."""
    final = final or {"dense": 0.70, "cats-50": 0.70, "cats-70": 0.69, "cats-90": 0.62, "relufication": 0.55}
    rows = []
    for variant, end in final.items():
        for seed in range(seeds):
            for step in (0, 50, 100, 200, 400):
                start = ACCURACY[variant]
                mean = start + (end - start) * (1 - 0.5 ** (step / 50)) + (0.004 * (seed - 1) if step else 0.0)
                for task in TASKS[:4]:
                    rows.append(
                        (model, variant, seed, step, 1e-4, task, mean, 0.02, 500, 2 - step / 500, 2.1 - step / 500)
                    )
    return pd.DataFrame(rows, columns=TABLES["e03_finetuning"])


def finetuned_sparsity(model: str = "made-up", drift: float = -0.05, layers: int = 5) -> pd.DataFrame:
    """Every layer off its target by `drift` before recalibration, on it after."""
    return pd.DataFrame(
        [
            (
                *(model, v, seed, 400, f"model.layers.{i}.mlp", i, TARGET[v]),
                *(TARGET[v] + (0 if again else drift + 0.01 * (i - 2)), again, 0.69 + 0.002 * again),
            )
            for v in ("cats-50", "cats-70", "cats-90")
            for seed in range(3)
            for i in range(layers)
            for again in (False, True)
        ],
        columns=TABLES["e03_sparsity"],
    )


def sweep(model: str = "made-up") -> pd.DataFrame:
    """Three learning rates each."""
    return pd.DataFrame(
        [(model, v, lr, 100, 2.0 + abs(np.log10(lr) + 3.5) / 9, lr == 3e-4) for v in ("cats-70", "relufication")
         for lr in (1e-4, 3e-4, 1e-3)],
        columns=TABLES["e03_sweep"],
    )  # fmt: skip


def task_sweep(model: str = "made-up") -> pd.DataFrame:
    """Two learning rates for each task."""
    return pd.DataFrame(
        [(model, task, v, lr, 16, 0.5 + lr, lr == 1e-4) for task in ("acceptability", "polarity", "yes_no")
         for v in ("cats-70", "relufication") for lr in (1e-4, 1e-3)],
        columns=TABLES["e04_sweep"],
    )  # fmt: skip


def task_finetuning(model: str = "made-up", accuracy: dict[str, float] | None = None) -> pd.DataFrame:
    """Three tasks, two seeds."""
    accuracy = accuracy or {"dense": 0.9, "cats-50": 0.898, "cats-70": 0.89, "cats-90": 0.85, "relufication": 0.72}
    return pd.DataFrame(
        [
            (model, task, v, seed, mean + offset, 0.005, 1000, TARGET[v], TARGET[v] - 0.01, 0.5)
            for v, mean in accuracy.items()
            for task, offset in (("acceptability", -0.02), ("polarity", 0.02), ("yes_no", 0.0))
            for seed in range(2)
        ],
        columns=TABLES["e04_task_finetuning"],
    )


def latency(
    machine: str = "made-up machine", gain: float = 1.0, dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    slowdown: dict[str, float] | None = None, rows: tuple[int, ...] = (1, 2, 4, 8),
) -> pd.DataFrame:  # fmt: skip
    """Every kernel at its share of the bytes bound; `gain` scales CATS and fused-mask."""
    cost = {"cats": 1.05, "fused-mask": 1.1, "fused-compact": 1.25, "gather": 1.6, **(slowdown or {})}
    out = []
    for shape, d, m in (("Mistral-7B", 4096, 14336), ("Llama2-7B", 4096, 11008), ("Llama2-13B", 5120, 13824)):
        for dtype in dtypes:
            for n in rows:
                dense = 3 * d * m * 4 / 3e7
                for target in (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
                    bound = dense * (1 + 2 * (1 - target)) / 3
                    times = {"dense": dense, "optimal-all-three-shrunk": dense * (1 - target) + 0.2}
                    times |= {k: c * bound / (gain if k in ("cats", "fused-mask") else 1) for k, c in cost.items()}
                    for name, ms in times.items():
                        sizes = (machine, shape, d, m, dtype, n, 2, target, target + 0.001, name)
                        timing = (ms, ms * 0.97, ms, ms * 1.04, 80)
                        traffic = (3 * d * m * 4, 20.0, 25.0, bound * 0.98, bound / ms, "")
                        out.append((*sizes, *timing, *traffic))
    return pd.DataFrame(out, columns=TABLES["e05_mlp_latency"])


def throughput(machine: str = "made-up machine", speedup: float = 1.2, model: str = "mistral-7b") -> pd.DataFrame:
    """Figure 4's lengths in both loops, and growth over batch, context, sparsity and layers."""
    rows = []

    def add(dtype: str, layers: int, loop: str, batch: int, prompt_tokens: int, new: int, target: float) -> None:
        for prompt in range(3):
            dense = (8.0 if loop == "eager" else 10.0) * (1 + 0.01 * prompt) * 2 / layers / (1 + prompt_tokens / 4000)
            gain = 1 + (speedup - 1) * target / 0.5 * (1.2 - batch * 0.2) * (1.05 if loop == "compiled" else 0.95)
            variant = "cats-sparsity" if target not in (0.5, 0.7, 0.9) else f"cats-{round(100 * target)}"
            for name, rate in (("dense", dense), (variant, dense * gain * (1 + 0.002 * prompt))):
                at = np.nan if name == "dense" else target
                condition = (
                    machine,
                    model,
                    layers,
                    dtype,
                    name,
                    at,
                    at + 0.002,
                    loop,
                    batch,
                    prompt,
                    prompt_tokens,
                    new,
                )
                rows.append((*condition, 0.1, new / rate, rate, 0.0 if loop == "eager" else 30.0, 3e9))

    for dtype in ("float32", "bfloat16"):
        for loop in ("eager", "compiled"):
            for new in (16, 32, 64):
                add(dtype, 2, loop, 1, 16, new, 0.5)
    for batch in (2, 4, 8):
        add("float32", 2, "eager", batch, 16, 16, 0.5)
    for context in (128, 512):
        add("float32", 2, "eager", 1, context, 16, 0.5)
    for target in (0.0, 0.7, 0.9):
        add("float32", 2, "eager", 1, 16, 16, target)
    add("float32", 4, "eager", 1, 16, 16, 0.5)
    return pd.DataFrame(rows, columns=TABLES["e06_throughput"]).drop_duplicates()


def shares(machine: str = "made-up machine") -> pd.DataFrame:
    """Where a token's time goes."""
    parts = (("mlp", 0.7), ("attention", 0.15), ("head", 0.1), ("other", 0.05))
    return pd.DataFrame(
        [(machine, "mistral-7b", 2, "float32", name, 100 * share, share) for name, share in parts],
        columns=TABLES["e06_shares"],
    )


def amdahl(machine: str = "made-up machine") -> pd.DataFrame:
    """One line of Amdahl's law."""
    return pd.DataFrame(
        [(machine, "mistral-7b", 2, dtype, 1.45, 0.7, 1.278, 1.2) for dtype in ("float32", "bfloat16")],
        columns=TABLES["e06_amdahl"],
    )


def greedy(machine: str = "made-up machine") -> pd.DataFrame:
    """Two checks, one of them failed."""
    checks = (("cats-0 against dense", 16), ("cats-50 against masked reference", 11))
    return pd.DataFrame(
        [(machine, "mistral-7b", 2, "float32", check, 16, same) for check, same in checks], columns=TABLES["e06_greedy"]
    )


def attention(model: str = "made-up", accuracy: dict[str, float] | None = None) -> pd.DataFrame:
    """e07 from the same maker as e02, with the share of zeros at each site."""
    table = zero_shot(model, accuracy or {"dense": 0.70, "cats-50": 0.69, "cats-50-attention": 0.67})
    table = table[table["metric"] == "acc"]
    first = table[table["variant"] != "dense"].drop_duplicates("variant")
    sites = [("gate", 0.503, first)]
    sites += [(site, share, first[first["variant"].str.contains("attention")]) for site, share in OTHER_SITES.items()]
    unmeasured = {name: np.nan for name in ("stderr", "difference", "difference_stderr", "chance")}
    rows = [
        of.assign(task="heldout_text", metric=f"sparsity_{site}", value=share, **unmeasured)
        for site, share, of in sites
    ]
    return pd.concat([table, *rows], ignore_index=True)


def all_tables() -> dict[str, pd.DataFrame]:
    """Every table once."""
    return {
        "e01_histogram": histogram(),
        "e01_thresholds": thresholds(),
        "e02_zero_shot": zero_shot(),
        "e03_finetuning": finetuning(),
        "e03_sparsity": finetuned_sparsity(),
        "e03_sweep": sweep(),
        "e04_sweep": task_sweep(),
        "e04_task_finetuning": task_finetuning(),
        "e05_mlp_latency": latency(),
        "e06_throughput": throughput(),
        "e06_shares": shares(),
        "e06_amdahl": amdahl(),
        "e06_greedy": greedy(),
        "e07_attention": attention(),
    }


def provenance() -> dict[str, object]:
    """What the runner writes beside the tables, made up."""
    return {
        "profile": "pocket",
        "experiments": {
            f"e{i:02d}": {
                "commit": "0123456789abcdef0123456789abcdef01234567",
                "dirty": i == 3,
                "versions": {"python": "3.12.0", "torch": "2.11.0", "transformers": "5.17.0"},
                "hardware": {"machine": "made-up machine", "cpu": "Imaginary CPU", "cores": 2, "memory_gib": 24},
                "seed": 0,
                "model_hash": "f" * 64,
                "data_hash": "e" * 64,
                "started": f"2001-01-0{i}T00:00:00+00:00",
                "seconds": 61.5 * i,
            }
            for i in range(1, 8)
        },
    }


def write_run(folder: Path, tables: dict[str, pd.DataFrame] | None = None, flat: bool = False) -> Path:
    """A run directory of these tables (default: all); `flat` puts the CSVs directly inside."""
    inside = folder if flat else folder / "results"
    inside.mkdir(parents=True, exist_ok=True)
    for name, table in (all_tables() if tables is None else tables).items():
        table.to_csv(inside / f"{name}.csv", index=False)
    (folder / "provenance.json").write_text(json.dumps(provenance()), encoding="utf-8")
    return folder


if __name__ == "__main__":
    write_run(Path(sys.argv[1]))
