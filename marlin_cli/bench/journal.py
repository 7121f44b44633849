"""Passes of a quality run that are done, in the user's cache: a run that is killed goes on where it was.

A file is records one after the other, each its length, its SHA-256 and its bytes; one that is cut short or damaged
ends the file. Nothing is written before `SAVE_EVERY_SECONDS`: a short run leaves no trace.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from marlin_cli.bench.pass_sums import PassSums, from_bytes, to_bytes
from marlin_cli.errors import OutputError

SAVE_EVERY_SECONDS = 10.0

# A run that nobody went on with for so long is forgotten.
KEPT_SECONDS = 30 * 24 * 3600.0

_LENGTH_BYTES, _DIGEST_BYTES = 8, 32


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
        """Take in a pass that is done; it is on disk within `SAVE_EVERY_SECONDS` and a pass.

        Raises:
            OutputError: the folder cannot be written.
        """
        self._waiting.append(number.to_bytes(_LENGTH_BYTES, "little") + to_bytes(results))
        if self._clock() - self._saved_at >= SAVE_EVERY_SECONDS:
            self._write()

    def save(self) -> None:
        """Write what waits, if this run has written before; a run too short for that is not worth it.

        Raises:
            OutputError: the folder cannot be written.
        """
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
        try:
            if self._fresh:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._forget_old()
            with self._path.open("wb" if self._fresh and not self._resume else "ab") as file:
                for record in self._waiting:
                    file.write(len(record).to_bytes(_LENGTH_BYTES, "little") + hashlib.sha256(record).digest() + record)
        except OSError as error:
            raise OutputError(f"{self._path}: cannot keep what is scored: {error.strerror or error}") from None
        self._waiting, self._fresh, self._saved_at = [], False, self._clock()

    def _forget_old(self) -> None:
        for path in self._folder.glob("*.journal"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > KEPT_SECONDS:
                    path.unlink()

    def _drop_torn_end(self) -> None:
        """What is added after a record that was cut short would never be read."""
        if self._path.exists():
            whole = sum(_LENGTH_BYTES + _DIGEST_BYTES + len(record) for record in _records(self._path))
            with self._path.open("r+b") as file:
                file.truncate(whole)


def _records(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while len(length := file.read(_LENGTH_BYTES)) == _LENGTH_BYTES:
            digest = file.read(_DIGEST_BYTES)
            size = int.from_bytes(length, "little")
            if size > path.stat().st_size:
                return
            record = file.read(size)
            if hashlib.sha256(record).digest() != digest:
                return
            yield record
