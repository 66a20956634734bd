"""The tables of the claims and of accuracy and sparsity: data frames of finished cells (Markdown)."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from reports import style
from reports.claims import NOT_TESTED
from reports.document import escape, without_constant
from reports.load import paper_models, paper_table
from reports.stats import finetuning_means, sparsity_means, task_means, variants, zero_shot_means


def claims(judged: pd.DataFrame, several_runs: bool) -> pd.DataFrame:
    """The claims table: what claims.csv holds, with a claim's own cells printed on its first row only."""
    rows, last = [], ""
    for row in judged.to_dict("records"):
        first = row["claim"] != last
        last = row["claim"]
        where = escape(row["model"])
        if several_runs and row["run"]:
            where = f"{where} ({escape(row['run'])})" if where else escape(row["run"])
        verdict = f"**{row['verdict']}**" + ", undecided" * (row["undecided"] == "yes")
        if row["verdict"] == NOT_TESTED:
            verdict = f"{NOT_TESTED}; run `{row['command']}`"
        rows.append(
            {
                "": row["claim"] if first else "",
                "Claim": escape(row["statement"]) if first else "",
                "The paper": escape(row["paper"]) if first else "",
                "Measured on": where,
                "Ours": escape(row["ours"]) or style.DASH,
                "Uncertainty": escape(row["uncertainty"]),
                "Verdict": verdict,
            }
        )
    return pd.DataFrame(rows)


def _paper_average(variant: str, model: str) -> str:
    paper = paper_table("table1_zero_shot").query("task == 'average' and variant == @variant and model == @model")
    return style.number(paper["accuracy"].iloc[0]) if len(paper) else style.DASH


def _bold_best(rows: list[dict[str, str]], values: list[dict[str, float]]) -> None:
    """Set the largest value of each column in bold, ties as printed; `values` stand beside `rows`, base left out."""
    for column in dict.fromkeys(name for at in values for name in at):
        printed = [round(at.get(column, math.nan), 4) for at in values]
        best = max((value for value in printed if math.isfinite(value)), default=math.nan)
        for row, value in zip(rows, printed, strict=True):
            if value == best:
                row[column] = f"**{row[column]}**"


def zero_shot(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """Table 1's layout: a row a variant, a column a task, then the plain mean; each with its standard error."""
    part = table[(table["model"] == model) & (table["metric"] == "acc")]
    means = zero_shot_means(part).set_index("variant").to_dict("index")
    tasks = list(dict.fromkeys(part["task"]))
    rows: list[dict[str, str]] = []
    values: list[dict[str, float]] = []
    for variant in variants(part):
        at = part[part["variant"] == variant].drop_duplicates("task").set_index("task").to_dict("index")
        at["average"] = means[variant]
        found = {_heading(task): at[task] for task in [*tasks, "average"] if task in at}
        cells = {_heading(task): style.DASH for task in tasks}
        cells |= {name: style.plus_minus(score["value"], score["stderr"]) for name, score in found.items()}
        rows.append({"": style.variant_name(variant), **cells})
        values.append({name: score["value"] for name, score in found.items()} if variant != "dense" else {})
    _bold_best(rows, values)
    chance = {_heading(str(task)): style.number(of["chance"].iloc[0]) for task, of in part.groupby("task")}
    rows.append({"": "*chance*", **chance, "Average": style.number(next(iter(means.values()))["chance"])})
    return pd.DataFrame(rows)


def _heading(task: str) -> str:
    return "Average" if task == "average" else escape(style.task_name(task))


def zero_shot_paper(model: str) -> pd.DataFrame:
    """The paper's Table 1 for the models that stand beside `model`."""
    paper = paper_table("table1_zero_shot")
    rows: list[dict[str, str]] = []
    for name in paper_models(model, paper["model"]):
        rows += _paper_rows(paper[paper["model"] == name], name)
    return pd.DataFrame(rows).fillna(style.DASH)


def _paper_rows(paper: pd.DataFrame, model: str) -> list[dict[str, str]]:
    """A row a variant, a column a task, of one model in one of the paper's accuracy tables."""
    rows: list[dict[str, str]] = []
    values: list[dict[str, float]] = []
    for variant in variants(paper):
        at = paper[paper["variant"] == variant].set_index("task")["accuracy"]
        found = {_heading(str(task)): value for task, value in at.items()}
        cells = {name: style.number(value) for name, value in found.items()}
        rows.append({"Model": "" if rows else model, "": style.variant_name(variant), **cells})
        values.append(found if variant != "dense" else {})
    _bold_best(rows, values)
    return rows


def zero_shot_summary(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """A row a variant: sparsity, mean accuracy, paired change against base, perplexity, and the paper's averages."""
    part = table[table["model"] == model]
    means = zero_shot_means(part)
    perplexity = part[part["metric"] == "perplexity"].groupby("variant")["value"].first()
    sites = {
        f"at {str(metric).removeprefix('sparsity_').replace('_', ' ').replace('mlp', 'MLP')}": of_site.set_index(
            "variant"
        )["value"]
        for metric, of_site in part.groupby("metric", sort=False)
        if str(metric).startswith("sparsity_")
    }
    rows = []
    for row in means.to_dict("records"):
        variant = row["variant"]
        error = row["difference_stderr"]
        change = style.points(row["difference"]) if variant != "dense" else style.DASH
        change += f" ± {100 * error:.2f}" if math.isfinite(error) and variant != "dense" else ""
        rows.append(
            {
                "": style.variant_name(variant),
                "Target": style.percent(row["sparsity_target"], 0),
                "Sparsity measured": style.percent(row["sparsity_measured"]),
                **{name: style.percent(of_site.get(variant, math.nan)) for name, of_site in sites.items()},
                "Mean accuracy": style.plus_minus(row["value"], row["stderr"]),
                "Against base, points": change,
                "Perplexity": style.number(perplexity.get(variant, math.nan), 2),
                **{f"{name} (paper)": _paper_average(variant, name)
                   for name in paper_models(model, paper_table("table1_zero_shot")["model"])},
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def finetuning(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """A row a variant, a column an evaluated step (at most seven, evenly chosen), accuracy with its standard error."""
    means = finetuning_means(table[table["model"] == model])
    steps = sorted(means["step"].unique())
    if len(steps) > 7:
        steps = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, 7).round().astype(int))]
    rows = []
    for variant in variants(means):
        at = means[means["variant"] == variant].set_index("step").to_dict("index")
        cells = {"": style.variant_name(variant)}
        for step in steps:
            found = at.get(step)
            cells[f"step {step}"] = style.plus_minus(found["accuracy"], found["stderr"]) if found else style.DASH
        rows.append(cells)
    return pd.DataFrame(rows)


def finetuned_sparsity(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """Figure 5's numbers: mean sparsity left, with and without recalibration, accuracy, and the paper's."""
    means = sparsity_means(table[table["model"] == model])
    paper = paper_table("figure5_finetuned_sparsity")
    rows = []
    for row in means.to_dict("records"):
        theirs = {}
        for name in paper_models(model, paper["model"]):
            at = paper[(paper["model"] == name) & (paper["variant"] == row["variant"])]["average_sparsity_percent"]
            theirs[f"{name} (paper)"] = f"{at.iloc[0]:.1f} %" if len(at) and not row["recalibrated"] else style.DASH
        rows.append(
            {
                "": style.variant_name(row["variant"]) + (", recalibrated" if row["recalibrated"] else ""),
                "Target": style.percent(row["sparsity_target"], 0),
                "Mean sparsity": style.percent(row["sparsity"]),
                "Single layers": f"{style.percent(row['lowest_layer'])} to {style.percent(row['highest_layer'])}",
                "Mean accuracy": style.number(row["accuracy"]),
                **theirs,
            }
        )
    return pd.DataFrame(rows)


def sweep(table: pd.DataFrame) -> pd.DataFrame:
    """A row a variant (and task): the loss at each learning rate tried, and the rate that was used."""
    of = [column for column in ("model", "task", "variant") if column in table]
    rows = []
    for key, tried in table.groupby(of, sort=False):
        named = {column: str(value) for column, value in zip(of, key, strict=True)}
        rates, chosen = sorted(tried["learning_rate"]), tried.loc[tried["chosen"], "learning_rate"]
        used = ", ".join(f"{rate:g}" for rate in chosen) or style.DASH
        at_edge = len(rates) > 1 and bool(chosen.isin([rates[0], rates[-1]]).any())
        losses = tried.set_index("learning_rate")["eval_loss"]
        rows.append(
            {
                "Model": escape(named["model"]),
                **({"Task": style.task_name(named["task"])} if "task" in named else {}),
                "Variant": style.variant_name(named["variant"]),
                "Steps": style.number(tried["step"].max(), 0),
                **{f"Loss at {rate:g}": style.number(losses[rate]) for rate in rates},
                "Used": f"{used}, at the edge" if at_edge else used,
            }
        )
    return without_constant(pd.DataFrame(rows).fillna(style.DASH), "Model")


def task_finetuning(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """Table 2's layout: a row a variant, a column a task, then the mean and its change against base."""
    means = task_means(table[table["model"] == model])
    rows, values = [], []
    base = math.nan
    for variant in variants(means):
        at = means[means["variant"] == variant].set_index("task").to_dict("index")
        cells = {_heading(task): style.DASH for task in dict.fromkeys(means["task"])}
        found = {_heading(str(task)): score for task, score in at.items()}
        cells |= {name: style.plus_minus(score["accuracy"], score["stderr"]) for name, score in found.items()}
        mean = at["average"]["accuracy"] if "average" in at else math.nan
        base = mean if variant == "dense" else base
        change = style.points(mean - base) if variant != "dense" else style.DASH
        rows.append({"": style.variant_name(variant), **cells, "Against base, points": change})
        values.append({name: score["accuracy"] for name, score in found.items()} if variant != "dense" else {})
    _bold_best(rows, values)
    return pd.DataFrame(rows)


def task_sparsity(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """Table 3's layout: the sparsity left after fine-tuning on each task, and its mean."""
    means = task_means(table[table["model"] == model])
    means = means[means["variant"] != "dense"]
    rows = []
    for variant in variants(means):
        part = means[means["variant"] == variant]
        left = {_heading(r["task"]): style.percent(r["sparsity_measured"]) for r in part.to_dict("records")}
        target = style.percent(part["sparsity_target"].iloc[0], 0)
        rows.append({"": style.variant_name(variant), "Target": target, **left})
    return pd.DataFrame(rows).fillna(style.DASH)


def task_finetuning_paper() -> pd.DataFrame:
    """The paper's Tables 2 and 3 in one: accuracy, and the sparsity left in brackets."""
    left = paper_table("table3_task_finetuned_sparsity").set_index(["variant", "task"])["sparsity_percent"]
    accuracy = paper_table("table2_task_finetuning")
    rows = _paper_rows(accuracy, "")
    for row, variant in zip(rows, variants(accuracy), strict=True):
        for task in accuracy["task"].unique():
            if (variant, task) in left.index:
                row[_heading(task)] += f" ({left[variant, task]:.1f} %)"
        del row["Model"]
    return pd.DataFrame(rows)


def thresholds(table: pd.DataFrame) -> pd.DataFrame:
    """Per model and target: thresholds over layers, and the sparsity they give on held-out text."""
    rows = []
    for (model, target), part in table.groupby(["model", "sparsity_target"], sort=False):
        held = part["sparsity_heldout"]
        rows.append(
            {
                "Model": escape(str(model)),
                "Target": f"{100 * float(str(target)):g} %",
                "Layers": str(len(part)),
                "Thresholds": f"{part['threshold'].min():.4f} to {part['threshold'].max():.4f}",
                "Held-out sparsity": f"{style.percent(held.min())} to {style.percent(held.max())}",
                "Largest distance, points": style.number(100 * (held - float(str(target))).abs().max(), 2),
            }
        )
    return without_constant(pd.DataFrame(rows), "Model")
