"""The desk between clients and the engine: which orders are taken, who gets which piece, and what became of each.

All of it runs in the event loop's thread; only `_deliver` is called by the engine's.
"""

import asyncio
import collections
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from marlin_cli.engine.scheduling import NOT_FINITE, Piece
from marlin_cli.errors import UsageError
from marlin_cli.serving.asks import Ask
from marlin_cli.serving.engine_thread import EngineThread, Event
from marlin_cli.serving.metrics import Metrics
from marlin_cli.serving.refusals import Refusal, bad
from marlin_cli.serving.served import Served

# Orders whose end is remembered.
MOST_REMEMBERED = 1024

# After the first piece of an order the next ones are handed out together, so often at most: each time costs the
# processor as much as a few bytes (eight streams at 20 ms lost a tenth of their speed on two cores).
PACE_S = 0.05

# A quiet order is looked after so often, that its client and what stands between may see that it lives.
QUIET_S = 15.0

LONGEST_RETRY_S = 60


@dataclass
class Stream:
    """One stream of an order; no byte of it is kept. Times are `time.monotonic`."""

    prompt_bytes: int
    seed: int
    stop_reason: str | None = None
    generated_bytes: int = 0
    first_s: float | None = None
    end_s: float | None = None


@dataclass
class Order:
    """What one request of a client asked for.

    Attributes:
        news: pieces that are not handed out yet, with the number of their stream.
        refusal: why no more comes.
    """

    id: str
    streams: list[Stream]
    opened_s: float
    opened_at: float
    news: list[tuple[int, Piece]] = field(default_factory=list)
    refusal: Refusal | None = None
    taken: int = 0  # streams that the scheduler has
    left: bool = False  # its client went away
    handed_s: float = 0.0  # when pieces were handed out last
    due: asyncio.TimerHandle | None = None  # when the next ones will be
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # there is something to hand out now
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # all taken, or refused

    @property
    def state(self) -> str:
        """One word."""
        if self.left:
            return "cancelled"
        if self.refusal is not None:
            return "failed"
        if all(each.stop_reason is not None for each in self.streams):
            return "done"
        return "running" if any(each.first_s is not None for each in self.streams) else "waiting"

    def document(self) -> dict[str, Any]:
        """What is told about it; no byte of it."""
        now = time.monotonic()
        return {
            "id": self.id,
            "object": "request",
            "created": int(self.opened_at),
            "state": self.state,
            "error": None if self.refusal is None else self.refusal.message,
            "streams": [
                {
                    "prompt_bytes": each.prompt_bytes,
                    "generated_bytes": each.generated_bytes,
                    "stop_reason": each.stop_reason,
                    "seed": each.seed,
                    "first_byte_ms": None if each.first_s is None else round(1000 * (each.first_s - self.opened_s), 3),
                    "wall_ms": round(1000 * ((each.end_s or now) - self.opened_s), 3),
                }
                for each in self.streams
            ],
        }


class Desk:
    """See the top of this file.

    Args:
        max_streams: that run at once; of the others `max_waiting` may wait.

    Attributes:
        closing: no more orders are taken.
    """

    def __init__(self, served: Served, engine: EngineThread, metrics: Metrics, max_streams: int, max_waiting: int) -> None:
        self._served, self._metrics = served, metrics
        self._most, self._max_streams = max_streams + max_waiting, max_streams
        self._engine = engine
        engine.deliver = self._deliver
        self._loop = asyncio.get_running_loop()
        self._next = 0
        self._open: dict[int, tuple[Order, int]] = {}  # stream by key
        self._orders: collections.OrderedDict[str, Order] = collections.OrderedDict()
        self._stream_s = 1.0  # how long a stream takes, a moving mean
        self.closing = False
        self._look_after()

    @property
    def open(self) -> int:
        """Streams that wait or run."""
        return len(self._open)

    def find(self, id: str) -> Order | None:
        """An order by its id: one that is open, or among the last that ended."""
        return self._orders.get(id)

    def take(self, asks: Sequence[Ask], prefix: str) -> Order:
        """Take an order; its caller closes it.

        Raises:
            Refusal: 400 for what can never be, 429 where too many wait, 503 where the server ends.
        """
        if self.closing:
            raise Refusal(503, "the server is stopping", code="shutting_down", headers={"Retry-After": "1"})
        if len(asks) > self._most:
            raise bad(f"{len(asks)} streams are more than this server ever has ({self._most}); ask for fewer at a time", "n")
        if len(self._open) + len(asks) > self._most:
            message = f"{len(self._open)} streams run or wait, and {self._most} is all; try again later"
            headers = {"Retry-After": str(self._retry_s(len(asks)))}
            raise Refusal(429, message, code="rate_limit_exceeded", headers=headers)
        try:
            requests = [self._served.request(ask) for ask in asks]
        except UsageError as error:
            raise bad(str(error)) from None
        streams = [Stream(len(ask.prompt), ask.sampling.seed) for ask in asks]
        order = Order(f"{prefix}-{secrets.token_hex(12)}", streams, time.monotonic(), time.time())
        self._remember(order)
        for number, request in enumerate(requests):
            self._open[self._next] = order, number
            self._engine.open(self._next, request)
            self._next += 1
        return order

    async def settle(self, order: Order) -> None:
        """Wait until the scheduler has taken all streams of an order, which it does between two quanta.

        Raises:
            Refusal: one of them can never run.
        """
        await order.settled.wait()
        if order.refusal is not None:
            raise order.refusal

    async def pieces(self, order: Order) -> AsyncIterator[list[tuple[int, Piece]]]:
        """What is new of an order until it ends, the first at once and then by `PACE_S`; nothing after `QUIET_S` of quiet.

        Raises:
            Refusal: it cannot go on.
        """
        while True:
            await order.changed.wait()
            order.changed.clear()
            news, order.news = order.news, []
            order.handed_s = time.monotonic()
            yield news
            if order.refusal is not None:
                raise order.refusal
            if order.state == "done" and not order.news:
                return

    def close(self, order: Order) -> None:
        """The client has all that it wanted: what still runs is forgotten."""
        gone = [key for key, (owner, _) in self._open.items() if owner is order]
        order.news.clear()
        for key in gone:
            del self._open[key]
            self._engine.close(key)
        if gone and order.refusal is None:
            order.left = True
            self._metrics.cancelled(len(gone))

    def end_all(self, message: str) -> None:
        """Refuse what is open, and what comes."""
        self.closing = True
        for order in {id(owner): owner for owner, _ in self._open.values()}.values():
            self._give_up(order, Refusal(503, message, code="shutting_down"))

    def _deliver(self, events: list[Event]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._take_in, events)
        except RuntimeError:  # the loop is closed: nobody waits any more
            pass

    def _take_in(self, events: list[Event]) -> None:
        now = time.monotonic()
        for event in events:
            owner = self._open.get(event.key)
            if owner is None:  # closed while it was on its way
                continue
            order, number = owner
            if event.refusal is not None:
                self._give_up(order, bad(event.refusal))
            elif event.failure is not None:
                self._give_up(order, Refusal(500, event.failure))
            elif event.piece is None:
                order.taken += 1
                if order.taken == len(order.streams):
                    order.settled.set()
            elif event.piece.stop_reason == NOT_FINITE:
                self._give_up(order, Refusal(500, "the model gives no numbers here: its weights are damaged, or overflow"))
            else:
                self._add(order, number, event.key, event.piece, now)

    def _add(self, order: Order, number: int, key: int, piece: Piece, now: float) -> None:
        stream = order.streams[number]
        order.news.append((number, piece))
        if stream.first_s is None:
            stream.first_s = now
            self._metrics.first_byte(stream.prompt_bytes, now - order.opened_s)
        stream.generated_bytes += len(piece.data)
        self._metrics.generated(len(piece.data))
        if piece.stop_reason is not None:
            stream.stop_reason, stream.end_s = piece.stop_reason, now
            del self._open[key]
            self._stream_s += 0.1 * (now - order.opened_s - self._stream_s)
            self._metrics.ended(piece.stop_reason, now - order.opened_s, now - stream.first_s)
        wait_s = order.handed_s + PACE_S - now
        if wait_s <= 0 or order.state == "done":
            order.changed.set()
        elif order.due is None:
            order.due = self._loop.call_later(wait_s, self._fall_due, order)

    def _fall_due(self, order: Order) -> None:
        order.due = None
        order.changed.set()

    def _look_after(self) -> None:
        """Wake the orders that were quiet for long, again and again."""
        now = time.monotonic()
        for order in {id(owner): owner for owner, _ in self._open.values()}.values():
            if now - max(order.handed_s, order.opened_s) >= QUIET_S:
                order.changed.set()
        self._loop.call_later(QUIET_S / 4, self._look_after)

    def _give_up(self, order: Order, refusal: Refusal) -> None:
        if order.refusal is None:
            order.refusal = refusal
            self.close(order)
            self._metrics.failed()
        order.changed.set()
        order.settled.set()

    def _retry_s(self, count: int) -> int:
        """Seconds after which so many streams may find a place, as far as one can tell."""
        return max(1, min(LONGEST_RETRY_S, round(self._stream_s * count / self._max_streams)))

    def _remember(self, order: Order) -> None:
        self._orders[order.id] = order
        for id in list(self._orders):
            if len(self._orders) <= MOST_REMEMBERED + self._most:
                break
            if self._orders[id].state in ("waiting", "running"):
                continue
            del self._orders[id]
