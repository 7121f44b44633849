"""The scheduler of each kind of network, chosen in one place."""

from collections import deque
from collections.abc import Iterator
from typing import Any

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.generation import generate
from marlin_cli.engine.scheduling import Piece, Request, Scheduler, SchedulerLimits
from marlin_cli.errors import UsageError
from marlin_cli.models import Network, continuing_of


def scheduler_of(
    network: Network, limits: SchedulerLimits | None = None, cache_bits: CacheBits | None = None
) -> Scheduler[Request]:
    """A scheduler of streams that the network continues.

    Args:
        cache_bits: of the keys and values of every stream.

    Raises:
        UsageError: `cache_bits` do not fit the network.
    """
    return OneByOne(network, limits or SchedulerLimits(), cache_bits)


class OneByOne:
    """A `Scheduler` in which every stream is decoded by itself, a piece of each at a time; no bound of the caches."""

    def __init__(self, network: Network, limits: SchedulerLimits, cache_bits: CacheBits | None) -> None:
        self._network, self._limits, self._bits = network, limits, cache_bits
        self._next = 0
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: dict[int, Iterator[Piece]] = {}

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def cache_bytes(self) -> int:
        return 0

    def admit(self, request: Request) -> int:
        ids: Any = continuing_of(self._network).ids(self._network.config, request.prompt, request.sentinels)
        if len(ids) > self._network.config.max_bytes:
            raise UsageError(f"the prompt has {len(ids)} bytes, but the model's context is {self._network.config.max_bytes}")
        stream, self._next = self._next, self._next + 1
        self._waiting.append((stream, request))
        return stream

    def advance(self) -> list[Piece]:
        while self._waiting and len(self._running) < self._limits.max_streams:
            stream, asked = self._waiting.popleft()
            self._running[stream] = generate(
                self._network, [asked.prompt], asked.stopping, asked.sampling, self._bits, sentinels=asked.sentinels
            )
        pieces = []
        for stream, decoding in list(self._running.items()):
            piece = next(decoding)
            pieces.append(Piece(stream, piece.data, piece.stop_reason))
            if piece.stop_reason is not None:
                del self._running[stream]
        return pieces

    def release(self, stream: int) -> None:
        self._running.pop(stream, None)
        self._waiting = deque(each for each in self._waiting if each[0] != stream)
