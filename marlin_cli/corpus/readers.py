"""Windows of raw bytes out of files and stdin, one at a time. What the rows of tables hold is read in tables.py."""

import contextlib
import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from marlin_cli.corpus.sources import TABLE_SUFFIXES, Source
from marlin_cli.corpus.tables import rows_of_hub, rows_of_jsonl, rows_of_parquet
from marlin_cli.errors import CorpusError
from marlin_cli.text import one_line

# A shorter rest of a file or a row is left out: a few patches without context would count like a window.
SHORTEST_WINDOW_BYTES = 64

PACKED_SUFFIXES = (".gz", ".zst")


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
    for name in files:
        with _naming(name):
            yield from _windows(_documents(Path(name), source), source.domain, sequence_bytes)


def size_of_windows(size_bytes: int, sequence_bytes: int) -> int:
    """How many bytes of a raw file of `size_bytes` come in windows."""
    rest = size_bytes % sequence_bytes
    return size_bytes if rest >= SHORTEST_WINDOW_BYTES else size_bytes - rest


def is_raw(file: Path, source: Source) -> bool:
    """Does the file hold its windows as they lie? A table or a compressed file does not."""
    return not file.name.endswith(TABLE_SUFFIXES) and (source.keeps_compressed or file.suffix not in PACKED_SUFFIXES)


def _windows(documents: Iterator[IO[bytes]], domain: str, sequence_bytes: int) -> Iterator[dict[str, Any]]:
    for document in documents:
        for data in _cut(document, sequence_bytes):
            yield {"domain": domain, "bytes": data}


def _documents(path: Path, source: Source) -> Iterator[IO[bytes]]:
    """A raw file, or each row of a table."""
    if path.name.endswith(".parquet"):
        yield from map(io.BytesIO, rows_of_parquet(path))
        return
    with path.open("rb") as stored, _unpacked(path, stored, source) as file:
        if path.name.endswith(TABLE_SUFFIXES):
            yield from map(io.BytesIO, rows_of_jsonl(path, file))
        else:
            yield file


@contextlib.contextmanager
def _unpacked(path: Path, stored: IO[bytes], source: Source) -> Iterator[IO[bytes]]:
    if is_raw(path, source) or path.suffix not in PACKED_SUFFIXES:
        yield stored
    elif path.suffix == ".gz":
        with gzip.GzipFile(fileobj=stored) as file:
            yield file  # type: ignore[misc]
    else:
        import pyarrow

        # Not zstandard's reader: it takes a truncated file for a whole one.
        with pyarrow.CompressedInputStream(stored, "zstd") as stream:
            yield io.BufferedReader(stream)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors of reading a file, as one that names it."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorpusError(f"{name}: damaged compressed file: {one_line(error)}") from None
    except OSError as error:
        if error.errno is None:  # Arrow's, of a .zst
            raise CorpusError(f"{name}: damaged compressed file: {one_line(error)}") from None
        raise CorpusError(f"{name}: cannot read: {error.strerror}") from None


def _cut(file: IO[bytes], sequence_bytes: int) -> Iterator[bytes]:
    """Consecutive windows; a pipe may give less than asked for, so each is read until it is full."""
    while True:
        parts: list[bytes] = []
        missing = sequence_bytes
        while missing and (part := file.read(missing)):
            parts.append(part)
            missing -= len(part)
        if missing and sequence_bytes - missing < SHORTEST_WINDOW_BYTES:
            return
        yield b"".join(parts)
        if missing:
            return
