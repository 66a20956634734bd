"""Which model a result is of: hashes of its files, for provenance."""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from cats.models.loader import loader_of


def identity(spec: str) -> dict[str, Any]:
    """What identifies the model ``spec``: kind of source, revision on the hub if known, SHA-256 of its files.

    Returns:
        ``model`` (the spec), ``kind`` (such as ``GGUF Q4_K_M, dequantised``), ``revision`` (or None), ``weights``,
        ``config`` and ``tokenizer`` (file name to SHA-256, empty for random weights), and the notes of a converted
        directory. A file that has not changed since is hashed once a process.

    Raises:
        ValueError: as `resolve`.
        OSError: the files are not on this machine.
    """
    origin = loader_of(spec).origin(spec)
    parts = {"weights": origin.weights, "config": origin.config, "tokenizer": origin.tokenizer}
    hashes = {part: {path.name: file_hash(path) for path in paths} for part, paths in parts.items()}
    return {"model": spec, "kind": origin.kind, "revision": origin.revision, **hashes, **origin.notes}


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; remembered for as long as its size and time stay what they are."""
    status = path.stat()
    return _hash(path.resolve(), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1024)
def _hash(path: Path, _modified: int, _size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
