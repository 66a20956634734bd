"""The report as blocks: claims, a section per experiment, the appendix; and the figures drawn for it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from reports.core import style
from reports.core.appendix import appendix, recorded
from reports.core.document import Block, Heading, Layout, Picture, Table, Text, escape
from reports.core.load import Run, command
from reports.core.merge import grouped, joined, models, of_model, together
from reports.core.protocol import MOST_COLUMNS, at_a_glance, protocol
from reports.core.provenance import machine, provenance_line, run_lines, sources
from reports.core.section import Drawing, Section
from reports.core.summary import details_blocks, first_page, notes

FURTHER = "Further tables and figures"
ELSEWHERE = (
    "Accuracy by task, thresholds by layer, learning rates, the paper's other kernels, several rows at once, single "
    "times, the log of the runs and their settings are in `report.html` and `report.md` beside this file; every "
    "number is in the runs' CSVs, hashes of all inputs and outputs in their `provenance.json`."
)
MANY_RUNS = 6
"""Provenance of so many runs is long enough to stand at a page's end, the figure on the next."""
OUTLINE = "#block(height: 7.5em, columns(2, gutter: 2em, outline(title: none, depth: 1)))"


@dataclass(frozen=True)
class Report:
    """The parts of a report.

    Attributes:
        main: the first page and the sections.
        further: secondary tables and figures, which the PDF leaves out.
        appendix: the log of the runs, which the PDF leaves out.
    """

    main: list[Block]
    further: list[Block]
    appendix: list[Block]

    @property
    def whole(self) -> list[Block]:
        """What HTML and Markdown show."""
        further: list[Block] = [Heading(1, FURTHER), *self.further] if self.further else []
        return [*self.main, *further, *self.appendix]

    @property
    def printed(self) -> list[Block]:
        """What the PDF shows."""
        return [*self.main, Text(f"**{FURTHER}.** {ELSEWHERE}")]


@dataclass(frozen=True)
class Part:
    """What one section shows at a time: one run, or several of different models as one.

    Attributes:
        run: the tables.
        suffix: of the names of its figures' files.
        label: before its captions; empty where there is nothing to tell apart.
        members: the runs that it is made of.
        again: whether a part before it has measured some of the same on the same machine.
    """

    run: Run
    suffix: str
    label: str
    members: tuple[Run, ...] = ()
    again: bool = False


def build(runs: list[Run], sections: list[Section], judged: pd.DataFrame, folder: Path) -> Report:
    """Every block of the report; the figures are drawn into ``folder``."""
    main = first_page(runs, judged, _draw_headline(runs, sections, folder))
    lines = "\n".join(f"- {escape(line)}" for line in run_lines(runs))
    main += [Layout("#pagebreak(weak: true)"), Heading(1, "Runs shown"), Text(lines), *notes(judged), Layout(OUTLINE)]
    detailed, further = details_blocks(runs, sections, judged)
    main += detailed
    for section in sections:
        shown, more = _section(section, runs, folder)
        main += shown
        if more:
            further += [Heading(2, section.title), *more]
    return Report(main, further + recorded(runs), appendix(runs, sections))


def _draw_headline(runs: list[Run], sections: list[Section], folder: Path) -> str | None:
    """figures/headline: the panels that sections have to show at a glance, over all runs."""
    painters = [painter for section in sections if (painter := section.glance(runs)) is not None]
    if not painters:
        return None
    size = (style.WIDTH if len(painters) > 1 else 3.8, 1.7)
    figure, axes = plt.subplots(1, len(painters), figsize=size, squeeze=False)
    for ax, painter in zip(axes[0], painters, strict=True):
        painter(ax)
    style.save(figure, folder / "headline")
    return "headline"


def parts(section: Section, runs: list[Run]) -> list[Part]:
    """What a section shows one after the other."""
    if section.by_run:
        measured = [run for run in runs if any(row_type.table in run.tables for row_type in section.tables)]
        by_machine: dict[str, list[Run]] = {}
        for run in measured:
            by_machine.setdefault(machine(run), []).append(run)
        several = len(runs) > 1
        return [
            replace(_part(members, section, several), again=number > 0)
            for own in by_machine.values()
            for number, members in enumerate(grouped(own, section.tables))
        ]
    groups = together(runs, section.tables)
    return [
        Part(run, f"_{number}" * (number > 1), escape(run.label) * (len(groups) > 1), again=number > 1)
        for number, run in enumerate(groups, 1)
    ]


def _part(members: list[Run], section: Section, several: bool) -> Part:
    """Runs of one machine that contradict each other nowhere, as one."""
    labels = [run.label for run in members]
    label = labels[0] if len(labels) == 1 else f"{labels[0].split()[0]}, {len(labels)} runs"
    return Part(
        joined(members, section.tables), f"_{_slug(labels[0])}" * several, escape(label) * several, tuple(members)
    )


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def _pictures(drawing: Drawing, part: Part, folder: Path) -> list[Block]:
    """The figure, or one per model, drawn into ``folder``."""
    if part.run.table(drawing.table) is None:
        return []
    subjects = [(part.run, part.suffix, part.label)]
    if drawing.per_model and len(names := models(part.run, drawing.table)) > 1:
        subjects = [
            (of_model(part.run, name), f"{part.suffix}_{_slug(style.model_name(name))}", escape(style.model_name(name)))
            for name in names
        ]
    pictures: list[Block] = []
    for run, suffix, label in subjects:
        figure = drawing.draw(run)
        if figure is None:
            continue
        style.save(figure, folder / f"{drawing.name}{suffix}")
        caption = "as in the figure before." if pictures else drawing.caption.strip()
        pictures.append(Picture(f"{drawing.name}{suffix}", f"{label}: {caption}" if label else caption))
    return pictures


def _section(section: Section, runs: list[Run], folder: Path) -> tuple[list[Block], list[Block]]:
    """The section's blocks, and its secondary ones."""
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
        return [*blocks, Text(f"Not measured here; run `{command(section.experiment)}`.")], []
    if note := section.note(measured):
        blocks.append(Text(note))
    more: list[Block] = []
    if section.protocol:
        frame, caption = protocol(section, measured), "The paper's protocol and what was done here."
        if frame.shape[1] - 2 > MOST_COLUMNS:
            more.append(Table(frame, f"{caption[:-1]}, run by run."))
            frame = at_a_glance(section, measured)
        widths = (17, 38, *([38 * (1 + (frame.shape[1] == 3))] * (frame.shape[1] - 2)))
        blocks.append(Table(frame, caption, widths))
    several = len(runs) > 1
    if not section.by_run:
        blocks += _sources(section, measured, len(measured) > 1)
    for part in parts(section, runs):
        main = more if part.again else blocks
        if part.again:
            again = ", ".join(escape(run.label) for run in part.members) or part.label
            blocks.append(Text(f"*{again}* measured some of it again: among the further tables and figures."))
        if section.by_run:
            main += [Heading(2 + part.again, f"{part.label}: {escape(machine(part.run))}")] if several else []
            main += _sources(section, list(part.members), len(part.members) > 1)
        for drawing in section.figures:
            (more if drawing.secondary else main).extend(_pictures(drawing, part, folder))
        main += section.contents(part.run)
        more += section.more(part.run)
    return blocks, more


def _sources(section: Section, runs: list[Run], several: bool) -> list[Block]:
    """When, how long and at which commit each run was measured, and which tables a single one lacks."""
    if several:
        text = f"*Provenance:* {'; '.join(sources(runs, section.experiment))}."
        return [Text(text, with_next=len(runs) < MANY_RUNS)]
    (run,) = runs
    blocks: list[Block] = [Text(provenance_line(run, section.experiment), with_next=True)]
    lacks = [t.table for t in section.tables if not t.samples and run.table(t) is None]
    if absent := [name for name in lacks if name not in run.problems]:
        blocks.append(
            Text(f"Not measured here: {escape(', '.join(absent))}; run `{command(section.experiment, run)}`.")
        )
    return blocks
