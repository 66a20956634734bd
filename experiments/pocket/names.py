"""Drafts of tasks whose answer is one name or symbol: keywords, operators, attributes, names in scope, exceptions.

Each draft yields, for every place in a module that it fits, an item, or None where the file has too few wrong answers.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterable, Iterator

from experiments.pocket.sources import Function, Item, Pool, Source, Tokens, arrange, local_names, walk_body

KEYWORDS = ("if", "for", "while", "return", "raise", "try", "with", "in", "is", "not", "and", "or", "as", "import",
            "else", "elif", "except", "def", "class", "lambda", "yield", "from", "del", "assert", "pass")  # fmt: skip
OPERATORS = ("=", "==", "!=", "<", ">", "<=", ">=", "+", "-", "*", "/", "%", "+=", "-=", "|", "&", "**", "//", "->",
             ":=")  # fmt: skip


def _symbols(source: Source, allowed: tuple[str, ...], rng: random.Random) -> Iterator[Item | None]:
    """Symbols with a space on both sides, inside a line."""
    used = {token.string for token in source.tokens if token.string in allowed}
    for token in source.tokens:
        if token.string not in used:
            continue
        row, column = token.start
        before, after = source.lines[row - 1][:column], source.lines[row - 1][token.end[1] :]
        if before.strip() and before.endswith(" ") and after[:1] in (" ", "\n"):
            wrong = [" " + other for other in used]
            yield arrange(rng, source.before(row, column)[:-1], " " + token.string, wrong, 4, f"{source.name}:{row}")


def keyword(source: Source, rng: random.Random, tokens: Tokens) -> Iterator[Item | None]:
    """The missing keyword inside a line, among keywords of the file."""
    yield from _symbols(source, KEYWORDS, rng)


def operator(source: Source, rng: random.Random, tokens: Tokens) -> Iterator[Item | None]:
    """The missing operator, among operators of the file."""
    yield from _symbols(source, OPERATORS, rng)


def _attributes(nodes: Iterable[ast.AST], owners: set[str]) -> list[tuple[str, ast.Attribute]]:
    """(owner, node) of every `owner.attribute` among `nodes` whose owner is one of `owners`."""
    return [
        (node.value.id, node)
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in owners
    ]


def _place(source: Source, node: ast.Attribute) -> tuple[int, int] | None:
    """Row and column of the attribute's own name, or None if a line break comes between."""
    row = node.value.end_lineno or 0
    column = source.character_column(row, node.value.end_col_offset or 0) + 1
    return (row, column) if source.lines[row - 1][column:].startswith(node.attr) else None


def attribute(source: Source, rng: random.Random, tokens: Tokens) -> Iterator[Item | None]:
    """The attribute of an imported module, among attributes that the file takes from its other modules."""
    imports = [node for node in source.nodes if isinstance(node, ast.Import)]
    uses = _attributes(source.nodes, {alias.asname or alias.name for node in imports for alias in node.names})
    owners: dict[str, set[str]] = {}
    for module, node in uses:
        owners.setdefault(node.attr, set()).add(module)
    pool = Pool(tokens, owners)
    for module, node in uses:
        if place := _place(source, node):
            wrong = [other for other in pool.near(node.attr) if module not in owners[other]]
            yield arrange(rng, source.before(*place), node.attr, wrong, 4, f"{source.name}:{place[0]}")


def self_attribute(source: Source, rng: random.Random, tokens: Tokens) -> Iterator[Item | None]:
    """The attribute or method of self, among those of the same class."""
    for owner in [node for node in source.nodes if isinstance(node, ast.ClassDef)]:
        uses = _attributes(ast.walk(owner), {"self"})
        pool = Pool(tokens, [node.attr for _, node in uses])
        for _, node in uses:
            if place := _place(source, node):
                wrong = pool.near(node.attr)
                yield arrange(rng, source.before(*place), node.attr, wrong, 4, f"{source.name}:{place[0]}")


def _uses(source: Source, function: Function, names: set[str]) -> Iterator[tuple[str, int, int, str]]:
    """(name, row, column, prompt) of one use a line of a local name that the prompt, but not the line, has before."""
    rows: set[int] = set()
    for node in walk_body(function):
        if not (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names):
            continue
        row, column = node.lineno, source.character_column(node.lineno, node.col_offset)
        line = source.lines[row - 1][:column]
        if row in rows or row in source.inside_string or not line.strip():
            continue
        rows.add(row)
        prompt = source.before(row, column)
        if node.id not in line and re.search(rf"\b{node.id}\b", prompt):
            yield node.id, row, column, prompt


def name_in_scope(source: Source, rng: random.Random, tokens: Tokens) -> Iterator[Item | None]:
    """The name that comes next, which the passage holds, among four local names of the function."""
    for function in source.functions:
        names = local_names(function)
        for name, row, _, prompt in _uses(source, function, names):
            space = " " if prompt.endswith(" ") else ""
            wrong = Pool(tokens, [space + other for other in names]).near(space + name)
            yield arrange(rng, prompt.removesuffix(" "), space + name, wrong, 4, f"{source.name}:{row}")


def referent(source: Source, rng: random.Random, tokens: Tokens) -> Iterator[Item | None]:
    """Which of two names of the passage a blank stands for; the rest of the line is scored with the name."""
    for function in source.functions:
        names = local_names(function)
        for name, row, column, prompt in _uses(source, function, names):
            space = " " if prompt.endswith(" ") else ""
            rest = source.lines[row - 1].rstrip()[column + len(name) :]
            seen = [space + other for other in names if re.search(rf"\b{other}\b", prompt)]
            wrong = [other + rest for other in Pool(tokens, seen).near(space + name)]
            yield arrange(rng, prompt.removesuffix(" "), space + name + rest, wrong, 2, f"{source.name}:{row}")


def exception(source: Source, rng: random.Random, tokens: Tokens) -> Iterator[Item | None]:
    """The exception raised or caught, among those of the file."""
    found = []
    for node in source.nodes:
        target = node.exc if isinstance(node, ast.Raise) else node.type if isinstance(node, ast.ExceptHandler) else None
        target = target.func if isinstance(target, ast.Call) else target
        if isinstance(target, ast.Name):
            found.append(target)
    pool = Pool(tokens, [" " + node.id for node in found])
    for node in found:
        prompt = source.before(node.lineno, source.character_column(node.lineno, node.col_offset))
        if prompt.endswith(" "):
            answer = " " + node.id
            yield arrange(rng, prompt[:-1], answer, pool.near(answer, 2), 4, f"{source.name}:{node.lineno}")
