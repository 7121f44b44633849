"""Prompts that a server has read, kept in memory and in a folder, so that whoever asks with the same beginning starts there.

In memory states share pages with each other and with the streams that go on from them. In the folder each is a file under a
name that is made here, written by a thread of its own. Several processes may have one folder: files appear whole, are read
whole or not at all, and whoever's budget is full removes those that nobody has used for longest.
"""

import contextlib
import hashlib
import json
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from marlin_cli import console
from marlin_cli.engine.state_files import ForeignStateError, StateError, StateKind, read_ids, read_state, write_state
from marlin_cli.engine.states import Beginning, StreamState, common_ids
from marlin_cli.errors import OutputError
from marlin_cli.private_files import NotPrivate, make_private_folder
from marlin_cli.writing import remove_abandoned

SUFFIX = ".state.safetensors"

# Rows of which no state is kept: they are read as fast as they are found.
FEWEST_ROWS = 16

# States that wait to be written. Where the disk is slower than the prompts come, the others are not.
WAITING_WRITES = 4


@dataclass(frozen=True)
class StoreLimits:
    """What a store may take: bytes of memory, and of files in its folder."""

    memory_bytes: int = 1 << 30
    disk_bytes: int = 16 << 30
    fewest_rows: int = field(default=FEWEST_ROWS)


class PromptStore:
    """A `PromptKeeper` for as many prompts as fit; for one thread, which also closes it.

    Args:
        kind: of the model's states, see `state_kinds.kind_of`.
        folder: where files go; None keeps to memory. It is made, for this user alone, where it is not there.

    Raises:
        OutputError: the folder cannot be made, or others may write in it: whoever does decides what the model seems to say.
    """

    keeps_outputs = True  # what answers a prompt is a part of the next one, where people talk with a model

    def __init__(self, kind: StateKind, folder: Path | None = None, limits: StoreLimits | None = None) -> None:
        self._kind, self._limits = kind, limits or StoreLimits()
        self._memory = _Memory(self._limits.memory_bytes)
        self._folder = None if folder is None else _Folder(kind, _private(folder), self._limits.disk_bytes)

    def restore(self, ids: Sequence[int]) -> Beginning | None:
        """The longest beginning of a prompt that is known: from memory, or from a file that has more of it.

        A file that does not hold what its name and header say is removed, with a line on stderr, and not used.
        """
        found = self._memory.beginning_of(ids)
        if self._folder is None:
            return found
        read = self._folder.beginning_of(ids, at_least=self._kind.units.size * (1 if found is None else found.units + 1))
        return found if read is None else read

    def keep(self, state: StreamState) -> None:
        """Take a state; the folder has it a little later. Those used longest ago go where there is no room."""
        if state.rows.count < self._limits.fewest_rows:
            return
        replaced = self._memory.add(state)
        if replaced is not None and self._folder is not None:
            self._folder.add(state, replaced)

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory that are held; what states share counts once."""
        return self._memory.nbytes

    def close(self) -> None:
        """Wait until the folder has all that is on its way there. Nothing may be kept afterwards."""
        if self._folder is not None:
            self._folder.close()


class _Memory:
    """States by their use, the latest last."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._states: OrderedDict[int, StreamState] = OrderedDict()
        self._held: dict[int, tuple[int, int]] = {}  # address -> bytes, and how many states have it
        self.nbytes = 0
        self._next = 0

    def beginning_of(self, ids: Sequence[int]) -> Beginning | None:
        found = [(beginning.units, number, beginning) for number, state in self._states.items()
                 if (beginning := state.beginning_of(ids)) is not None]  # fmt: skip
        if not found:
            return None
        _, number, beginning = max(found, key=lambda each: each[:2])
        self._states.move_to_end(number)
        return beginning

    def add(self, state: StreamState) -> list[StreamState] | None:
        """Take a state, and return those whose place it takes as it holds them; None if one that is here holds it."""
        for number, other in self._states.items():
            if other.holds(state):
                self._states.move_to_end(number)
                return None
        replaced = {number: other for number, other in self._states.items() if state.holds(other)}
        for number in replaced:
            self._remove(number)
        for address, nbytes in state.memory.items():
            self._held[address] = (nbytes, self._held.get(address, (0, 0))[1] + 1)
            self.nbytes += nbytes if self._held[address][1] == 1 else 0
        self._states[self._next], self._next = state, self._next + 1
        while self.nbytes > self._most_bytes and self._states:
            self._remove(next(iter(self._states)))
        return list(replaced.values())

    def _remove(self, number: int) -> None:
        for address in self._states.pop(number).memory:
            nbytes, states = self._held.pop(address)
            if states > 1:
                self._held[address] = (nbytes, states - 1)
            else:
                self.nbytes -= nbytes


@dataclass(frozen=True)
class _File:
    """A state's file as it was last seen: its stamp, and the prompt, None where it is another model's or no state."""

    stamp: tuple[int, int]
    ids: npt.NDArray[np.int32] | None


class _Folder:
    """States as files, and what is known of them. Its own thread writes, and removes what is too much."""

    def __init__(self, kind: StateKind, path: Path, most_bytes: int) -> None:
        self._kind, self._path, self._most_bytes = kind, path, most_bytes
        self._known: dict[str, _File] = {}
        self._queue: queue.Queue[tuple[StreamState, list[str]] | None] = queue.Queue(WAITING_WRITES)
        self._said: set[str] = set()
        remove_abandoned(path, f"*{SUFFIX}", Path(SUFFIX).suffix)
        self._thread = threading.Thread(target=self._write_all, name="prompt store", daemon=True)
        self._thread.start()

    def beginning_of(self, ids: Sequence[int], at_least: int) -> Beginning | None:
        """The longest beginning with at least so many ids."""
        self._look()
        candidates = [(common_ids(file.ids, ids), name) for name, file in self._known.items() if file.ids is not None]
        for common, name in sorted(candidates, reverse=True):
            if common < at_least:
                return None
            path = self._path / name
            try:
                state = read_state(path, self._kind)
                os.utime(path)
            except StateError as error:
                self._discard(path, error)
                continue
            except OSError:  # removed meanwhile
                continue
            beginning = state.beginning_of(ids)
            if beginning is not None and beginning.units * self._kind.units.size >= at_least:
                return beginning
        return None

    def add(self, state: StreamState, replaced: Sequence[StreamState]) -> None:
        """Write a state soon, if the disk keeps up, and remove the files of those whose place it takes."""
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait((state, [name_of(each, self._kind) for each in replaced]))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _look(self) -> None:
        """See which files are there. Each is opened once: under its name nothing else ever stands."""
        found = {}
        for entry in self._entries():
            with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                status = entry.stat()
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
        if path.exists():  # it may be gone because there was no room
            console.note(f"{error}; it is removed, and prompts are read as usual")
            path.unlink(missing_ok=True)

    def _entries(self) -> list["os.DirEntry[str]"]:
        with contextlib.suppress(OSError), os.scandir(self._path) as entries:
            return [entry for entry in entries if entry.name.endswith(SUFFIX) and not entry.name.startswith(".")]
        return []

    def _write_all(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                self._write(*job)
            except OutputError as error:
                if str(error) not in self._said:  # a disk that is full stays full for a while
                    self._said.add(str(error))
                    console.note(f"{error}; the prompt is kept in memory alone")

    def _write(self, state: StreamState, replaced: Sequence[str]) -> None:
        path = self._path / name_of(state, self._kind)
        if path.exists():
            os.utime(path)
            return
        write_state(path, state, self._kind)
        for name in replaced:
            (self._path / name).unlink(missing_ok=True)
        sizes = []
        for entry in self._entries():
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
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


def _private(folder: Path) -> Path:
    try:
        return make_private_folder(folder)
    except NotPrivate as error:
        raise OutputError(str(error)) from None
    except OSError as error:
        raise OutputError(f"{folder}: cannot write: {error.strerror or error}") from None
