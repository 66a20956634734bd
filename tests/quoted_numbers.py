"""What a number quoted in a document is, as measured: functions from a run below results/ to the number.

`tests/quoted_numbers.toml` says which sentence of which document quotes which of them.

    python -m tests.quoted_numbers    # write what results/ say now into sentences whose numbers have changed
"""

from __future__ import annotations

import functools
import math
import re
import string
import sys
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.framework.tables import (
    CriterionRow,
    CriterionSpeedRow,
    FinetuningRow,
    LatencyRow,
    QuantizationRow,
    QuantizationSpeedRow,
    QuantizationThroughputRow,
    ThroughputRow,
    ZeroShotRow,
)
from reports.core.load import Run, load_run, paper_table
from reports.core.section import discover, row_types
from reports.e08.tables import text_rows
from reports.measures.accuracy import zero_shot_means
from reports.measures.finetuning import finetuning_means
from reports.measures.frontier import fastest
from reports.measures.generation import figure_4, generation_speedups
from reports.measures.latency import OURS, SHAPES, batch_one, kernel_speedups

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
DECLARED = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
NUMBER = r"[+-]?\d[\d,]*(?:\.\d+)?"


@functools.cache
def run_at(name: str) -> Run:
    """The committed run `results/NAME`."""
    return load_run(RESULTS / name, row_types(discover()), name)


def one(table: pd.DataFrame, column: str, **where: object) -> float:
    """The column's value in the only row with these values.

    Raises:
        ValueError: no row has them, or several.
    """
    rows = table
    for name, value in where.items():
        same = np.isclose(rows[name], value) if isinstance(value, float) else rows[name] == value
        rows = rows[same]
    if len(rows) != 1:
        raise ValueError(f"{len(rows)} rows have {where}")
    return float(rows[column].iloc[0])


def mlp(run: str, column: str = "speedup", pick: str = "", **where: object) -> float:
    """e05 at batch 1: speed-up of our kernel over the fastest dense (or ``over_torch``, ``over_own``); ``pick``: the
    smallest or largest (min, max) of the rows."""
    rows = batch_one(kernel_speedups(run_at(run).tables[LatencyRow.table]))
    rows = rows[(rows["implementation"] == OURS) & rows["shape"].isin(SHAPES) & (rows["condition"] == "figure")]
    if not pick:
        return one(rows, column, **where)
    level = where.pop("sparsity_target")
    return float(rows.loc[np.isclose(rows["sparsity_target"], level), column].agg(pick))


def generation(run: str, column: str = "speedup", over: str = "", **where: object) -> float:
    """e06, Figure 4's rows: ``speedup``, ``tokens_per_second``, ``dense_tokens_per_second``; with ``over`` the dense of
    that run is meant, which may be e09's of weights that are not quantised.

    Raises:
        ValueError: ``over`` is slower than the run's own dense.
    """

    def of(name: str, wanted: str) -> float:
        return one(figure_4(generation_speedups(run_at(name).tables[ThroughputRow.table])), wanted, **where)

    if not over:
        return of(run, column)
    e06 = ThroughputRow.table in run_at(over).tables
    dense = of(over, "dense_tokens_per_second") if e06 else quantized_generation(over, "none", "dense")
    if dense < of(run, "dense_tokens_per_second"):
        raise ValueError(f"dense is slower in {over} than in {run}")
    return {
        "dense_tokens_per_second": dense,
        "speedup": of(run, "tokens_per_second") / dense,
    }[column]


def quantized_generation(run: str, format: str, variant: str) -> float:
    """e09: median tokens per second of a format."""
    table = run_at(run).tables[QuantizationThroughputRow.table]
    rows = table[(table["format"] == format) & (table["variant"] == variant)]
    if rows.empty:
        raise ValueError(f"no row has {format}, {variant}")
    return float(rows["tokens_per_second"].median())


def quantized_mlp(run: str, format: str, sparsity_target: float, over: str, beside: str = "") -> float:
    """e09: speed-up of our kernel over the fastest dense of the same bits, of this run and of ``beside``
    (``over="dense"``; of the same format where that is ``none``), or over itself on bfloat16 weights at the same
    sparsity (``over="bfloat16"``)."""
    table = run_at(run).tables[QuantizationSpeedRow.table]
    dense = pd.concat([table, *([run_at(beside).tables[QuantizationSpeedRow.table]] if beside else [])])
    dense = dense[dense["implementation"] != "cats"]
    ours = table[(table["implementation"] == "cats") & np.isclose(table["sparsity_target"], sparsity_target)]
    if over == "bfloat16":
        other = one(ours, "p50_ms", format="none")
    else:
        alike = dense["format"] == "none" if format == "none" else dense["bits"] == one(ours, "bits", format=format)
        other = float(dense.loc[alike, "p50_ms"].min())
    return other / one(ours, "p50_ms", format=format)


def accuracy(run: str, variant: str) -> float:
    """e02: the mean over the tasks."""
    return one(zero_shot_means(run_at(run).tables[ZeroShotRow.table]), "value", variant=variant)


def accuracy_change(run: str, variant: str) -> float:
    """e02: points of mean accuracy from dense."""
    return 100 * one(zero_shot_means(run_at(run).tables[ZeroShotRow.table]), "difference", variant=variant)


def perplexity(run: str, variant: str) -> float:
    """e02: of held-out text."""
    return one(run_at(run).tables[ZeroShotRow.table], "value", variant=variant, metric="perplexity")


def perplexity_ratio(run: str, variant: str) -> float:
    """e02: over dense."""
    return perplexity(run, variant) / perplexity(run, "dense")


def perplexity_increase(run: str, variant: str) -> float:
    """e02: over dense, in percent."""
    return 100 * (perplexity_ratio(run, variant) - 1)


def finetuned_increase(run: str, variant: str, step: int) -> float:
    """e03: increase of perplexity over dense fine-tuned alike, mean over seeds, in percent."""
    table = run_at(run).tables[FinetuningRow.table]
    losses = table[table["step"] == step].drop_duplicates(["variant", "seed"]).groupby("variant")["eval_loss"].mean()
    return 100 * math.expm1(losses[variant] - losses["dense"])


def finetuned_ratio(run: str, variant: str, step: int) -> float:
    """e03: perplexity over that of dense fine-tuned alike."""
    return 1 + finetuned_increase(run, variant, step) / 100


def finetuned_accuracy(run: str, variant: str, step: int) -> float:
    """e03: mean over tasks and seeds."""
    return one(finetuning_means(run_at(run).tables[FinetuningRow.table]), "accuracy", variant=variant, step=step)


def criterion_tokens(run: str, variant: str) -> float:
    """e08: tokens per second."""
    return one(run_at(run).tables[CriterionSpeedRow.table], "value", variant=variant, what="token")


def criterion_increase(run: str, variant: str, scope: str = "mlp") -> float:
    """e08: increase of perplexity over dense, in percent."""
    return 100 * one(text_rows(run_at(run).tables[CriterionRow.table]), "increase", variant=variant, scope=scope)


def answers(run: str, variant: str, column: str = "value", prompt: str = "masked") -> float:
    """e08: exact matches of generated answers, as a fraction."""
    return one(run_at(run).tables[CriterionRow.table], column, variant=variant, prompt=prompt, metric="exact_match")


def criterion_sparsity(run: str, variant: str) -> float:
    """e08: fraction of the neurons that was skipped on held-out text."""
    table = run_at(run).tables[CriterionRow.table]
    return one(
        table,
        "sparsity_measured",
        variant=variant,
        scope="mlp",
        metric="perplexity",
        prompt="masked",
        task="heldout_text",
    )


def quantized_increase(run: str, model: str, format: str, variant: str = "dense") -> float:
    """e09: increase of perplexity over dense, unquantised weights, in percent."""
    table = run_at(run).tables[QuantizationRow.table]
    difference = one(table, "difference", model=model, format=format, variant=variant, metric="perplexity")
    return 100 * math.expm1(difference)


def criterion_speed(run: str, variant: str, what: str = "token", machine: str = "") -> float:
    """e08: speed-up over dense of the whole token, or of the MLPs."""
    speed = fastest(run_at(run).tables[CriterionSpeedRow.table])
    return one(speed, "speedup", variant=variant, what=what, **({"machine": machine} if machine else {}))


def paper(table: str, column: str, **where: object) -> float:
    """A number that the paper prints."""
    return one(paper_table(table), column, **where)


def value_of(entry: dict[str, object]) -> float:
    """The number that an entry of the TOML file asks for: `of` names a function here, the rest are its arguments."""
    arguments = dict(entry)
    name, factor = str(arguments.pop("of")), arguments.pop("times", 1)
    known = {f.__name__: f for f in KNOWN}
    if name not in known:
        raise ValueError(f"of must be one of {', '.join(known)}, not {name}")
    value = factor * known[name](**arguments)  # type: ignore[operator]
    if not math.isfinite(value):
        raise ValueError(f"{entry} is not measured")
    return value


KNOWN = (
    mlp, generation, accuracy, accuracy_change, perplexity, perplexity_ratio, perplexity_increase, criterion_increase,
    answers, criterion_sparsity, quantized_increase, criterion_speed, criterion_tokens, finetuned_increase,
    finetuned_ratio, finetuned_accuracy, paper, quantized_generation, quantized_mlp,
)  # fmt: skip


def sentence(quote: dict) -> str:
    """What the document should say."""
    return quote["text"].format(*map(value_of, quote["values"]))


def pattern(quote: dict) -> re.Pattern:
    """The sentence with any numbers, wherever its lines end."""
    parts = string.Formatter().parse(quote["text"])
    literal = [re.escape(text) + (f"({NUMBER})" if name is not None else "") for text, name, *_ in parts]
    return re.compile("".join(literal).replace("\\ ", r"\s+"))


def update(document: str, quote: dict) -> bool:
    """Write the numbers that results/ give into the one place where the document has the sentence.

    Raises:
        ValueError: the document does not have it once.
    """
    path = ROOT / document
    text = path.read_text(encoding="utf-8")
    found = list(pattern(quote).finditer(text))
    if len(found) != 1:
        raise ValueError(f"{document} has {len(found)} times: {quote['text']}")
    numbers = pattern(quote).fullmatch(sentence(quote))
    if numbers is None:
        raise ValueError(f"the numbers of {quote['text']!r} are not written as numbers: {sentence(quote)}")
    for place in range(len(numbers.groups()), 0, -1):
        start, end = found[0].span(place)
        text = text[:start] + numbers.group(place) + text[end:]
    changed = text != path.read_text(encoding="utf-8")
    if changed:
        path.write_text(text, encoding="utf-8")
    return changed


if __name__ == "__main__":
    for declared in DECLARED["quote"]:
        try:
            if update(declared["document"], declared):
                print(f"{declared['document']}: {sentence(declared)}")
        except ValueError as error:
            sys.exit(f"tests.quoted_numbers: {error}")
