"""Windows of raw bytes out of files and stdin, one at a time. What the rows of tables hold is read in tables.py."""

import contextlib
import io
import sys
import warnings
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from marlin_cli.corpus.columns import COLUMNS, Held, TextColumns, find_only_column
from marlin_cli.corpus.packed import packing_of, unpacked
from marlin_cli.corpus.sources import Source
from marlin_cli.corpus.tables import (
    held_by_lines,
    held_by_parquet,
    is_parquet,
    is_table,
    refuse_disguised,
    rows_of_hub,
    rows_of_lines,
    rows_of_parquet,
)
from marlin_cli.errors import AssumptionWarning, CorpusError
from marlin_cli.files import check_regular

# A shorter rest of a file or a row is left out: a few patches without context would count like a window.
SHORTEST_WINDOW_BYTES = 64

# A window is read in parts of this size: a buffer for all of it would be made before it is known that the file is as long.
PART_BYTES = 1 << 20


def windows_of_source(source: Source, files: tuple[str, ...], sequence_bytes: int) -> Iterator[dict[str, Any]]:
    """The windows of a source, its files read in the order of `files`: {domain, bytes}, as `datasets` wants them.

    A window spans neither two files nor two rows. One window at a time is read, when it is asked for.

    Raises:
        CorpusError: naming the file that is damaged or cannot be read.
    """
    if source.stdin:
        if sys.stdin is None:
            raise CorpusError("stdin is closed; pipe bytes in, or name a file")
        documents: Iterator[IO[bytes]] = iter([sys.stdin.buffer])
        yield from _windows(documents, source.domain, sequence_bytes)
    if source.hub is not None:
        yield from _windows(map(io.BytesIO, rows_of_hub(source.hub)), source.domain, sequence_bytes)
    _note_documents(files, source)
    columns: TextColumns | None = None
    for name in files:
        path = Path(name)
        if is_table(path):
            if columns is None:
                columns = TextColumns(find_only_column(_held(files)))
            file_documents = _rows(path, columns)
        else:
            file_documents = _raw(path, source)
        with _naming(name), contextlib.closing(file_documents):
            yield from _windows(file_documents, source.domain, sequence_bytes)
    if columns is not None:
        columns.report(source.domain)


def size_of_windows(size_bytes: int, sequence_bytes: int) -> int:
    """How many bytes of a raw file of `size_bytes` come in windows."""
    rest = size_bytes % sequence_bytes
    return size_bytes if rest >= SHORTEST_WINDOW_BYTES else size_bytes - rest


def is_raw(file: Path, source: Source) -> bool:
    """Does the file hold its windows as they lie? A table or a compressed file does not."""
    return not is_table(file) and (source.keeps_compressed or packing_of(file) is None)


def _windows(documents: Iterator[IO[bytes]], domain: str, sequence_bytes: int) -> Iterator[dict[str, Any]]:
    for document in documents:
        for data in _cut(document, sequence_bytes):
            yield {"domain": domain, "bytes": data}


def _raw(path: Path, source: Source) -> Generator[IO[bytes], None, None]:
    """A file that is no table, unpacked where it is packed."""
    with _opened(path) as stored:
        if is_raw(path, source):
            if not source.keeps_compressed:
                refuse_disguised(path, stored)
            yield stored
        else:
            with unpacked(path, stored) as file:
                refuse_disguised(path, file)
                yield file


def _note_documents(files: Sequence[str], source: Source) -> None:
    """Say that .json is no table, where a source has nothing else and begins as rows do."""
    if not files or source.keeps_compressed or not all(name.lower().endswith(".json") for name in files):
        return
    with _naming(files[0]), _opened(Path(files[0])) as file:
        head = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n[")
    if head.startswith(b"{") and any(b'"%s"' % name.encode() in head for name in (*COLUMNS, "messages", "conversations")):
        warnings.warn(
            f"{files[0]}: is read as raw bytes, as every .json is; if it holds rows, write them one a line into a .jsonl",
            AssumptionWarning,
            stacklevel=2,
        )


def _rows(path: Path, columns: TextColumns) -> Generator[IO[bytes], None, None]:
    """The rows of a table, each a file of its own."""
    if is_parquet(path):
        yield from map(io.BytesIO, rows_of_parquet(path, columns))
    else:
        with _lines(path) as lines:
            yield from map(io.BytesIO, rows_of_lines(path, lines, columns))


def _held(files: Sequence[str]) -> Iterator[tuple[str, dict[str, Held]]]:
    """What the rows of all tables among the files hold."""
    for name in files:
        path = Path(name)
        if is_table(path):
            with _naming(name):
                if is_parquet(path):
                    yield from held_by_parquet(path)
                else:
                    with _lines(path) as lines:
                        yield from held_by_lines(path, lines)


@contextlib.contextmanager
def _lines(path: Path) -> Iterator[IO[bytes]]:
    with _opened(path) as stored:
        if packing_of(path) is None:
            yield stored
        else:
            with unpacked(path, stored) as file:
                yield file


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    check_regular(path, CorpusError)  # since the name was looked up it may have become a pipe
    with path.open("rb") as file:
        yield file


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors of the system, as one that names the file."""
    try:
        yield
    except OSError as error:
        raise CorpusError(f"{name}: cannot read: {error.strerror}") from None


def _cut(file: IO[bytes], sequence_bytes: int) -> Iterator[bytes]:
    """Consecutive windows; a pipe may give less than asked for, so each is read until it is full."""
    while True:
        parts: list[bytes] = []
        missing = sequence_bytes
        while missing and (part := file.read(min(missing, PART_BYTES))):
            parts.append(part)
            missing -= len(part)
        if missing and sequence_bytes - missing < SHORTEST_WINDOW_BYTES:
            return
        yield b"".join(parts)
        if missing:
            return
