"""Compressed files as streams of what is in them, in bounded memory. What is damaged, or packed otherwise, is named."""

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from marlin_cli.errors import CorpusError
from marlin_cli.text import one_line, quoted

# How files begin that are read through, by the end of their name. A .zst may begin with a frame that is skipped.
BEGINNINGS = {
    ".gz": (b"\x1f\x8b",),
    ".zst": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + number]) + b"\x2a\x4d\x18" for number in range(16))),
    ".bz2": (b"BZh",),
    ".xz": (b"\xfd7zXZ\x00",),
}
PACKED_SUFFIXES = tuple(BEGINNINGS)
UNREAD_SUFFIXES = (".lz4", ".br", ".lzma", ".z")

# What unpacking may take: `xz -9` needs 65 MiB. Zstandard's own limit is a window of 128 MiB, as `zstd -d` has it.
MOST_XZ_BYTES = 96 << 20

_BLOCK_BYTES = 1 << 16

# Words of the libraries' messages, and what they mean here.
_MEANINGS = {
    "Not a gzipped file": "other bytes follow its end",
    "Dictionary mismatch": "it was packed with a dictionary, which is another file; unpack it with zstd -d -D",
    "too much memory": "it needs a window of more than 128 MiB; unpack it with zstd -d --long=31",
    "Memory usage limit": f"it needs more than {MOST_XZ_BYTES >> 20} MiB to unpack; unpack it with xz -d",
}


def packing_of(path: Path) -> str | None:
    """The suffix by which a file is packed, `.gz` for example; None for others."""
    suffix = path.suffix.lower()
    return suffix if suffix in (*PACKED_SUFFIXES, *UNREAD_SUFFIXES) else None


def packing_by_beginning(head: bytes) -> str | None:
    """The suffix that a file with these first bytes should have."""
    return next((suffix for suffix, beginnings in BEGINNINGS.items() if head.startswith(beginnings)), None)


@contextlib.contextmanager
def unpacked(path: Path, stored: IO[bytes]) -> Iterator[IO[bytes]]:
    """The stream of what is in a packed file `stored`; several parts one after the other are one, and zeros may follow.

    Raises, and so does reading it:
        CorpusError: damaged, cut short, packed in a way that is not read, or not what its name says.
    """
    suffix = packing_of(path)
    if suffix not in BEGINNINGS:
        raise CorpusError(
            f"{path}: {suffix} files are not read through; unpack it, or name it binary= to take its bytes as they lie"
        )
    head = stored.peek(8)[:8]  # type: ignore[attr-defined]
    if not head.startswith(BEGINNINGS[suffix]):
        raise CorpusError(f"{path}: is no {suffix} file, for it begins with {quoted(head)}; name it after what it is")
    with _opened(suffix, stored) as packed:
        yield io.BufferedReader(_Named(path, packed))


def _opened(suffix: str, stored: IO[bytes]) -> Any:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=stored)
    if suffix == ".bz2":
        return _Parts(stored, bz2.BZ2Decompressor)
    if suffix == ".xz":
        return _Parts(stored, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MOST_XZ_BYTES))
    import pyarrow

    # Not zstandard's reader: it takes a truncated file for a whole one.
    return pyarrow.CompressedInputStream(stored, "zstd")


class _Named(io.RawIOBase):
    """A stream whose errors are ours, and name the file."""

    def __init__(self, path: Path, packed: Any) -> None:
        self._path, self._packed = path, packed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the beginning of `buffer`; 0 at the end."""
        import pyarrow

        try:
            return self._packed.readinto(buffer)
        except (EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
            raise _damaged(self._path, error) from None
        except OSError as error:
            if error.errno is not None:  # the system's, of the file
                raise
            raise _damaged(self._path, error) from None


class _Parts(io.RawIOBase):
    """Streams of bz2 or xz one after the other. The library's own files take no limit, and pass over what follows the end."""

    def __init__(self, stored: IO[bytes], decompressor: Callable[[], Any]) -> None:
        self._stored, self._new = stored, decompressor
        self._part = decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the beginning of `buffer`; 0 at the end."""
        while True:
            given = b""
            if self._part.eof:
                given = self._next_part()
                if not given:
                    return 0
                self._part = self._new()
            elif self._part.needs_input:
                given = self._stored.read(_BLOCK_BYTES)
                if not given:
                    raise EOFError("it ends too early")
            data = self._part.decompress(given, len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)

    def _next_part(self) -> bytes:
        rest = self._part.unused_data.lstrip(b"\0")
        while not rest:
            block = self._stored.read(_BLOCK_BYTES)
            if not block:
                break
            rest = block.lstrip(b"\0")
        return rest


def _damaged(path: Path, error: Exception) -> CorpusError:
    text = one_line(error)
    meaning = next((meaning for words, meaning in _MEANINGS.items() if words in text), None)
    if meaning is not None and meaning.startswith("it "):
        return CorpusError(f"{path}: cannot unpack: {meaning}")
    return CorpusError(f"{path}: damaged compressed file: {meaning or text[:200]}")
