"""Made-up experiments: a function in this process, or modules in a folder that CATS_EXPERIMENTS names."""

import csv
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from experiments.framework import profiles
from experiments.framework.config import Config
from experiments.framework.options import Count
from experiments.framework.tables import Row


@dataclass(frozen=True)
class Measured(Row):
    table: ClassVar[str] = "e90_measured"
    name: str
    value: float | None
    count: int


@dataclass(frozen=True)
class Sample(Row):
    table: ClassVar[str] = "e90_sample"
    samples: ClassVar[bool] = True
    name: str
    correct: str


@dataclass(frozen=True, kw_only=True)
class Options:
    limit: Count = 1
    batch_size: Count = 16
    train_batch_size: Count = 8
    levels: tuple[float, ...] = (0.5,)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Register a function as experiment e90: ``toy(function)``."""

    def register(run: Callable[[Config], Iterable[Row]]) -> None:
        monkeypatch.setitem(profiles.EXPERIMENTS, "e90", "toy_e90")
        monkeypatch.setitem(sys.modules, "toy_e90", SimpleNamespace(run=run, Options=Options))

    return register


def config_in(folder: Path, **options) -> Config:
    return Config("e90", "toy", folder, options=Options(**options))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))
