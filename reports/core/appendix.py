"""The report's appendix: machines, commits and times of the runs shown, what they noted, what they lack."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from reports.core import style
from reports.core.document import Block, Heading, Table, Text, escape, without_constant
from reports.core.load import Run, command
from reports.core.provenance import commit, seconds, started
from reports.core.section import Section

IN_TIMES = ("tables", "started", "seconds", "attempts", "commit", "commits", "dirty")  # shown in the table of times
LONGEST = 600  # characters of one recorded fact


def appendix(runs: list[Run], sections: list[Section]) -> list[Block]:
    """Provenance of every run, and what is missing."""
    blocks: list[Block] = [Heading(1, "Appendix: log of the runs shown")]
    blocks += [
        Text(f"{escape(run.label)}: no provenance; commit, versions and hardware are unknown.")
        for run in runs
        if not run.provenance
    ]
    if any(run.provenance for run in runs):
        times = without_constant(_times(runs, sections), "Run")
        blocks += [
            Table(times, "When each experiment ran, for how long (all attempts), at which commit."),
            Table(_facts(runs), "Hardware, versions, settings and notes, as recorded with the measurements.", (24, 76)),
        ]
    return [*blocks, Heading(2, "Missing pieces"), *_missing(runs, sections)]


def _times(runs: list[Run], sections: list[Section]) -> pd.DataFrame:
    titles = {section.experiment: section.title for section in sections}
    rows = []
    for run in runs:
        label = escape(run.label)
        known = [seconds(entry) for entry in run.provenance.values() if math.isfinite(seconds(entry))]
        for name, entry in run.provenance.items():
            rows.append(
                {
                    "Run": label,
                    "Experiment": escape(f"{name}: {titles.get(name, '')}"),
                    "Started": escape(started(entry)),
                    "Took": style.duration(seconds(entry)),
                    "Commit": escape(commit(entry)),
                }
            )
        if len(run.provenance) > 1:
            together = style.duration(sum(known))
            rows.append({"Run": label, "Experiment": "together", "Started": "", "Took": together, "Commit": ""})
    return pd.DataFrame(rows)


def _facts(runs: list[Run]) -> pd.DataFrame:
    """A row per fact, with the runs and experiments that recorded it; nothing where all did."""
    by_key: dict[str, dict[str, dict[str, list[str]]]] = {}
    for run in runs:
        for experiment, entry in run.provenance.items():
            for key, value in _flat(entry).items():
                if text := style.listed(value):
                    by_key.setdefault(key, {}).setdefault(text, {}).setdefault(run.label, []).append(experiment)
    rows = []
    for key, values in by_key.items():
        for text, where in values.items():
            shown = text if len(text) <= LONGEST else f"{text[:LONGEST]} ... (the rest is in provenance.json)"
            rows.append({"What": escape(key.replace("_", " ")) + _where(where, runs), "Recorded": escape(shown)})
    return pd.DataFrame(rows)


def _where(where: dict[str, list[str]], runs: list[Run]) -> str:
    """` (h200 paper: e05; cpu pocket)`: the runs that recorded a fact, with the experiments where not all did so."""
    said, everywhere = [], True
    for run in (run for run in runs if run.provenance):
        experiments = where.get(run.label, [])
        whole = len(experiments) == len(run.provenance)
        everywhere &= whole
        if experiments:
            named = [run.label] * (len(runs) > 1) + [", ".join(experiments)] * (not whole)
            said.append(": ".join(named))
    return "" if everywhere else f" ({escape('; '.join(said))})"


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
    return [Table(frame, "Tables that are not in these runs.", (24, 26, 14, 36))]
