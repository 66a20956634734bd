"""What provenance says of one experiment, and what each attempt at it notes of itself for that."""

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.framework.children import COMMAND
from experiments.framework.config import Config
from experiments.framework.provenance import ROOT, hardware, merged_sources, now, source_hash, source_state, versions
from experiments.framework.tables import SCHEMA_VERSION

OF_ATTEMPTS = ("source_sha256", "command", "versions", "hardware", "processes", "workers")
"""What an entry takes from the attempts, since the tables may be written on another machine, at another commit."""


def attempt_facts(config: Config[Any]) -> dict[str, Any]:
    """What an attempt notes of itself when it begins: source, command line, and how many processes share it."""
    return {
        **source_state(),
        "measured": False,
        "source_sha256": source_hash(),
        "command": command_line(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "workers": config.workers,
    }


def machine_facts() -> dict[str, Any]:
    """What an attempt notes once it has measured something."""
    return {"versions": versions(), "hardware": hardware()}


def command_line() -> str:
    """The command as the user typed it, but for where this machine keeps its files, see `portable`."""
    typed = os.environ.get(COMMAND)
    words = shlex.split(typed) if typed else ["python", "-m", "experiments", *sys.argv[1:]]
    return shlex.join(portable(word) for word in words)


def portable(word: str) -> str:
    """A word of a command line with absolute paths relative to the repository, and of those outside the name alone.

    They may be the whole word, what an option or a setting equals, or in quotes within a list.
    """

    def shortened(match: re.Match[str]) -> str:
        path = Path(os.path.normpath(match.group()))
        return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name or match.group()

    return re.sub(r"""(?:^|(?<=[="'\[{(:, ])|(?<=://))/(?!/)[^\s/"',\]})](?:[^"',\]})\s]|\s(?!/))*""", shortened, word)


def provenance_entry(
    config: Config[Any], tables: Mapping[str, Any], peak: Mapping[str, Any] | None, ended: bool = True
) -> dict[str, Any]:
    """What provenance says of an experiment whose tables have just been written.

    Args:
        config: with the units and the notes.
        tables: see `experiments.framework.results.table_entries`.
        peak: memory used while measuring; None where that is not known.
        ended: whether this process has measured it to its end; else ``written`` stands for ``finished``, and
            ``incomplete`` says how many units are finished and which are missing, if any is.
    """
    if ended and not config.units:  # an experiment without units has measured nonetheless
        config.store.note_machine()
        config.store.tick()
    attempts = config.store.attempts()
    sources = [*config.units.values(), *([source_state()] if ended else [])]
    entry: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        **merged_sources(sources),
        **of_attempts(attempts),
        "settings": config.settings(),
        "differs_from_profile": config.differs,
        "peak_memory_gib": peak,
        "started": attempts[0]["started"] if attempts else None,
        "finished": now() if ended else None,
        "attempts": len(attempts) or None,
        "seconds": round(sum(attempt["seconds"] for attempt in attempts), 1) if attempts else None,
        "units": config.units,
        **tables,
        **config.notes,
    }
    if not ended:
        entry |= {"written": now(), "written_by": command_line()}
    if config.missing:
        entry["incomplete"] = {"finished": len(config.units), "missing": config.missing}
    return entry


def of_attempts(attempts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The facts `OF_ATTEMPTS` of the last attempt that has measured anything, None for what is not noted; where such
    attempts differ in versions or hardware, also each one's, as ``versions_by_attempt`` and ``hardware_by_attempt``."""
    attempts = [attempt for attempt in attempts if attempt.get("measured", True)]  # older ones have noted nothing
    last = attempts[-1] if attempts else {}
    facts = {key: last.get(key) for key in OF_ATTEMPTS}
    for key in ("versions", "hardware"):
        each = [attempt.get(key) for attempt in attempts]
        if any(value != each[0] for value in each):
            facts[f"{key}_by_attempt"] = each
    return facts
