"""One scheduler over the schedulers of several ranks. Rank 0 has it; the others `follow`.

`Routed`: each rank has the whole model, and a stream runs on one of them, that which has the fewest. `Mirrored`: the ranks
share the model (`models.splitting`), and each does what rank 0 does, in the same order. What is said travels over the
connections by which ranks watch each other, not over collectives, where no rank may be late.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from marlin_cli.engine.answer_requests import Answer, AnswerLimits, AnswerPiece, AnswerRequest
from marlin_cli.engine.beams import Beams
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.scheduling import Cost, Piece, Request, Scheduler
from marlin_cli.engine.speculation import Speculated, Speculation
from marlin_cli.engine.stopping import Stopping
from marlin_cli.engine.wire import Wire
from marlin_cli.errors import DistributedError
from marlin_cli.models import Network
from marlin_cli.models.splitting import share_of
from marlin_cli.ranks import Ranks
from marlin_cli.text import quoted

CONTINUING = (Request, Stopping, Sampling, Speculation, Piece, Cost, Speculated)
ANSWERING = (AnswerRequest, AnswerLimits, Beams, AnswerPiece, Answer)
WIRE = Wire((*CONTINUING, *ANSWERING))

# Seconds that rank 0 waits for the others where it has nothing to do itself.
PATIENCE_SECONDS = 0.02


class Routed:
    """A `Scheduler` whose streams run on any rank; at rank 0, which runs some itself.

    Args:
        own: of this rank; the others have the like.
        most: streams that one rank runs at once; more wait here, in their order.
    """

    def __init__(self, own: Scheduler[Any], ranks: Ranks, most: int) -> None:
        self._own, self._ranks, self._most = own, ranks, most
        # Streams of a scheduler before this one, which may still be told of, had other numbers.
        self._next = time.monotonic_ns()
        _tell_all(self._ranks, "reset")
        self._waiting: deque[tuple[int, Any]] = deque()
        self._rank_of: dict[int, int] = {}  # streams that run
        self._running = [0] * ranks.size  # streams by rank
        self._numbers: dict[int, int] = {}  # own stream -> number here
        self._others_cache_bytes = [0] * ranks.size

    @property
    def running(self) -> int:
        return len(self._rank_of)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def cache_bytes(self) -> int:
        return self._own.cache_bytes + sum(self._others_cache_bytes)

    def admit(self, request: Any) -> int:
        self._own.release(self._own.admit(request))  # refuses what can never fit
        number, self._next = self._next, self._next + 1
        self._waiting.append((number, request))
        return number

    def advance(self) -> Sequence[Piece]:
        while self._waiting and min(self._running) < self._most:
            rank = self._running.index(min(self._running))
            number, request = self._waiting.popleft()
            self._rank_of[number] = rank
            self._running[rank] += 1
            if rank == 0:
                self._numbers[self._own.admit(request)] = number
            else:
                self._ranks.send(rank, WIRE.to_bytes(("admit", number, request)))
        pieces: list[Piece] = []
        if self._own.running or self._own.waiting:
            with self._ranks.nothing_to_save():  # what is told is written
                told = self._own.advance()
            pieces = [dataclasses.replace(piece, stream=self._numbers[piece.stream]) for piece in told]
        seconds = 0.0 if self._numbers or pieces else PATIENCE_SECONDS
        while (message := self._ranks.receive(seconds)) is not None:
            rank, data = message
            self._others_cache_bytes[rank], theirs = WIRE.from_bytes(data)
            pieces += [piece for piece in theirs if piece.stream in self._rank_of]
            seconds = 0.0
        for piece in pieces:
            if piece.stop_reason is not None:
                self._forget(piece.stream)
        return pieces

    def release(self, stream: int) -> None:
        self._waiting = deque(each for each in self._waiting if each[0] != stream)
        rank = self._rank_of.get(stream)
        if rank is None:
            return
        if rank > 0:
            self._ranks.send(rank, WIRE.to_bytes(("release", stream)))
        else:
            self._own.release(next(own for own, number in self._numbers.items() if number == stream))
        self._forget(stream)

    def _forget(self, stream: int) -> None:
        self._running[self._rank_of.pop(stream)] -= 1
        self._numbers = {own: number for own, number in self._numbers.items() if number != stream}


class Mirrored:
    """A `Scheduler` of a model that ranks share; at rank 0, whose every step the others take too."""

    def __init__(self, own: Scheduler[Any], ranks: Ranks) -> None:
        self._own, self._ranks = own, ranks
        _tell_all(self._ranks, "reset")

    @property
    def running(self) -> int:
        return self._own.running

    @property
    def waiting(self) -> int:
        return self._own.waiting

    @property
    def cache_bytes(self) -> int:
        return self._own.cache_bytes * self._ranks.size

    def admit(self, request: Any) -> int:
        number = self._own.admit(request)  # refuses what can never fit
        _tell_all(self._ranks, "admit", number, request)
        return number

    def advance(self) -> Sequence[Piece]:
        _tell_all(self._ranks, "advance")
        with self._ranks.computing():
            return self._own.advance()

    def release(self, stream: int) -> None:
        _tell_all(self._ranks, "release", stream)
        self._own.release(stream)


def follow(own: Scheduler[Any], ranks: Ranks, network: Network) -> None:
    """What a rank other than 0 does until rank 0 has nothing more for it.

    Args:
        network: the scheduler's, which the ranks may share.

    Raises:
        DistributedError: rank 0 said what no rank says; or another rank ended.
    """
    numbers: dict[int, int] = {}  # own stream -> rank 0's number
    mirrors = share_of(network) is not None
    while True:
        idle = mirrors or not (own.running or own.waiting)
        message = ranks.receive(None if idle else 0.0)
        if message is not None:
            kind, *rest = WIRE.from_bytes(message[1])
            if kind == "over":
                return
            if kind == "admit":
                number, request = rest
                numbers[own.admit(request)] = number
            elif kind == "release":
                _release(own, numbers, rest)
            elif kind == "reset":
                _release(own, numbers, list(numbers.values()))
            elif kind == "advance":
                with ranks.computing():
                    _forget_ended(numbers, own.advance())
            else:
                raise DistributedError(f"rank 0 asked for {quoted(kind)}, which is unknown here; start all of one version")
            continue
        with ranks.nothing_to_save():
            pieces = own.advance()
        told = [dataclasses.replace(piece, stream=numbers[piece.stream]) for piece in pieces]
        _forget_ended(numbers, pieces)
        if told:
            ranks.send(0, WIRE.to_bytes((own.cache_bytes, told)))


def _forget_ended(numbers: dict[int, int], pieces: Sequence[Piece]) -> None:
    for piece in pieces:
        if piece.stop_reason is not None:
            numbers.pop(piece.stream, None)


def _release(own: Scheduler[Any], numbers: dict[int, int], unwanted: Sequence[int]) -> None:
    """Forget the streams that have these numbers at rank 0."""
    for stream in [mine for mine, number in numbers.items() if number in unwanted]:
        own.release(stream)
        del numbers[stream]


def over_ranks(own: Scheduler[Any], ranks: Ranks, network: Network, most: int) -> Scheduler[Any]:
    """The scheduler of rank 0: its own where it is alone, else one whose streams run over the ranks, which `follow`.

    Args:
        network: the scheduler's, which the ranks may share.
        most: streams that one rank runs at once.
    """
    if ranks.size == 1:
        return own
    return Routed(own, ranks, most) if share_of(network) is None else Mirrored(own, ranks)


def dismiss(ranks: Ranks) -> None:
    """At rank 0: the others, which `follow`, have nothing more to do."""
    _tell_all(ranks, "over")


def _tell_all(ranks: Ranks, *message: Any) -> None:
    for rank in range(1, ranks.size):
        ranks.send(rank, WIRE.to_bytes(message))
