"""Which way of multiplying packed weights a product takes: shipped by class of processor, or measured here by `make tune`.

Where several ways compete (kernels/ways.hpp), rows of x decide: "1 fixed, 4 registers, panels" is fixed point for one row,
registers for up to four, panels for more. Each format has such a line for 16 and 8 bits of activations, and for small matrices
and large ones.
"""

from pathlib import Path
from typing import Any

from marlin_cli import console
from marlin_cli.documents import parse_json, read_json
from marlin_cli.errors import ConfigError
from marlin_cli.files import shipped
from marlin_cli.private_files import NotPrivate, read_private
from marlin_cli.text import quoted

KINDS = ("nvfp4", "mxfp4", "mxfp8", "int4", "int8")  # the kernels' formats
ANY = 0  # in place of a number of rows: all that are left
SIZES = ("small", "large")  # up to `most_small_weights` of the kernels, which the second cache holds, and beyond
MOST_BYTES = 64 << 10

Choices = list[tuple[int, str]]  # up to so many rows, this way


def keys() -> dict[str, tuple[str, int, str]]:
    """The format, activation bits and size that each line of a table is of, by its key."""
    every = [(name, bits, size) for name in KINDS for bits in (16, 8) for size in SIZES]
    return {f"{name} {bits} {size}": (name, bits, size) for name, bits, size in every if (name, bits) != ("mxfp8", 8)}


def measured_file(module: Any) -> Path:
    """Where `make tune` keeps what it measured: beside the kernels, whose build it is of."""
    return Path(module.__file__).with_name("ways.json")


def use_ways(module: Any) -> str:
    """Give the kernels the table of this machine, else that of its class; what it is, in words."""
    processor = module.processor_class()
    file = measured_file(module)
    try:
        table, source = parse_json(read_private(file, MOST_BYTES), str(file), ConfigError), "ways measured here"
        set_table(module, table, str(file))
        return source
    except FileNotFoundError:
        pass
    except (ConfigError, NotPrivate, OSError) as problem:
        console.note(f"ways of multiplying that were measured are left alone: {problem}")
    path = shipped("kernels") / "ways.json"
    set_table(module, read_json(path).get(processor, {}), str(path))
    return f"ways of {processor}"


def set_table(module: Any, table: Any, where: str) -> None:
    """Give the kernels each line of a table.

    Raises:
        ConfigError: an unknown key, or a line that is none.
    """
    known = keys()
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: is no table of ways, but {quoted(table)}; `make tune` makes one")
    for key, line in table.items():
        if key not in known:
            raise ConfigError(f"{where}: {quoted(key)} is no format, bits and size; `make tune` makes the table anew")
        name, bits, size = known[key]
        kind = getattr(module.Kind, name)
        module.set_ways(kind, bits, size == "large", parse(line, set(module.way_names(kind, bits)), f"{where}: {key}"))


def parse(line: Any, here: set[str], where: str) -> Choices:
    """The choices that a line says.

    Raises:
        ConfigError: it says something else, or a way that this processor lacks.
    """
    choices: Choices = []
    for part in line.split(", ") if isinstance(line, str) else ():
        *rows, way = part.split(" ")
        if way not in here or len(rows) > 1 or not all(each.isdecimal() and len(each) < 10 for each in rows):
            raise ConfigError(f"{where}: {quoted(part)} is no number of rows and a way; ways here: {', '.join(sorted(here))}")
        choices.append((int(rows[0]) if rows else ANY, way))
    if not choices or choices[-1][0] != ANY:
        raise ConfigError(f"{where}: {quoted(line)} does not end with a way for all rows that are left")
    return choices


def line_of(best: dict[int, str]) -> str:
    """The line that says which way was the fastest at each number of rows: a way holds until another one is faster."""
    parts: list[tuple[int, str]] = []
    for rows, way in sorted(best.items()):
        if parts and parts[-1][1] == way:
            parts.pop()
        parts.append((rows, way))
    return ", ".join(f"{rows} {way}" for rows, way in parts[:-1]) + (", " if len(parts) > 1 else "") + parts[-1][1]
