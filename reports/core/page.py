"""A page that a command writes from results/, and the check that the committed one is what it would write."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from experiments.framework.files import write_bytes_atomically

TEMPLATES = Path(__file__).parents[1] / "template"


def filled(template: str, parts: Mapping[str, str]) -> str:
    """A page of reports/template with `{name}` replaced by the part of that name."""
    text = (TEMPLATES / template).read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"{{{name}}}", part)
    return text


def write_or_check(page: Path, content: Callable[[], str], check: bool, module: str) -> int:
    """Write ``page``, or say whether it is up to date. Returns 0, or 1 after one sentence on stderr."""
    try:
        text = content()
        if not check:
            write_bytes_atomically(page, text.encode())
            print(page)
            return 0
        current = page.read_text(encoding="utf-8") if page.exists() else ""
    except (ValueError, OSError) as error:
        print(f"{module}: {error}", file=sys.stderr)
        return 1
    if current != text:
        print(f"{module}: {page} is not what results/ say now; run `python -m {module}`", file=sys.stderr)
        return 1
    return 0
