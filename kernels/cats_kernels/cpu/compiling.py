"""How numba compiles the CPU kernels, and keeps what it compiled on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray

# without nnan and ninf: NaN and infinity must behave as in the reference
FASTMATH = {"reassoc", "contract", "nsz", "arcp"}

SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()
"""Of everything that is compiled here."""


def follow_sources(compiled: Any) -> Any:
    """Let numba's on-disk cache of ``compiled`` forget what was made from other sources.

    Numba looks at the file of the function itself, and not at those of the functions that it calls; and it fails where
    an index names a class that is no longer there.
    """
    cached = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
    if cached is not None:
        cached._source_stamp = SOURCES
        load_index = cached._load_index

        def load() -> Any:
            try:
                return load_index()
            except (AttributeError, ImportError):
                return {}

        cached._load_index = load
    return compiled


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``njit`` with numba's on-disk cache, or without one where no directory can be written."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return follow_sources(njit(cache=True, fastmath=FASTMATH, **options)(function))
        except RuntimeError:  # numba can write neither NUMBA_CACHE_DIR, nor the package, nor the user's cache
            return njit(fastmath=FASTMATH, **options)(function)

    return decorate
