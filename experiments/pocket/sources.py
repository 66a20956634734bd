"""Held-out modules as material for questions: their lines, tokens, functions and names, and what training has seen.

Shared by the zero-shot tasks (`names.py`, `passages.py`) and the fine-tuning tasks (`finetuning_tasks.py`).
"""

from __future__ import annotations

import ast
import io
import random
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from experiments.pocket.corpus import Module

PROMPT_CHARACTERS = 200  # about 60 tokens: an evaluation of the eight tasks is then half a million tokens
Function = ast.FunctionDef | ast.AsyncFunctionDef
Tokens = Callable[[str], int]  # number of tokens of a text


@dataclass(frozen=True)
class Item:
    """A multiple-choice question. The right choice after `prompt` is what the source says.

    With `choices_first` (the partial evaluation of winogrande) the choices precede: each is followed by the same
    `prompt`, whose likelihood alone is scored.
    """

    prompt: str
    choices: tuple[str, ...]
    label: int
    source: str  # module and line
    choices_first: bool = False

    @property
    def answer(self) -> str:
        return self.choices[self.label]

    @property
    def passage(self) -> str:
        """The text of the source that the item was made of."""
        return self.answer + self.prompt if self.choices_first else self.prompt + self.answer


class Source:
    """One module, parsed on demand. Positions are (row from 1, column from 0), as in `ast` and `tokenize`."""

    def __init__(self, module: Module) -> None:
        self.name = module.name
        self.lines = module.text.splitlines(keepends=True)

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse("".join(self.lines))

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All nodes of the tree, breadth first: walking it again and again was half of the time of a build."""
        return list(ast.walk(self.tree))

    @cached_property
    def tokens(self) -> list[tokenize.TokenInfo]:
        return list(tokenize.generate_tokens(io.StringIO("".join(self.lines)).readline))

    @cached_property
    def functions(self) -> list[Function]:
        found = [node for node in self.nodes if isinstance(node, Function)]
        return sorted(found, key=lambda node: node.lineno)

    @cached_property
    def inside_string(self) -> set[int]:
        """Rows within a string of several lines (a docstring, say), its first row excepted."""
        strings = (node for node in self.nodes if isinstance(node, ast.Constant | ast.JoinedStr))
        return {row for node in strings for row in range(node.lineno + 1, (node.end_lineno or 0) + 1)}

    def before(self, row: int, column: int, characters: int = PROMPT_CHARACTERS) -> str:
        """Text before a position: whole lines, about `characters` characters, at least the line itself."""
        text = self.lines[row - 1][:column]
        while row > 1 and len(text) + len(self.lines[row - 2]) <= characters:
            row -= 1
            text = self.lines[row - 1] + text
        return text.lstrip("\n")

    def character_column(self, row: int, byte_column: int) -> int:
        """Column in characters of a column of `ast`, which counts UTF-8 bytes."""
        return len(self.lines[row - 1].encode()[:byte_column].decode())


class TrainingText:
    """What the model may have seen: answers whether a passage occurs verbatim in a training module."""

    def __init__(self, modules: Iterable[Module]) -> None:
        self.text = "\0\n".join(module.text for module in modules if not module.heldout)
        self.lines = set(self.text.splitlines())

    def contains(self, passage: str) -> bool:
        """Whether `passage` is a substring of a training module; the set of lines spares most searches."""
        whole_lines = passage.split("\n")[1:-1]
        return all(line in self.lines for line in whole_lines) and passage in self.text


def arrange(
    rng: random.Random,
    prompt: str,
    right: str,
    wrong: Iterable[str],
    count: int,
    source: str,
    choices_first: bool = False,
) -> Item | None:
    """Item of `count` choices: the right one at a uniformly drawn position, a sample of `wrong`; None if too few."""
    pool = sorted(set(wrong) - {right})
    if len(pool) < count - 1 or not prompt.strip():
        return None
    label = rng.randrange(count)
    choices = rng.sample(pool, count - 1)
    choices.insert(label, right)
    return Item(prompt, tuple(choices), label, source, choices_first)


class Pool:
    """Wrong answers by their number of tokens: `acc` compares unnormalised likelihoods, so lengths must agree."""

    def __init__(self, tokens: Tokens, texts: Iterable[str]) -> None:
        self.tokens = tokens
        self.by_length: dict[int, list[str]] = {}
        for text in sorted(set(texts)):
            self.by_length.setdefault(tokens(text), []).append(text)

    def near(self, right: str, slack: int = 0) -> list[str]:
        """Those with as many tokens as `right`, give or take `slack`."""
        length = self.tokens(right)
        lengths = range(length - slack, length + slack + 1)
        return [text for n in lengths for text in self.by_length.get(n, ())]


def local_names(function: Function) -> set[str]:
    """Parameters and local variables of a function, without self and cls."""
    names = {node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)}
    names |= {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return names - {"self", "cls", "_"}


def walk_body(function: Function) -> Iterator[ast.AST]:
    """All nodes below the statements of a function."""
    for statement in function.body:
        yield from ast.walk(statement)
