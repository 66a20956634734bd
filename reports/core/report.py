"""The report as blocks: claims, a section per experiment, the appendix; and the figures drawn for it."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from reports.core import style
from reports.core.appendix import appendix
from reports.core.document import Block, Heading, Picture, Table, Text, escape
from reports.core.load import Run, command
from reports.core.protocol import protocol
from reports.core.provenance import machine, provenance_line
from reports.core.section import Section
from reports.core.summary import claims_blocks

Drawn = dict[tuple[str, str], str]


def build(runs: list[Run], sections: list[Section], judged: pd.DataFrame, folder: Path) -> list[Block]:
    """Every block of the report, in order; the figures are drawn into ``folder``."""
    headline = _draw_headline(runs, sections, folder)
    drawn = _draw_all(runs, sections, folder)
    blocks = claims_blocks(runs, sections, judged, headline)
    for section in sections:
        blocks += _section(section, runs, drawn)
    return blocks + appendix(runs, sections)


def _draw_headline(runs: list[Run], sections: list[Section], folder: Path) -> str | None:
    """figures/headline: the panels that sections have to show at a glance, over all runs."""
    painters = [painter for section in sections if (painter := section.glance(runs)) is not None]
    if not painters:
        return None
    size = (style.WIDTH if len(painters) > 1 else 3.8, 2.7)
    figure, axes = plt.subplots(1, len(painters), figsize=size, squeeze=False)
    for ax, painter in zip(axes[0], painters, strict=True):
        painter(ax)
    style.save(figure, folder / "headline")
    return "headline"


def _draw_all(runs: list[Run], sections: list[Section], folder: Path) -> Drawn:
    """Draw each run's figures: (figure name, run label) -> file stem, for those that could be drawn."""
    drawn = {}
    for run in runs:
        suffix = "" if len(runs) == 1 else "_" + re.sub(r"[^A-Za-z0-9.]+", "-", run.label)
        for drawing in (drawing for section in sections for drawing in section.figures):
            if run.table(drawing.table) is None:
                continue
            figure = drawing.draw(run)
            if figure is not None:
                style.save(figure, folder / f"{drawing.name}{suffix}")
                drawn[drawing.name, run.label] = f"{drawing.name}{suffix}"
    return drawn


def _section(section: Section, runs: list[Run], drawn: Drawn) -> list[Block]:
    blocks: list[Block] = [Heading(1, section.title)]
    names = [row_type.table for row_type in section.tables]
    measured = [run for run in runs if any(name in run.tables for name in names)]
    blocks += [
        Text(f"**Broken in {escape(run.label)}:** {escape(f'{name}.csv: {run.problems[name]}')}.")
        for run in runs
        for name in names
        if name in run.problems
    ]
    if not measured:
        return [*blocks, Text(f"Not measured here; run `{command(section.experiment)}`.")]
    if note := section.note(measured):
        blocks.append(Text(note))
    if section.protocol:
        frame = protocol(section, measured)
        widths = (14, 38, *([38] * (frame.shape[1] - 2)))
        blocks.append(Table(frame, "The paper's protocol and what was done here.", widths))
    for run in measured:
        blocks += _one_run(section, run, drawn, several=len(runs) > 1)
    return blocks


def _one_run(section: Section, run: Run, drawn: Drawn, several: bool) -> list[Block]:
    blocks: list[Block] = [Heading(2, f"{escape(run.label)}: {escape(machine(run))}")] if several else []
    blocks.append(Text(provenance_line(run, section.experiment), with_next=True))
    absent = [t.table for t in section.tables if not t.samples and run.table(t) is None and t.table not in run.problems]
    if absent:
        again = command(section.experiment, run)
        blocks.append(Text(f"Not measured here: {escape(', '.join(absent))}; run `{again}`."))
    label = f"{escape(run.label)}: " if several else ""
    blocks += [
        Picture(drawn[drawing.name, run.label], label + drawing.caption)
        for drawing in section.figures
        if (drawing.name, run.label) in drawn
    ]
    return blocks + section.contents(run)
