"""Units of work on disk: how an interrupted experiment resumes.

A unit's file holds its rows, the notes it made, how long it took, of which commit it is, and a checksum of all that.
What cannot be read, does not match its checksum, or was measured with other settings is measured again, and said.
"""

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.framework.files import write_text_atomically
from experiments.framework.identity import digest
from experiments.framework.tables import Row

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Unit:
    """What one unit of work left: rows, notes for the provenance, seconds, and the source's commit."""

    key: str
    stamp: str
    rows: list[Row]
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    commit: str = UNKNOWN
    dirty: bool | str = UNKNOWN


class UnitStore:
    """The units, attempts and checkpoints of one experiment, in a folder that goes when the experiment has finished."""

    def __init__(self, folder: Path, experiment: str) -> None:
        self.folder, self.experiment = folder, experiment

    def path(self, key: str) -> Path:
        """The file of a unit."""
        return self.folder / f"{_slug(key)}.json"

    def read(
        self, key: str, stamp: str, row_types: Sequence[type[Row]], outcome: str = "is measured again"
    ) -> Unit | None:
        """The stored unit; None when there is none, or none that can be used: which is said, with the ``outcome``."""
        path = self.path(key)
        if not path.exists():
            return None
        try:
            content = read_checked(path)
            if content["stamp"] != stamp:
                raise ValueError("it was measured with other settings")
            types = {row_type.table: row_type for row_type in row_types}
            rows = [types[table](**row) for table, row in content.pop("rows")]
            return Unit(rows=rows, **content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._say(f"{key} {outcome}: what {path} holds cannot be used ({error})")
            return None

    def write(self, unit: Unit) -> None:
        """Store a unit."""
        path = self.path(unit.key)
        if path.is_dir():
            shutil.rmtree(path)
        rows = [[row.table, asdict(row)] for row in unit.rows]
        write_checked(path, {**vars(unit), "rows": rows})
        self.note_machine()
        self.tick()

    def kept(self, stamp_of: Any) -> list[str]:
        """Keys of the stored units that can be used; ``stamp_of`` gives a key's present stamp."""
        keys = []
        for path in sorted(self.folder.glob("*.json")):
            try:
                content = read_checked(path)
                if content["stamp"] == stamp_of(content["key"]):
                    keys.append(content["key"])
            except (OSError, ValueError, KeyError, TypeError):
                continue  # `read` says so
        return keys

    def workdir(self, key: str, stamp: str) -> Path:
        """Directory for checkpoints of a unit."""
        path = self.folder / f"{_slug(key)}-{stamp[:8]}"
        if path.exists() and not path.is_dir():
            self._say(f"{path} is in the way of a folder for checkpoints: it is removed")
            path.unlink()
        path.mkdir(parents=True, exist_ok=True)
        return path

    def clear(self) -> None:
        """Forget everything."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)
        else:
            self.folder.unlink(missing_ok=True)

    def begin_attempt(self, facts: dict[str, Any], started: str, machine: Callable[[], dict[str, Any]]) -> None:
        """Note that an attempt begins now, with ``facts`` such as its commit; see `attempts`.

        What ``machine`` returns is noted with the first unit that the attempt stores: one that has measured nothing
        says nothing of machines, and asking for a GPU's name before anything runs on it would change what runs first.
        """
        self._began, self._machine = time.monotonic(), machine
        self._attempts = [*self.attempts(), {"started": started, "seconds": 0.0, **facts}]
        write_checked(self._attempts_file, {"attempts": self._attempts})

    def note_machine(self) -> None:
        """Add the machine to the present attempt, which has measured something; `tick` stores it."""
        if hasattr(self, "_attempts") and not self._attempts[-1].get("measured"):
            self._attempts[-1] |= {"measured": True, **self._machine()}

    def tick(self) -> None:
        """Note how long the present attempt has taken so far."""
        if hasattr(self, "_attempts"):
            self._attempts[-1]["seconds"] = round(time.monotonic() - self._began, 1)
            write_checked(self._attempts_file, {"attempts": self._attempts})

    def attempts(self) -> list[dict[str, Any]]:
        """Every attempt at this experiment: started, seconds (up to its last unit, for one that was killed), and the
        facts noted with it."""
        if not self._attempts_file.exists():
            return []
        try:
            attempts = read_checked(self._attempts_file)["attempts"]
            return [{**attempt, "seconds": float(attempt["seconds"])} for attempt in attempts]
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._say(f"seconds of earlier attempts are lost: {self._attempts_file} cannot be used ({error})")
            return []

    def mark_forced(self, experiments: Sequence[str]) -> None:
        """Forget everything and note that ``experiments`` are measured again, so that what is done counts no more."""
        self.clear()
        write_checked(self._forced_file, {"experiments": list(experiments)})

    def forced(self) -> list[str]:
        """The experiments of the --force that this one has still to be measured for; empty without one."""
        try:
            return list(read_checked(self._forced_file)["experiments"])
        except (OSError, ValueError, KeyError, TypeError):
            return []

    @property
    def _attempts_file(self) -> Path:
        return self.folder / "progress" / "attempts.json"

    @property
    def _forced_file(self) -> Path:
        return self.folder / "progress" / "forced.json"

    def _say(self, sentence: str) -> None:
        print(f"{self.experiment}: {sentence}", file=sys.stderr, flush=True)


def write_checked(path: Path, content: dict[str, Any]) -> None:
    """Write JSON with its checksum, atomically."""
    content = json.loads(json.dumps(content))
    write_text_atomically(path, json.dumps({**content, "checksum": digest(content)}))


def read_checked(path: Path) -> dict[str, Any]:
    """What `write_checked` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not what was written.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError("it is truncated or damaged") from error
    if not isinstance(content, dict) or content.pop("checksum", None) != digest(content):
        raise ValueError("its checksum is wrong")
    return content


def added_notes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What ``after`` has that ``before`` has not, tables within tables alike."""
    added = {}
    for key, value in after.items():
        if isinstance(value, dict) and isinstance(before.get(key), dict):
            if inner := added_notes(before[key], value):
                added[key] = inner
        elif key not in before or before[key] != value:
            added[key] = value
    return added


def merge_notes(notes: dict[str, Any], added: dict[str, Any]) -> None:
    """Put ``added`` into ``notes``, tables within tables alike."""
    for key, value in added.items():
        if isinstance(value, dict) and isinstance(notes.get(key), dict):
            merge_notes(notes[key], value)
        else:
            notes[key] = value


def _slug(key: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', key)[-60:].strip('-')}-{digest(key)[:6]}"
