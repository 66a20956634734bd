"""A report as a list of blocks, and its three written forms: GitHub's Markdown, and pandoc's for PDF and for HTML.

They differ in pictures (PNG on GitHub, SVG in the PDF, in HTML what the caller says), in captions (text with a number,
but part of the template's numbered figures in the PDF) and in column widths, which only the PDF needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pandas as pd

LONG_TABLE = 14, 1500  # rows, characters; a shorter table stays on one page


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is a section."""

    level: int
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph or list, in Markdown; `with_next` keeps it on the page of what follows."""

    markdown: str
    with_next: bool = False


@dataclass(frozen=True)
class Table:
    """Cells in Markdown (`escape` what comes from data), a caption, relative column widths (default: by content)."""

    frame: pd.DataFrame
    caption: str
    widths: tuple[float, ...] = ()


@dataclass(frozen=True)
class Picture:
    """A figure by the stem of its file in figures/, and its caption."""

    stem: str
    caption: str


@dataclass(frozen=True)
class Layout:
    """Typst's own markup for the PDF, such as a page break; the other forms leave it out."""

    typst: str


Block = Heading | Text | Table | Picture | Layout


def escape(text: str) -> str:
    """Data as Markdown text: nothing in it is markup."""
    return re.sub(r"([\\`*_\[\]<>#|~$^@])", r"\\\1", " ".join(str(text).split()))


def without_constant(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """Without a column that says the same in every row (the caption or the text above says it then)."""
    return frame.drop(columns=column) if column in frame and frame[column].nunique() <= 1 else frame


def one_line(text: str) -> str:
    """A caption as one line, however it stands in the source."""
    return " ".join(text.split())


def to_markdown(title: str, blocks: Iterable[Block]) -> str:
    """The report for the web (GitHub's Markdown); pictures are figures/*.png beside it."""
    parts, figures, tables = [f"# {title}"], 0, 0
    for block in blocks:
        match block:
            case Heading(level, text):
                parts.append(f"{'#' * (level + 1)} {text}")
            case Text(markdown):
                parts.append(markdown)
            case Table(frame, caption):
                tables += 1
                parts += [f"**Table {tables}.** {one_line(caption)}", pipe_table(frame)]
            case Picture(stem, caption):
                figures += 1
                parts += [f"![Figure {figures}](figures/{stem}.png)", f"**Figure {figures}.** {one_line(caption)}"]
    return "\n\n".join(parts) + "\n"


def to_html_source(blocks: Iterable[Block], classes: dict[str, str], picture: Callable[[str], str]) -> str:
    """The report's body for pandoc on the way to HTML: every wide table and picture in a box that scrolls.

    Args:
        blocks: the report.
        classes: words in bold -> the class of the style sheet that colours them.
        picture: stem of a figure -> path of its file.
    """
    parts, figures, tables = [], 0, 0
    for block in blocks:
        match block:
            case Heading(level, text):
                parts.append(f"{'#' * (level + 1)} {text}")
            case Text(markdown):
                parts.append(_classed(markdown, classes))
            case Table(frame, caption):
                tables += 1
                table = _classed(pipe_table(frame), classes)
                parts.append(f"::: caption\n**Table {tables}.** {one_line(caption)}\n:::")
                parts.append(f"::: scroll\n{_unbroken(table)}\n:::")
            case Picture(stem, caption):
                figures += 1
                parts.append(f"::: scroll\n![Figure {figures}]({picture(stem)})\\\n:::")  # \\: no figure of pandoc's
                parts.append(f"::: caption\n**Figure {figures}.** {one_line(caption)}\n:::")
    return "\n\n".join(parts) + "\n"


def _classed(markdown: str, classes: dict[str, str]) -> str:
    for words, name in classes.items():
        markdown = markdown.replace(f"**{words}**", f"[{words}]{{.{name}}}")
    return markdown


def to_pandoc(blocks: Iterable[Block]) -> str:
    """The report's body for pandoc; pictures are figures/*.svg, numbering and title are the template's."""
    parts = []
    for block in blocks:
        match block:
            case Heading(level, text):
                parts.append(f"{'#' * level} {text}")
            case Text(markdown, with_next):
                text = _unbroken(markdown)
                parts.append(f'::: {{typst:sticky="true"}}\n{text}\n:::' if with_next else text)
            case Table(frame, caption, widths):
                table = _unbroken(f"{pipe_table(frame, widths or _widths(frame))}\n\n: {one_line(caption)}")
                size = len(frame), sum(len(str(cell)) for cell in frame.to_numpy().ravel())
                whole = all(count <= most for count, most in zip(size, LONG_TABLE, strict=True))
                parts.append(f'::: {{typst:breakable="false"}}\n{table}\n:::' if whole else table)
            case Picture(stem, caption):
                parts.append(f"![{_unbroken(one_line(caption))}](figures/{stem}.svg)")
            case Layout(typst):
                parts.append(f"```{{=typst}}\n{typst}\n```")
    return "\n\n".join(parts) + "\n"


def pipe_table(frame: pd.DataFrame, widths: tuple[float, ...] = ()) -> str:
    """A pipe table. With `widths`, the rule's dashes carry them: pandoc then wraps cells to the page's width."""
    dashes = [max(3, round(150 * width / sum(widths))) for width in widths] or [3] * frame.shape[1]
    rule = "|".join(
        (":" + "-" * count if _is_text(frame.iloc[:, place]) else ":" + "-" * count + ":")
        for place, count in enumerate(dashes)
    )
    rows = [" | ".join(map(str, frame.columns)), None, *(" | ".join(map(str, row)) for row in frame.to_numpy())]
    return "\n".join(f"|{rule}|" if row is None else f"| {row} |" for row in rows)


def _is_text(column: pd.Series) -> bool:
    """Whether a column is set flush left: some cell begins with a letter."""
    return any(re.match(r"[`*\\]*[A-Za-z]", str(cell)) for cell in column)


def _unbroken(markdown: str) -> str:
    """A number stays with its per cent sign, and a plus-minus with its number."""
    return re.sub(r"(?<=\d) (?=%)|(?<=±) (?=\d)", "\u00a0", markdown)


def _widths(frame: pd.DataFrame) -> tuple[float, ...]:
    """By content: room for the longest word of each column, then by the square root of the longest cell."""
    widths = []
    for place, column in enumerate(frame.columns):
        cells = [str(column), *map(str, frame.iloc[:, place])]
        word = max(
            len(part) for cell in cells for part in re.split(r"[\s/]+|-(?=[a-z])", cell.replace("\\", "")) or [""]
        )
        widths.append(max(word + 1.5, 2.6 * max(len(cell) for cell in cells) ** 0.5))
    return tuple(widths)
