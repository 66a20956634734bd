"""Render run directories into one report: `python -m reports RUN_DIR [RUN_DIR ...] [--output DIR]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reports.core.load import load_runs
from reports.core.render import render
from reports.core.section import discover, row_types


def main(arguments: list[str] | None = None) -> int:
    """Command line. Returns 0, or 1 after one sentence on stderr that says what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m reports", description="Claims, figures, report.md, report.html and report.pdf."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="holds results/*.csv and provenance.json")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: the first RUN_DIR)")
    given = parser.parse_args(arguments)
    try:
        sections = discover()
        runs = load_runs(given.runs, row_types(sections))
        for run in runs:
            for name, why in run.problems.items():
                print(f"reports: {run.label}: {name}: {why}", file=sys.stderr)
            for name in run.unclaimed:
                print(f"reports: {run.label}: {name} is not shown: no section of the report reads it", file=sys.stderr)
        written = render(runs, sections, given.output or given.runs[0])
    except (ValueError, RuntimeError, OSError) as error:
        print(f"reports: {error}", file=sys.stderr)
        return 1
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
