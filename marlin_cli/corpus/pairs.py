"""Pairs of an input and its answer, from .jsonl and .tsv files: raw bytes, checked line by line. Mixes nothing."""

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlin_cli.documents import parse_json
from marlin_cli.errors import CorpusError
from marlin_cli.files import shipped

# Names of the two sides of an object, in order of preference; each may end in _base64 or _hex where it is no text.
SIDES = (("source", "target"), ("input", "output"))

# Names of what groups pairs in a report.
GROUPS = ("language", "group", "lang", "domain")

_DECODERS: dict[str, Callable[[str], bytes]] = {
    "": lambda text: text.encode("utf-8", errors="surrogatepass"),
    "_base64": lambda text: base64.b64decode(text, validate=True),
    "_hex": bytes.fromhex,
}


@dataclass(frozen=True)
class Pair:
    """An input, the answer wanted, and the group (language, kind) that the pair is reported in; empty for none."""

    source: bytes
    target: bytes
    group: str = ""


def locate_pairs(name: str) -> Path:
    """The file of pairs: a path, or the name of a shipped model that has pairs.

    Raises:
        CorpusError: neither.
    """
    path = Path(name).expanduser()
    beside = shipped("configs/models") / name / "pairs.jsonl"
    if not path.exists() and Path(name).name == name and beside.is_file():
        return beside
    if not path.is_file():
        raise CorpusError(f"{name}: no such file of pairs, and no shipped model with pairs; name a .jsonl or .tsv file")
    return path


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a file, in its order; empty lines are left out. Memory: the file's, about twice.

    A line of .jsonl is an object with source and target (or input and output), as text or under the same names with
    _base64 or _hex; language, group, lang or domain names its group. A line of .tsv is source, a tab, target, and
    after another tab perhaps the group; a carriage return at its end is left out.

    Raises:
        CorpusError: another kind of file, one that cannot be read, or a line that is no pair.
    """
    readers = {".jsonl": _of_object, ".tsv": _of_columns}
    if path.suffix not in readers:
        raise CorpusError(f"{path}: pairs are read from .jsonl or .tsv files, unpacked")
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CorpusError(f"{path}: cannot read: {error.strerror}") from None
    read = readers[path.suffix]
    pairs = [read(line, f"{path}: line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not pairs:
        raise CorpusError(f"{path}: holds no pairs")
    return pairs


def _of_columns(line: bytes, where: str) -> Pair:
    columns = line.removesuffix(b"\r").split(b"\t")
    if len(columns) not in (2, 3):
        raise CorpusError(f"{where}: {len(columns)} columns; write source, tab, target, and perhaps tab, group")
    return Pair(columns[0], columns[1], columns[2].decode("utf-8", errors="replace") if len(columns) == 3 else "")


def _of_object(line: bytes, where: str) -> Pair:
    row = parse_json(line, where, CorpusError)
    if not isinstance(row, dict):
        raise CorpusError(f"{where}: is not a JSON object")
    for source, target in SIDES:
        if any(source + ending in row for ending in _DECODERS):
            return Pair(_side(row, source, where), _side(row, target, where), _group(row))
    found = ", ".join(map(str, row)) or "nothing"
    raise CorpusError(f"{where}: has no source and target, nor input and output; found {found[:200]}")


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


def _group(row: Mapping[str, Any]) -> str:
    return next((str(row[name]) for name in GROUPS if row.get(name) is not None), "")
