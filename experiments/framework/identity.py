"""What identifies the inputs of a run: hashes of models, data sets and tasks, for the provenance."""

import hashlib
import json
import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any


def model_identity(spec: str) -> dict[str, Any]:
    """`cats.models.identity`: kind of source, revision, SHA-256 of weights, configuration and tokenizer."""
    from cats.models import identity

    return identity(spec)


def content(identity: Mapping[str, Any]) -> str:
    """Hash of an identity but for words about it: a hub's repository changes its revision with its page too."""
    return digest({key: value for key, value in identity.items() if key not in ("kind", "revision")})


def changed_models(identities: Mapping[str, Mapping[str, Any]], since: str | None) -> list[str]:
    """The models that are files or directories here and have other content now than in their identities.

    Args:
        identities: of models by name.
        since: an ISO time before they were identified; what has not changed since is not read. None: all are.
    """
    began = datetime.fromisoformat(since).timestamp() if since else -math.inf
    return [name for name, known in identities.items() if _is_younger(name, began) and _differs(name, known)]


def _is_younger(name: str, time: float) -> bool:
    """Whether the path ``name``, what it leads to, or a file in it was written or came there after that time."""
    path = Path(name).expanduser()
    if not path.exists():
        return False
    try:
        files = [path, *path.iterdir()] if path.is_dir() else [path]
        facts = [fact for file in files for fact in (file.lstat(), file.stat())]
    except OSError:  # such as a link that leads nowhere
        return True
    return any(max(fact.st_mtime, fact.st_ctime) > time for fact in facts)


def _differs(name: str, known: Mapping[str, Any]) -> bool:
    try:
        return content(model_identity(name)) != content(known)
    except (ValueError, OSError):  # no model any more, which the run will say
        return True


def task_identity(task: Any, folder: str | None = None) -> dict[str, Any]:
    """`cats.task_data.tasks_identity` of one lm-eval task: its version, and hashes of its items.

    ``folder`` is that of the profile's data, if there is one.
    """
    from cats.task_data import tasks_identity

    return tasks_identity({"": task}, None if folder is None else Path(folder))[""]


def text_identity(data: Mapping[str, Any]) -> dict[str, Any]:
    """A profile's ``[data]`` table, with the SHA-256 of the local files that it names."""
    from experiments.data import text_identity as folder_identity

    paths = [data.get("path"), data.get("data_files")]
    files = [Path(path) for path in paths if isinstance(path, str) and Path(path).is_file()]
    hashes = {file.name: file_hash(file) for file in files} | folder_identity(dict(data))
    return {**data, "sha256": hashes} if hashes else dict(data)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Stable hash of a JSON-able value, 16 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
