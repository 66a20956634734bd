"""The report's tables: data frames of finished cells (Markdown), from the tables of one run."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from reports import style
from reports.claims import NOT_TESTED
from reports.document import escape
from reports.figures_latency import batch_one, paper_latency
from reports.load import paper_models, paper_table
from reports.stats import (
    bytes_bound_speedup,
    finetuning_means,
    generation_speedups,
    sparsity_means,
    speedup_at,
    task_means,
    throughput_by_length,
    variants,
    zero_shot_means,
)

Tables = Mapping[str, pd.DataFrame]


def claims(judged: pd.DataFrame, several_runs: bool) -> pd.DataFrame:
    """The claims table: what claims.csv holds, with a claim's own cells printed on its first row only."""
    rows, last = [], ""
    for row in judged.to_dict("records"):
        first = row["claim"] != last
        last = row["claim"]
        where = [escape(row["run"])] * (several_runs and bool(row["run"])) + [escape(row["model"])] * bool(row["model"])
        verdict = f"**{row['verdict']}**" if row["verdict"] != NOT_TESTED else f"{NOT_TESTED}; run `{row['command']}`"
        rows.append(
            {
                "": row["claim"] if first else "",
                "Claim": escape(row["statement"]) if first else "",
                "The paper": escape(row["paper"]) if first else "",
                "Measured on": ", ".join(where),
                "Ours": escape(row["ours"]) or style.DASH,
                "Uncertainty": escape(row["uncertainty"]),
                "Verdict": verdict,
            }
        )
    return pd.DataFrame(rows)


def _paper_average(variant: str, model: str) -> str:
    paper = paper_table("table1_zero_shot").query("task == 'average' and variant == @variant and model == @model")
    return style.number(paper["accuracy"].iloc[0]) if len(paper) else style.DASH


def zero_shot(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """Table 1's layout: a row a variant, a column a task, then the plain mean; each with its standard error."""
    part = table[(table["model"] == model) & (table["metric"] == "acc")]
    means = zero_shot_means(part).set_index("variant").to_dict("index")
    rows = []
    for variant in variants(part):
        at = part[part["variant"] == variant].drop_duplicates("task").set_index("task").to_dict("index")
        cells = {"": style.variant_name(variant)}
        for task in dict.fromkeys(part["task"]):
            cell = style.plus_minus(at[task]["value"], at[task]["stderr"]) if task in at else style.DASH
            cells[_heading(task)] = cell
        mean = means[variant]
        cells["Average"] = f"**{style.plus_minus(mean['value'], mean['stderr'])}**"
        rows.append(cells)
    chance = {
        escape(style.task_name(str(task))): style.number(of["chance"].iloc[0]) for task, of in part.groupby("task")
    }
    rows.append({"": "*chance*", **chance, "Average": style.number(next(iter(means.values()))["chance"])})
    return pd.DataFrame(rows)


def _heading(task: str) -> str:
    return "Average" if task == "average" else escape(style.task_name(task))


def zero_shot_paper(model: str) -> pd.DataFrame:
    """The paper's Table 1 for the models that stand beside `model`."""
    paper = paper_table("table1_zero_shot")
    rows = []
    for name in paper_models(model, paper["model"]):
        of_model = paper[paper["model"] == name]
        for variant in variants(of_model):
            at = of_model[of_model["variant"] == variant].set_index("task")["accuracy"]
            cells = {_heading(str(task)): style.number(value) for task, value in at.items()}
            rows.append({"Model": name, "": style.variant_name(variant), **cells})
    return pd.DataFrame(rows).fillna(style.DASH)


def zero_shot_summary(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """A row a variant: sparsity, mean accuracy, paired change against base, perplexity, and the paper's averages."""
    part = table[table["model"] == model]
    means = zero_shot_means(part)
    perplexity = part[part["metric"] == "perplexity"].groupby("variant")["value"].first()
    sites = {
        f"at {str(metric).removeprefix('sparsity_').replace('_', ' ')}": of_site.set_index("variant")["value"]
        for metric, of_site in part.groupby("metric", sort=False)
        if str(metric).startswith("sparsity_")
    }
    rows = []
    for row in means.to_dict("records"):
        variant = row["variant"]
        error = row["difference_stderr"]
        change = style.points(row["difference"])
        change += f" ± {100 * error:.2f}" if math.isfinite(error) else ""
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
    """Learning rates tried for each variant, and the one that was used."""
    table = table[table["step"] == table.groupby(["model", "variant", "learning_rate"])["step"].transform("max")]
    return pd.DataFrame(
        [
            {
                "Model": escape(row["model"]),
                "": style.variant_name(row["variant"]),
                "Learning rate": f"{row['learning_rate']:g}",
                "Step": style.number(row["step"], 0),
                "Evaluation loss": style.number(row["eval_loss"]),
                "Used": "yes" if row["chosen"] else "",
            }
            for row in table.to_dict("records")
        ]
    )


def task_finetuning(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """Tables 2 and 3 in one: accuracy per task, change against base, sparsity left, and the paper's averages."""
    means = task_means(table[table["model"] == model])
    paper, left = paper_table("table2_task_finetuning"), paper_table("table3_task_finetuned_sparsity")
    average = paper[paper["task"] == "average"].set_index("variant")["accuracy"]
    sparsity = left[left["task"] == "average"].set_index("variant")["sparsity_percent"]
    base = means[(means["variant"] == "dense") & (means["task"] == "average")]["accuracy"]
    rows = []
    for variant in variants(means):
        at = means[means["variant"] == variant].set_index("task").to_dict("index")
        cells = {"": style.variant_name(variant)}
        for task in dict.fromkeys(means["task"]):
            cells[_heading(task)] = (
                style.plus_minus(at[task]["accuracy"], at[task]["stderr"]) if task in at else style.DASH
            )
        mean = at.get("average")
        cells["Relative to base"] = style.DASH
        if mean is not None and len(base) > 0 and variant != "dense":
            cells["Relative to base"] = f"{style.points(mean['accuracy'] / base.iloc[0] - 1)} %"
        cells["Sparsity left"] = style.percent(mean["sparsity_measured"]) if mean is not None else style.DASH
        cells["Paper, average"] = style.number(average.get(variant, math.nan))
        cells["Paper, sparsity"] = f"{sparsity[variant]:.1f} %" if variant in sparsity else style.DASH
        rows.append(cells)
    return pd.DataFrame(rows)


def latency(tables: Tables) -> pd.DataFrame:
    """Speed-up at 50, 70 and 90 %: ours with its p20 to p80 range, the bound by bytes, and the paper's nearest row."""
    table, paper = batch_one(tables), paper_latency()
    rows = []
    for (machine, shape, dtype), part in table.groupby(["machine", "shape", "dtype"], sort=False):
        cats = part[part["implementation"] == "cats"]
        theirs = paper[(paper["model"] == shape) & (paper["implementation"] == "fused-mask")]
        for target in (0.5, 0.7, 0.9):
            at = speedup_at(cats, target) if len(cats) else None
            near = theirs[(theirs["sparsity"] - target).abs() <= 0.05]
            near = near.iloc[(near["sparsity"] - target).abs().argsort()[:1]]
            close = cats.iloc[(cats["sparsity"] - target).abs().argsort()[:1]]
            rows.append(
                {
                    "Machine": escape(str(machine)),
                    "Shape": str(shape),
                    "Dtype": style.dtype_name(str(dtype)),
                    "Sparsity": f"{100 * target:.0f} %",
                    "Dense, ms": style.number(part["dense_ms"].median(), 3),
                    "Ours": f"**{style.times(at[0])}** ({at[1]:.2f} to {at[2]:.2f})" if at else style.DASH,
                    "Bytes bound": style.times(float(bytes_bound_speedup(target))),
                    "Of the bound": style.percent(close["fraction_of_bound"].iloc[0], 0) if len(close) else style.DASH,
                    "Paper": f"{style.times(near['speedup'].iloc[0])} at {100 * near['sparsity'].iloc[0]:.1f} %"
                    if len(near)
                    else style.DASH,
                }
            )
    return _without_constant(pd.DataFrame(rows), "Machine")


def latency_errors(table: pd.DataFrame) -> pd.DataFrame:
    """What could not be timed, and why."""
    failed = table[table["error"].str.strip() != ""]
    rows = failed.groupby(["shape", "dtype", "rows", "implementation", "error"]).size().reset_index(name="count")
    return pd.DataFrame(
        [
            {"Shape": r["shape"], "Dtype": style.dtype_name(r["dtype"]), "Rows": f"{r['rows']:.0f}",
             "Implementation": r["implementation"], "Sparsities": str(r["count"]), "Error": escape(r["error"][:200])}
            for r in rows.to_dict("records")
        ]
    )  # fmt: skip


def throughput(table: pd.DataFrame) -> pd.DataFrame:
    """Figure 4's numbers: tokens per second for each length, dense and CATS-50, with what else the run cost."""
    lengths = throughput_by_length(generation_speedups(table))
    rows = []
    for row in lengths.to_dict("records"):
        same = table[
            (table["model"] == row["model"]) & (table["layers"] == row["layers"]) & (table["dtype"] == row["dtype"])
            & (table["loop"] == row["loop"]) & (table["batch"] == 1)
            & (table["variant"].eq("dense") | np.isclose(table["sparsity_target"], 0.5))
        ]  # fmt: skip
        memory = same.groupby(same["variant"].eq("dense"))["peak_memory_bytes"].max()
        ratio = memory.get(False, math.nan) / memory.get(True, math.nan)
        error = row["log_stderr"] * row["speedup"]
        rows.append(
            {
                "Model": f"{escape(row['model'])}, {row['layers']:.0f} layers",
                "Dtype": style.dtype_name(row["dtype"]),
                "Loop": row["loop"],
                "Tokens": f"{row['generated_tokens']:.0f}",
                "Dense, tokens/s": style.number(row["dense_tokens_per_second"], 2),
                "CATS-50, tokens/s": style.number(row["tokens_per_second"], 2),
                "Speed-up": f"**{style.times(row['speedup'])}**" + (f" ± {error:.3f}" if math.isfinite(error) else ""),
                "Sparsity": style.percent(row["sparsity_measured"]),
                "Prefill, s": style.number(same["prefill_s"].median(), 3),
                "Compile, s": style.number(same["compile_s"].max(), 1),
                "Memory": style.times(ratio),
            }
        )
    return pd.DataFrame(rows)


def amdahl(table: pd.DataFrame) -> pd.DataFrame:
    """What Amdahl's law allows from the MLP's share and the kernel's gain, against what was measured."""
    return pd.DataFrame(
        [
            {
                "Model": f"{escape(row['model'])}, {row['layers']:.0f} layers",
                "Dtype": style.dtype_name(row["dtype"]),
                "Kernel speed-up": style.times(row["kernel_speedup"]),
                "MLP share": style.percent(row["mlp_share"]),
                "Predicted": style.times(row["predicted_speedup"]),
                "Measured": style.times(row["measured_speedup"]),
                "Measured / predicted": style.number(row["measured_speedup"] / row["predicted_speedup"], 3),
            }
            for row in table.to_dict("records")
        ]
    )


def greedy(table: pd.DataFrame) -> pd.DataFrame:
    """Whether CATS generates the tokens it must."""
    return pd.DataFrame(
        [
            {
                "Model": f"{escape(row['model'])}, {row['layers']:.0f} layers",
                "Dtype": style.dtype_name(row["dtype"]),
                "Check": escape(row["check"]),
                "Identical tokens": f"{row['identical_tokens']:.0f} of {row['tokens']:.0f}",
            }
            for row in table.to_dict("records")
        ]
    )


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
    return pd.DataFrame(rows)


def _without_constant(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """Without a column that says the same in every row (the caption says it then)."""
    return frame.drop(columns=column) if column in frame and frame[column].nunique() <= 1 else frame
