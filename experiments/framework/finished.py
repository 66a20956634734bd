"""The tables of a run that has not ended: those of its finished units, with nothing computed.

An interrupted run writes them before it ends; ``run eNN --finished-only`` does the same by hand, for a run that was
killed or whose machine was lost, and also where the run's device and models are not. The units stay in ``state/``: the
command of the run goes on from them, and its tables then replace these.
"""

import importlib
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.framework.config import SELECTING, Config, RunError
from experiments.framework.entries import provenance_entry
from experiments.framework.memory import peak_gib
from experiments.framework.profiles import EXPERIMENTS
from experiments.framework.provenance import read_provenance, write_provenance
from experiments.framework.results import damage, remove_tables, table_entries, write_tables
from experiments.framework.tables import Row

LONGEST = 10.0
"""Seconds that an interrupted run may take to make its rows: a part of what it is given before it is killed."""


@dataclass(frozen=True)
class Finished:
    """What was written: the CSV files, of how many units, and the keys of those that are missing."""

    experiment: str
    paths: list[Path]
    units: int
    missing: list[str]

    def __str__(self) -> str:
        units = f"{self.units} finished {'unit' if self.units == 1 else 'units'}"
        words = f"{self.experiment}: the tables hold {units}; "
        if not self.missing:
            return f"{words}none is missing"
        shown = ", ".join(self.missing[:6]) + (", ..." if len(self.missing) > 6 else "")
        return f"{words}{len(self.missing)} {'is' if len(self.missing) == 1 else 'are'} missing ({shown})"


def write_finished(config: Config[Any], measured_here: bool = False) -> Finished:
    """Write the tables and the provenance of the units that are finished; when none is missing, the run is done.

    Args:
        config: of the run; what it has gathered so far is not used.
        measured_here: whether this process has measured the last of them.

    Raises:
        RunError: no unit is finished, the experiment cannot do without those that are missing, the tables of a
            finished run are in the way, or (with ``measured_here``) it takes too long.
    """
    lowered = {key: value for key, value in config.notes.items() if key == "lowered_for_memory"}
    only: Config[Any] = replace(config, finished_only=True, notes=lowered, units={}, missing=[])
    directory = only.output / "results"
    before = read_provenance(only.output)["experiments"].get(only.experiment, {})
    if not only.store.kept(only.stamp):
        raise RunError(_nothing(only))
    if _is_whole(before) and damage(directory, before) is None:
        held = f"{directory} holds the tables of a finished run of {only.experiment}"
        raise RunError(f"{held}, which those of an unfinished one do not replace: move them, or let the run finish")
    with _at_most(LONGEST) if measured_here else nullcontext():
        rows = _rows(only)
    if not only.units:
        raise RunError(_nothing(only))
    paths = write_tables(rows, directory)
    peak = peak_gib() if measured_here else None
    entry = provenance_entry(only, table_entries(paths, directory), peak, ended=False)
    write_provenance(only.output, only.experiment, entry)
    remove_tables(directory, before, entry)
    if not only.missing and not only.partial:
        only.clear_state()
    return Finished(only.experiment, paths, len(only.units), only.missing)


def write_after(config: Config[Any]) -> None:
    """`write_finished` of a run that has just been interrupted or has failed, said on stderr; what led here counts, so
    that nothing is raised."""
    if not config.store.kept(config.stamp):
        return
    try:
        said = str(write_finished(config, measured_here=True))
    except Exception as error:
        said = f"{config.experiment}: no tables of the finished units are written ({error})"
    print(said, file=sys.stderr, flush=True)


class _TooLong(RunError):
    """The experiment works outside of its units."""


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise `_TooLong` in the block after so many seconds; only the main thread can, and not on Windows."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(_number: int, _frame: object) -> None:
        raise _TooLong(f"more than {seconds:g} s of work lie outside of its units; --finished-only has no such limit")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _rows(config: Config[Any]) -> list[Row]:
    try:
        return list(importlib.import_module(EXPERIMENTS[config.experiment]).run(config))
    except _TooLong:
        raise
    except Exception as error:
        why = "fails outside of its units"
        if config.missing:
            why = f"cannot make tables without the units that are missing ({', '.join(config.missing)})"
        raise RunError(f"{config.experiment} {why}: {error!r}") from error


def _is_whole(entry: dict[str, Any]) -> bool:
    """Whether a provenance entry is that of a finished run: no unfinished one, nor a part whose units are kept."""
    return bool(entry) and "incomplete" not in entry and not entry["settings"].get("options", {}).get(SELECTING)


def _nothing(config: Config[Any]) -> str:
    folder = config.store.folder
    others = len(list(folder.glob("*.json")))
    if not others:
        return f"{folder} holds no finished unit: there is nothing to write"
    why = f"{others} that are damaged or of other settings: give the options that the run was started with"
    return f"{folder} holds no finished unit of these settings, but {why}"
