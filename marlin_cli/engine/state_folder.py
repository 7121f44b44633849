"""States as files in a folder, which several processes may share: who looks for one, who writes, who removes.

Nothing here is MLX's: whoever reads a file may do so in any thread, and a thread of the folder's own writes.
"""

import contextlib
import hashlib
import json
import os
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from marlin_cli import console
from marlin_cli.engine.state_files import (
    ForeignStateError,
    StateError,
    StateKind,
    StoredState,
    read_ids,
    read_stored,
    write_state,
)
from marlin_cli.engine.states import StreamState, common_ids
from marlin_cli.errors import OutputError
from marlin_cli.writing import remove_abandoned

SUFFIX = ".state.safetensors"

# States that wait to be written. Where the disk is slower than the prompts come, the others are not.
WAITING_WRITES = 4


@dataclass(frozen=True)
class _File:
    """A state's file as it was last seen: its stamp, and the prompt, None where it is another model's or no state."""

    stamp: tuple[int, int]
    ids: npt.NDArray[np.int32] | None


class StateFolder:
    """See the top of this file.

    Args:
        path: of a folder of this user's alone.
        most_bytes: of files in it; those that nobody has used for longest go.
    """

    def __init__(self, kind: StateKind, path: Path, most_bytes: int) -> None:
        self._kind, self._path, self._most_bytes = kind, path, most_bytes
        self._known: dict[str, _File] = {}
        self._looking = threading.Lock()
        self._queue: queue.Queue[tuple[StreamState, list[str]] | None] = queue.Queue(WAITING_WRITES)
        self._said: set[str] = set()
        remove_abandoned(path, f"*{SUFFIX}", Path(SUFFIX).suffix)
        self._thread = threading.Thread(target=self._write_all, name="prompt store", daemon=True)
        self._thread.start()

    def find(self, ids: Sequence[int], at_least: int) -> StoredState | None:
        """The state with which most of a prompt begins, at least so many ids. In any thread."""
        with self._looking:
            self._look()
            known = list(self._known.items())
        candidates = [(common_ids(file.ids, ids), name) for name, file in known if file.ids is not None]
        for common, name in sorted(candidates, reverse=True):
            if common < at_least:
                return None
            path = self._path / name
            try:
                stored = read_stored(path, self._kind)
            except StateError as error:
                self._discard(path, error)
                continue
            with contextlib.suppress(OSError):  # removed meanwhile, or on a disk that takes no stamps
                os.utime(path)
            if stored.units_of(ids) * self._kind.units.size >= at_least:
                return stored
        return None

    def add(self, state: StreamState, replaced: Sequence[StreamState]) -> None:
        """Write a state soon, if the disk keeps up, and remove the files of those whose place it takes."""
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait((state, [name_of(each, self._kind) for each in replaced]))

    def close(self) -> None:
        """Wait until all that is on its way is written."""
        self._queue.put(None)
        self._thread.join()

    def _look(self) -> None:
        """See which files are there. Each is opened once: under its name nothing else ever stands."""
        found = {}
        for entry in self._entries():
            with contextlib.suppress(OSError):  # removed since it was listed
                status = entry.stat(follow_symlinks=False)
                stamp = (status.st_ino, status.st_size)
                file = self._known.get(entry.name)
                found[entry.name] = file if file is not None and file.stamp == stamp else _File(stamp, self._ids_in(entry.name))
        self._known = found

    def _ids_in(self, name: str) -> npt.NDArray[np.int32] | None:
        try:
            return read_ids(self._path / name, self._kind)
        except ForeignStateError:  # each model looks after its own
            return None
        except StateError as error:
            self._discard(self._path / name, error)
            return None

    def _discard(self, path: Path, error: StateError) -> None:
        if not path.exists():  # it may be gone because there was no room
            return
        try:
            path.unlink(missing_ok=True)
            what = "it is removed"
        except OSError as problem:
            what = f"it cannot be removed ({problem.strerror})"
        self._say_once(f"{error}; {what}, and prompts are read as usual")

    def _entries(self) -> list["os.DirEntry[str]"]:
        """Files of states. What is no file was not made here, and is left alone."""
        with contextlib.suppress(OSError), os.scandir(self._path) as entries:
            return [
                entry
                for entry in entries
                if entry.name.endswith(SUFFIX) and not entry.name.startswith(".") and entry.is_file(follow_symlinks=False)
            ]
        return []

    def _write_all(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                self._write(*job)
            except OutputError as error:
                # A disk that is full stays full for a while, whatever the file is called.
                self._say_once(f"{error}; the prompt is kept in memory alone", str(error).rpartition(": ")[2])
            except OSError as error:
                self._say_once(f"{self._path}: {error.strerror or error}; files of prompts are not kept as they should be")

    def _say_once(self, message: str, reason: str | None = None) -> None:
        """Say something, unless this or the same reason was said before."""
        if (reason or message) not in self._said:
            self._said.add(reason or message)
            console.note(message)

    def _write(self, state: StreamState, replaced: Sequence[str]) -> None:
        path = self._path / name_of(state, self._kind)
        try:
            os.utime(path)
            return
        except FileNotFoundError:
            write_state(path, state, self._kind)
        for name in replaced:
            (self._path / name).unlink(missing_ok=True)
        sizes = []
        for entry in self._entries():
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                sizes.append((status.st_mtime_ns, entry.name, status.st_size))
        total = sum(size for _, _, size in sizes)
        for _, name, size in sorted(sizes):
            if total <= self._most_bytes:
                break
            (self._path / name).unlink(missing_ok=True)
            total -= size


def name_of(state: StreamState, kind: StateKind) -> str:
    """The name of a state's file: a hash of all that decides what is in it, and nothing of the prompt."""
    digest = hashlib.sha256(json.dumps(dict(kind.facts), sort_keys=True).encode())
    digest.update(state.ids.tobytes())
    digest.update(json.dumps([place.units for place in state.places]).encode())
    return digest.hexdigest()[:32] + SUFFIX
