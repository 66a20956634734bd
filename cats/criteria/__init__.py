"""Criteria: what decides which neurons or inputs are skipped, one file each, found by name. Needs no torch to import.

    criteria.names()                    # ('cats', 'chess', 'gate-norm', ...)
    criteria.get("chess").decider       # 'gate'
    criteria.label("cats", 0.5)         # 'CATS-50'

Every module of this package with a ``CRITERION`` counts, and every entry point of the group ``cats.criteria`` of
another installed package; `register` takes one made in a running program.
"""

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules

from cats.criteria.base import BLOCK_INPUTS, Criterion, Layer

__all__ = ["BLOCK_INPUTS", "Criterion", "Layer", "get", "label", "names", "register"]

GROUP = "cats.criteria"
_registered: dict[str, Criterion] = {}


@cache
def _installed() -> dict[str, Criterion]:
    modules = (import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__))
    criteria = [module.CRITERION for module in modules if hasattr(module, "CRITERION")]
    criteria += [entry.load() for entry in entry_points(group=GROUP)]
    return {criterion.name: criterion for criterion in criteria}


def register(criterion: Criterion) -> None:
    """Make ``criterion`` known by its name in this process, in place of one that had the name.

    Raises:
        TypeError: not an instance of `Criterion`.
    """
    if not isinstance(criterion, Criterion):
        raise TypeError(f"a criterion must be an instance of cats.criteria.Criterion, not {type(criterion).__name__}")
    _registered[criterion.name] = criterion


def names() -> tuple[str, ...]:
    """Names of all criteria, sorted."""
    return tuple(sorted({**_installed(), **_registered}))


def get(name: str) -> Criterion:
    """The criterion of that name. Raises ValueError naming those that exist."""
    criterion = {**_installed(), **_registered}.get(name) if isinstance(name, str) else None
    if criterion is None:
        raise ValueError(f"unknown criterion {name!r}: allowed are {', '.join(names())}")
    return criterion


def label(name: str, sparsity: float | None = None) -> str:
    """What reports print for a criterion at a level, such as "CATS-50". Raises as `get`."""
    return get(name).label(sparsity)
