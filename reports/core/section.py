"""What the report says of one experiment, as an object, and how the sections are discovered.

``reports/eNN.py`` (or a folder) holds a `Section` under the name ``SECTION``. Whoever adds a folder to
``reports.__path__`` adds the sections in it.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

import reports
from experiments.framework.tables import Row
from reports.core.document import Block
from reports.core.load import Run
from reports.core.verdicts import Rule

Painter = Callable[[Axes], None]


@dataclass(frozen=True)
class Aspect:
    """One row of the protocol table: what the paper did, and what a run did (empty: not recorded)."""

    name: str
    paper: str
    ours: Callable[[Run], str]


@dataclass(frozen=True)
class Drawing:
    """One figure: its file name, the table without which there is nothing to draw, and its caption (Markdown).

    Attributes:
        secondary: it stands among the further figures of the HTML and Markdown, and not in the PDF.
        per_model: a figure per model rather than one for all.
    """

    name: str
    table: type[Row]
    draw: Callable[[Run], Figure | None]
    caption: str
    secondary: bool = False
    per_model: bool = False


def nothing(run: Run) -> list[Block]:
    """No tables."""
    return []


@dataclass(frozen=True)
class Section:
    """Everything that the report says of one experiment.

    Attributes:
        experiment: such as ``e02``.
        title: the heading.
        tables: row types that it reads, samples included; the first is the one without which there is no section.
        protocol: rows of the table that sets the paper's protocol beside ours.
        figures: in the order of the report.
        contents: tables with their captions.
        more: further tables, which the PDF leaves out.
        by_run: show each run for itself, as what is measured is its machine; else the runs of different models are
            shown together, as if they were one.
        rules: (claim, rule) pairs: what decides the paper's claims (`reports.core.claims.CLAIMS`).
        note: a paragraph (Markdown) above everything else, from the runs that measured it.
        glance: what to paint into a panel of the first figure, or None where the runs have nothing for it.
    """

    experiment: str
    title: str
    tables: tuple[type[Row], ...]
    protocol: tuple[Aspect, ...] = ()
    figures: tuple[Drawing, ...] = ()
    contents: Callable[[Run], list[Block]] = nothing
    more: Callable[[Run], list[Block]] = nothing
    by_run: bool = False
    rules: tuple[tuple[str, Rule], ...] = ()
    note: Callable[[list[Run]], str] = lambda runs: ""
    glance: Callable[[list[Run]], Painter | None] = lambda runs: None


def discover() -> list[Section]:
    """All sections, by experiment.

    Raises:
        ValueError: a module named like an experiment has no ``SECTION``.
    """
    names = sorted({m.name for m in pkgutil.iter_modules(reports.__path__) if re.fullmatch(r"e\d\d(_\w+)?", m.name)})
    sections = []
    for name in names:
        section = getattr(importlib.import_module(f"reports.{name}"), "SECTION", None)
        if not isinstance(section, Section):
            raise ValueError(f"reports/{name} has no section: it must define SECTION, a reports.core.section.Section")
        sections.append(section)
    return sections


def row_types(sections: list[Section]) -> list[type[Row]]:
    """The row types that the sections read, each once."""
    return list({row_type.table: row_type for section in sections for row_type in section.tables}.values())
