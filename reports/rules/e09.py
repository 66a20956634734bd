"""Whether the damage of quantisation and that of sparsity add up (e09); no claim of the paper."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from experiments.framework.tables import QuantizationRow, QuantizationTextSample
from reports.core.load import Run
from reports.core.statistics import Estimate, bootstrap_means, unpack_numbers
from reports.core.style import signed_percent, variant_name
from reports.core.verdicts import Finding, column_of, decide, untested

SHARE = 0.1
"""Of the sum of both damages: the most by which the damage of both together may differ from that sum."""
PLAIN = "none"
Blocks = Mapping[tuple[str, str], np.ndarray]


def damages_add_up(run: Run) -> list[Finding]:
    """Holds here if, for every format and level, the increase of the logarithm of perplexity by quantisation and
    sparsity together differs from the sum of the increases by each alone by at most a tenth of that sum, either way:
    then perplexity is multiplied by the product of both factors. Paired over blocks of text, against the unquantised
    dense model; one level beyond decides against it: the two interact.
    """
    table, samples = run.table(QuantizationRow), run.table(QuantizationTextSample)
    if table is None:
        return []
    findings = []
    for name, part in table[table["metric"] == "perplexity"].groupby("model", sort=False):
        model = str(name)
        blocks = blocks_of(samples, model)
        for form in [str(one) for one in part["format"].unique() if one != PLAIN]:
            variants = [str(v) for v in part.loc[part["format"] == form, "variant"].unique() if v != "dense"]
            findings.append(_finding(model, form, variants, blocks))
    return findings


def blocks_of(samples: pd.DataFrame | None, model: str) -> Blocks:
    """(format, variant) -> nats per token of each block."""
    if samples is None:
        return {}
    rows = samples[samples["model"] == model].to_dict("records")
    return {(row["format"], row["variant"]): unpack_numbers(row["nats"]) for row in rows}


def _finding(model: str, form: str, variants: list[str], blocks: Blocks) -> Finding:
    needed = {(PLAIN, "dense"), (form, "dense"), *((of, v) for of in (PLAIN, form) for v in variants)}
    if not variants:
        return untested(model, "no level measured", condition=form)
    if needed - set(blocks):
        return untested(model, "no losses of blocks were kept", condition=form)
    if len({len(blocks[key]) for key in needed}) > 1:
        return untested(model, "formats were measured on different text", condition=form)
    margins, said, ends = [], [], []
    for variant in variants:
        together, apart = effects(blocks, form, variant)
        excess = together - apart
        estimate = _estimate(excess)
        margins += [
            (f"{variant_name(variant)}, more than the sum", _estimate(SHARE * apart - excess)),
            (f"{variant_name(variant)}, less than the sum", _estimate(SHARE * apart + excess)),
        ]
        factors = [signed_percent(float(np.expm1(one.mean()))) for one in (together, apart)]
        said.append(f"{variant_name(variant)}: {factors[0]} together, {factors[1]} by the product")
        if estimate.known:
            low, high = (signed_percent(float(np.expm1(end))) for end in (estimate.low, estimate.high))
            ends.append(f"{variant_name(variant)}: interaction {low} to {high}")
    verdict, reason = decide(margins)
    return Finding(model, column_of(model), verdict, "; ".join(said), "; ".join(ends), reason, condition=form)


def effects(blocks: Blocks, form: str, variant: str) -> tuple[np.ndarray, np.ndarray]:
    """Per block, in nats per token: the increase by both together, and the sum of the increases by each alone."""
    base = blocks[PLAIN, "dense"]
    together = blocks[form, variant] - base
    return together, (blocks[form, "dense"] - base) + (blocks[PLAIN, variant] - base)


def _estimate(values: np.ndarray) -> Estimate:
    """Mean over blocks, resampled; unknown for a single block."""
    if len(values) < 2:
        return Estimate(float(values.mean()), how="a single block of text")
    low, high = np.quantile(bootstrap_means(values, np.random.default_rng(0)), [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high), f"paired over {len(values)} blocks")
