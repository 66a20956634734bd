"""Files of local lm-eval tasks: JSON lines, YAML, and a listing by which a folder that is up to date is recognised."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cats.calibration import write_text_atomically
from cats.models import pocket_path
from experiments.pocket.corpus import Module, describe
from experiments.pocket.sources import Item


def write_items(path: Path, items: Sequence[Item]) -> None:
    """One JSON object a line: prompt, choices, label, source."""
    keys = ("prompt", "choices", "label", "source")
    write_text_atomically(path, "".join(json.dumps({k: getattr(item, k) for k in keys}) + "\n" for item in items))


def write_task(folder: Path, items: Sequence[Item], metadata: dict[str, Any]) -> None:
    """Write NAME.jsonl and the lm-eval task NAME.yaml that reads it (by its absolute path, cached inside `folder`).

    `metadata`: name, mirrors, chance, items, description; it is part of the YAML file.
    """
    data = folder / f"{metadata['name']}.jsonl"
    write_items(data, items)
    first = items[0].choices_first
    task = {
        "task": metadata["name"],
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}, "cache_dir": str((folder / "cache").resolve())},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "label" if first else "prompt",  # a number: the choices are contexts, as in winogrande
        "doc_to_choice": "choices",
        "doc_to_target": "prompt" if first else "label",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0, **metadata},
    }
    write_text_atomically(folder / f"{metadata['name']}.yaml", yaml.safe_dump(task, sort_keys=False))


def fingerprint(modules: list[Module], *parameters: object) -> str:
    """Hash of everything the items depend on: library, tokenizer, this package's source, parameters."""
    digest = hashlib.sha256(f"{describe(modules)} {parameters}".encode())
    for path in [pocket_path() / "tokenizer.json", *sorted(Path(__file__).parent.glob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def write_listing(folder: Path, mark: str, rows: list[dict[str, Any]]) -> None:
    """Write `tasks.json`, last of all: it says that the folder is whole."""
    write_text_atomically(folder / "tasks.json", json.dumps({"fingerprint": mark, "tasks": rows}, indent=1) + "\n")


def read_listing(folder: Path, mark: str | None = None) -> list[dict[str, Any]]:
    """Metadata of the tasks in a folder; none if it has no listing that can be read, or one of another fingerprint."""
    try:
        listing: dict[str, Any] = json.loads((folder / "tasks.json").read_text())
    except (FileNotFoundError, ValueError):  # never written, or damaged: to be built again
        return []
    return listing["tasks"] if mark in (None, listing["fingerprint"]) else []
