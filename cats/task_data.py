"""Data sets from a local folder with the hub's names, so that lm-eval's tasks need no server.

    FOLDER/hub/allenai/sciq/    what `datasets.load_dataset("allenai/sciq")` would fetch: the hub's files
    FOLDER/text/                text with the splits train and heldout, column ``text`` (see `experiments.data`)

Nothing is downloaded: a set that the folder lacks is an error, even where the hub has it.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cats.extras import missing
from cats.models.identity import file_hash

try:
    import datasets
    from datasets import DatasetDict
    from lm_eval.api.task import Task
except ImportError as error:
    raise missing(__name__, "experiments", error) from error

HUB, TEXT = "hub", "text"


@dataclass
class LocalSets:
    """What was asked for while `local_sets` was in force.

    Attributes:
        folder: where sets are looked for; None: from the hub, as always.
        asked: names and configurations in the order in which they were asked for.
        loaded: the last of them, if it could be loaded.
    """

    folder: Path | None = None
    asked: list[str] = field(default_factory=list)
    loaded: DatasetDict | None = None

    def explain(self, error: Exception) -> str:
        """What went wrong in one sentence, with what the set has where it does not fit a task."""
        text = " ".join(str(error).split())
        if not self.asked or isinstance(error, FileNotFoundError):
            return text
        cause = f"{type(error).__name__}: {text}" if isinstance(error, KeyError | IndexError | TypeError) else text
        place = f"the data set {self.asked[-1]} in {self.folder}"
        if self.loaded is None:
            return f"{place} cannot be read ({cause})"
        has = "; ".join(f"{split} with the columns {', '.join(d.column_names)}" for split, d in self.loaded.items())
        return f"{place} does not fit the task ({cause}): it has the splits {has}"


def check_folder(folder: Path, parts: Iterable[str] = (HUB, TEXT)) -> None:
    """Refuse a folder that lacks one of ``parts``.

    Raises:
        FileNotFoundError: it does not exist, or has no directory of that name.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"the data folder {folder} does not exist")
    for part in parts:
        if not (folder / part).is_dir():
            raise FileNotFoundError(
                f"the data folder {folder} has no directory {part}/: it holds task data in {HUB}/OWNER/NAME and text "
                f"in {TEXT}/"
            )


def set_path(folder: Path, name: str) -> Path:
    """Where ``folder`` keeps the hub's data set ``name``. Raises FileNotFoundError when it has none."""
    path = folder / HUB / name
    if not path.is_dir():
        check_folder(folder, [HUB])
        sets = ", ".join(sorted("/".join(p.parts[-2:]) for p in (folder / HUB).glob("*/*") if p.is_dir()))
        raise FileNotFoundError(f"the data folder {folder} has no set {name}: it has {sets or 'none'}")
    return path


def cache_of(part: Path) -> str:
    """Where `datasets` may keep what it makes of the directory ``part``: elsewhere for every content.

    Its own choice depends on the directory's name alone, so that it goes on with the old rows of a set that has changed
    or that another folder has by the same name.
    """
    hashes = json.dumps(folder_hashes(part, part)).encode()
    return str(Path(datasets.config.HF_DATASETS_CACHE) / f"{part.name}-{hashlib.sha256(hashes).hexdigest()[:16]}")


@contextmanager
def local_sets(folder: Path | None) -> Iterator[LocalSets]:
    """While it is in force `datasets.load_dataset` takes the hub's names for directories under ``folder``.

    Names of local files and directories, and kinds of files such as ``json``, stay what they are. With None nothing
    changes.
    """
    record = LocalSets(folder)
    original = datasets.load_dataset
    if folder is None:
        yield record
        return
    root = folder

    def load(path: str, name: str | None = None, *arguments: Any, **options: Any) -> Any:
        if "/" not in path or Path(path).exists():
            return original(path, name, *arguments, **options)
        record.asked.append(f"{path} ({name})" if name else path)
        record.loaded = None
        where = set_path(root, path)
        record.loaded = original(str(where), name, *arguments, **{"cache_dir": cache_of(where), **options})
        return record.loaded

    datasets.load_dataset = load
    try:
        yield record
    finally:
        datasets.load_dataset = original


def check_answer(task: Task) -> None:
    """Refuse a multiple-choice task whose first item's answer is none of its choices.

    lm-eval takes a column that is missing for a constant: every item would be scored as wrong without a word.

    Raises:
        ValueError: the answer is no choice.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    item: Any = task.eval_docs[0]
    choices = task.doc_to_choice(item)
    answer = task.doc_to_text(item) if getattr(task, "multiple_input", 0) else task.doc_to_target(item)
    for one in answer if isinstance(answer, list) else [answer]:
        if not (0 <= one < len(choices) if isinstance(one, int) else one in choices):
            raise ValueError(f"the answer of its first item, {one!r}, is none of {len(choices)} choices")


def tasks_identity(tasks: Mapping[str, Task], folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """What identifies the items of ``tasks``, for provenance.

    Args:
        tasks: by name.
        folder: where their data come from, if from a folder.

    Returns:
        For each task: ``version`` (lm-eval's), ``data`` (name and configuration of the set), ``items`` and ``sha256``
        (of the evaluated items, as sorted JSON, one a line), and with a folder ``files`` (path in the folder to
        SHA-256 of every file of the set).
    """
    return {name: _task_identity(task, folder) for name, task in tasks.items()}


def _task_identity(task: Task, folder: Path | None) -> dict[str, Any]:
    digest = hashlib.sha256()
    for item in task.eval_docs:
        digest.update(json.dumps(item, sort_keys=True, default=str).encode() + b"\n")
    source, part = getattr(task.config, "dataset_path", None), getattr(task.config, "dataset_name", None)
    source = source or ""
    local = Path(source).exists()  # a path is of this machine: only its name is kept
    known: dict[str, Any] = {
        "version": str(task.VERSION),
        "data": [Path(source).name if local else source, part],
        "items": len(task.eval_docs),
        "sha256": digest.hexdigest(),
    }
    if folder is not None and (folder / HUB / source).is_dir():
        known["files"] = folder_hashes(folder, folder / HUB / source)
    return known


def folder_hashes(folder: Path, part: Path) -> dict[str, str]:
    """SHA-256 of every file under ``part``, by its path in ``folder``."""
    files = sorted(path for path in part.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in files}
