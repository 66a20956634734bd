"""Load run directories: CSV tables and provenance, with what is missing or broken said in words.

A run directory holds `results/*.csv` and `provenance.json` (written by the experiments), or the CSVs directly inside
(published under `results/<machine>/<profile>/`). A table that is absent, or whose columns or numbers are not those
expected, never becomes zeros: it lands in `Run.problems` with the reason and is left out of `Run.tables`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

PAPER = Path(__file__).parent / "paper"

_ZERO_SHOT = (
    "model,variant,sparsity_target,sparsity_measured,task,metric,value,stderr,difference,difference_stderr,items,chance"
)
_COLUMNS = {
    "e01_histogram": "model,layer,layer_index,bin_left,bin_right,count",
    "e01_thresholds": "model,layer,layer_index,sparsity_target,threshold,sparsity_calibration,sparsity_heldout",
    "e02_zero_shot": _ZERO_SHOT,
    "e03_finetuning": "model,variant,seed,step,learning_rate,task,accuracy,stderr,items,train_loss,eval_loss",
    "e03_sparsity": "model,variant,seed,step,layer,layer_index,sparsity_target,sparsity_measured,recalibrated,"
    "accuracy_mean",
    "e03_sweep": "model,variant,learning_rate,step,eval_loss,chosen",
    "e04_sweep": "model,task,variant,learning_rate,step,eval_loss,chosen",
    "e04_task_finetuning": "model,task,variant,seed,accuracy,stderr,items,sparsity_target,sparsity_measured,chance",
    "e05_mlp_latency": "machine,shape,d,m,dtype,rows,threads,sparsity_target,sparsity,implementation,geomean_ms,"
    "p20_ms,p50_ms,p80_ms,rounds,bytes_moved,gb_per_s,bandwidth_gb_per_s,bound_ms,fraction_of_bound,error",
    "e06_throughput": "machine,model,layers,dtype,variant,sparsity_target,sparsity_measured,loop,batch,prompt,"
    "prompt_tokens,generated_tokens,prefill_s,decode_s,tokens_per_second,compile_s,peak_memory_bytes",
    "e06_shares": "machine,model,layers,dtype,component,milliseconds,share",
    "e06_amdahl": "machine,model,layers,dtype,kernel_speedup,mlp_share,predicted_speedup,measured_speedup",
    "e06_greedy": "machine,model,layers,dtype,check,tokens,identical_tokens",
    "e07_attention": _ZERO_SHOT,
}
TABLES: dict[str, tuple[str, ...]] = {name: tuple(columns.split(",")) for name, columns in _COLUMNS.items()}
"""Table name -> the columns it must have (more are allowed)."""

EXPERIMENTS = {
    "e01": "Activation histograms (Figure 1)",
    "e02": "Zero-shot accuracy (Table 1)",
    "e03": "General fine-tuning (Figures 2 and 5)",
    "e04": "Task fine-tuning (Tables 2 and 3)",
    "e05": "MLP latency (Figures 3 and 6)",
    "e06": "Generation throughput (Figure 4)",
    "e07": "CATS in the attention block (appendix B)",
}

_TEXT = {"model", "layer", "variant", "task", "metric", "machine", "shape", "dtype", "implementation", "error"}
_TEXT |= {"loop", "component", "prompt", "check"}
_FLAGS = {"recalibrated", "chosen"}
_TRUE, _FALSE = {"true", "1", "1.0", "yes"}, {"false", "0", "0.0", "no", ""}


@dataclass(frozen=True)
class Run:
    """One run directory: its tables by name, and the reason for each table that is not there."""

    label: str
    path: Path
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, dict[str, Any]] = field(default_factory=dict)

    def table(self, name: str) -> pd.DataFrame | None:
        """The table, or None when it is missing or broken (`problems[name]` says which)."""
        return self.tables.get(name)

    @property
    def profiles(self) -> list[str]:
        """The profiles that its experiments ran with, as far as recorded."""
        entries = self.provenance.values()
        named = [(entry.get("settings") or {}).get("profile") or entry.get("profile") for entry in entries]
        return sorted({str(name) for name in named if name})

    def broken(self, experiment: str) -> list[str]:
        """Sentences about tables of one experiment that are present but cannot be read."""
        return [f"{name}.csv: {why}" for name, why in self.problems.items() if name.startswith(experiment)]


def command(experiment: str, run: Run | None = None) -> str:
    """The command that measures what is missing, with the profile of the run that misses it."""
    profile = run.profiles[0] if run and run.profiles else "pocket"
    return f"nox -s experiment -- {experiment}" + (f" --profile {profile}" if profile != "pocket" else "")


def read_table(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """Read one CSV. Raises ValueError naming the column that is missing or that holds something else than numbers."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"unreadable ({str(error).strip()})") from error
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(f"column{'s' * (len(missing) > 1)} {', '.join(missing)} missing")
    if table.empty:
        raise ValueError("it has a header and no rows")
    for column in columns:
        if column in _FLAGS:
            table[column] = _flags(table[column])
        elif column not in _TEXT:
            table[column] = _numbers(table[column])
    return table


def _numbers(column: pd.Series) -> pd.Series:
    values = pd.to_numeric(column, errors="coerce")
    wrong = column[values.isna() & ~column.str.strip().str.lower().isin(["", "nan"])]
    if len(wrong):
        raise ValueError(f"column {column.name} holds {wrong.iloc[0]!r} in row {wrong.index[0] + 2}, not a number")
    return values.astype(float)


def _flags(column: pd.Series) -> pd.Series:
    text = column.str.strip().str.lower()
    wrong = column[~text.isin(_TRUE | _FALSE)]
    if len(wrong):
        raise ValueError(f"column {column.name} holds {wrong.iloc[0]!r} in row {wrong.index[0] + 2}, not True or False")
    return text.isin(_TRUE)


def load_run(path: Path, label: str | None = None) -> Run:
    """Load one run directory. Raises ValueError when it is no directory or holds none of the expected CSVs."""
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory; give a run directory, for example runs/pocket")
    folder = path / "results" if any((path / "results" / f"{name}.csv").exists() for name in TABLES) else path
    tables: dict[str, pd.DataFrame] = {}
    problems: dict[str, str] = {}
    for name, columns in TABLES.items():
        file = folder / f"{name}.csv"
        if not file.exists():
            continue
        try:
            tables[name] = read_table(file, columns)
        except ValueError as error:
            problems[name] = str(error)
    if not tables and not problems:
        raise ValueError(f"{path} holds no results (none of {', '.join(f'{name}.csv' for name in TABLES)})")
    provenance, problem = _read_provenance(path)
    if problem:
        problems["provenance"] = problem
    return Run(label or path.name, path, tables, problems, provenance)


def _read_provenance(path: Path) -> tuple[dict[str, dict[str, Any]], str]:
    file = next((f for f in (path / "provenance.json", path / "results" / "provenance.json") if f.exists()), None)
    if file is None:
        return {}, "provenance.json is missing: commit, versions and hardware are unknown"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        experiments = content["experiments"]
        if not isinstance(experiments, dict) or not all(isinstance(entry, dict) for entry in experiments.values()):
            raise TypeError("experiments is not a table of tables")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {}, f"provenance.json is broken ({error}): commit, versions and hardware are unknown"
    common = {key: value for key, value in content.items() if key != "experiments"}
    return {name: {**common, **entry} for name, entry in experiments.items()}, ""


def load_runs(paths: list[Path]) -> list[Run]:
    """Load several run directories under short labels that differ: the last parts of their paths."""
    if not paths:
        raise ValueError("no run directory given; give at least one, for example runs/pocket")
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise ValueError("the same run directory is given twice")
    for depth in range(1, max(map(len, parts)) + 1):
        labels = [" ".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(labels):
            break
    labels = [
        " ".join(part[-2:]) if part[-3:-2] == ("results",) else label for part, label in zip(parts, labels, strict=True)
    ]
    return [load_run(path, label) for path, label in zip(paths, labels, strict=True)]


def paper_table(name: str) -> pd.DataFrame:
    """One CSV of the paper's own numbers, by file name without suffix."""
    return pd.read_csv(PAPER / f"{name}.csv")


def paper_models(model: str, available: Mapping[str, Any] | pd.Series) -> list[str]:
    """The paper's models to show beside `model`: the same one where the paper has it, else its two 7B models."""
    flat = model.lower().replace("-", "").replace("_", "")
    known = {"mistral7b": "Mistral-7B", "llama27b": "Llama2-7B", "llama213b": "Llama2-13B"}
    names = list(dict.fromkeys(available))
    same = [name for key, name in known.items() if key in flat and name in names]
    return same or [name for name in names if name in ("Mistral-7B", "Llama2-7B")]
