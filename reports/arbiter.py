"""docs/ARBITER.md: the numbers that papers print about CATS, and what our measurements say of each.

python -m reports.arbiter            # write it from results/ and reports/paper/
python -m reports.arbiter --check    # say whether the file is what would be written
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.framework.tables import CriterionRow, CriterionSample, CriterionTextSample, ItemSample, ZeroShotRow
from reports.core import style
from reports.core.document import pipe_table
from reports.core.load import Run, load_run, paper_table
from reports.core.merge import grouped, joined, of_model
from reports.core.merge import models as models_of
from reports.core.page import filled, write_or_check
from reports.core.provenance import incomplete
from reports.core.statistics import Estimate
from reports.core.verdicts import POCKET_MODEL
from reports.leaderboard import RESULTS
from reports.measures.accuracy import scores
from reports.measures.frontier import Point, accuracy_points, affords, text_points

PAGE = Path(__file__).parents[1] / "docs" / "ARBITER.md"
TYPES = (CriterionRow, CriterionSample, CriterionTextSample, ZeroShotRow, ItemSample)
SAVED = 2 / 3  # of an MLP's weights, for each neuron skipped
# weights of one block: (attention, MLP)
BLOCKS = {
    "Llama2-7B": (4 * 4096 * 4096, 3 * 4096 * 11008),
    "Mistral-7B": (2 * 4096 * 4096 + 2 * 4096 * 1024, 3 * 4096 * 14336),
    "Llama3-8B": (2 * 4096 * 4096 + 2 * 4096 * 1024, 3 * 4096 * 14336),
}
LEVELS = (0.5, 0.7, 0.9)

WITHIN, BETWEEN = "the same within our error", "around it: the printed number lies between the two levels"


@dataclass(frozen=True)
class Model:
    """What was measured of one of our models.

    Attributes:
        name: short.
        share: of the MLP in the weights of a block; NaN where it is not known.
        text: CATS's perplexity at each level.
        kept: CATS's share of dense accuracy at each level of e02.
        affords: the most sparsity that keeps 99 % of accuracy, in words.
    """

    name: str
    share: float
    text: list[Point]
    kept: dict[float, Estimate]
    affords: str


def our_models(results: Path) -> list[Model]:
    """Real models below ``results``, by size; parts of one model's measurements lie in several runs."""
    runs = []
    for path in sorted(folder for folder in results.glob("*/*") if (folder / "results").is_dir()):
        if any((path / "results" / f"{t.table}.csv").exists() for t in (CriterionRow, ZeroShotRow)):
            runs.append(load_run(path, TYPES, path.relative_to(results).as_posix()))
    made = []
    for name in dict.fromkeys(name for run in runs for t in (CriterionRow, ZeroShotRow) for name in models_of(run, t)):
        groups = grouped([of_model(run, name) for run in runs], TYPES)
        for number, members in enumerate(groups if name != POCKET_MODEL else []):
            again = f" ({members[0].label})" * (number > 0)  # measured again, with other results
            entries = [run.provenance.get(experiment, {}) for run in members for experiment in ("e02", "e08")]
            again += " (incomplete)" * any(map(incomplete, entries))
            made.append(_model(joined(members, TYPES), name, again))
    return sorted(made, key=lambda model: style.parameters(model.name))


def _model(run: Run, name: str, again: str) -> Model:
    share, text, words = math.nan, [], "not measured"
    if (table := run.table(CriterionRow)) is not None:
        key = (name, "cats", "mlp")
        text = sorted(text_points(table, run.table(CriterionTextSample)).get(key, []), key=lambda point: point.level)
        whole = table[(table["model"] == name) & (table["scope"] == "model") & table["input_sparsity"].notna()]
        if len(whole):  # the level at which attention and MLP skip as many bytes as the MLP alone
            share = float((whole["input_sparsity"] / (SAVED * whole["sparsity_measured"])).mean())
        kept = affords(accuracy_points(table, run.table(CriterionSample)).get(key, []))
        words = kept.words if kept else words
    return Model(style.short_name(name) + again, share, text, _accuracy_kept(run, name), words)


def _accuracy_kept(run: Run, name: str) -> dict[float, Estimate]:
    table = run.table(ZeroShotRow)
    if table is None:
        return {}
    at = scores(table[table["model"] == name], run.table(ItemSample), name)
    kept = {}
    for level in LEVELS:
        variant = f"cats-{100 * level:g}"
        if {"dense", variant} <= set(at):
            change, dense = at[variant].lead(at["dense"], to_dense=True), at["dense"].value
            kept[level] = Estimate(1 + change.value / dense, 1 + change.low / dense, 1 + change.high / dense, WITHIN)
    return kept


def share_of(model: str) -> float:
    """Of the MLP in the weights of a block, for one of the papers' models."""
    attention, mlp = BLOCKS[model]
    return mlp / (attention + mlp)


def conversion_table(models: list[Model]) -> pd.DataFrame:
    """What k means for the whole model, and what a model-wide sparsity means as k."""
    shares = {name: share_of(name) for name in BLOCKS} | {model.name: model.share for model in models}
    rows = []
    for name, share in shares.items():
        if math.isfinite(share):
            rows.append(
                {
                    "Model": name,
                    "MLP's share of a block": style.percent(share),
                    **{f"k = {100 * k:.0f} %": style.percent(SAVED * k * share) for k in LEVELS},
                    **{f"“{100 * wide:.0f} %” is": _k_words(wide / (SAVED * share)) for wide in (0.25, 0.4)},
                }
            )
    return pd.DataFrame(rows)


def _k_words(k: float) -> str:
    return f"k = {100 * k:.0f} %" if k <= 1 else "out of CATS's reach"


def printed() -> pd.DataFrame:
    """Every printed number: the paper's own, then others'. Columns: source, model, metric, k, value, words."""
    averages = paper_table("table1_zero_shot").query("task == 'average'")
    accuracy = averages.pivot(index="model", columns="variant", values="accuracy")
    source = "the CATS paper"
    rows = []
    for row in (
        paper_table("table3_v4_perplexity").query("variant == 'cats-50' and fine_tuned == 'no'").to_dict("records")
    ):
        value = row["perplexity_increase_percent"] / 100
        rows.append({"source": source, "model": row["model"], "metric": "text", "k": 0.5, "value": value})
    for model, at in accuracy.iterrows():
        for level in LEVELS:
            if np.isfinite(value := at.get(f"cats-{100 * level:g}", math.nan)):
                share = value / at["dense"]
                words = f"accuracy {value:.4f} of {at['dense']:.4f}, {style.percent(share)} of dense"
                rows.append({"source": source, "model": model, "metric": "kept", "k": level, "value": share,
                             "words": words})  # fmt: skip
    for row in paper_table("printed_about_cats").to_dict("records"):
        rows.append(_of_others(row, accuracy))
    frame = pd.DataFrame(rows)
    plain = frame["value"].map(lambda value: f"perplexity {style.signed_percent(value)}")
    return frame.assign(words=frame["words"].where(frame["words"].notna(), plain))


def _of_others(row: Mapping[Any, Any], accuracy: pd.DataFrame) -> dict[str, object]:
    k = row["k"]
    if math.isfinite(row["model_wide"]):
        k = row["model_wide"] / (SAVED * share_of(row["model"]))
    of = f" at “{100 * row['model_wide']:.0f} %”" if math.isfinite(row["model_wide"]) else ""
    made = {"source": row["source"], "model": row["model"], "k": k}
    if row["metric"] == "perplexity":
        ratio = row["printed"] / row["dense"] - 1
        return {
            **made,
            "metric": "text",
            "value": ratio,
            "words": f"perplexity {row['printed']:g} of {row['dense']:g}{of}",
        }
    if row["metric"] == "perplexity increase":
        return {**made, "metric": "text", "value": row["printed"]}
    if row["metric"] == "accuracy":
        beside = f"beside the paper's {accuracy.loc[row['model'], 'cats-90']:.4f} for CATS-90"
        words = f"accuracy {row['printed']:.3f} ({row['where']}){of}, {beside}"
        return {**made, "metric": "none", "value": row["printed"], "words": words}
    return {
        **made,
        "metric": "affords",
        "value": row["printed"],
        "words": f"{style.percent(row['printed'], 0)}: {row['where']}",
    }


def bracket(model: Model, k: float) -> tuple[str, Estimate] | None:
    """The increase of perplexity at k, or at the measured levels around it, with its whole range; None beyond them."""
    below = [point for point in model.text if point.level <= k + 1e-6]
    above = [point for point in model.text if point.level >= k - 1e-6]
    if not below or not above:
        return None
    ends = list(dict.fromkeys([below[-1], above[0]]))
    words = " and ".join(f"{increase(point.change.value)} at {100 * point.level:g} %" for point in ends)
    low, high = math.expm1(ends[0].change.low), math.expm1(ends[-1].change.high)
    how = BETWEEN if len(ends) > 1 else WITHIN
    return words, Estimate((low + high) / 2, min(low, high), max(low, high), how)


def increase(log_ratio: float) -> str:
    """`+18.7 %`, or `99 times` from ten times on."""
    ratio = math.exp(log_ratio)
    return f"{ratio:.0f} times" if ratio >= 10 else style.signed_percent(ratio - 1)


def compared(value: float, ours: Estimate) -> str:
    """How ours lies to a printed number."""
    if not ours.known:
        return "undecided (error unknown)"
    return "larger" if ours.low > value else "smaller" if ours.high < value else ours.how


def verdicts_table(models: list[Model]) -> pd.DataFrame:
    """A row per printed number: ours at that k on each model, and how it lies to it."""
    rows, last = [], ""
    for row in printed().to_dict("records"):
        ours, lies = [], {}
        for model in models:
            if row["metric"] == "text" and (at := bracket(model, row["k"])):
                ours.append(f"{model.name}: {at[0]}")
                lies[model.name] = compared(row["value"], at[1])
            elif row["metric"] == "kept" and row["k"] in model.kept:
                estimate = model.kept[row["k"]]
                ends = f"{100 * estimate.low:.1f} to {style.percent(estimate.high)}"
                ours.append(f"{model.name}: {style.percent(estimate.value)} of dense ({ends})")
                lies[model.name] = compared(row["value"], estimate)
            elif row["metric"] == "affords":
                ours.append(f"{model.name}: {model.affords}")
        rows.append(
            {
                "Source": row["source"] if row["source"] != last else "",
                "Model": row["model"],
                "Printed": row["words"],
                "At k": style.percent(row["k"], 0) if math.isfinite(row["k"]) else style.DASH,
                "Ours": "; ".join(ours) or style.DASH,
                "Ours is": _said(lies),
            }
        )
        last = row["source"]
    return pd.DataFrame(rows)


def _said(lies: dict[str, str]) -> str:
    by_word: dict[str, list[str]] = {}
    for model, word in lies.items():
        by_word.setdefault(word, []).append(model)
    if len(by_word) == 1 and len(lies) > 1:
        return f"{next(iter(by_word))} on all {len(lies)}"
    return "; ".join(f"{word} ({', '.join(names)})" for word, names in by_word.items()) or style.DASH


def findings(models: list[Model]) -> list[str]:
    """What follows, each with the numbers that it rests on."""
    frame = printed()
    frame = frame[frame["metric"] == "text"]
    half, near = frame[frame["k"] == 0.5], frame[frame["k"].between(0.4, 0.5, inclusive="left")]
    said = [_at_half(models, half["value"])]
    said += [_near_teal(models, row) for row in near.to_dict("records")]
    rises = [
        f"{model.name} {increase(model.text[-2].change.value)} at {100 * model.text[-2].level:g} % and "
        f"{increase(model.text[-1].change.value)} at {100 * model.text[-1].level:g} %"
        for model in models
        if len(model.text) > 1
    ]
    k_of = {name: 100 * 0.4 / (SAVED * share_of(name)) for name in ("Llama2-7B", "Mistral-7B")}
    said.append(
        f"Perplexity collapses between neighbouring levels: {'; '.join(rises)}. A “40 %” that is "
        f"{' and '.join(f'k = {k:.0f} % on {name}' for name, k in k_of.items())} is two places on such a curve, so "
        "that numbers of different papers at “40 %” may both be right."
    )
    said.append(
        "The paper's CATS-90 on Llama2-7B and the averages that R-Sparse and LaRoSA print at “40 %” are of the "
        "same k; their tasks differ, so neither agreement nor contradiction follows."
    )
    return said


def _at_half(models: list[Model], values: pd.Series) -> str:
    ours = {model.name: at for model in models if (at := bracket(model, 0.5))}
    larger = [name for name, (_, at) in ours.items() if at.low > values.max()]
    return (
        f"The paper's increase of perplexity at 50 % is {_range(values)} on 7B models; ours: "
        f"{'; '.join(f'{name} {words}' for name, (words, _) in ours.items())}. Our whole interval lies above the "
        f"paper's numbers on {len(larger)} of {len(ours)} models. Whether the increase shrinks to them with size is "
        "not measured here."
    )


def _near_teal(models: list[Model], row: Mapping[Any, Any]) -> str:
    around = {model.name: at for model in models if (at := bracket(model, row["k"]))}
    same = [name for name, (_, at) in around.items() if compared(row["value"], at) in (BETWEEN, WITHIN)]
    small = f" ({', '.join(same)}): small models show such a loss at that k" if same else ""
    return (
        f"TEAL's {style.signed_percent(row['value'], 0)} on {row['model']} near k = {100 * row['k']:.0f} % lies "
        f"between our values at the levels around it on {len(same)} of {len(around)} models{small}. "
        "That says nothing of Mistral-7B itself."
    )


def _range(values: pd.Series) -> str:
    return f"{style.signed_percent(values.min())} to {style.signed_percent(values.max())}"


def arbiter(results: Path) -> str:
    """The page as Markdown."""
    models = our_models(results)
    parts = {
        "conversion": pipe_table(conversion_table(models)),
        "printed": pipe_table(verdicts_table(models)),
        "findings": "\n".join(f"- {one}" for one in findings(models)),
    }
    return filled("arbiter.md", parts)


def main(arguments: list[str] | None = None) -> int:
    """Command line. Returns 0, or 1 after one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="python -m reports.arbiter", description="Write or check docs/ARBITER.md.")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: results/")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the file would change")
    given = parser.parse_args(arguments)
    return write_or_check(PAGE, lambda: arbiter(given.results), given.check, "reports.arbiter")


if __name__ == "__main__":
    sys.exit(main())
