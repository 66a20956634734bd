"""What a data folder must hold for a run of several experiments, asked before the first begins."""

import importlib
from collections.abc import Sequence
from pathlib import Path

from cats.task_data import set_path
from experiments.framework.config import Config
from experiments.framework.cost import TASKS
from experiments.framework.profiles import EXPERIMENTS
from experiments.framework.subject import check_length


def check_folders(configs: Sequence[Config]) -> None:
    """Refuse data folders (``--data``) that lack a task's set, or whose text is too short.

    Raises:
        FileNotFoundError: a folder has no such set.
        ValueError: as `experiments.data.blocks`.
        OSError: the text or a model's tokenizer cannot be read.
    """
    for config in configs:
        if "folder" not in config.data:
            continue
        module = importlib.import_module(EXPERIMENTS[config.experiment])
        needed = module.text_blocks(config) if hasattr(module, "text_blocks") else None
        if needed == {}:  # its models are only timed
            continue
        for task in getattr(config.options, "tasks", ()):
            if task in TASKS and not config.partial:  # of an experiment in part it is not known which it needs
                set_path(Path(config.data["folder"]), TASKS[task][0])
        if needed:
            check_length(config, needed)
