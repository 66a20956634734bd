"""The report's appendix: machines, commits and times of the runs shown, what they lack; and what they noted."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from reports.core import style
from reports.core.document import Block, Heading, Table, Text, escape
from reports.core.load import Run, command
from reports.core.provenance import NOT_RECORDED, commit, incomplete, seconds, started
from reports.core.section import Section

IN_TIMES = (
    "tables",
    "started",
    "finished",
    "seconds",
    "attempts",
    "commit",
    "commits",
    "dirty",
    "written",
)  # in the first table
# what is said to be not recorded where it is null
RECORDED = ("command", "versions", "hardware")
IN_FILE = ("schema", "units", "checksums", "source_sha256")  # for machines, in provenance.json
LONGEST = 600  # characters of one recorded fact


def appendix(runs: list[Run], sections: list[Section]) -> list[Block]:
    """When and where every run was measured, and what is missing."""
    blocks: list[Block] = [Heading(1, "Appendix: log of the runs shown")]
    blocks += [
        Text(f"{escape(run.label)}: no provenance; commit, versions and hardware are unknown.")
        for run in runs
        if not run.provenance
    ]
    if any(run.provenance for run in runs):
        caption = "When each run's experiments ran, for how long (all attempts), at which commit, with which versions."
        blocks.append(Table(_times(runs), caption, (20, 36, 16, 28)))
    return [*blocks, Heading(2, "Missing pieces"), *_missing(runs, sections)]


def recorded(runs: list[Run]) -> list[Block]:
    """Hardware, versions, settings and notes of every run, as recorded."""
    facts = _facts(runs)
    if facts.empty:
        return []
    caption = "Hardware, versions, settings and notes, as recorded with the measurements."
    return [Heading(2, "What the runs recorded"), Table(facts, caption, (24, 76))]


def _times(runs: list[Run]) -> pd.DataFrame:
    """A row per run and commit: its experiments with their times, the first start, the versions that matter."""
    rows = []
    for run in runs:
        by_commit: dict[str, list[str]] = {}
        for name, entry in run.provenance.items():
            by_commit.setdefault(commit(entry), []).append(name)
        known = [at for at in map(seconds, run.provenance.values()) if math.isfinite(at)]
        for place, (measured, names) in enumerate(by_commit.items()):
            entries = [run.provenance[name] for name in names]
            took = ", ".join(_took(name, run.provenance[name]) for name in names)
            total = f"; all {style.duration(sum(known))}" if len(run.provenance) > 1 and not place else ""
            rows.append(
                {
                    "Run": escape(run.label) if not place else "",
                    "Experiments, time": escape(took + total),
                    "Started": escape(min(started(entry) for entry in entries)),
                    "Commit, versions": escape("; ".join(filter(None, [measured, _versions(entries)]))),
                }
            )
    return pd.DataFrame(rows)


def _took(experiment: str, entry: dict[str, Any]) -> str:
    """`e05 10 min 26 s (incomplete: 7 of 16 units missing)`."""
    lacks = incomplete(entry)
    return f"{experiment} {style.duration(seconds(entry))}" + (f" ({lacks})" if lacks else "")


def _versions(entries: list[dict[str, Any]]) -> str:
    """`torch 2.11.0, triton 3.6.0`: the versions that a speed or an accuracy depends on most."""
    shown: dict[str, list[str]] = {}
    for entry in entries:
        for name in ("torch", "triton", "transformers"):
            if version := (entry.get("versions") or {}).get(name):
                shown.setdefault(name, []).append(str(version))
    if any("versions" in entry and entry["versions"] is None for entry in entries):
        shown["versions"] = [NOT_RECORDED]
    return ", ".join(f"{name} {' and '.join(dict.fromkeys(versions))}" for name, versions in shown.items())


def _facts(runs: list[Run]) -> pd.DataFrame:
    """A row per fact, with the runs and experiments that recorded it; nothing where all did."""
    by_key: dict[str, dict[str, dict[str, list[str]]]] = {}
    for run in runs:
        for experiment, entry in run.provenance.items():
            for key, value in _flat(entry).items():
                if text := style.listed(_of_a_folder(value)):
                    by_key.setdefault(key, {}).setdefault(text, {}).setdefault(run.label, []).append(experiment)
    rows = []
    for key, values in by_key.items():
        for text, where in values.items():
            shown = text if len(text) <= LONGEST else f"{text[:LONGEST]} ... (the rest is in provenance.json)"
            rows.append({"What": escape(key.replace("_", " ")) + _where(where, runs), "Recorded": escape(shown)})
    return pd.DataFrame(rows)


def _of_a_folder(value: Any) -> Any:
    """Without the names on the hub of a text that was read from a local folder: the hub was not asked."""
    if not isinstance(value, dict):
        return value
    local = bool(value.get("folder"))
    kept = {key: inner for key, inner in value.items() if not (local and key in ("path", "name", "revision"))}
    kept |= {"source": "a local folder"} if local and "source" in value else {}
    return {key: _of_a_folder(inner) for key, inner in kept.items()}


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
    facts = {key: value for key, value in entry.items() if key not in (*IN_TIMES, *IN_FILE)}
    facts |= {key: NOT_RECORDED for key in RECORDED if key in facts and facts[key] is None}
    for key in (f"{name}_by_attempt" for name in RECORDED):
        if isinstance(facts.get(key), list):
            facts[key] = [NOT_RECORDED if value is None else value for value in facts[key]]
    settings = facts.pop("settings", None) or {}
    if isinstance(settings, dict):
        options = settings.get("options")
        facts["settings"] = {k: v for k, v in settings.items() if k not in ("experiment", "options")}
        facts["options"] = options
    if isinstance(facts.get("argv"), list):
        facts["argv"] = " ".join(map(str, facts["argv"]))
    return {("command line" if key == "argv" else key): value for key, value in facts.items()}


def _missing(runs: list[Run], sections: list[Section]) -> list[Block]:
    """What no run has, and what is broken in one; samples, which accompany a table, are not named beside it."""
    rows = []
    for section in sections:
        absent = [t for t in section.tables if not any(t.table in {**run.tables, **run.problems} for run in runs)]
        tables = [t.table for t in absent if not t.samples] or [t.table for t in absent]
        if tables:
            again = f"`{command(section.experiment, runs[0])}`"
            rows.append((escape(", ".join(tables)), "not measured here", again))
        for run in runs:
            rows += [
                (escape(t.table), escape(f"broken in {run.label}: {run.problems[t.table]}"),
                 f"`{command(section.experiment, run)}`")
                for t in section.tables if t.table in run.problems
            ]  # fmt: skip
    for run in runs:
        rows += [
            (escape(name), escape(f"{run.label}: no section of the report reads it"), "") for name in run.unclaimed
        ]
        if "provenance" in run.problems:
            rows.append(("provenance", escape(f"{run.label}: {run.problems['provenance']}"), ""))
    if not rows:
        return [Text("None: every table is there in some run, and readable.")]
    frame = pd.DataFrame(rows, columns=["Table", "Why", "Command"])
    return [Table(frame, "Tables that no run has, or that cannot be read.", (30, 34, 36))]
