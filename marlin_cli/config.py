"""Frozen settings from mappings: an unknown key or a wrong type is an error that names the nearest known key."""

import contextlib
import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from marlin_cli.errors import ConfigError
from marlin_cli.text import MOST_QUOTED, quoted

T = TypeVar("T")

# In the metadata of a dataclass's field: how many entries its list may have, which are not looked at where there are more.
MOST_ENTRIES = "most entries"


def from_mapping(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """Build the frozen dataclass `cls` from `mapping`; `where` (a file or an option) begins every error.

    Nested dataclasses and tuples of them are built from nested mappings and lists. Numbers are not coerced,
    except that an integer stands for a float.

    Raises:
        ConfigError: an unknown or missing key, or a value of the wrong type.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: expected a table of keys and values, found {describe(mapping)}")
    hints = _type_hints(typing.cast(Any, cls))
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in mapping:
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {quoted(key)}{did_you_mean(_name(key), fields)}")
    for name, value in mapping.items():
        most = fields[name].metadata.get(MOST_ENTRIES)
        if most is not None and isinstance(value, (list, tuple)) and len(value) > most:
            raise ConfigError(f"{where}: {name} has {len(value):,} entries, more than {most}")
    values = {key: _checked(value, hints[key], f"{where}: key {key!r}") for key, value in mapping.items()}
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: missing key {missing[0]!r}")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


# Tables stand in lists of thousands, and the types of one class are looked up from their text.
@functools.cache
def _type_hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def check_same(found: T, wanted: T, where: str) -> None:
    """Compare the configuration found in a checkpoint with one that was asked for, but for fields left at their defaults.

    Raises:
        ConfigError: a field that differs; `where` begins the error.
    """
    for field in dataclasses.fields(wanted):  # type: ignore[arg-type]
        ours, theirs = getattr(found, field.name), getattr(wanted, field.name)
        if theirs not in (field.default, ours):
            raise ConfigError(f"{where}: {field.name} is {ours!r} in the checkpoint, but {theirs!r} was asked for")


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest of `known`, or the list of them when none is near."""
    names = list(known)
    # Comparing takes the product of the lengths; a word that is no name at all is like none of them.
    near = difflib.get_close_matches(word, names, n=1) if len(word) <= MOST_QUOTED else []
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(sorted(names))}"


def describe(value: Any) -> str:
    """A short description of a value for an error message."""
    return f"{type(value).__name__} {quoted(value)}"


def _name(key: Any) -> str:
    """A key of YAML as text; Python refuses to write whole numbers of thousands of digits."""
    return key if isinstance(key, str) else quoted(key)


def _checked(value: Any, hint: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise ConfigError(f"{where}: {describe(value)} is not one of {', '.join(map(str, choices))}")
        return value
    if origin in (typing.Union, types.UnionType):
        arms = typing.get_args(hint)
        if value is None and type(None) in arms:
            return None
        first, *others = (arm for arm in arms if arm is not type(None))
        if not others:
            return _checked(value, first, where)
        for arm in (first, *others):
            with contextlib.suppress(ConfigError):
                return _checked(value, arm, where)
        kinds = (arm.__name__ if isinstance(arm, type) else " or ".join(typing.get_args(arm)) for arm in (first, *others))
        raise ConfigError(f"{where}: expected {' or '.join(kinds)}, found {describe(value)}")
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, found {describe(value)}")
        item = typing.get_args(hint)[0]
        return tuple(_checked(entry, item, f"{where}[{index}]") for index, entry in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a table, found {describe(value)}")
        item = typing.get_args(hint)[1]
        return {_name(key): _checked(entry, item, f"{where}.{_name(key)}") for key, entry in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else from_mapping(hint, value, where)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise ConfigError(f"{where}: expected a finite number, found {describe(value)}")
        return number
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where}: expected {hint.__name__}, found {describe(value)}")
    return value
