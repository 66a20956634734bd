"""A profile (TOML) becomes one `Config` for each experiment."""

import json
import os
import pkgutil
import re
import shutil
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm

from cats.calibration import write_text_atomically
from cats.structure import resolve_device
from experiments.framework.results import Row, digest

EXPERIMENTS_FOLDER = Path(__file__).parents[1]
PROFILES = EXPERIMENTS_FOLDER / "profiles"
EXPERIMENTS = {
    module.name.split("_")[0]: f"experiments.{module.name}"
    for module in pkgutil.iter_modules([str(EXPERIMENTS_FOLDER)])
    if re.fullmatch(r"e\d\d_\w+", module.name)
}
"""``e01`` and so on -> module or package; one file or folder each, found by its name."""
DTYPES = ("auto", "float32", "float16", "bfloat16")  # not cats.models.DTYPES: importing it costs seconds
_COMMON = ("models", "device", "dtype", "seed", "data")
_KEYS = {"description", *_COMMON, *EXPERIMENTS}
T = TypeVar("T")


class RunError(RuntimeError):
    """A run cannot go on for a reason that its one sentence tells: no traceback is needed."""


@dataclass
class Config:
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
        options: the profile's table of this experiment.
        notes: what the experiment adds to its provenance, such as hashes of models and data.
        reduced: options that `halve_batches` has lowered, with the values that the profile gave.
    """

    experiment: str
    profile: str
    output: Path
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    models: list[str] = field(default_factory=lambda: ["pocket"])
    data: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    reduced: dict[str, int] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """Everything that changes the numbers; a change of it makes stored results stale."""
        settings = {key: value for key, value in asdict(self).items() if key not in ("output", "notes", "reduced")}
        return {**settings, "options": {**self.options, **self.reduced}}

    def halve_batches(self) -> dict[str, int]:
        """Halve the options that set how much is computed at once, after memory has run out; results do not depend on
        them beyond rounding, so stored units stay valid.

        Returns:
            The lowered options, which are also noted in the provenance; empty when nothing can be lowered.
        """
        large = {key: self.options[key] for key in ("batch_size", "micro_batch_size") if self.options.get(key, 1) > 1}
        lowered = {key: value // 2 for key, value in large.items()}
        self.reduced = {**large, **self.reduced}
        self.options.update(lowered)
        if lowered:
            self.notes["lowered_for_memory"] = {key: self.options[key] for key in self.reduced}
        return lowered

    def _state(self) -> Path:
        return self.output / "state" / self.experiment

    def unit(self, key: str, compute: Callable[[], list[Row]], row_types: Sequence[type[Row]]) -> list[Row]:
        """Run one unit of work, or return the rows it left before: how an interrupted experiment resumes.

        Args:
            key: names the unit within the experiment, such as ``pocket/cats-50/seed 1``.
            compute: does the work; its rows are stored once it returns.
            row_types: the row classes that ``compute`` may return.
        """
        path = self._state() / f"{_slug(key)}.json"
        stamp = digest([key, self.settings()])
        types = {row_type.table: row_type for row_type in row_types}
        if path.exists():
            try:
                stored = json.loads(path.read_text())
                if stored["settings"] == stamp:
                    return [types[table](**row) for table, row in stored["rows"]]
            except (ValueError, KeyError, TypeError):
                pass  # written by an older version or damaged: measure again
        rows = list(compute())
        content = {"unit": key, "settings": stamp, "rows": [[row.table, asdict(row)] for row in rows]}
        if is_main_process():
            write_text_atomically(path, json.dumps(content))
        return rows

    def workdir(self, key: str) -> Path:
        """Directory for a unit's checkpoints; it goes when the experiment has finished or its settings have changed."""
        path = self._state() / f"{_slug(key)}-{digest([key, self.settings()])[:8]}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def clear_state(self) -> None:
        """Forget stored units and checkpoints."""
        shutil.rmtree(self._state(), ignore_errors=True)

    def progress(self, iterable: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
        """``iterable`` behind a progress bar with an estimate of the time left."""
        label, silent = f"{self.experiment} {description}", not is_main_process()
        return tqdm(iterable, desc=label, total=total, mininterval=1.0, dynamic_ncols=True, disable=silent)


def is_main_process() -> bool:
    """False in the processes that accelerate's launcher started beside the first."""
    return os.environ.get("RANK", "0") == "0"


def _slug(key: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', key)[-60:].strip('-')}-{digest(key)[:6]}"


def load_profile(name: str) -> dict[str, Any]:
    """Read a profile by name (pocket, laptop, paper) or from a TOML file of the same form.

    Raises:
        ValueError: no such profile, broken TOML, or an unknown key.
    """
    path = Path(name) if name.endswith(".toml") else PROFILES / f"{name}.toml"
    try:
        profile = tomllib.loads(path.read_text())
    except OSError as error:
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.toml")))
        raise ValueError(f"no profile {name!r}: allowed are {known}, or the path of a .toml file") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    unknown = sorted(set(profile) - _KEYS)
    if unknown:
        raise ValueError(f"{path} has unknown keys {', '.join(unknown)}: allowed are {', '.join(sorted(_KEYS))}")
    return profile


def override(profile: dict[str, Any], assignment: str) -> None:
    """Apply ``e02.limit=50`` to a profile in place; the value is TOML.

    Raises:
        ValueError: it cannot be read, or names an option that neither this nor any shipped profile has.
    """
    path, equals, value = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or keys[0] not in _KEYS:
        raise ValueError(
            f"--set {assignment!r} must look like e02.limit=50, beginning with one of {', '.join(sorted(_KEYS))}"
        )
    if keys[0] in EXPERIMENTS and len(keys) > 1:
        shipped = [load_profile(path.stem).get(keys[0], {}) for path in PROFILES.glob("*.toml")]
        known = {"include_path", *_COMMON, *profile.get(keys[0], {}), *(key for table in shipped for key in table)}
        if keys[1] not in known:
            raise ValueError(f"{keys[0]} has no option {keys[1]}: allowed are {', '.join(sorted(known))}")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()  # a bare word is a string
    table = profile
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ValueError(f"--set {assignment!r}: {key} is not a table")
    table[keys[-1]] = parsed


def make_config(experiment: str, name: str, profile: dict[str, Any], output: Path) -> Config:
    """The `Config` of one experiment. An experiment's own table may override models, dtype, device and seed.

    Raises:
        ValueError: unknown experiment, device or dtype.
    """
    if experiment not in EXPERIMENTS:
        raise ValueError(f"unknown experiment {experiment!r}: allowed are {', '.join(EXPERIMENTS)}")
    if experiment not in profile:
        raise ValueError(f"profile {name} has no table [{experiment}] with the options of this experiment")
    options = dict(profile.get(experiment, {}))
    common = {key: options.pop(key, profile.get(key)) for key in _COMMON}
    given = {key: value for key, value in common.items() if value is not None}
    config = Config(experiment, name, output, options=options, **given)
    config.data = {"source": "hub" if "path" in config.data else "pocket", **config.data}
    if "path" in config.data and "split" not in config.data:
        raise ValueError(f"[data] has a path but no split: name the part of {config.data['path']} to read")
    config.device = resolve_device(config.device, "sharded")
    if config.dtype not in DTYPES:
        raise ValueError(f"unknown dtype {config.dtype!r}: allowed are {', '.join(DTYPES)}")
    if not config.models or not all(isinstance(model, str) for model in config.models):
        raise ValueError("models must be a non-empty list of names")
    return config
