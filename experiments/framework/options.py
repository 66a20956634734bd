"""An experiment's options: a frozen dataclass, and how a table of a profile becomes one. Free of torch.

A field's annotation says what is allowed, and that is what messages say too:

    @dataclass(frozen=True, kw_only=True)
    class Options:
        \"\"\"Options of e99.\"\"\"

        levels: tuple[Sparsity, ...]                       # a list of at least one, each given once
        lengths: dict[Annotated[str, OneOf(LOOPS)], tuple[Count, ...]]      # a table
        growth: Growth = Growth()                          # a table with options of its own: another such dataclass
        limit: Count | None = None                         # None when the profile does not give it
        steps: Annotated[tuple[Count, ...], Rising()] = (10, 20)

        def __post_init__(self) -> None:                   # what concerns several options; begin with the option's name
            if self.limit is not None and self.limit < self.steps[0]:
                raise ValueError("limit must be at least the first of steps")

`parse` refuses unknown keys, missing keys, and values of a wrong type or out of range: one sentence each, naming the
key and what is allowed. Defaults are not checked.
"""

import dataclasses
import math
import reprlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

O = TypeVar("O")  # noqa: E741, any dataclass of options


class Constraint:
    """What an annotation demands of a value beyond its type."""

    def allows(self, value: Any) -> bool:
        """Whether a value of the right type is allowed."""
        raise NotImplementedError

    def describe(self, kind: str) -> str:
        """``kind`` ("a whole number") with this constraint in words."""
        raise NotImplementedError


@dataclass(frozen=True)
class Range(Constraint):
    """A number from ``least`` to ``most``, both allowed unless ``open_least`` or ``open_most``."""

    least: float = -math.inf
    most: float = math.inf
    open_least: bool = False
    open_most: bool = False

    def allows(self, value: Any) -> bool:
        above = value > self.least if self.open_least else value >= self.least
        below = value < self.most if self.open_most else value <= self.most
        return bool(above and below)

    def describe(self, kind: str) -> str:
        if self.most == math.inf:
            return f"{kind} above {self.least:g}" if self.open_least else f"{kind}, {self.least:g} or more"
        least, most = (f"{bound:.0f}" if bound == int(bound) else f"{bound:g}" for bound in (self.least, self.most))
        return f"{kind} in {'(' if self.open_least else '['}{least}, {most}{')' if self.open_most else ']'}"


@dataclass(frozen=True)
class OneOf(Constraint):
    """One of a few values; a callable gives them when they are first needed, for what imports slowly."""

    values: Sequence[Any] | Callable[[], Sequence[Any]]

    def _known(self) -> Sequence[Any]:
        return self.values() if callable(self.values) else self.values

    def allows(self, value: Any) -> bool:
        return value in self._known()

    def describe(self, kind: str) -> str:
        return "one of " + ", ".join(str(value) for value in self._known())


@dataclass(frozen=True)
class Rising(Constraint):
    """A list whose values rise."""

    def allows(self, value: Any) -> bool:
        return list(value) == sorted(set(value))

    def describe(self, kind: str) -> str:
        return f"{kind}, rising"


@dataclass(frozen=True)
class MayBeEmpty(Constraint):
    """A list or table that may have no entry; without this one entry is the least."""

    def allows(self, value: Any) -> bool:
        return True

    def describe(self, kind: str) -> str:
        return kind.replace(" of at least one character", "").replace(" of at least one", "", 1)


Whole = Annotated[int, Range(0)]
"""A whole number, 0 or more."""
Count = Annotated[int, Range(1)]
"""A whole number, 1 or more."""
Seed = Annotated[int, Range(0, 2**31 - 1)]
"""Seeds of every library in use."""
Sparsity = Annotated[float, Range(0, 1, open_most=True)]
"""A fraction in [0, 1)."""
Positive = Annotated[float, Range(0, open_least=True)]
"""A number above 0."""
NotNegative = Annotated[float, Range(0)]
"""A number, 0 or more."""
Text = Annotated[str, MayBeEmpty()]
"""A string; the plain ``str`` must not be empty."""


def parse(options: type[O], table: Mapping[str, Any], where: str) -> O:
    """The options that a profile's table gives.

    Args:
        options: a dataclass as in this module's docstring.
        table: as TOML gives it.
        where: what the keys belong to, such as ``e02``; empty for those at the top of a profile.

    Raises:
        ValueError: one sentence about the first key that is wrong.
    """
    fields = {field.name: field for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(options, include_extras=True)
    if unknown := sorted(set(table) - set(fields)):
        raise ValueError(f"{where} has no option {', '.join(unknown)}: allowed are {', '.join(sorted(fields))}")
    begin = f"{where}." if where else ""
    values = {name: _convert(hints[name], value, f"{begin}{name}") for name, value in table.items()}
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{begin}{name} is missing: give {describe(hints[name])}")
    try:
        return options(**values)
    except ValueError as error:
        raise ValueError(f"{begin}{error}") from error


def describe(hint: Any) -> str:
    """What an annotation allows, in words."""
    kind, constraints = _unpack(hint)
    words = _words(kind)
    for constraint in constraints:
        words = constraint.describe(words)
    return words


def to_json(options: Any) -> Any:
    """Options as JSON would give them back: tables and lists."""
    if dataclasses.is_dataclass(options) and not isinstance(options, type):
        return {field.name: to_json(getattr(options, field.name)) for field in dataclasses.fields(options)}
    if isinstance(options, Mapping):
        return {key: to_json(value) for key, value in options.items()}
    if isinstance(options, (tuple, list)):
        return [to_json(value) for value in options]
    return options


_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string of at least one character",
    Any: "anything",
}


def _unpack(hint: Any) -> tuple[Any, tuple[Constraint, ...]]:
    """An annotation without ``Annotated`` and ``| None``, and its constraints."""
    if typing.get_origin(hint) is Annotated:
        kind, *extra = typing.get_args(hint)
        inner, constraints = _unpack(kind)
        return inner, (*constraints, *(one for one in extra if isinstance(one, Constraint)))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (kind,) = (one for one in typing.get_args(hint) if one is not type(None))
        return _unpack(kind)
    return hint, ()


def _words(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin is tuple:
        return f"a list of at least one, each {describe(typing.get_args(kind)[0])}"
    if origin is dict:
        key, value = typing.get_args(kind)
        return f"a table of at least one KEY = VALUE, each key {describe(key)}, each value {describe(value)}"
    if dataclasses.is_dataclass(kind):
        return f"a table with {', '.join(field.name for field in dataclasses.fields(kind))}"
    return _WORDS[kind]


def _convert(hint: Any, value: Any, where: str) -> Any:
    """``value`` of TOML as ``hint`` wants it. Raises ValueError naming ``where`` and what is allowed."""
    kind, constraints = _unpack(hint)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return parse(typing.cast(type, kind), value, where)
    refused = ValueError(f"{where} must be {describe(hint)}, not {reprlib.repr(value)}")
    converted = _container(kind, value, where, refused)
    empty = isinstance(converted, (str, tuple, dict)) and not converted
    if empty and not any(isinstance(one, MayBeEmpty) for one in constraints):
        raise refused
    if not all(constraint.allows(converted) for constraint in constraints):
        raise refused
    return converted


def _container(kind: Any, value: Any, where: str, refused: ValueError) -> Any:
    origin = typing.get_origin(kind)
    if origin is tuple and isinstance(value, (list, tuple)):
        inner = typing.get_args(kind)[0]
        entries = tuple(_entry(inner, entry, where, refused) for entry in value)
        if any(entry in entries[:index] for index, entry in enumerate(entries)):
            raise ValueError(f"{where} must give each value once, not {reprlib.repr(value)}")
        return entries
    if origin is dict and isinstance(value, Mapping):
        of_key, of_value = typing.get_args(kind)
        for key in value:
            _convert(of_key, key, f"a key of {where}")
        return {key: _convert(of_value, entry, f"{where}.{key}") for key, entry in value.items()}
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind is Any or (kind in (int, str, bool) and type(value) is kind):
        return value
    raise refused


def _entry(hint: Any, value: Any, where: str, refused: ValueError) -> Any:
    """One entry of a list: the message is about the whole list."""
    try:
        return _convert(hint, value, where)
    except ValueError as error:
        raise refused from error
