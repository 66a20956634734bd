"""`Config`: what an experiment gets, and how it stores its units of work."""

import copy
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from tqdm.auto import tqdm

from experiments.framework.identity import digest, model_identity
from experiments.framework.options import to_json
from experiments.framework.provenance import source_state
from experiments.framework.tables import Row
from experiments.framework.units import Unit, UnitStore, added_notes, merge_notes

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

    def settings(self) -> dict[str, Any]:
        """Everything that changes the numbers, as JSON; a change of it makes stored results stale."""
        kept = ("experiment", "profile", "device", "dtype", "seed", "models", "data")
        options = {**to_json(self.options), **self.reduced}
        return {**{key: to_json(getattr(self, key)) for key in kept}, "options": options}

    def identify(self, model: str) -> None:
        """Add hashes of a model's weights, configuration and tokenizer to the provenance."""
        if is_main_process():
            self.notes.setdefault("models", {})[model] = model_identity(model)

    def identify_data(self, name: str, identity: dict[str, Any]) -> None:
        """Add what identifies a data set or a task to the provenance.

        Args:
            name: such as ``text`` or ``task boolq``.
            identity: see `experiments.framework.identity`, whose `task_identity` and `text_identity` make it.
        """
        self.notes.setdefault("inputs", {})[name] = identity

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
            self.notes["lowered_for_memory"] = {key: {**options, **lowered}[key] for key in self.reduced}
        return lowered

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

        Args:
            key: names the unit within the experiment, such as ``pocket/cats-50/seed 1``.
            compute: does the work; its rows, and the notes it made, are stored once it returns.
            row_types: the row classes that ``compute`` may return.
        """
        stored = self.store.read(key, self.stamp(key), row_types)
        if stored is None:
            before, begin = copy.deepcopy(self.notes), time.monotonic()
            rows = list(compute())
            seconds = round(time.monotonic() - begin, 3)
            stored = Unit(key, self.stamp(key), rows, added_notes(before, self.notes), seconds, **source_state())
            if is_main_process():
                self.store.write(stored)
                tqdm.write(f"{self.experiment} {key}: {seconds:.1f} s")
        else:
            merge_notes(self.notes, stored.notes)
        self.units[key] = {"seconds": stored.seconds, "commit": stored.commit, "dirty": stored.dirty}
        return stored.rows

    def workdir(self, key: str) -> Path:
        """Directory for a unit's checkpoints; it goes when the experiment has finished or its settings have changed."""
        return self.store.workdir(key, self.stamp(key))

    def clear_state(self) -> None:
        """Forget stored units and checkpoints."""
        self.store.clear()

    def progress(self, iterable: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
        """``iterable`` behind a progress bar with an estimate of the time left."""
        label, silent = f"{self.experiment} {description}", not is_main_process()
        return tqdm(iterable, desc=label, total=total, mininterval=1.0, dynamic_ncols=True, disable=silent)


def is_main_process() -> bool:
    """False in the processes that accelerate's launcher started beside the first."""
    return os.environ.get("RANK", "0") == "0"
