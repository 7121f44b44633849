"""Memory of the GPUs of one host whose ranks share a stage: each leaves parts of sums in that of the others (exchange.cuh).

Ranks give each other handles of their memory, and see that what they write there arrives, before any kernel relies on it.
"""

import functools
import json
import socket
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from marlin_cli.documents import parse_json
from marlin_cli.errors import BackendError, DistributedError
from marlin_cli.ops.cuda_driver import Memory, Queue, bus_address, handle_of, opened, pinned
from marlin_cli.ranks import Ranks

MOST_RANKS = 8  # of one host; a kernel keeps an address for each
MOST_PLACES = 16 << 14  # of rows of x: 16 of the longest
GREETING_BYTES = 16
TURNS = 1 << 32  # come again after so many; every place has been written over long before
BOOT = Path("/proc/sys/kernel/random/boot_id")  # of a machine, however many others have its name

Done = TypeVar("Done")


class Exchange:
    """This rank's side.

    Launches that wait for other ranks must come in the same order on each, and one at a time: so all of a process go through
    one `queue`, and count the same turns.

    Args:
        own: this rank's memory.
        places: of each rank's memory as this process sees it: [2][ranks][MOST_PLACES] cells, zero at first.
        words: [4] int32 of the host, zero, and where they are: see exchange.cuh.
    """

    def __init__(
        self, rank: int, queue: Queue, own: Memory | None, places: Sequence[int], words: tuple[np.ndarray, int]
    ) -> None:
        self.queue, self._own, self._words = queue, own, words[0]
        record = struct.pack(f"<{2 + len(places)}Q", words[1], rank, *places)
        self._record = queue.allocate(len(record))
        queue.write(self._record.address, record)
        self._turn = 0

    def take(self, turns: int) -> tuple[int, int]:
        """For a launch of so many sums: where the record is, and the turn before its first."""
        before = self._turn
        self._turn = (self._turn + turns) % TURNS
        return self._record.address, before

    def end(self) -> None:
        """Let kernels wait no longer, as the job is over. From any thread."""
        self._words[0] = 1

    def check(self) -> None:
        """See that no kernel has waited in vain.

        Raises:
            BackendError: one has.
        """
        if self._words[2]:
            raise BackendError("the GPU gave up a patch: another rank did not come to the same sum in 20 seconds")


class NoExchange(BackendError):
    """Why ranks cannot share a stage on their GPUs."""


@functools.cache
def exchange_among(ranks: Ranks) -> Exchange | NoExchange:
    """The exchange of this process, or why there is none; the same on all ranks, which must ask at the same time.

    Raises:
        DistributedError: the connection broke.
    """
    try:
        return _exchange(ranks)
    except NoExchange as problem:
        return problem


def _exchange(ranks: Ranks) -> Exchange:
    if ranks.size > MOST_RANKS:
        raise NoExchange(f"{ranks.size} ranks are more than {MOST_RANKS}")
    _, gpus = _by_all(ranks, lambda: None, lambda _: f"{_machine()} {bus_address()}")
    if len({gpu.rpartition(" ")[0] for gpu in gpus}) > 1:
        raise NoExchange("the ranks are on several machines")
    if len(set(gpus)) < ranks.size:
        raise NoExchange("several ranks are on one GPU")
    cells = 8 * 2 * ranks.size * MOST_PLACES
    greetings = [f"rank {rank}".encode().ljust(GREETING_BYTES) for rank in range(ranks.size)]

    def offer() -> tuple[Queue, Memory]:
        queue = Queue()
        memory = queue.allocate(cells + GREETING_BYTES * ranks.size)
        queue.wait()  # it is zero before anybody else writes there
        return queue, memory

    (queue, own), handles = _by_all(ranks, offer, lambda made: handle_of(made[1].address).hex())

    def greet() -> list[int]:
        places = [own.address if rank == ranks.rank else opened(bytes.fromhex(handle)) for rank, handle in enumerate(handles)]
        for place in places:
            queue.write(place + cells + GREETING_BYTES * ranks.rank, greetings[ranks.rank])
        queue.wait()
        return places

    def look() -> None:
        if queue.read(own.address + cells, GREETING_BYTES * ranks.size) != b"".join(greetings):
            raise BackendError("what other ranks write into its GPU's memory does not arrive")

    places, _ = _by_all(ranks, greet)
    _by_all(ranks, look)
    exchange = Exchange(ranks.rank, queue, own, places, pinned(4))
    ranks.when_over(exchange.end)
    ranks.before_collectives.append(queue.wait)
    return exchange


def _machine() -> str:
    try:
        boot = BOOT.read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"


def _by_all(ranks: Ranks, do: Callable[[], Done], say: Callable[[Done], str] = lambda done: "") -> tuple[Done, list[str]]:
    """What this rank has done, and what every rank says when it has done the like.

    Raises:
        NoExchange: one could not.
        DistributedError: the connection broke.
    """
    done: list[Done] = []
    try:
        done.append(do())
        own = {"said": say(done[0])}
    except BackendError as error:
        own = {"problem": str(error)}
    everyone = [parse_json(part, "what a rank says", DistributedError) for part in ranks.gather(json.dumps(own).encode())]
    for rank, each in enumerate(everyone):
        if "problem" in each:
            raise NoExchange(f"rank {rank}: {each['problem']}")
    return done[0], [each["said"] for each in everyone]
