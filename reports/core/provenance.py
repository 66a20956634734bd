"""Where a run's numbers come from, in words: machine, commits, changes, times. What is not recorded is "unknown"."""

from __future__ import annotations

import re
from typing import Any

from reports.core import style
from reports.core.document import escape
from reports.core.load import Run
from reports.core.verdicts import CPU, GPU

NOT_RECORDED = "not recorded"  # of a null in provenance.json: known not to be known
UNKNOWN_MACHINES = ("unknown machine", f"machine {NOT_RECORDED}")
LONGEST = 120  # characters of what differs from the profile; all of it is in provenance.json
_GPU_NAME = re.compile(r"\bGPU\b|NVIDIA|GeForce|Quadro|Tesla|Radeon|Instinct", re.IGNORECASE)


def machine(run: Run) -> str:
    """The machine in words: that of its timings, else the GPUs or the processor recorded."""
    for table in run.tables.values():
        if "machine" in table:
            return str(table["machine"].iloc[0])
    for entry in run.provenance.values():
        hardware = entry.get("hardware")
        if isinstance(hardware, dict) and (hardware.get("gpus") or hardware.get("cpu")):
            gpus = hardware.get("gpus") or []
            return ", ".join(_counted(gpus)) if gpus else f"{hardware['cpu']}, {hardware.get('cores', '?')} cores"
        if isinstance(hardware, str):
            return hardware
    unrecorded = any("hardware" in entry and entry["hardware"] is None for entry in run.provenance.values())
    return UNKNOWN_MACHINES[unrecorded]


def _counted(names: list[str]) -> list[str]:
    """`3 x Imaginary GPU` for three of one name."""
    return [f"{names.count(name)} x {name}" if names.count(name) > 1 else name for name in dict.fromkeys(names)]


def processor(run: Run, name: str) -> str:
    """`GPU` or `CPU`, for a name in a column ``machine``."""
    for entry in run.provenance.values():
        hardware = entry.get("hardware")
        if isinstance(hardware, dict) and name in (hardware.get("gpus") or []):
            return GPU
    return GPU if _GPU_NAME.search(name) else CPU


def commits(entry: dict[str, Any]) -> list[str]:
    """`0123456789` for each commit that an experiment's units were measured at."""
    several = entry.get("commits")
    if isinstance(several, dict):
        several = list(several)
    names = several if isinstance(several, list) and several else [entry.get("commit")]
    names = [name.get("commit") if isinstance(name, dict) else name for name in names]
    return [str(name)[:10] if name else "unknown" for name in dict.fromkeys(names)]


def changes(entry: dict[str, Any]) -> str:
    """Whether the source tree had changes that were not committed: `clean`, `with uncommitted changes` or unknown."""
    dirty = entry.get("dirty", "unknown")
    if isinstance(dirty, bool):
        return "with uncommitted changes" if dirty else "clean"
    return "unknown whether it was clean"


def commit(entry: dict[str, Any]) -> str:
    """`0123456789, clean`; several commits where a run was resumed at another."""
    return f"{' and '.join(commits(entry))}, {changes(entry)}"


def seconds(entry: dict[str, Any]) -> float:
    """Seconds of all attempts; NaN when not recorded."""
    attempts = entry.get("attempts")
    if isinstance(attempts, list) and attempts:
        parts = [one.get("seconds") if isinstance(one, dict) else one for one in attempts]
        known = [float(part) for part in parts if isinstance(part, int | float)]
        return sum(known) if len(known) == len(parts) else float("nan")
    single = entry.get("seconds")
    return float(single) if isinstance(single, int | float) and not isinstance(single, bool) else float("nan")


def started(entry: dict[str, Any]) -> str:
    """`2001-01-01 00:00 UTC`."""
    text = str(entry.get("started") or "")
    return text[:16].replace("T", " ") + (" UTC" if text.endswith(("+00:00", "Z")) else "") or "unknown"


def differences(entry: dict[str, Any]) -> str:
    """What differs from the profile that the run is named after, or nothing."""
    return style.listed(entry.get("differs_from_profile"))


def incomplete(entry: dict[str, Any]) -> str:
    """`incomplete: 7 of 16 units missing`, of an experiment whose run has not ended; else nothing."""
    part = entry.get("incomplete")
    if not isinstance(part, dict):
        return ""
    missing = len(part.get("missing") or ())
    return f"incomplete: {missing} of {missing + int(part.get('finished') or 0)} units missing"


def incomplete_experiments(run: Run) -> str:
    """`e05 incomplete: 7 of 16 units missing`, for each such experiment of a run; nothing for a whole one."""
    said = [f"{name} {words}" for name, entry in run.provenance.items() if (words := incomplete(entry))]
    return ", ".join(said)


def provenance_line(run: Run, experiment: str) -> str:
    """When, how long, from which commit: one paragraph (Markdown)."""
    entry = run.provenance.get(experiment)
    if entry is None:
        return "*Provenance:* none recorded for this experiment."
    words = [f"measured {started(entry)}", f"took {style.duration(seconds(entry))}", f"commit {commit(entry)}"]
    torch = (entry.get("versions") or {}).get("torch")
    words += [f"torch {torch}"] if torch else []
    words += [f"{key} {NOT_RECORDED}" for key in ("versions", "hardware") if key in entry and entry[key] is None]
    words = list(filter(None, [incomplete(entry), *words]))
    differing = differences(entry)
    differing = differing if len(differing) <= LONGEST else f"{differing[:LONGEST].rsplit(' ', 1)[0]} ..."
    words += [f"differs from its profile in {differing}"] if differing else []
    return f"*Provenance:* {escape(', '.join(words))}."


def sources(runs: list[Run], experiment: str) -> list[str]:
    """`one (42 s), two (50 s): 2001-01-01, commit 0123456789, clean`, an entry per day and commit (Markdown)."""
    alike: dict[str, list[str]] = {}
    for run in runs:
        if (entry := run.provenance.get(experiment)) is None:
            alike.setdefault("no provenance", []).append(run.label)
            continue
        label = f"{run.label} ({', '.join(filter(None, [style.duration(seconds(entry)), incomplete(entry)]))})"
        alike.setdefault(f"{started(entry)[:10]}, commit {commit(entry)}", []).append(label)
    return [escape(f"{', '.join(labels)}: {origin}") for origin, labels in alike.items()]


def run_lines(runs: list[Run]) -> list[str]:
    """A line per machine, profile, day and commit: `h100 one, h100 two: Imaginary GPU; profile paper; ...`."""
    labels: dict[str, list[str]] = {}
    for run in runs:
        labels.setdefault(run_origin(run), []).append(run.label)
    return [f"{', '.join(of)}: {origin}" for origin, of in labels.items()]


def run_origin(run: Run) -> str:
    """`Imaginary CPU, 2 cores; profile pocket; measured 2001-01-07; commit 0123456789, clean`."""
    entries = list(run.provenance.values())
    words = [machine(run), *filter(None, [incomplete_experiments(run)])]
    days = sorted({str(entry["started"])[:10] for entry in entries if entry.get("started")})
    if run.profiles:
        changed = " (changed)" if any(differences(entry) for entry in entries) else ""
        words.append(f"profile {', '.join(run.profiles)}{changed}")
    words += [f"measured {days[0]}" + (f" to {days[-1]}" if len(days) > 1 else "")] if days else []
    if entries:
        names = sorted({name for entry in entries for name in commits(entry)})
        states = sorted({changes(entry) for entry in entries})
        words.append(
            f"commit {' and '.join(names)}, " + ", ".join(["in part " * (len(states) > 1) + s for s in states])
        )
    else:
        words.append("no provenance")
    return "; ".join(words)
