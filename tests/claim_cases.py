"""What the tests of the verdict rules share."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from reports.core.load import Run
from reports.core.verdicts import (
    Finding,
)
from tests import make_results as made

Table = pd.DataFrame


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1
    return findings[0]


def verdict(rule: Callable[[Run], list[Finding]], **tables: Table) -> str:
    return only(rule(made.loaded(**tables))).verdict


def timed(half: float, more: float, compiled: float | None = 0.95, machine: str = "made-up machine") -> Table:
    """Latency in which CATS is `half` and `more` times as fast as the fastest dense at 50 and 70 %."""
    table = made.latency(machine, dtypes=("float32",), rows=(1,), compiled=compiled)
    for shape, part in table.groupby("shape"):
        dense = part.loc[part["implementation"].isin(["dense", "dense-compiled"]), "geomean_ms"].min()
        for target, speedup in ((0.5, half), (0.7, more)):
            at = (table["shape"] == shape) & (table["implementation"] == "cats") & (table["sparsity_target"] == target)
            table.loc[at, "geomean_ms"] = dense / speedup
    return table
