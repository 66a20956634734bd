"""Ratios of generation throughput to dense, paired by prompt and repeat (e06)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from reports.core.merge import ORIGIN
from reports.core.statistics import Estimate, mean_estimate, standard_error

BENCH = ["machine", "model", "weights", "layers", "model_layers", "dtype", "attention", "loop"]
SIZES = ["condition", "batch", "prompt_tokens", "generated_tokens", "cache_tokens"]
GENERATION_KEYS = [*BENCH, *SIZES]
PAIR = ["prompt", "repeat"]


def pairs(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of the sparse variants with dense's tokens per second at the same condition, prompt and repeat.

    New columns: ``dense_tokens_per_second`` and ``log_ratio``.
    """
    table = table[table["tokens_per_second"] > 0]
    keys = [*GENERATION_KEYS, *PAIR]
    dense = table[table["criterion"] == "dense"].groupby(keys, sort=False, dropna=False)["tokens_per_second"]
    rates = np.exp(dense.agg(lambda rate: np.log(rate).mean())).rename("dense_tokens_per_second").reset_index()
    joined = table[table["criterion"] != "dense"].merge(rates, on=keys)
    return joined.assign(log_ratio=np.log(joined["tokens_per_second"] / joined["dense_tokens_per_second"]))


def generation_speedups(table: pd.DataFrame) -> pd.DataFrame:
    """One row per condition and variant: geometric means over prompts and repeats, and the ratio to dense.

    ``log_stderr`` is the standard error of the mean log ratio over prompts and repeats (NaN for a single one);
    ``origin`` as `reports.core.merge.joined` gives it, else empty.
    """
    columns = [*GENERATION_KEYS, "criterion", "variant", "sparsity_target"]
    rows = []
    for _, part in pairs(table).groupby(columns, sort=False, dropna=False):
        log_ratio = part.groupby(PAIR)["log_ratio"].mean().to_numpy()
        rows.append(
            {
                **part[columns].iloc[0].to_dict(),
                "tokens_per_second": float(np.exp(np.log(part["tokens_per_second"]).mean())),
                "dense_tokens_per_second": float(np.exp(np.log(part["dense_tokens_per_second"]).mean())),
                "speedup": float(np.exp(log_ratio.mean())),
                "log_stderr": standard_error(log_ratio),
                "sparsity_measured": part["sparsity_measured"].mean(),
                "path": part["path"].iloc[0],
                ORIGIN: part[ORIGIN].iloc[0] if ORIGIN in part else "",
                "prompts": part["prompt"].nunique(),
                "repeats": part["repeat"].nunique(),
                "prefill_s": part["prefill_s"].median(),
                "compile_s": part["compile_s"].max(),
                "peak_memory_bytes": part["peak_memory_bytes"].max(),
            }
        )
    extra = ["tokens_per_second", "dense_tokens_per_second", "speedup", "log_stderr", "sparsity_measured", "path"]
    extra += [ORIGIN, "prompts", "repeats", "prefill_s", "compile_s", "peak_memory_bytes"]
    return pd.DataFrame(rows, columns=[*columns, *extra])


def figure_4(speedups: pd.DataFrame) -> pd.DataFrame:
    """The rows of the paper's Figure 4: CATS-50 at batch 1, measured for it."""
    kept = (speedups["condition"] == "figure") & (speedups["batch"] == 1) & (speedups["variant"] == "cats-50")
    at = speedups[kept & (speedups["criterion"] == "cats")]
    return at.sort_values([*BENCH, *SIZES], kind="stable", ignore_index=True)


def over_lengths(part: pd.DataFrame) -> Estimate:
    """Ratio to dense in the mean over generated lengths, from `pairs` of one bench.

    Lengths of one prompt and repeat are read from one generation: their log ratios are averaged first, so that the
    error is that over prompts and repeats, which holds the drift from run to run.
    """
    log_ratio = part.groupby(PAIR)["log_ratio"].mean().to_numpy()
    prompts, repeats = part["prompt"].nunique(), part["repeat"].nunique()
    how = f"over {prompts} prompt{'s' * (prompts != 1)} x {repeats} repeat{'s' * (repeats != 1)}"
    return mean_estimate(log_ratio, how).exponential()
