"""Pairs of an input and its answer, from .jsonl and .tsv files: raw bytes, checked line by line. Mixes nothing."""

import base64
import binascii
import codecs
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlin_cli.corpus.lines import lines_of
from marlin_cli.corpus.packed import packing_by_beginning
from marlin_cli.documents import parse_json
from marlin_cli.errors import CorpusError
from marlin_cli.files import check_regular, shipped
from marlin_cli.text import MOST_QUOTED, one_line, quoted

# Names of the two sides of an object, in order of preference; each may end in _base64 or _hex where it is no text.
SIDES = (("source", "target"), ("input", "output"))

# Names of what groups pairs in a report.
GROUPS = ("language", "group", "lang", "domain")

_DECODERS: dict[str, Callable[[str], bytes]] = {
    "": lambda text: text.encode("utf-8", errors="surrogatepass"),
    "_base64": lambda text: base64.b64decode(text, validate=True),
    "_hex": bytes.fromhex,
}


# The largest file, and the most pairs of one: they are held in memory, some 200 bytes each beside their text.
MOST_PAIRS_BYTES = 256 << 20
MOST_PAIRS = 1_000_000

_MOST_LISTED = 8  # names in an error


@dataclass(frozen=True, slots=True)
class Pair:
    """An input, the answer wanted, and the group (language, kind) that the pair is reported in; empty for none."""

    source: bytes
    target: bytes
    group: str = ""


BESIDE_A_MODEL = "pairs.jsonl"


def locate_pairs(name: str) -> Path:
    """The file of pairs: a path, the folder of a model that has pairs.jsonl, or the name of a shipped one.

    Raises:
        CorpusError: neither.
    """
    path = Path(os.path.expanduser(name))
    beside = shipped("configs/models") / name / BESIDE_A_MODEL
    if not os.path.exists(path) and Path(name).name == name and os.path.isfile(beside):
        return beside
    if not os.path.exists(path):
        shown = name if name.isprintable() and len(name) <= 200 else quoted(name)
        raise CorpusError(f"{shown}: no such file of pairs, and no shipped model with pairs; name a .jsonl or .tsv file")
    if path.is_dir() and (path / BESIDE_A_MODEL).is_file():
        return path / BESIDE_A_MODEL
    check_regular(path, CorpusError, "a file of pairs (.jsonl or .tsv)")
    return path


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a file, in its order; empty lines are left out. Memory: the pairs, and one line.

    A line of .jsonl (.ndjson) is an object with source and target (or input and output), as text or under the same
    names with _base64 or _hex; language, group, lang or domain names its group. A line of .tsv is source, a tab,
    target, and after another tab perhaps the group; a carriage return at its end is left out, and quotes are as they
    lie. Where its first line has the names of both sides, it says which column is which.

    Raises:
        CorpusError: another kind of file, one that cannot be read or is too large, or a line that is no pair.
    """
    check_regular(path, CorpusError, "a file of pairs (.jsonl or .tsv)")
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".ndjson", ".tsv"):
        raise CorpusError(f"{path}: pairs are read from .jsonl or .tsv files, unpacked")
    try:
        with path.open("rb") as file:
            _check_beginning(path, file.peek(8)[:8])
            lines = lines_of(file, str(path), CorpusError, most_bytes=MOST_PAIRS_BYTES)
            found = _of_table(lines) if suffix == ".tsv" else (_of_object(line, where) for where, line in lines)
            pairs = list(itertools.islice(found, MOST_PAIRS + 1))
    except OSError as error:
        raise CorpusError(f"{path}: cannot read: {error.strerror}") from None
    if len(pairs) > MOST_PAIRS:
        raise CorpusError(f"{path}: holds more than {MOST_PAIRS:,} pairs; cut it into several files")
    if not pairs:
        raise CorpusError(f"{path}: holds no pairs")
    return pairs


def _check_beginning(path: Path, head: bytes) -> None:
    packing = packing_by_beginning(head)
    if packing is not None:
        raise CorpusError(f"{path}: holds {packing} data; pairs are read from .jsonl or .tsv files, unpacked")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and b"\0" in head[2:]:
        raise CorpusError(f"{path}: is UTF-16; write it as UTF-8")


def _of_table(lines: Iterator[tuple[str, bytes]]) -> Iterator[Pair]:
    """The pairs of a .tsv."""
    order: tuple[int, ...] = (0, 1, 2)
    for number, (where, line) in enumerate(lines):
        columns = line.removesuffix(b"\r").split(b"\t")
        if number == 0:
            columns[0] = columns[0].removeprefix(codecs.BOM_UTF8)
            named = _order_of_header([column.decode("utf-8", errors="replace").lower() for column in columns])
            if named is not None:
                order = named
                continue
        if len(columns) not in (2, 3):
            raise CorpusError(f"{where}: {len(columns)} columns; write source, tab, target, and perhaps tab, group")
        if max(order[:2]) >= len(columns):
            raise CorpusError(f"{where}: {len(columns)} columns, where the first line names more")
        group = columns[order[2]] if order[2] < len(columns) else b""
        yield Pair(columns[order[0]], columns[order[1]], _shown_group(group.decode("utf-8", errors="replace")))


def _order_of_header(names: Sequence[str]) -> tuple[int, int, int] | None:
    """Where source, target and group stand, if these are the names of columns; 3 for no group."""
    for source, target in SIDES:
        rest = [name for name in names if name not in (source, target)]
        if sorted(set(names) - set(rest)) == sorted((source, target)) and len(names) == len(rest) + 2 <= 3:
            return names.index(source), names.index(target), names.index(rest[0]) if rest else 3
    return None


def _of_object(line: bytes, where: str) -> Pair:
    row = parse_json(line, where, CorpusError)
    if not isinstance(row, dict):
        raise CorpusError(f"{where}: is not a JSON object")
    for source, target in SIDES:
        if any(source + ending in row for ending in _DECODERS):
            return Pair(_side(row, source, where), _side(row, target, where), _group(row, where))
    found = ", ".join(map(quoted, itertools.islice(row, _MOST_LISTED))) or "nothing"
    more = ", ..." if len(row) > _MOST_LISTED else ""
    raise CorpusError(f"{where}: has no source and target, nor input and output; found {found}{more}")


def _side(row: Mapping[str, Any], name: str, where: str) -> bytes:
    given = [name + ending for ending in _DECODERS if name + ending in row]
    if len(given) != 1:
        raise CorpusError(f"{where}: needs one of {', '.join(name + ending for ending in _DECODERS)}")
    value = row[given[0]]
    if not isinstance(value, str):
        raise CorpusError(f"{where}: {given[0]!r} is {type(value).__name__}, expected text")
    try:
        return _DECODERS[given[0].removeprefix(name)](value)
    except (binascii.Error, ValueError):
        raise CorpusError(f"{where}: {given[0]!r} is not {given[0].rpartition('_')[2]}") from None


def _group(row: Mapping[str, Any], where: str) -> str:
    name = next((name for name in GROUPS if row.get(name) is not None), None)
    if name is None:
        return ""
    if not isinstance(row[name], (str, int, float)):
        raise CorpusError(f"{where}: {name!r} is {type(row[name]).__name__}, expected text")
    return _shown_group(str(row[name]))


def _shown_group(text: str) -> str:
    """The name of a group as reports show it."""
    shown = one_line(text)
    return shown if len(shown) <= MOST_QUOTED else shown[: MOST_QUOTED - 3] + "..."
