"""Drafts of tasks whose answer is a line or a passage: next lines, bodies, docstrings, comments. As in `names.py`."""

from __future__ import annotations

import ast
import random
import re
import tokenize
from collections.abc import Iterator

from experiments.pocket.sources import Function, Item, Pool, Source, Tokens, arrange

PREFIX = re.compile(r"\s*[rR]?(\"\"\"|'''|\"|')\s*")


def indentation(line: str) -> int:
    """Number of leading blanks."""
    return len(line) - len(line.lstrip())


def _split(text: str) -> tuple[str, str]:
    """(text, blanks at its end): blanks belong to the continuation, where its first piece holds them."""
    bare = text.rstrip()
    return bare, text[len(bare) :]


def next_line(source: Source, rng: random.Random, tokens: Tokens) -> Iterator[Item | None]:
    """The line of a function that follows, among lines of the same file, indentation and length (6 to 20 tokens)."""
    by_indentation: dict[int, dict[int, str]] = {}
    for function in source.functions:
        for row in range(function.body[0].lineno + 1, (function.end_lineno or 0) + 1):
            line = source.lines[row - 1].rstrip()
            if line.strip() and row not in source.inside_string and not line.lstrip().startswith(("#", '"', "'")):
                by_indentation.setdefault(indentation(line), {})[row] = line
    for lines in by_indentation.values():
        pool = Pool(tokens, lines.values())
        for row, line in lines.items():
            if 6 <= tokens(line) <= 20:
                prompt, gap = _split(source.before(row, 0))
                wrong = [gap + other for other in pool.near(line, 1) if other not in prompt]
                yield arrange(rng, prompt, gap + line, wrong, 4, f"{source.name}:{row}")


def _text(source: Source, start: int, stop: int, column: int) -> str:
    """Source from the start of row `start` to column `column` of row `stop`."""
    return "".join(source.lines[start - 1 : stop - 1]) + source.lines[stop - 1][:column]


def docstring(source: Source, rng: random.Random, tokens: Tokens) -> Iterator[Item | None]:
    """Does the docstring belong to this definition or to that one of the file? The docstring is scored."""
    found: list[tuple[int, str, str, str]] = []
    for node in source.nodes:
        if not isinstance(node, Function | ast.ClassDef) or ast.get_docstring(node) is None:
            continue
        start = node.body[0].lineno
        opening = PREFIX.match("".join(source.lines[start - 1 : start + 1]))
        if opening is None or start == node.lineno:
            continue
        row = start + opening.group().count("\n")
        column = len(opening.group().rsplit("\n", 1)[-1])
        text = re.sub(r"\s*(\"\"\"|'''|\"|')?\s*$", "", source.lines[row - 1][column:])
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        if len(text) >= 10:
            found.append((row, text, _text(source, node.lineno, row, column), kind + opening.group()))
    for row, text, definition, kind in found:
        wrong = [other for _, other_text, other, other_kind in found if other_kind == kind and other_text != text]
        yield arrange(rng, text, definition, wrong, 2, f"{source.name}:{row}", choices_first=True)


def body(source: Source, rng: random.Random, tokens: Tokens) -> Iterator[Item | None]:
    """The goal is a definition, the means the first two lines of a body: which of two definitions do they serve?"""
    found: list[tuple[int, str, str, int]] = []
    for function in source.functions:
        row = function.body[0].lineno
        if ast.get_docstring(function) is None and row > function.lineno:
            lines = "".join(source.lines[row - 1 : min(function.end_lineno or row, row + 1)]).rstrip()
            definition, gap = _split(_text(source, function.lineno, row, 0))
            found.append((row, gap + lines, definition, indentation(lines)))
    for row, lines, definition, indent in found:
        wrong = [other for _, text, other, other_indent in found if other_indent == indent and text != lines]
        yield arrange(rng, lines, definition, wrong, 2, f"{source.name}:{row}", choices_first=True)


def _after(source: Source, entries: dict[int, str], rng: random.Random, tokens: Tokens) -> Iterator[Item | None]:
    """Items of two choices: the line of a row, or another one of `entries` with its indentation."""
    pools: dict[int, Pool] = {}
    for indent in {indentation(line) for line in entries.values()}:
        pools[indent] = Pool(tokens, [line for line in entries.values() if indentation(line) == indent])
    for row, line in entries.items():
        prompt, gap = _split(source.before(row, 0, 300))
        wrong = [gap + other for other in pools[indentation(line)].near(line, 2)]
        yield arrange(rng, prompt, gap + line, wrong, 2, f"{source.name}:{row}")


def first_statement(source: Source, rng: random.Random, tokens: Tokens) -> Iterator[Item | None]:
    """The goal is a definition with its docstring; the means, the first line of the body, one of two of the file."""
    entries = {}
    for function in source.functions:
        if ast.get_docstring(function) is not None and len(function.body) > 1:
            row = function.body[1].lineno
            entries[row] = source.lines[row - 1].rstrip()
    yield from _after(source, entries, rng, tokens)


def comment(source: Source, rng: random.Random, tokens: Tokens) -> Iterator[Item | None]:
    """The goal is a comment; the means, the line of code below it, one of two of the file."""
    entries = {}
    for token in source.tokens:
        row, column = token.start
        if token.type == tokenize.COMMENT and not source.lines[row - 1][:column].strip() and row < len(source.lines):
            line = source.lines[row].rstrip()
            if line.strip() and not line.lstrip().startswith("#") and indentation(line) == column:
                entries[row + 1] = line
    yield from _after(source, entries, rng, tokens)
