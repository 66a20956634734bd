"""The report's appendix and whatever else comes from provenance: machines, commits, times, missing pieces, the log."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd

from reports import style
from reports.document import Block, Heading, Table, Text, escape
from reports.load import EXPERIMENTS, TABLES, Run, command

LOG = Path(__file__).parent.parent / "docs" / "LOG.md"
IN_TIMES = ("tables", "started", "seconds", "commit", "dirty")  # told in the table of times


def machine(run: Run) -> str:
    """The machine in words: the GPU where one was used, else the processor."""
    for name in ("e06_throughput", "e05_mlp_latency"):
        if name in run.tables:
            return str(run.tables[name]["machine"].iloc[0])
    for entry in run.provenance.values():
        hardware = entry.get("hardware")
        if isinstance(hardware, dict) and (hardware.get("gpus") or hardware.get("cpu")):
            gpus = hardware.get("gpus") or []
            return ", ".join(gpus) if gpus else f"{hardware['cpu']}, {hardware.get('cores', '?')} cores"
        if isinstance(hardware, str):
            return hardware
    return "unknown machine"


def commit(entry: dict[str, Any]) -> str:
    """`0123456789`, and whether the tree had changes that were not committed."""
    name = str(entry.get("commit") or "unknown")[:10]
    return name + (", with uncommitted changes" if entry.get("dirty") else "")


def provenance_line(run: Run, experiment: str) -> str:
    """When, how long, from which commit: one paragraph."""
    entry = run.provenance.get(experiment)
    if entry is None:
        return "*Provenance:* none recorded for this experiment."
    said = [f"measured {_started(entry)}", f"took {_took(entry)}", f"commit {escape(commit(entry))}"]
    for key in ("seed", "model_hash", "data_hash"):
        if entry.get(key) not in (None, ""):
            said.append(f"{key.replace('_', ' ')} {escape(str(entry[key])[:16])}")
    torch = (entry.get("versions") or {}).get("torch")
    return f"*Provenance:* {', '.join(said)}" + (f", torch {escape(str(torch))}." if torch else ".")


def _started(entry: dict[str, Any]) -> str:
    """`2001-01-01 00:00 UTC`."""
    started = str(entry.get("started") or "")
    shown = started[:16].replace("T", " ") + (" UTC" if started.endswith(("+00:00", "Z")) else "")
    return escape(shown) or "at an unknown time"


def _took(entry: dict[str, Any]) -> str:
    seconds = entry.get("seconds")
    return style.duration(float(seconds)) if isinstance(seconds, int | float) else "an unknown time"


def appendix(runs: list[Run]) -> list[Block]:
    blocks: list[Block] = [Heading(1, "Appendix"), Heading(2, "Machines and versions")]
    for run in runs:
        if not run.provenance:
            blocks.append(Text(f"{escape(run.label)}: no provenance."))
            continue
        label = escape(run.label)
        blocks.append(Table(_times(run), f"{label}: when each experiment ran and how long it took.", (46, 24, 16, 14)))
        caption = f"{label}: hardware, versions and settings, as recorded with the measurements."
        blocks.append(Table(pd.DataFrame(_facts(run)), caption, (22, 78)))
    blocks += [Heading(2, "Missing pieces"), *_missing(runs)]
    if LOG.exists():
        blocks += [Heading(2, "Log of what was tried"), Text(_demote(LOG.read_text(encoding="utf-8")))]
    return blocks


def _times(run: Run) -> pd.DataFrame:
    rows = [
        {"Experiment": f"{name}: {EXPERIMENTS.get(name, '')}", "Started": _started(entry), "Took": _took(entry),
         "Commit": escape(commit(entry))}
        for name, entry in run.provenance.items()
    ]  # fmt: skip
    seconds = [
        float(entry["seconds"]) for entry in run.provenance.values() if isinstance(entry.get("seconds"), int | float)
    ]
    rows.append({"Experiment": "together", "Started": "", "Took": style.duration(sum(seconds)), "Commit": ""})
    return pd.DataFrame(rows)


def _facts(run: Run) -> list[dict[str, str]]:
    """Facts that all experiments share once; those that differ once per experiment."""
    by_key: dict[str, dict[str, list[str]]] = {}
    for experiment, entry in run.provenance.items():
        for key, value in entry.items():
            text = style.listed(value)
            if key not in IN_TIMES and text:
                by_key.setdefault(key, {}).setdefault(text, []).append(experiment)
    rows = []
    for key, values in by_key.items():
        for text, experiments in values.items():
            everywhere = len(experiments) == len(run.provenance)
            where = "" if everywhere else f" ({', '.join(experiments)})"
            rows.append({"What": escape(key.replace("_", " ")) + where, "Recorded": escape(text)})
    return rows


def _missing(runs: list[Run]) -> list[Block]:
    rows = []
    for run in runs:
        label = escape(run.label)
        for experiment in EXPERIMENTS:
            named = [name for name in TABLES if name.startswith(experiment)]
            absent = [name for name in named if name not in run.tables and name not in run.problems]
            again = f"`{command(experiment, run)}`"
            if absent:
                rows.append((label, escape(", ".join(absent)), "not measured here", again))
            rows += [
                (label, escape(name), f"broken: {escape(run.problems[name])}", again)
                for name in named
                if name in run.problems
            ]
        if "provenance" in run.problems:
            rows.append((label, "provenance", escape(run.problems["provenance"]), ""))
    if not rows:
        return [Text("None: every table of every run is there and readable.")]
    columns = ["Run", "Table", "Why", "Command"]
    # runs of one profile lack the same tables: said once
    frame = pd.DataFrame(rows, columns=columns).groupby(columns[1:], sort=False)["Run"].agg(", ".join).reset_index()
    frame = frame[columns].sort_values(["Run", "Table"], kind="stable")
    return [Table(frame, "Tables that are not in these runs.", (12, 28, 17, 43))]


def _demote(markdown: str) -> str:
    """The log's headings three levels down, outside code blocks, its own title dropped."""
    out, code = [], False
    for line in markdown.splitlines():
        code ^= line.startswith("```")
        if not code and line.startswith("# "):
            continue
        out.append(re.sub(r"^(#+) ", r"##\1 ", line) if not code else line)
    return "\n".join(out).strip()
