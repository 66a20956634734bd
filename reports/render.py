"""Runs in, a report out: claims.csv, figures/, report.md, report.pdf."""

from __future__ import annotations

import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from reports.appendix import commit, machine
from reports.claims import judge
from reports.document import Block, escape, to_markdown, to_pandoc
from reports.figures import draw_all, draw_headline
from reports.load import Run
from reports.sections import build

TEMPLATE = Path(__file__).parent / "template" / "report.typ"
TITLE = "CATS: a reproduction"
PAPER_LINE = (
    "Lee, Lee, Zhang, Tiwari, Mirhoseini: CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models "
    "(COLM 2024, arXiv 2404.08763)"
)


def render(runs: list[Run], output: Path) -> list[Path]:
    """Write the report of `runs` into `output`. Returns the files for a reader, in reading order.

    Raises:
        OSError: `output` cannot be written.
        RuntimeError: the PDF could not be set; everything else has been written by then.
    """
    output.mkdir(parents=True, exist_ok=True)
    judged = judge(runs)
    claims = output / "claims.csv"
    _write(claims, judged.to_csv(index=False, lineterminator="\n").encode())
    drawn = draw_all(runs, output / "figures")
    headline = draw_headline(runs, output / "figures")
    blocks = build(runs, judged, drawn, headline)
    lines = [_run_line(run) for run in runs]
    markdown = output / "report.md"
    front = [f"Reproduction of {PAPER_LINE}.", *(f"- {escape(line)}" for line in lines)]
    text = to_markdown(TITLE, blocks)
    title, _, body = text.partition("\n\n")
    _write(markdown, "\n\n".join([title, front[0], "\n".join(front[1:]), body]).encode())
    pdf = output / "report.pdf"
    _set_pdf(blocks, lines, pdf)
    return [pdf, markdown, claims]


def _run_line(run: Run) -> str:
    """`pocket: Imaginary CPU, 2 cores; profile pocket; measured 2001-01-07; commit 0123456789`."""
    entries = list(run.provenance.values())
    days = sorted({str(entry["started"])[:10] for entry in entries if entry.get("started")})
    commits = sorted({commit({**entry, "dirty": False}) for entry in entries})
    changed = ", in part with uncommitted changes" if any(entry.get("dirty") for entry in entries) else ""
    said = [machine(run)]
    said += [f"profile {', '.join(run.profiles)}"] if run.profiles else []
    said += [f"measured {days[0]}" + (f" to {days[-1]}" if len(days) > 1 else "")] if days else []
    said += [f"commit {' and '.join(commits)}{changed}"] if commits else ["no provenance"]
    return f"{run.label}: {'; '.join(said)}"


def _set_pdf(blocks: list[Block], lines: list[str], pdf: Path) -> None:
    """Markdown -> typst (pandoc, our template) -> PDF, with the fonts inside the typst wheel: the same everywhere."""
    try:
        import pypandoc
        import typst
    except ImportError as error:
        raise RuntimeError(f"report.pdf needs pypandoc_binary and typst ({error.name} is missing)") from error
    reader = "markdown-tex_math_dollars-citations-subscript-superscript-raw_html-raw_tex-strikeout-yaml_metadata_block"
    arguments = [f"--template={TEMPLATE}", "--columns=40", "--wrap=none", "--syntax-highlighting=none"]
    arguments += [f"--metadata=title:{TITLE}", f"--metadata=paper:{PAPER_LINE}"]
    arguments += [f"--metadata=run:{line}" for line in lines]
    arguments += [f"--metadata=date:{datetime.now(UTC):%Y-%m-%d}"]
    try:
        source = pypandoc.convert_text(to_pandoc(blocks), "typst", format=reader, extra_args=arguments)
        # typst reads pictures from below its root, so the source has to stand beside them for a moment.
        with tempfile.NamedTemporaryFile(dir=pdf.parent, prefix=".report-", suffix=".typ") as main:
            main.write(source.encode())
            main.flush()
            content = typst.compile(main.name, root=str(pdf.parent), ignore_system_fonts=True)
    except (RuntimeError, typst.TypstError) as error:
        raise RuntimeError(f"report.pdf could not be set: {error}") from error
    _write(pdf, content)


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all: a reader never sees half a file."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)
