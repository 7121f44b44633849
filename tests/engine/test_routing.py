"""One scheduler over those of several ranks, here in threads: where streams run, what of them comes back, and what travels."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from marlin_cli.engine.answer_requests import Answer, AnswerLimits, AnswerPiece, AnswerRequest
from marlin_cli.engine.beams import Beams
from marlin_cli.engine.routing import WIRE, Mirrored, Routed, dismiss, follow
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.scheduling import Cost, Piece, Request
from marlin_cli.engine.stopping import Stopping
from marlin_cli.engine.wire import Wire
from marlin_cli.errors import DistributedError, UsageError


class Countdown:
    """A scheduler whose streams tell their prompt once a quantum, `max_bytes` times."""

    cache_bytes = 7

    def __init__(self) -> None:
        self.streams: dict[int, Request] = {}
        self.count = 0
        self.most = 0  # streams at a time
        self.admitted: list[bytes] = []

    @property
    def running(self) -> int:
        return len(self.streams)

    waiting = 0

    def admit(self, request: Request) -> int:
        if len(request.prompt) > 8:
            raise UsageError("too long")
        self.count += 1
        self.streams[self.count] = request
        self.admitted.append(request.prompt)
        return self.count

    def advance(self) -> list[Piece]:
        self.most = max(self.most, len(self.streams))
        pieces = []
        for number, request in list(self.streams.items()):
            left = request.stopping.max_bytes - 1
            self.streams[number] = replace(request, stopping=Stopping(left))
            pieces.append(Piece(number, request.prompt, None if left else "length"))
            if not left:
                del self.streams[number]
        return pieces

    def release(self, stream: int) -> None:
        self.streams.pop(stream, None)


class Wired:
    """Ranks in threads: a queue each, and no collectives."""

    def __init__(self, rank: int, boxes: list["queue.SimpleQueue[tuple[int, bytes]]"]) -> None:
        self.rank, self.size, self._boxes = rank, len(boxes), boxes

    def send(self, rank: int, message: bytes) -> None:
        self._boxes[rank].put((self.rank, message))

    @staticmethod
    def nothing_to_save() -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def receive(self, seconds: float | None = None) -> tuple[int, bytes] | None:
        try:
            return self._boxes[self.rank].get(timeout=seconds)
        except queue.Empty:
            return None


class Network:
    """A network of which each rank has all."""


@pytest.fixture
def ranks() -> Iterator[tuple[Any, list[Countdown]]]:
    """Rank 0 of three, and the schedulers of all, the others of which follow."""
    boxes: list[queue.SimpleQueue[tuple[int, bytes]]] = [queue.SimpleQueue() for _ in range(3)]
    schedulers = [Countdown() for _ in boxes]
    wired: list[Any] = [Wired(rank, boxes) for rank in range(3)]
    others = [threading.Thread(target=follow, args=(schedulers[rank], wired[rank], Network()), daemon=True) for rank in (1, 2)]
    for other in others:
        other.start()
    yield wired[0], schedulers
    dismiss(wired[0])
    for other in others:
        other.join(timeout=10)
        assert not other.is_alive()


def texts(scheduler: Any, numbers: list[int]) -> list[tuple[bytes, str | None]]:
    """All that streams tell, and why they end."""
    found: dict[int, tuple[bytes, str | None]] = dict.fromkeys(numbers, (b"", None))
    while scheduler.running or scheduler.waiting:
        for piece in scheduler.advance():
            found[piece.stream] = found[piece.stream][0] + piece.data, piece.stop_reason
    return [found[number] for number in numbers]


def test_streams_run_on_all_ranks_and_come_back_under_their_numbers(ranks: tuple[Any, list[Countdown]]) -> None:
    first, schedulers = ranks
    routed = Routed(schedulers[0], first, most=2)
    prompts = [bytes([65 + number]) for number in range(9)]
    numbers = [routed.admit(Request(prompt, Stopping(3))) for prompt in prompts]
    assert len(set(numbers)) == 9
    assert (routed.running, routed.waiting) == (0, 9)
    assert texts(routed, numbers) == [(prompt * 3, "length") for prompt in prompts]
    assert max(scheduler.most for scheduler in schedulers) <= 2
    assert all(scheduler.admitted for scheduler in schedulers)
    assert routed.cache_bytes == 3 * 7


def test_a_stream_that_can_never_fit_is_refused_before_it_travels(ranks: tuple[Any, list[Countdown]]) -> None:
    first, schedulers = ranks
    with pytest.raises(UsageError, match="too long"):
        Routed(schedulers[0], first, most=2).admit(Request(b"123456789"))


def test_what_is_released_says_no_more(ranks: tuple[Any, list[Countdown]]) -> None:
    first, schedulers = ranks
    routed = Routed(schedulers[0], first, most=1)
    numbers = [routed.admit(Request(bytes([65 + number]), Stopping(1 << 30))) for number in range(4)]
    routed.advance()
    assert (routed.running, routed.waiting) == (3, 1)
    for number in numbers:
        routed.release(number)
    assert (routed.running, routed.waiting) == (0, 0)
    again = routed.admit(Request(b"z", Stopping(2)))
    assert texts(routed, [again]) == [(b"zz", "length")]


def test_a_new_scheduler_hears_nothing_of_the_streams_of_the_one_before(ranks: tuple[Any, list[Countdown]]) -> None:
    first, schedulers = ranks
    before = Routed(schedulers[0], first, most=1)
    for number in range(3):
        before.admit(Request(bytes([65 + number]), Stopping(1 << 30)))
    before.advance()
    schedulers[0] = Countdown()
    routed = Routed(schedulers[0], first, most=1)
    numbers = [routed.admit(Request(bytes([97 + number]), Stopping(2))) for number in range(3)]
    assert texts(routed, numbers) == [(b"aa", "length"), (b"bb", "length"), (b"cc", "length")]


def test_ranks_that_share_a_model_do_what_rank_0_does(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    class Told(Wired):
        def send(self, rank: int, message: bytes) -> None:
            sent.append((rank, WIRE.from_bytes(message)))

        def computing(self) -> threading.Lock:
            return threading.Lock()

    told: Any = Told(0, [queue.SimpleQueue(), queue.SimpleQueue()])
    mirrored = Mirrored(Countdown(), told)
    request = Request(b"a", Stopping(1))
    number = mirrored.admit(request)
    assert mirrored.advance() == [Piece(number, b"a", "length")]
    mirrored.release(number)
    assert sent == [(1, ("reset",)), (1, ("admit", number, request)), (1, ("advance",)), (1, ("release", number))]


@pytest.mark.parametrize(
    "value",
    [
        Request(b"\x00\xff", Stopping(3, (b"a", b"\xfe")), Sampling(0.1, seed=(1 << 64) - 1), True, 5),
        Piece(3, b"\x80", "stop", (Cost(1, -0.1, ((2, -3.25), (3, -1e-9))),)),
        AnswerRequest(b"x", AnswerLimits(5, 1, b"y"), beams=Beams(3, 2, -0.5, "never"), memory_bits=4),
        AnswerPiece(1, b"", "end", (), (Answer(1, 0, (5, 6), -0.3333333333333333, "end"),)),
        ("admit", 7, None, True, 1.5, b"", ()),
    ],
)
def test_what_travels_arrives_as_it_was(value: Any) -> None:
    assert WIRE.from_bytes(WIRE.to_bytes(value)) == value


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b'{"class": "Path", "fields": {}}',
        b'{"class": "Piece", "fields": {"x": 1}}',
        b'{"bytes": "?"}',
        b'{"bytes": 1}',
        b"{}",
        b'{"class": [], "fields": {}}',
        b'{"class": "Sampling", "fields": {"temperature": -1}}',
        b"[" * 100_000,
    ],
)
def test_what_no_rank_says_is_an_error(data: bytes) -> None:
    with pytest.raises(DistributedError):
        WIRE.from_bytes(data)


def test_what_is_of_another_class_does_not_travel() -> None:
    with pytest.raises(AssertionError, match="Piece does not travel"):
        Wire(()).to_bytes(Piece(0, b""))
