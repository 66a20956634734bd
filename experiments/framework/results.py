"""Rows, their CSV files and where they came from: what an experiment leaves behind.

The CSV schema is the row's dataclass: one class a table, one field a column, one row a measurement. An unmeasured
value is None and an empty cell. Files are replaced atomically, so a reader never sees half a table.
"""

import csv
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch

from cats.calibration import write_text_atomically

PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "numba",
    "numpy",
    "peft",
    "accelerate",
    "datasets",
    "lm-eval",
    "cats-sparsity",
)


@dataclass(frozen=True)
class Row:
    """Base of every table's row; subclasses name their ``table`` (the CSV's name) and declare its columns as fields."""

    table: ClassVar[str]


def write_tables(rows: list[Row], directory: Path) -> list[Path]:
    """Write ``rows`` as ``directory/<table>.csv``, one file a table. Raises ValueError if there are none."""
    if not rows:
        raise ValueError("the experiment produced no rows: nothing was measured")
    by_table: dict[str, list[Row]] = {}
    for row in rows:
        by_table.setdefault(row.table, []).append(row)
    paths = []
    for table, group in by_table.items():
        text = io.StringIO()
        writer = csv.DictWriter(text, [field.name for field in fields(group[0])], lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in asdict(row).items()} for row in group)
        paths.append(directory / f"{table}.csv")
        write_text_atomically(paths[-1], text.getvalue())
    return paths


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and value != value):
        return ""
    return f"{value:.7g}" if isinstance(value, float) else value


def git_state() -> dict[str, Any]:
    """Commit of the source tree and whether it has changes; None where that is unknown, as outside a git checkout.

    A machine that has a copy of the tree without its history takes the commit from the variable CATS_COMMIT.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    if os.environ.get("CATS_COMMIT"):
        return {"commit": os.environ["CATS_COMMIT"], "dirty": None}
    commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if status is None else bool(status)}


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """The processor's marketing name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def hardware() -> dict[str, Any]:
    """Processor, cores, threads in use, memory, and GPUs."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
    }


def machine_name(device: str) -> str:
    """Name of the machine in the ``machine`` column: the GPU's for cuda, else the processor's and its cores."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    return f"{cpu_name()}, {hardware()['cores']} cores"


def versions() -> dict[str, str | None]:
    """Installed versions of Python and of the packages that matter."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def file_hash(path: Path) -> str:
    """SHA-256 of a file, first 16 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def digest(value: Any) -> str:
    """Stable hash of a JSON-able value, 16 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def now() -> str:
    """Current time, UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_provenance(output: Path) -> dict[str, Any]:
    """The run directory's provenance, or an empty one. Raises ValueError when the file is broken."""
    path = output / "provenance.json"
    if not path.exists():
        return {"experiments": {}}
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        for entry in data["experiments"].values():
            entry["settings"], entry["tables"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is broken ({error}): remove it, and what it described will be measured again"
        ) from error
    return data


def write_provenance(output: Path, experiment: str, entry: dict[str, Any]) -> None:
    """Put ``entry`` under ``experiment`` into the run directory's provenance.json, atomically."""
    data = read_provenance(output)
    data["experiments"][experiment] = entry
    data["experiments"] = dict(sorted(data["experiments"].items()))
    write_text_atomically(output / "provenance.json", json.dumps(data, indent=2) + "\n")
