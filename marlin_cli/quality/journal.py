"""Passes of a quality run that are done, in the user's cache: a run that is killed goes on where it was.

A file is records one after the other, each its length, its SHA-256 and its bytes; one that is cut short or damaged
ends the file. Nothing is written before `SAVE_EVERY_SECONDS`: a short run leaves no trace.
"""

import contextlib
import errno
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from marlin_cli import console
from marlin_cli.quality.pass_sums import PassSums, from_bytes, to_bytes

SAVE_EVERY_SECONDS = 10.0

# A run that nobody went on with for so long is forgotten.
KEPT_SECONDS = 30 * 24 * 3600.0

_LENGTH_BYTES, _DIGEST_BYTES = 8, 32

# A pass of twenty models takes some million bytes.
MOST_RECORD_BYTES = 1 << 28


class Journal:
    """The passes of one run, by their numbers. Use it as a context: leaving it saves, also after an interrupt."""

    def __init__(
        self,
        folder: Path,
        key: Callable[[], str],
        *,
        rank: int = 0,
        resume: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            folder: made when first needed. Journals of other runs in it that are old are removed then.
            key: names the run: models, bytes, settings. Asked for when something is saved or resumed, not before.
            rank: of this process; each writes a file of its own, and reads those of all.
            resume: take over what an earlier run of the same key has left; else that is discarded.
        """
        self._folder, self._name, self._rank, self._resume, self._clock = folder, key, rank, resume, clock
        self._waiting: list[bytes] = []
        self._saved_at = clock()
        self._key: str | None = None
        self._given_up = False
        self._fresh = True  # nothing of this run is in the file

    def load(self) -> dict[int, list[PassSums]]:
        """The passes that were done before, by number: those of all ranks on this machine."""
        if not self._resume:
            return {}
        found = {}
        for path in sorted(self._folder.glob(f"{self._named()}.*.journal")):
            for record in _records(path):
                number = int.from_bytes(record[:_LENGTH_BYTES], "little")
                with contextlib.suppress(ValueError):
                    found[number] = from_bytes(record[_LENGTH_BYTES:])
        self._drop_torn_end()
        return found

    def add(self, number: int, results: list[PassSums]) -> None:
        """Take in a pass that is done; it is on disk within `SAVE_EVERY_SECONDS` and a pass."""
        self._waiting.append(number.to_bytes(_LENGTH_BYTES, "little") + to_bytes(results))
        if self._clock() - self._saved_at >= SAVE_EVERY_SECONDS:
            self._write()

    def save(self) -> None:
        """Write what waits, if this run has written before; a run too short for that is not worth it."""
        if not self._fresh:
            self._write()

    def remove(self) -> None:
        """Forget the run: it is finished."""
        if self._key is not None:
            for path in self._folder.glob(f"{self._key}.*.journal"):
                path.unlink(missing_ok=True)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.remove()
        elif self._waiting:
            self._write()

    def _named(self) -> str:
        if self._key is None:
            self._key = self._name()
        return self._key

    @property
    def _path(self) -> Path:
        return self._folder / f"{self._named()}.{self._rank}.journal"

    def _write(self) -> None:
        """Write what waits. A folder that takes nothing costs the run its way back, and nothing else: it is said once."""
        waiting, self._waiting, self._saved_at = self._waiting, [], self._clock()
        if self._given_up:
            return
        try:
            if self._fresh:
                self._folder.mkdir(0o700, parents=True, exist_ok=True)
                self._forget_old()
            flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if self._fresh and not self._resume else os.O_APPEND)
            with open(_opened(self._path, flags), "wb") as file:
                for record in waiting:
                    file.write(len(record).to_bytes(_LENGTH_BYTES, "little") + hashlib.sha256(record).digest() + record)
        except OSError as error:
            self._given_up = True
            console.note(f"{self._path}: cannot keep what is scored, so --resume will not: {error.strerror or error}")
        self._fresh = False

    def _forget_old(self) -> None:
        for path in self._folder.glob("*.journal"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > KEPT_SECONDS:
                    path.unlink()

    def _drop_torn_end(self) -> None:
        """What is added after a record that was cut short would never be read."""
        whole = sum(_LENGTH_BYTES + _DIGEST_BYTES + len(record) for record in _records(self._path))
        with contextlib.suppress(OSError), open(_opened(self._path, os.O_RDWR), "r+b") as file:
            file.truncate(whole)


def _records(path: Path) -> Iterator[bytes]:
    """The whole records of a file; none of what is no file."""
    with contextlib.suppress(OSError), open(_opened(path, os.O_RDONLY), "rb") as file:
        size_of_file = os.fstat(file.fileno()).st_size
        while len(length := file.read(_LENGTH_BYTES)) == _LENGTH_BYTES:
            digest = file.read(_DIGEST_BYTES)
            size = int.from_bytes(length, "little")
            if not _LENGTH_BYTES <= size <= min(size_of_file, MOST_RECORD_BYTES):
                return
            record = file.read(size)
            if hashlib.sha256(record).digest() != digest:
                return
            yield record


def _opened(path: Path, flags: int) -> int:
    """A descriptor of a regular file; a link is not followed and a pipe not waited for.

    Raises:
        OSError: it is none, or cannot be opened.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return descriptor
