"""Tables of e08: what each criterion affords, its loss at three levels, dense prompts, speed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from cats import criteria
from experiments.framework.tables import CriterionRow, CriterionSample, CriterionSpeedRow, CriterionTextSample
from reports.core import style
from reports.core.document import escape
from reports.core.load import Run
from reports.core.tables import without_empty
from reports.e08.figures import HIGHEST, title
from reports.measures.frontier import Kept, accuracy_points, affords, fastest, speed_at, text_points

LEVELS = (0.3, 0.5, 0.7)
ROLES = {"oracle": " (ceiling)", "random": " (floor)"}
WITH_KERNEL = tuple(name for name in criteria.names() if not criteria.get(name).no_kernel)
METRIC_NAMES = {"continuation_perplexity": "perplexity of continuations", "exact_match": "exact match"}


def _name(criterion: str, scope: str) -> str:
    return title(criterion) + ROLES.get(criterion, "") + (", model" if scope == "model" else "")


def text_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of perplexity with every token masked, with its increase over the dense model as a fraction."""
    rows = table[(table["metric"] == "perplexity") & (table["prompt"] == "masked")]
    return rows.assign(increase=np.exp(rows["difference"]) - 1)


def affordable_table(run: Run) -> pd.DataFrame:
    """A row per model and criterion: the most sparsity that keeps 99 % of dense, the speed there; its loss at 50 %."""
    table, speed = run.tables[CriterionRow.table], fastest(run.table(CriterionSpeedRow))
    accuracy = accuracy_points(table, run.table(CriterionSample))
    text = text_points(table, run.table(CriterionTextSample))
    halves = text_rows(table)
    halves = halves[np.isclose(halves["sparsity_target"], 0.5)]
    rows = []
    for model in dict.fromkeys(table["model"]):
        of_model = [key for key in dict.fromkeys([*accuracy, *text]) if key[0] == model]
        half = halves[halves["model"] == model].set_index(["criterion", "scope"])
        loss = half["increase"].to_dict()
        for place, key in enumerate(sorted(of_model, key=lambda key: loss.get(key[1:], math.inf))):
            at = halves[(halves["model"] == model) & (halves["criterion"] == key[1]) & (halves["scope"] == key[2])]
            rows.append(
                {
                    "Model": "" if place else escape(style.short_name(model)),
                    "": escape(_name(*key[1:])),
                    **_kept_cells("accuracy", affords(accuracy.get(key, [])), speed, model),
                    **_kept_cells("perplexity", affords(text.get(key, [])), speed, model),
                    "Perplexity at 50 %": _cell(at),
                    "Against CATS": _ratio(at),
                    "Speed at 50 %": speed_words(_speeds_at_half(speed, *key)),
                }
            )
    frame = without_empty(pd.DataFrame(rows))
    return frame if table["model"].nunique() > 1 else frame.drop(columns="Model", errors="ignore")


def _kept_cells(metric: str, kept: Kept | None, speed: pd.DataFrame, model: str) -> dict[str, str]:
    cells = {f"Keeps 99 % of {metric}": kept.words if kept else style.DASH}
    at = speed_at(speed, model, kept.point.variant) if kept and kept.point else []
    cells[f"Speed there ({metric})"] = speed_words(at)
    return cells


def _speeds_at_half(speed: pd.DataFrame, model: str, criterion: str, scope: str) -> list[dict]:
    return speed_at(speed, model, f"{criterion}-50") if scope == "mlp" else []


def speed_words(rows: Iterable[Mapping[Any, Any]]) -> str:
    """`1.12x token, 1.60x MLPs, NVIDIA H100`: by machine; a dash for none."""
    by_machine: dict[str, list[str]] = {}
    for row in rows:
        what = "token" if row["what"] == "token" else "MLPs"
        by_machine.setdefault(str(row["machine"]), []).append(f"{style.times(row['speedup'])} {what}")
    words = (", ".join([*dict.fromkeys(speeds), escape(machine)]) for machine, speeds in by_machine.items())
    return "; ".join(words) or style.DASH


def criteria_table(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """One row per criterion and scope: the increase of perplexity at each of `LEVELS`, and against CATS at 50 %."""
    part = text_rows(table[table["model"] == model])
    part = part[part["sparsity_target"].notna()]
    rows = []
    for (criterion, scope), of_one in part.groupby(["criterion", "scope"], sort=False):
        cells: dict[str, str] = {"": escape(_name(str(criterion), str(scope)))}
        for level in LEVELS:
            cells[f"{100 * level:.0f} %"] = _cell(of_one[np.isclose(of_one["sparsity_target"], level)])
        half = of_one[np.isclose(of_one["sparsity_target"], 0.5)]
        cells["Against CATS"] = _ratio(half)
        rows.append((half["increase"].iloc[0] if len(half) else np.inf, cells))
    return pd.DataFrame([cells for _, cells in sorted(rows, key=lambda row: row[0])])


def _cell(rows: pd.DataFrame) -> str:
    if rows.empty or not np.isfinite(rows["increase"].iloc[0]):
        return style.DASH
    row = rows.iloc[0]
    if row["increase"] > HIGHEST:
        return f"over +{100 * HIGHEST:.0f} %"
    error = 100 * (1 + row["increase"]) * row["difference_stderr"]
    text = f"{100 * row['increase']:+.1f} ± {error:.1f} %".replace("-", style.MINUS)
    missed = row["on_target"] is False or row["on_target"] == 0
    return f"{text} ({style.percent(row['sparsity_measured'])})" if missed else text


def _ratio(rows: pd.DataFrame) -> str:
    if rows.empty or not np.isfinite(rows["cats_difference"].iloc[0]) or rows["criterion"].iloc[0] == "cats":
        return style.DASH
    row = rows.iloc[0]
    ratio = float(np.exp(row["cats_difference"]))
    return f"{ratio:.3f} ± {ratio * row['cats_difference_stderr']:.3f}" if ratio < HIGHEST else f"over {HIGHEST:.0f}"


def prompts_table(table: pd.DataFrame, short: bool = False) -> pd.DataFrame:
    """A row per model, measure, criterion and level that was measured with a dense prompt too; `short`: at 50 %, and of
    criteria that a kernel serves."""
    part = table[table["metric"].isin(METRIC_NAMES)]
    if short:
        half = np.isclose(part["sparsity_target"], 0.5) & part["criterion"].isin(WITH_KERNEL)
        part = part[half | (part["criterion"] == "dense")]
    keys = ["model", "metric", "task", "variant", "scope"]
    rows, last = [], ("", "")
    for (model, metric, _, variant, scope), of_one in part.groupby(keys, sort=False):
        by_prompt = of_one.drop_duplicates("prompt").set_index("prompt").to_dict("index")
        if variant == "dense" or not {"masked", "dense"} <= set(by_prompt):
            continue
        dense = part[(part["model"] == model) & (part["metric"] == metric) & (part["criterion"] == "dense")]
        base = dense["value"].iloc[0] if len(dense) else math.nan
        first = (str(model), str(metric)) != last
        last = (str(model), str(metric))
        rows.append(
            {
                "Model": escape(style.short_name(str(model))) if first else "",
                "Measure": METRIC_NAMES[str(metric)] if first else "",
                "Dense": style.significant(base) if first else "",
                "": escape(_variant(str(variant), str(scope))),
                "All masked": _change(by_prompt["masked"], str(metric)),
                "Prompt dense": _change(by_prompt["dense"], str(metric)),
            }
        )
    return pd.DataFrame(rows)


def _variant(variant: str, scope: str) -> str:
    criterion, _, level = variant.rpartition("-")
    return f"{_name(criterion, scope)}, {level} %" if criterion else variant


def _change(row: Mapping[Any, Any], metric: str) -> str:
    error = row["difference_stderr"]
    if metric.endswith("perplexity"):
        ratio = math.exp(row["difference"])
        return f"{100 * (ratio - 1):+.1f} ± {100 * ratio * error:.1f} %".replace("-", style.MINUS)
    return f"{style.points(row['difference'])} ± {100 * error:.2f} points"


def speed_table(speed: pd.DataFrame) -> pd.DataFrame:
    """A row per machine, model, what was timed and variant."""
    rows = [
        {
            "Machine": escape(str(row["machine"])),
            "Model": escape(style.short_name(str(row["model"]))),
            "Dtype": style.dtype_name(str(row["dtype"])),
            "What": escape(f"{row['what']}, {row['loop']}" if row["loop"] else str(row["what"])),
            "": escape(str(row["variant"])),
            "Dense": f"{style.significant(row['dense_value'])} {row['unit']}",
            "Sparse": f"{style.significant(row['value'])} {row['unit']}",
            "Speed-up": style.times(row["speedup"])
            + (f" ({style.times_range(row['speedup_low'], row['speedup_high'])})"
               if math.isfinite(row["speedup_low"]) else ""),
        }
        for row in fastest(speed).to_dict("records")
    ]  # fmt: skip
    return pd.DataFrame(rows)
