"""Which column of a table is its text: by what all rows of all its files hold, never by what the first ones do."""

import enum
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from marlin_cli.errors import AssumptionWarning, CorpusError
from marlin_cli.text import MOST_QUOTED, one_line, quoted

# Columns that are taken for a table's bytes wherever they come, in order of preference.
COLUMNS = ("bytes", "content", "text")

# How many columns an error lists.
_MOST_LISTED = 8


class Kind(enum.Enum):
    """What a value, or a column of a type, can be to us."""

    TEXT = enum.auto()
    NOTHING = enum.auto()  # null
    NESTED = enum.auto()  # lists and tables: a chat, tokens
    OTHER = enum.auto()  # numbers, dates


class Held(NamedTuple):
    """The kind of a column's values, and the name of their type."""

    kind: Kind
    type: str


def held_by_row(row: Mapping[str, Any]) -> dict[str, Held]:
    """What a row of JSON holds, by column."""
    return {name: _held_by_value(value) for name, value in row.items()}


def held_by_schema(schema: Any) -> dict[str, Held]:
    """What an Arrow schema says that its columns hold."""
    return {field.name: Held(_kind_of_type(field.type), one_line(field.type)[:MOST_QUOTED]) for field in schema}


def find_only_column(rows: Iterable[tuple[str, Mapping[str, Held]]]) -> str | None:
    """The only column that ever holds text; None where one of `COLUMNS` does, so that its name decides, or without rows.

    Takes (where, what is held) for rows or schemas and goes on only as long as it must. Memory: that of some names.

    Raises:
        CorpusError: no column holds text, several do, or one does beside lists or tables, of which it may be the label.
    """
    text: dict[str, str] = {}  # column -> where it was first seen
    nested: tuple[str, str, str] | None = None  # where, column, type
    seen: dict[str, str] = {}  # column -> the type that was first seen there
    where = first = None
    for where, held in rows:
        first = where if first is None else first
        if any(held[name].kind is Kind.TEXT for name in COLUMNS if name in held):
            return None
        for name, (kind, type_name) in held.items():
            if len(seen) <= _MOST_LISTED:
                seen.setdefault(name, type_name)
            if kind is Kind.TEXT and len(text) < 2:
                text.setdefault(name, where)
            if kind is Kind.NESTED and nested is None:
                nested = where, name, type_name
    if first is None:
        return None
    if nested is not None:
        where, name, type_name = nested
        raise CorpusError(
            f"{where}: {quoted(name)} holds {type_name}, and text alone is read;"
            " have one column text, with what the model shall see of a row"
        )
    if len(text) == 1:
        return next(iter(text))
    names = ", ".join([*map(quoted, list(seen)[:_MOST_LISTED]), *(["..."] if len(seen) > _MOST_LISTED else [])])
    if not text:
        kinds = ", ".join(f"{quoted(name)} ({seen[name]})" for name in list(seen)[:_MOST_LISTED])
        raise CorpusError(f"{first}: no column holds text or bytes; found {kinds or 'no columns'}")
    raise CorpusError(f"{list(text.values())[1]}: which column holds the bytes? Found {names}; name it text")


class TextColumns:
    """The choice of a column for each row or file of one source, held to be one choice; counts the rows without text."""

    def __init__(self, only: str | None) -> None:
        """Takes what `find_only_column` gave."""
        self.names = COLUMNS if only is None else (only,)
        self._taken: set[str] = set()
        self._passed: dict[str, str] = {}  # was text in a row whose text was the other column
        self._odd: dict[str, CorpusError] = {}  # held something else than text
        self._without = self._rows = 0

    def choose(self, where: str, held: Mapping[str, Held]) -> str | None:
        """The column with the text of this row or file; None for no text in it. A null is as good as no column.

        Raises:
            CorpusError: another row's choice, by which text of one of them would be lost, or not text.
        """
        found = [name for name in self.names if name in held and held[name].kind is Kind.TEXT]
        for name in self.names:
            if name in held and held[name].kind in (Kind.NESTED, Kind.OTHER):
                self._odd.setdefault(name, CorpusError(f"{where}: {quoted(name)} is {held[name].type}, expected text"))
        self._taken.update(found[:1])
        self._passed.update((name, found[0]) for name in found[1:])
        for name in self._taken & self._odd.keys():
            raise self._odd[name]
        for name in self._taken & self._passed.keys():
            raise CorpusError(
                f"{where}: {quoted(name)} is the text of some rows, and in others stands beside"
                f" {quoted(self._passed[name])}; leave one column of the two, or name these files apart"
            )
        return found[0] if found else None

    def count(self, where: str, rows: int, without: int) -> None:
        """Count rows, and how many of them have no text. The first of these are told at once: the end may not be read."""
        if without and not self._without:
            _warn(f"{where}: no text ({self._wanted()}) where other rows hold some; rows without are left out")
        self._rows += rows
        self._without += without

    def report(self, name: str) -> None:
        """Say at the end of source `name` how many rows had no text."""
        if self._without > 1:
            _warn(f"{name}: {self._without:,} of {self._rows:,} rows hold no text ({self._wanted()}) and were left out")

    def _wanted(self) -> str:
        return " or ".join(quoted(name) for name in self.names if name in self._taken or not self._taken)


def _warn(message: str) -> None:
    warnings.warn(message, AssumptionWarning, stacklevel=3)


def _held_by_value(value: Any) -> Held:
    if isinstance(value, (str, bytes)):
        kind = Kind.TEXT
    elif value is None:
        kind = Kind.NOTHING
    else:
        kind = Kind.NESTED if isinstance(value, (list, dict)) else Kind.OTHER
    return Held(kind, type(value).__name__)


def _kind_of_type(kind: Any) -> Kind:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_null(kind):
        return Kind.NOTHING
    if types.is_nested(kind):
        return Kind.NESTED
    tests = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "fixed_size_binary")
    return Kind.TEXT if any(getattr(types, f"is_{test}")(kind) for test in tests) else Kind.OTHER
