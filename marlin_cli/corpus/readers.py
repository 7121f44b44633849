"""Windows of raw bytes out of files, tables, hub datasets and stdin, one at a time: memory holds a window each."""

import gzip
import io
import sys
import zlib
from collections.abc import Iterable, Iterator
from logging import CRITICAL
from pathlib import Path
from typing import Any, BinaryIO

from marlin_cli.corpus.sources import TABLE_SUFFIXES, Source
from marlin_cli.errors import CorpusError
from marlin_cli.files import one_line

# A shorter rest of a file is left out: it holds less than a few patches.
SHORTEST_WINDOW_BYTES = 64

# Columns of a table that are taken for its bytes, in order of preference.
COLUMNS = ("bytes", "content", "text")


def windows_of_files(files: list[str], domain: str, keeps_compressed: bool, sequence_bytes: int) -> Iterator[dict[str, Any]]:
    """The windows of raw files, in order; none spans two files. Plain values, as `datasets` wants a generator's."""
    for name in files:
        path = Path(name)
        try:
            with _opened(path, keeps_compressed) as file:
                for data in _windows_of(file, sequence_bytes):
                    yield {"domain": domain, "bytes": data}
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise CorpusError(f"{path}: damaged compressed file: {one_line(error)}") from None
        except OSError as error:
            raise CorpusError(f"{path}: cannot read: {error.strerror or error}") from None


def windows_of_stdin(domain: str, sequence_bytes: int) -> Iterator[dict[str, Any]]:
    """The windows of standard input."""
    for data in _windows_of(sys.stdin.buffer, sequence_bytes):
        yield {"domain": domain, "bytes": data}


def windows_of_rows(rows: Iterable[dict[str, Any]], where: str, domain: str, sequence_bytes: int) -> Iterator[dict[str, Any]]:
    """The windows of a table's rows; text stands for its UTF-8 bytes, none spans two rows."""
    column = None
    for row in _readable(rows, where):
        if column is None:
            column = _column(row, where)
        value = row[column]
        if value is None:
            continue
        data = value.encode("utf-8", errors="surrogatepass") if isinstance(value, str) else bytes(value)
        for window in _windows_of(io.BytesIO(data), sequence_bytes):
            yield {"domain": domain, "bytes": window}


def _readable(rows: Iterable[dict[str, Any]], where: str) -> Iterator[dict[str, Any]]:
    """The rows, with whatever their reader raises as a `CorpusError`: its exceptions are of dozens of kinds."""
    try:
        yield from rows
    except Exception as error:
        raise CorpusError(f"{where}: cannot read its rows: {one_line(error)[:200]}") from None


def is_table(path: Path) -> bool:
    """Do the rows of this file hold the bytes, and not the file itself?"""
    return path.name.endswith(TABLE_SUFFIXES)


def rows_of_table(path: str) -> Iterable[dict[str, Any]]:
    """The rows of a .parquet or .jsonl file, streamed."""
    import datasets

    kind = "parquet" if path.endswith(".parquet") else "json"
    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(kind, data_files=path, split="train", streaming=True)
        return rows
    except Exception as error:
        raise CorpusError(f"{path}: cannot read as {kind}: {one_line(error)[:200]}") from None


def rows_of_hub(source: Source) -> Iterable[dict[str, Any]]:
    """The rows of a dataset on the hub: name[/config][@split]."""
    import datasets
    import huggingface_hub

    huggingface_hub.logging.set_verbosity(CRITICAL)  # it tells of every retry; the error says what matters
    assert source.hub is not None
    location, _, split = source.hub.partition("@")
    owner, _, rest = location.partition("/")
    name, _, config = rest.partition("/")
    repository = f"{owner}/{name}" if name else owner
    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(
            repository, config or None, split=split or "train", streaming=True
        )
        return rows
    except Exception as error:
        raise CorpusError(f"hf:{source.hub}: the hub did not give it: {one_line(error)[:200]}") from None


def _opened(path: Path, keeps_compressed: bool) -> io.BufferedIOBase:
    if keeps_compressed or path.suffix not in (".gz", ".zst"):
        return path.open("rb")
    if path.suffix == ".gz":
        return gzip.GzipFile(path)
    import zstandard

    return _Zstandard(path, zstandard.ZstdDecompressor().stream_reader(path.open("rb"), closefd=True))


class _Zstandard(io.BufferedIOBase):
    """A .zst stream whose damage is reported like that of a .gz one."""

    def __init__(self, path: Path, stream: Any) -> None:
        self._path, self._stream = path, stream

    def read(self, size: int | None = -1) -> bytes:
        import zstandard

        try:
            return bytes(self._stream.read(size))
        except zstandard.ZstdError as error:
            raise CorpusError(f"{self._path}: damaged compressed file: {one_line(error)}") from None

    def close(self) -> None:
        self._stream.close()
        super().close()


def _windows_of(file: io.BufferedIOBase | BinaryIO, sequence_bytes: int) -> Iterator[bytes]:
    """Consecutive windows; a pipe may give less than asked for, so each is read until it is full."""
    while True:
        parts: list[bytes] = []
        missing = sequence_bytes
        while missing and (part := file.read(missing)):
            parts.append(part)
            missing -= len(part)
        if sequence_bytes - missing < min(SHORTEST_WINDOW_BYTES, sequence_bytes):
            return
        yield b"".join(parts)
        if missing:
            return


def _column(row: dict[str, Any], where: str) -> str:
    """The column whose values are the bytes."""
    fitting = [name for name, value in row.items() if isinstance(value, (str, bytes))]
    for name in COLUMNS:
        if name in fitting:
            return name
    if len(fitting) != 1:
        raise CorpusError(f"{where}: which column holds the bytes? Found {', '.join(map(str, row)) or 'none'}; name it text")
    return fitting[0]
