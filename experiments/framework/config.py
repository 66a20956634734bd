"""`Config`: what an experiment gets, and how it stores its units of work."""

import copy
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from tqdm.auto import tqdm

from experiments.framework.identity import content, digest, model_identity
from experiments.framework.options import to_json
from experiments.framework.provenance import source_state
from experiments.framework.tables import Row
from experiments.framework.units import Unit, UnitStore, added_notes, merge_notes
from experiments.framework.workers import Claims, WorkerFinished, is_worker, run_workers

LOWERED = ("batch_size", "micro_batch_size", "generation_batch_size")
"""Options that set how much is computed at once, and that results do not depend on beyond rounding."""
SELECTING = "only"
"""Option that chooses which units are measured and changes none of them: those of a part serve the whole later."""
T = TypeVar("T")
O = TypeVar("O")  # noqa: E741, an experiment's Options


class RunError(RuntimeError):
    """A run cannot go on, for a reason that needs no traceback: the message is one sentence."""


@dataclass
class Config(Generic[O]):
    """What an experiment gets: where to write, on what to run, and its own options.

    Attributes:
        experiment: ``e01`` and so on.
        profile: name of the profile.
        output: run directory.
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``sharded`` (a model's layers over all GPUs).
        dtype: ``auto``, ``float32``, ``float16`` or ``bfloat16``.
        seed: of the order of texts, training and random weights (the pocket tasks are the same for every seed).
        models: hub ids, directories, ``pocket`` or ``shape:NAME``.
        data: where text comes from (see `experiments.data`).
        options: the experiment's ``Options``, from the profile's table.
        notes: what the experiment adds to its provenance; those of a unit's work are stored with it.
        reduced: options that `halve_batches` has lowered, with the values that the profile gave.
        differs: settings in which this run differs from its profile: key -> [the profile's, the run's].
        units: the units done or kept so far: key -> seconds and commit.
        workers: processes that compute units side by side.
        command: that starts a worker.
        finished_only: nothing is computed: `unit` returns what is stored, and no rows for a unit that is not.
        missing: keys of the units that were asked for and are not stored, with ``finished_only``.
    """

    experiment: str
    profile: str
    output: Path
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    models: list[str] = field(default_factory=lambda: ["pocket"])
    data: dict[str, Any] = field(default_factory=dict)
    options: O = field(default_factory=dict)  # type: ignore[assignment]
    notes: dict[str, Any] = field(default_factory=dict)
    reduced: dict[str, int] = field(default_factory=dict)
    differs: dict[str, list[Any]] = field(default_factory=dict)
    units: dict[str, dict[str, Any]] = field(default_factory=dict)
    workers: int = 1
    command: list[str] = field(default_factory=list)
    finished_only: bool = False
    missing: list[str] = field(default_factory=list)

    def settings(self) -> dict[str, Any]:
        """Everything that changes the numbers, as JSON; a change of it makes stored results stale."""
        kept = ("experiment", "profile", "device", "dtype", "seed", "models", "data")
        options = {**to_json(self.options), **self.reduced}
        return {**{key: to_json(getattr(self, key)) for key in kept}, "options": options}

    def identify(self, model: str) -> None:
        """Add hashes of a model's weights, configuration and tokenizer to the provenance.

        Raises:
            RunError: units that are kept were measured with another one of this name.
        """
        if is_main_process():
            self._note_inputs({"models": {model: model_identity(model)}})

    def identify_data(self, name: str, identity: dict[str, Any]) -> None:
        """Add what identifies a data set or a task to the provenance.

        Args:
            name: such as ``text`` or ``task boolq``.
            identity: see `experiments.framework.identity`, whose `task_identity` and `text_identity` make it.

        Raises:
            RunError: as `identify`.
        """
        self._note_inputs({"inputs": {name: identity}})

    def _note_inputs(self, notes: dict[str, Any]) -> None:
        """Add notes to the provenance, unless they say that a model or a data set has changed since it was noted."""
        for table in ("models", "inputs"):
            for name, identity in notes.get(table, {}).items():
                known = self.notes.get(table, {}).get(name, identity)
                if content(known) != content(identity):
                    kept = f"{name} is not what it was when other units in {self.store.folder} were measured"
                    raise RunError(f"{self.experiment}: {kept}: --force measures all of them again")
        merge_notes(self.notes, notes)

    def halve_batches(self) -> dict[str, int]:
        """Halve the options in `LOWERED` after memory has run out; stored units stay valid.

        Returns:
            The lowered options, which are also noted in the provenance; empty when nothing can be lowered.
        """
        options = to_json(self.options)
        large = {key: options[key] for key in LOWERED if (options.get(key) or 1) > 1}
        lowered = {key: value // 2 for key, value in large.items()}
        self.reduced = {**large, **self.reduced}
        if lowered:
            self.options = replace(self.options, **lowered)  # type: ignore[type-var]
            self.notes |= self._lowered()
        return lowered

    def _lowered(self) -> dict[str, Any]:
        """The note of what `halve_batches` has lowered, and to what; empty where it has not."""
        options = to_json(self.options)
        return {"lowered_for_memory": {key: options[key] for key in self.reduced}} if self.reduced else {}

    @cached_property
    def store(self) -> UnitStore:
        """Units and checkpoints of this experiment in the run directory."""
        return UnitStore(self.output / "state" / self.experiment, self.experiment)

    def stamp(self, key: str) -> str:
        """Hash of a unit's name and of everything that changes its numbers."""
        settings = self.settings()
        settings["options"].pop(SELECTING, None)
        return digest([key, settings])

    @property
    def partial(self) -> bool:
        """Whether only some of the units are measured."""
        return bool(getattr(self.options, SELECTING, ()))

    def unit(self, key: str, compute: Callable[[], list[Row]], row_types: Sequence[type[Row]]) -> list[Row]:
        """Run one unit of work, or return the rows it left before: how an interrupted experiment resumes.

        All of an experiment's work belongs into units: with ``finished_only`` those that are not stored are noted in
        ``missing`` and have no rows, and the experiment is to go on without them.

        Args:
            key: names the unit within the experiment, such as ``pocket/cats-50/seed 1``.
            compute: does the work; its rows, and the notes it made, are stored once it returns.
            row_types: the row classes that ``compute`` may return.
        """
        stored = self._stored(key, row_types)
        if stored is None and self.finished_only:
            if key not in self.missing:
                self.missing.append(key)
            return []
        if stored is None:
            before, begin = copy.deepcopy(self.notes), time.monotonic()
            rows = list(compute())
            seconds = round(time.monotonic() - begin, 3)
            notes = added_notes(before, self.notes) | self._lowered()  # made before, by this process alone
            stored = Unit(key, self.stamp(key), rows, notes, seconds, **source_state())
            if is_main_process():
                self.store.write(stored)
                tqdm.write(f"{self.experiment} {key}: {seconds:.1f} s")
        else:
            self._note_inputs(stored.notes)
        self.units[key] = {"seconds": stored.seconds, "commit": stored.commit, "dirty": stored.dirty}
        return stored.rows

    def compute_ahead(self, jobs: Mapping[str, Callable[[], list[Row]]], row_types: Sequence[type[Row]]) -> None:
        """Let the workers, if there are any, compute and store units that do not depend on each other.

        A call of `unit` for each of them, in any order, is to follow: without workers that is where they are computed.

        Args:
            jobs: what `unit` will be called with: key -> compute.
            row_types: as in `unit`.

        Raises:
            RunError: a worker failed.
            WorkerFinished: in a worker, when all jobs are taken.
        """
        if self.finished_only:
            return
        missing = [key for key in jobs if self._stored(key, row_types) is None]
        claims = Claims(self.store.folder / "claims")
        if is_worker() and missing:
            for key in missing:
                name = self.store.path(key).name
                if claims.take(name):
                    try:
                        self.unit(key, jobs[key], row_types)
                    except BaseException:  # when memory has run out, it is tried again with smaller batches
                        claims.give_back(name)
                        raise
            raise WorkerFinished
        if self.workers > 1 and len(missing) > 1:
            claims.clear()
            statuses = run_workers(self.command, min(self.workers, len(missing)), gpus_of(self.device))
            if any(statuses):
                failed = f"{sum(map(bool, statuses))} of {len(statuses)} workers failed, see the log above"
                raise RunError(f"{self.experiment}: {failed}; finished units are kept")

    def _stored(self, key: str, row_types: Sequence[type[Row]]) -> Unit | None:
        outcome = "counts as missing" if self.finished_only else "is measured again"
        return self.store.read(key, self.stamp(key), row_types, outcome)

    def workdir(self, key: str) -> Path:
        """Directory for a unit's checkpoints; it goes when the experiment has finished or its settings have changed.

        With smaller batches it is another one: training goes on only with those that it began with.
        """
        stamp = self.stamp(key)
        if self.reduced:
            options = to_json(self.options)
            stamp = digest([stamp, {name: options[name] for name in sorted(self.reduced)}])
        return self.store.workdir(key, stamp)

    def clear_state(self) -> None:
        """Forget stored units and checkpoints."""
        self.store.clear()

    def progress(self, iterable: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
        """``iterable`` behind a progress bar with an estimate of the time left."""
        label, silent = f"{self.experiment} {description}", self.finished_only or not is_main_process()
        return tqdm(iterable, desc=label, total=total, mininterval=1.0, dynamic_ncols=True, disable=silent)


def gpus_of(device: str) -> int:
    """How many GPUs a device setting may use: all for ``cuda``, one for ``cuda:N``, none for ``cpu``."""
    if not device.startswith("cuda"):
        return 0
    import torch

    return torch.cuda.device_count() if device == "cuda" else 1


def is_main_process() -> bool:
    """False in the processes that accelerate's launcher started beside the first."""
    return os.environ.get("RANK", "0") == "0"
