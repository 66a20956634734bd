"""lm-eval without its bars, its announcements, and its repeated compiling of templates."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from tqdm import tqdm

from cats.extras import missing

try:
    import datasets
    import lm_eval.utils
except ImportError as error:
    raise missing(__name__, "experiments", error) from error

NOISE = ("`pretrained` model kwarg is not of type `str`", "Passed an already-initialized model")
"""Beginnings of warnings of lm-eval's about every model that is given as an object, as all are here."""


def _no_noise(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NOISE)


def _without_bar(*args: Any, **kwargs: Any) -> Any:
    return tqdm(*args, **{**kwargs, "disable": True})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of lm-eval and datasets, no announcements of lm-eval: all other warnings are shown."""
    logger, noisy = logging.getLogger("lm_eval"), logging.getLogger("lm_eval.models.huggingface")
    level, bars = logger.level, not datasets.are_progress_bars_disabled()
    modules: Any = [m for name, m in sys.modules.items() if name.startswith("lm_eval.") and hasattr(m, "tqdm")]
    names = [(module, module.tqdm) for module in modules if module.tqdm is tqdm]
    logger.setLevel(logging.WARNING)
    noisy.addFilter(_no_noise)
    datasets.disable_progress_bars()
    for module, _ in names:
        module.tqdm = _without_bar
    try:
        yield
    finally:
        for module, original in names:
            module.tqdm = original
        if bars:
            datasets.enable_progress_bars()
        noisy.removeFilter(_no_noise)
        logger.setLevel(level)


@contextlib.contextmanager
def templates_compiled_once() -> Iterator[None]:
    """Let lm-eval compile each template of a task once, where it does so three times an item: most of its own time."""
    environment: Any = lm_eval.utils.env
    environment.from_string = lru_cache(maxsize=None)(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string
