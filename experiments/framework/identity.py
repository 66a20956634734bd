"""What identifies the inputs of a run: hashes of models, data sets and tasks, for the provenance."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def model_identity(spec: str) -> dict[str, Any]:
    """`cats.models.identity`: kind of source, revision, SHA-256 of weights, configuration and tokenizer."""
    from cats import models

    identity = getattr(models, "identity", None)
    return dict(identity(spec)) if identity is not None else {"model": spec}


def task_identity(task: Any) -> dict[str, Any]:
    """An lm-eval task: its version, where its data is from, and their fingerprint.

    The fingerprint is that of `datasets`: of the content for files that are read here, of the revision for the hub's.
    """
    config = task.config
    splits = getattr(task, "dataset", None) or {}
    fingerprints = {str(split): getattr(part, "_fingerprint", None) for split, part in splits.items()}
    return {
        "version": task.VERSION,
        "path": getattr(config, "dataset_path", None),
        "name": getattr(config, "dataset_name", None),
        "fingerprints": fingerprints,
    }


def text_identity(data: Mapping[str, Any]) -> dict[str, Any]:
    """A profile's ``[data]`` table, with the SHA-256 of local files that it names."""
    paths = [data.get("path"), data.get("data_files")]
    files = [Path(path) for path in paths if isinstance(path, str) and Path(path).is_file()]
    return {**data, "sha256": {file.name: file_hash(file) for file in files}} if files else dict(data)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Stable hash of a JSON-able value, 16 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
