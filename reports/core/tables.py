"""Layouts that several sections share: accuracy by task, the paper's beside it, sweeps; cells are finished Markdown."""

from __future__ import annotations

import math

import pandas as pd

from reports.core import style
from reports.core.document import escape, without_constant
from reports.core.load import paper_models, paper_table
from reports.measures.accuracy import variants, zero_shot_means


def bold_best(rows: list[dict[str, str]], values: list[dict[str, float]]) -> None:
    """Set the largest value of each column in bold, ties as printed; `values` stand beside `rows`, base left out."""
    for column in dict.fromkeys(name for at in values for name in at):
        printed = [round(at.get(column, math.nan), 4) for at in values]
        best = max((value for value in printed if math.isfinite(value)), default=math.nan)
        for row, value in zip(rows, printed, strict=True):
            if value == best:
                row[column] = f"**{row[column]}**"


def heading(task: str) -> str:
    """A task's name as the heading of a column."""
    return "Average" if task == "average" else escape(style.task_name(task))


def zero_shot(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """Table 1's layout: a row per variant, a column per task, then the plain mean; each with its standard error."""
    part = table[(table["model"] == model) & (table["metric"] == "acc")]
    means = zero_shot_means(part).set_index("variant").to_dict("index")
    tasks = list(dict.fromkeys(part["task"]))
    rows: list[dict[str, str]] = []
    values: list[dict[str, float]] = []
    for variant in variants(part):
        at = part[part["variant"] == variant].drop_duplicates("task").set_index("task").to_dict("index")
        at["average"] = means[variant]
        measured = {heading(task): at[task] for task in [*tasks, "average"] if task in at}
        cells = {heading(task): style.DASH for task in tasks}
        cells |= {name: style.plus_minus(score["value"], score["stderr"]) for name, score in measured.items()}
        rows.append({"": escape(style.variant_name(variant)), **cells})
        values.append({name: score["value"] for name, score in measured.items()} if variant != "dense" else {})
    bold_best(rows, values)
    chance = {heading(str(task)): style.number(of["chance"].iloc[0]) for task, of in part.groupby("task")}
    rows.append({"": "*chance*", **chance, "Average": style.number(next(iter(means.values()))["chance"])})
    return pd.DataFrame(rows)


def paper_rows(paper: pd.DataFrame, model: str) -> list[dict[str, str]]:
    """A row per variant, a column per task, of one model in one of the paper's accuracy tables."""
    rows: list[dict[str, str]] = []
    values: list[dict[str, float]] = []
    for variant in variants(paper):
        at = paper[paper["variant"] == variant].set_index("task")["accuracy"]
        printed = {heading(str(task)): value for task, value in at.items()}
        cells = {name: style.number(value) for name, value in printed.items()}
        rows.append({"Model": "" if rows else model, "": style.variant_name(variant), **cells})
        values.append(printed if variant != "dense" else {})
    bold_best(rows, values)
    return rows


def accuracy_summary(table: pd.DataFrame, beside_paper: bool) -> pd.DataFrame:
    """A row per model and variant: sparsity (also by site), mean accuracy, paired change to base, perplexity, and the
    paper's accuracies."""
    models = [str(model) for model in table.loc[table["metric"] == "acc", "model"].unique()]
    frames = [_summary_of(table, model, beside_paper) for model in models]
    for model, frame in zip(models, frames, strict=True):
        frame.insert(0, "Model", [escape(style.model_name(model)), *[""] * (len(frame) - 1)])
    shown = pd.concat(frames, ignore_index=True).fillna(style.DASH) if frames else pd.DataFrame()
    return without_empty(shown if len(models) > 1 else shown.drop(columns="Model", errors="ignore"))


def _summary_of(table: pd.DataFrame, model: str, beside_paper: bool) -> pd.DataFrame:
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
    paper = paper_table("table1_zero_shot")
    names = paper_models(model, paper["model"]) if beside_paper else []
    rows = []
    for row in means.to_dict("records"):
        variant, error = row["variant"], row["difference_stderr"]
        change = style.points(row["difference"]) if variant != "dense" else style.DASH
        change += f" ± {100 * error:.2f}" if math.isfinite(error) and variant != "dense" else ""
        raised = math.nan
        if variant in perplexity and "dense" in perplexity and variant != "dense":
            raised = perplexity[variant] / perplexity["dense"] - 1
        rows.append(
            {
                "": escape(style.variant_name(variant)),
                "Target": style.percent(row["sparsity_target"], 0),
                "Sparsity measured": style.percent(row["sparsity_measured"]),
                **{name: style.percent(of_site.get(variant, math.nan)) for name, of_site in sites.items()},
                "Mean accuracy": style.plus_minus(row["value"], row["stderr"]),
                "Against base, points": change,
                "Perplexity": style.number(perplexity.get(variant, math.nan), 2),
                "Raised by": style.signed_percent(raised),
                **{f"{name} (paper)": _paper_average(paper, variant, name) for name in names},
            }
        )
    return pd.DataFrame(rows)


def _paper_average(paper: pd.DataFrame, variant: str, model: str) -> str:
    at = paper[(paper["task"] == "average") & (paper["variant"] == variant) & (paper["model"] == model)]
    return style.number(at["accuracy"].iloc[0]) if len(at) else style.DASH


def without_empty(frame: pd.DataFrame) -> pd.DataFrame:
    """Without columns in which nothing was measured."""
    return frame.drop(columns=[name for name in frame if (frame[name] == style.DASH).all()])


def sweep(table: pd.DataFrame) -> pd.DataFrame:
    """A row per variant (and task): the loss at each learning rate tried, and the rate that was used."""
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
                "Model": escape(style.model_name(named["model"])),
                **({"Task": escape(style.task_name(named["task"]))} if "task" in named else {}),
                "Variant": escape(style.variant_name(named["variant"])),
                "Steps": style.number(tried["step"].max(), 0),
                **{f"Loss at {rate:g}": style.number(losses[rate]) for rate in rates},
                "Used": f"{used}, at the edge" if at_edge else used,
            }
        )
    return without_constant(pd.DataFrame(rows).fillna(style.DASH), "Model")
