"""Prompts that a server has read, kept in memory and in a folder, so that whoever asks with the same beginning starts there.

In memory states share pages with each other and with the streams that go on from them. In the folder each is a file, read and
written by threads of their own. Several processes may have one folder: files appear whole, are read whole or not at all, and
whoever's budget is full removes those that nobody has used for longest.
"""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from marlin_cli.engine.state_files import StateKind, StoredState
from marlin_cli.engine.state_folder import StateFolder
from marlin_cli.engine.states import Beginning, StreamState
from marlin_cli.errors import OutputError
from marlin_cli.private_files import NotPrivate, make_private_folder

# Rows of which no state is kept: they are read as fast as they are found.
FEWEST_ROWS = 16


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
        self._folder = None if folder is None else StateFolder(kind, _private(folder), self._limits.disk_bytes)
        self._reader: ThreadPoolExecutor | None = None
        self._fetched: tuple[Sequence[int], Future[StoredState | None]] | None = None

    def is_ready(self, ids: Sequence[int]) -> bool:
        """Is all at hand that `restore` will look for? If not it is read from the folder meanwhile, in another thread.

        What was read for one prompt is forgotten when the next one is asked for: at most one is held.
        """
        if self._folder is None:
            return True
        if self._fetched is None or self._fetched[0] != ids:
            if self._reader is None:
                self._reader = ThreadPoolExecutor(1, "prompt reader")
            self._fetched = ids, self._reader.submit(self._folder.find, ids, self._wanted(self._memory.beginning_of(ids)))
        return self._fetched[1].done()

    def restore(self, ids: Sequence[int]) -> Beginning | None:
        """The longest beginning of a prompt that is known: from memory, or from a file that has more of it.

        A file that does not hold what its name and header say is removed, with a line on stderr, and not used.
        """
        found = self._memory.beginning_of(ids)
        if self._folder is None:
            return found
        if self._fetched is not None and self._fetched[0] == ids:
            stored = self._fetched[1].result()
        else:
            stored = self._folder.find(ids, self._wanted(found))
        self._fetched = None
        read = None if stored is None else stored.state().beginning_of(ids)
        return found if read is None or (found is not None and found.units >= read.units) else read

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
        if self._reader is not None:
            self._reader.shutdown()
        if self._folder is not None:
            self._folder.close()

    def _wanted(self, found: Beginning | None) -> int:
        """Ids that a file must have in common with a prompt to be worth reading."""
        return self._kind.units.size * (1 if found is None else found.units + 1)


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


def _private(folder: Path) -> Path:
    try:
        return make_private_folder(folder)
    except NotPrivate as error:
        raise OutputError(str(error)) from None
    except OSError as error:
        raise OutputError(f"{folder}: cannot write: {error.strerror or error}") from None
