"""The report's appendix: machines, commits and times of the runs shown, what they noted, what they lack."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from reports.core import style
from reports.core.document import Block, Heading, Table, Text, escape
from reports.core.load import Run, command
from reports.core.provenance import commit, seconds, started
from reports.core.section import Section

IN_TIMES = ("tables", "started", "seconds", "attempts", "commit", "commits", "dirty")  # shown in the table of times
LONGEST = 600  # characters of one recorded fact


def appendix(runs: list[Run], sections: list[Section]) -> list[Block]:
    """Provenance of every run, and what is missing."""
    blocks: list[Block] = [Heading(1, "Appendix: log of the runs shown")]
    for run in runs:
        label = escape(run.label)
        if not run.provenance:
            blocks.append(Text(f"{label}: no provenance; commit, versions and hardware are unknown."))
            continue
        blocks.append(Table(_times(run, sections), f"{label}: when each experiment ran, for how long (all attempts), "
                            "at which commit.", (42, 22, 14, 22)))  # fmt: skip
        caption = f"{label}: hardware, versions, settings and notes, as recorded with the measurements."
        blocks.append(Table(pd.DataFrame(_facts(run)), caption, (22, 78)))
    return [*blocks, Heading(2, "Missing pieces"), *_missing(runs, sections)]


def _times(run: Run, sections: list[Section]) -> pd.DataFrame:
    titles = {section.experiment: section.title for section in sections}
    rows = [
        {"Experiment": escape(f"{name}: {titles.get(name, '')}"), "Started": escape(started(entry)),
         "Took": style.duration(seconds(entry)), "Commit": escape(commit(entry))}
        for name, entry in run.provenance.items()
    ]  # fmt: skip
    known = [seconds(entry) for entry in run.provenance.values() if math.isfinite(seconds(entry))]
    rows.append({"Experiment": "together", "Started": "", "Took": style.duration(sum(known)), "Commit": ""})
    return pd.DataFrame(rows)


def _facts(run: Run) -> list[dict[str, str]]:
    """Facts that all experiments share once; those that differ once per experiment."""
    by_key: dict[str, dict[str, list[str]]] = {}
    for experiment, entry in run.provenance.items():
        for key, value in _flat(entry).items():
            text = style.listed(value)
            if text:
                by_key.setdefault(key, {}).setdefault(text, []).append(experiment)
    rows = []
    for key, values in by_key.items():
        for text, experiments in values.items():
            everywhere = len(experiments) == len(run.provenance)
            where = "" if everywhere else f" ({', '.join(experiments)})"
            shown = text if len(text) <= LONGEST else f"{text[:LONGEST]} ... (the rest is in provenance.json)"
            rows.append({"What": escape(key.replace("_", " ")) + where, "Recorded": escape(shown)})
    return rows


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    """The facts of one experiment. Settings that most experiments share are separate from their options."""
    facts = {key: value for key, value in entry.items() if key not in IN_TIMES}
    settings = facts.pop("settings", None) or {}
    if isinstance(settings, dict):
        options = settings.get("options")
        facts["settings"] = {k: v for k, v in settings.items() if k not in ("experiment", "options")}
        facts["options"] = options
    if isinstance(facts.get("argv"), list):
        facts["argv"] = " ".join(map(str, facts["argv"]))
    return {("command line" if key == "argv" else key): value for key, value in facts.items()}


def _missing(runs: list[Run], sections: list[Section]) -> list[Block]:
    rows = []
    for run in runs:
        label = escape(run.label)
        for section in sections:
            names = [row_type.table for row_type in section.tables]
            absent = [name for name in names if name not in run.tables and name not in run.problems]
            again = f"`{command(section.experiment, run)}`"
            if absent:
                rows.append((label, escape(", ".join(absent)), "not measured here", again))
            rows += [(label, escape(name), f"broken: {escape(run.problems[name])}", again) for name in names
                     if name in run.problems]  # fmt: skip
        rows += [(label, escape(name), "no section of the report reads it", "") for name in run.unclaimed]
        if "provenance" in run.problems:
            rows.append((label, "provenance", escape(run.problems["provenance"]), ""))
    if not rows:
        return [Text("None: every table of every run is there and readable.")]
    columns = ["Run", "Table", "Why", "Command"]
    # runs of one profile lack the same tables: said once
    frame = pd.DataFrame(rows, columns=columns).groupby(columns[1:], sort=False)["Run"].agg(", ".join).reset_index()
    frame = frame[columns].sort_values(["Run", "Table"], kind="stable")
    return [Table(frame, "Tables that are not in these runs.", (12, 30, 17, 41))]
