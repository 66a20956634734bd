"""Where lm-eval has a task of its own: its index of all of them reads 14,000 YAML files, which takes about ten seconds.

A name that exactly one of the files gives to its task is looked up in an index of that file's directory alone.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from cats.extras import missing

try:
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise missing(__name__, "experiments", error) from error

OWN = Path(lm_eval.tasks.__file__).parent


def own_tasks(names: Iterable[str]) -> dict[str, TaskManager]:
    """For each of ``names`` that is one of lm-eval's own tasks an index that has it; others are left out."""
    files = _files_of(tuple(names))
    indices: dict[str, TaskManager] = {}
    for name, paths in files.items():
        index = _index_of(paths[0].parent) if len(paths) == 1 else all_own_tasks()
        if len(paths) == 1 and (name not in index.all_subtasks or index.task_index[name].yaml_path != paths[0]):
            index = all_own_tasks()
        if name in index.all_subtasks:
            indices[name] = index
    return indices


@lru_cache(maxsize=1)
def all_own_tasks() -> TaskManager:
    """lm-eval's index of all its own tasks."""
    return TaskManager()


@lru_cache(maxsize=64)
def _index_of(directory: Path) -> TaskManager:
    return TaskManager(include_path=directory, include_defaults=False)


@lru_cache(maxsize=16)
def _files_of(names: tuple[str, ...]) -> dict[str, list[Path]]:
    """Files that say ``task: NAME``, for each name; a name may also be made of other keys, by an included file."""
    either = b"|".join(re.escape(name.encode()) for name in names)
    line = re.compile(rb"^task:[ \t]*(['\"]?)(" + either + rb")\1[ \t]*(?:#.*)?\r?$", re.MULTILINE)
    files: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(OWN.glob("**/*.yaml")):
        for match in line.finditer(path.read_bytes()):
            files[match[2].decode()].append(path)
    return {name: files[name] for name in names}
