"""Runs in, a report out: claims.csv, figures/, report.md, report.html, report.pdf."""

from __future__ import annotations

import importlib
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiments.framework.files import write_bytes_atomically
from reports.core.claims import judge
from reports.core.document import Block, to_html_source, to_markdown, to_pandoc
from reports.core.load import Run
from reports.core.report import build
from reports.core.section import Section
from reports.core.verdicts import FAILS, HOLDS, ON_POCKET

TEMPLATE = Path(__file__).parents[1] / "template"
TITLE = "CATS: a reproduction"
PAPER_LINE = (
    "Lee, Lee, Zhang, Tiwari, Mirhoseini: CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models "
    "(COLM 2024, arXiv 2404.08763)"
)
READER = "markdown-tex_math_dollars-citations-subscript-superscript-raw_html-raw_tex-strikeout-yaml_metadata_block"
CLASSES = {HOLDS: "holds", ON_POCKET[HOLDS]: "holds", FAILS: "fails", ON_POCKET[FAILS]: "fails"}
LARGEST_SVG = 200_000  # bytes; a larger picture goes into the HTML as PNG


def render(runs: list[Run], sections: list[Section], output: Path) -> list[Path]:
    """Write the report of `runs` into `output`. Returns the files for a reader, in reading order.

    Raises:
        OSError: `output` cannot be written.
        RuntimeError: the HTML or the PDF could not be set; the rest has been written by then.
    """
    output.mkdir(parents=True, exist_ok=True)
    judged = judge(runs, sections)
    claims, markdown = output / "claims.csv", output / "report.md"
    write_bytes_atomically(claims, judged.to_csv(index=False, lineterminator="\n").encode())
    report = build(runs, sections, judged, output / "figures")
    front = f"Reproduction of {PAPER_LINE}."
    title, _, body = to_markdown(TITLE, report.whole).partition("\n\n")
    write_bytes_atomically(markdown, "\n\n".join([title, front, body]).encode())
    html, pdf = output / "report.html", output / "report.pdf"
    _set_html(report.whole, front, html)
    _set_pdf(report.printed, pdf)
    return [pdf, html, markdown, claims]


def _set_html(blocks: list[Block], front: str, html: Path) -> None:
    """One file with its style sheet and pictures inside."""
    pypandoc = _require("pypandoc", "report.html needs pypandoc_binary")

    def picture(stem: str) -> str:
        vector = html.parent / "figures" / f"{stem}.svg"
        return f"figures/{stem}.{'svg' if vector.stat().st_size <= LARGEST_SVG else 'png'}"

    source = f"{front}\n\n{to_html_source(blocks, CLASSES, picture)}"
    arguments = ["--standalone", "--embed-resources", "--toc", "--toc-depth=2", "--wrap=none", "--columns=100000"]
    arguments += [f"--css={TEMPLATE / 'report.css'}", f"--resource-path={html.parent}", "--metadata=lang:en"]
    arguments += [f"--metadata=title:{TITLE}", "--syntax-highlighting=none"]
    try:
        text = pypandoc.convert_text(source, "html5", format=READER, extra_args=arguments)
    except RuntimeError as error:
        raise RuntimeError(f"report.html could not be set: {error}") from error
    write_bytes_atomically(html, text.encode())


def _set_pdf(blocks: list[Block], pdf: Path) -> None:
    """Markdown -> typst (pandoc, our template) -> PDF, with the fonts inside the typst wheel: the same everywhere."""
    pypandoc = _require("pypandoc", "report.pdf needs pypandoc_binary")
    typst = _require("typst", "report.pdf needs typst")
    arguments = [f"--template={TEMPLATE / 'report.typ'}", "--columns=40", "--wrap=none", "--syntax-highlighting=none"]
    arguments += [f"--metadata=title:{TITLE}", f"--metadata=paper:{PAPER_LINE}"]
    arguments += [f"--metadata=date:{datetime.now(UTC):%Y-%m-%d}"]
    try:
        source = pypandoc.convert_text(to_pandoc(blocks), "typst", format=READER, extra_args=arguments)
        # typst reads pictures from below its root, so the source has to stand beside them for a moment.
        with tempfile.NamedTemporaryFile(dir=pdf.parent, prefix=".report-", suffix=".typ") as main:
            main.write(source.encode())
            main.flush()
            content = typst.compile(main.name, root=str(pdf.parent), ignore_system_fonts=True)
    except (RuntimeError, typst.TypstError) as error:
        raise RuntimeError(f"report.pdf could not be set: {error}") from error
    write_bytes_atomically(pdf, content)


def _require(name: str, needed: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeError(f"{needed} ({error.name} is missing): install the extra reports") from error
