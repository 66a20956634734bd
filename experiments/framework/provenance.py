"""Where numbers come from: commit, machine, versions, and the file that says so beside the results."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

from experiments.framework.files import write_text_atomically

ROOT = Path(__file__).parents[2]
SOURCES = ("cats", "kernels", "experiments", "reports", "pyproject.toml", "constraints.txt")
UNKNOWN = "unknown"
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
    "gguf",
    "cats-sparsity",
)


@cache
def source_state() -> dict[str, Any]:
    """``commit`` of the source tree, and whether it is ``dirty``; each ``"unknown"`` where that cannot be known.

    Untracked files in the source's folders are dirt too. A machine that has a copy of the tree without its history
    takes the commit from the variable CATS_COMMIT; whether the copy was changed is then unknown.
    """
    if os.environ.get("CATS_COMMIT"):
        return {"commit": os.environ["CATS_COMMIT"], "dirty": UNKNOWN}
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top) != ROOT.resolve():  # no history, or that of a project that this one is installed in
        return {"commit": UNKNOWN, "dirty": UNKNOWN}
    status = _git("status", "--porcelain", "--untracked-files=all", "--", *SOURCES)
    return {"commit": _git("rev-parse", "HEAD") or UNKNOWN, "dirty": UNKNOWN if status is None else bool(status)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def source_hash() -> str:
    """SHA-256 over the source files that measure, for trees without a history."""
    files = [path for folder in SOURCES[:3] for path in (ROOT / folder).rglob("*.py")]
    total = hashlib.sha256()
    for path in sorted(files):
        total.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes())
    return total.hexdigest()


def merged_sources(states: list[dict[str, Any]]) -> dict[str, Any]:
    """Several `source_state` as one: the last ``commit``, all ``commits`` in order, and the worst of ``dirty``."""
    commits = list(dict.fromkeys(state["commit"] for state in states))
    dirts = [state["dirty"] for state in states]
    dirty = True if True in dirts else UNKNOWN if UNKNOWN in dirts else False
    return {"commit": states[-1]["commit"], "commits": commits, "dirty": dirty}


@cache
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
    """Installed versions of Python and of the packages that matter; None for one that is not installed."""
    installed: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = None
    return installed


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
