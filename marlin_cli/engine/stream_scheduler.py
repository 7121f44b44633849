"""The scheduler of streams that continue bytes: who has a place, what each may still draw, and which bytes that sets free."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from marlin_cli.engine.drafts import DraftSource, TextDrafts, as_text
from marlin_cli.engine.endless import Window, most_ids_of
from marlin_cli.engine.scheduling import NOT_FINITE, Cost, Piece, Request, SchedulerLimits
from marlin_cli.engine.slice_pace import SlicePace
from marlin_cli.engine.speculation import Drafting, check_verified
from marlin_cli.engine.split import agreed
from marlin_cli.engine.states import is_cut_anywhere
from marlin_cli.engine.stopping import StopMatcher
from marlin_cli.engine.streams import Ask, Drawn, Floats, StreamNoise, Streams
from marlin_cli.errors import UsageError
from marlin_cli.models import Network, continuing_of
from marlin_cli.models.splitting import share_of


@dataclass(frozen=True)
class _Waiting:
    """A request that has no place yet."""

    stream: int
    request: Request
    ids: Sequence[int]
    most_ids: int  # that may follow them
    most_bytes: int  # that its caches may take


class StreamScheduler:
    """A `Scheduler` over the streams of one network.

    A stream has a place when there is one, in the order of the requests, and when its caches can grow to all that it may
    ever have beside those of the others: what has begun is never stopped for want of memory.

    Args:
        draft_source: (request, its prompt as it is read) -> where the drafts of its stream come from.
    """

    def __init__(
        self,
        network: Network,
        streams: Streams,
        limits: SchedulerLimits,
        window: Window | None = None,
        draft_source: Callable[[Request, bytes], DraftSource] | None = None,
    ) -> None:
        self._network, self._streams, self._limits = network, streams, limits
        self._context = most_ids_of(network.config, window)
        self._draft_source = draft_source or text_drafts
        self._next = 0
        self._waiting: deque[_Waiting] = deque()
        self._running: dict[int, _Running] = {}
        # Ranks that share a model read the same rows, and where a prompt pauses is a place of its state if others are not.
        is_timed = share_of(network) is None and is_cut_anywhere(network.config)
        self._pace = SlicePace(limits.slice_rows, is_timed=is_timed)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def cache_bytes(self) -> int:
        return self._streams.nbytes

    def admit(self, request: Request) -> int:
        config, room, context = self._network.config, self._limits.cache_bytes, self._context
        ids = continuing_of(self._network).ids(config, request.prompt, request.sentinels)
        if len(ids) > context:
            raise UsageError(
                f"the prompt has {len(ids)} bytes, but the model's context is {context}; give its last {context} bytes"
            )
        check_verified(request.speculation, self._streams.no_drafts)
        most_ids = min(request.stopping.max_bytes, context - len(ids))
        most_bytes = self._streams.most_bytes(len(ids) + most_ids) if most_ids else 0
        if room is not None and most_bytes > room:
            raise UsageError(
                f"the prompt and what follows it have up to {len(ids) + most_ids} bytes, whose cache takes {most_bytes:,},"
                f" but the caches of all streams have {room:,}; give a shorter prompt, or ask for fewer bytes"
            )
        stream, self._next = self._next, self._next + 1
        self._waiting.append(_Waiting(stream, request, ids, most_ids, most_bytes))
        return stream

    def advance(self) -> list[Piece]:
        pieces = self._let_in()
        if not self._running:
            return pieces
        for number, drawn in self._step().items():
            piece = self._running[number].take(drawn)
            if piece.stop_reason is not None:
                self.release(number)
            if piece.data or piece.stop_reason is not None:
                pieces.append(piece)
        return agreed(self._network, pieces, ends=any(piece.stop_reason is not None for piece in pieces))

    def _step(self) -> Mapping[int, Drawn]:
        """A step of the streams, with as long a slice of prompts as those can bear that wait for ids."""
        entering = {number for number, running in self._running.items() if not running.has_drawn}
        ready = len(self._running) - len(entering)
        rows = self._pace.rows(ready)
        start = time.perf_counter()
        found = self._streams.step({number: running.ask for number, running in self._running.items()}, rows)
        if entering.isdisjoint(found):  # else the last slice may have been a shorter one
            self._pace.took(time.perf_counter() - start, ready, rows if entering else 0)
        return found

    def release(self, stream: int) -> None:
        if self._running.pop(stream, None) is not None:
            self._streams.end(stream)
        elif any(each.stream == stream for each in self._waiting):
            self._waiting = deque(each for each in self._waiting if each.stream != stream)

    def _let_in(self) -> list[Piece]:
        """Give places to those that wait, as far as there are any; the pieces of those that want nothing."""
        pieces = []
        while self._waiting and (self._waiting[0].most_ids == 0 or self._may_begin(self._waiting[0])):
            first = self._waiting.popleft()
            if first.most_ids == 0:
                reason = "length" if first.request.stopping.max_bytes == 0 else "context"
                pieces.append(Piece(first.stream, b"", reason))
            else:
                drafting = None if self._streams.no_drafts else self._drafting(first)
                self._running[first.stream] = _Running(self._network, first, drafting)
                self._streams.begin(first.stream, first.ids)
        return pieces

    def _may_begin(self, asked: _Waiting) -> bool:
        """Is there a place for it, and does nobody wait while it begins?"""
        return self._has_room(asked) and (self._streams.is_ready(asked.ids) or not self._running)

    def _drafting(self, asked: _Waiting) -> Drafting | None:
        """What drafts a stream ahead, if it asks for it."""
        speculation, first_byte = asked.request.speculation, continuing_of(self._network).first_byte
        if not speculation.most:
            return None
        source = self._draft_source(asked.request, as_text(asked.ids, first_byte))
        return Drafting(speculation, source, first_byte)

    def _has_room(self, asked: _Waiting) -> bool:
        if len(self._running) >= self._limits.max_streams:
            return False
        room = self._limits.cache_bytes
        most = [asked.most_bytes, *(each.asked.most_bytes for each in self._running.values())]
        return room is None or self._streams.bytes_together(most) <= room


class _Running:
    """A stream that has a place: what it may still draw, and the bytes that it holds back."""

    def __init__(self, network: Network, asked: _Waiting, drafting: Drafting | None) -> None:
        config, self._continuing = network.config, continuing_of(network)
        self.asked, self._drafting = asked, drafting
        self._ends = self._continuing.ends(config)
        self._left, self.has_drawn = asked.most_ids, False
        self._matcher = StopMatcher(asked.request.stopping.stop)
        self._noise = StreamNoise(asked.request.sampling.seed, config.vocab_size)
        self._pending: deque[tuple[int, Cost]] = deque()  # of the ids whose bytes are held back: bytes, and the cost

    @property
    def ask(self) -> Ask:
        """What it wants of the next step."""
        request = self.asked.request
        return Ask(self._left, request.sampling, self._noise, request.logprobs is not None, self._drafting)

    def take(self, drawn: Drawn) -> Piece:
        """The piece that ids set free. What was drawn beyond the stream's end is nothing."""
        self.has_drawn = True
        if self._drafting is not None:
            self._drafting.push(drawn.ids)
        data, reason = b"", None
        for index, value in enumerate(drawn.ids):
            freed, reason = self._push(value, None if drawn.logits is None else drawn.logits[index])
            data += freed
            if reason is not None:
                break
        told = None if self._drafting is None or reason is None else self._drafting.told
        return Piece(self.asked.stream, data, reason, self._costs_of(len(data)), known=drawn.known, speculated=told)

    def _push(self, value: int, logits: Floats | None) -> tuple[bytes, str | None]:
        """The bytes that an id sets free, and why it is the last one."""
        if value < 0:
            return self._matcher.flush(), NOT_FINITE
        if value in self._ends:
            return self._matcher.flush(), "special"
        byte, stopped = value - self._continuing.first_byte, False
        is_byte = 0 <= byte < 256
        text = b"" if is_byte or not self.asked.request.sentinels else self._continuing.sentinel(value)
        if logits is not None and (is_byte or text):
            self._pending.append((1 if is_byte else len(text), cost_of(logits, value, self.asked.request.logprobs or 0)))
        if is_byte:
            data, stopped = self._matcher.push(byte)
        else:  # no stop sequence goes on over it
            data = self._matcher.flush() + text
        self._left -= 1
        if stopped:
            return data, "stop"
        if self._left == 0:
            most = self.asked.request.stopping.max_bytes
            return data + self._matcher.flush(), "length" if self.asked.most_ids == most else "context"
        return data, None

    def _costs_of(self, count: int) -> tuple[Cost, ...]:
        """The costs of the ids that so many bytes are of, which are set free now."""
        found = []
        while count > 0 and self._pending:
            length, cost = self._pending.popleft()
            found.append(cost)
            count -= length
        return tuple(found)


def text_drafts(request: Request, prompt: bytes) -> DraftSource:
    """Drafts out of a prediction, the prompt, and what has followed it."""
    return TextDrafts(request.speculation.prediction, prompt)


def cost_of(logits: Floats, value: int, likeliest: int) -> Cost:
    """What an id costs under logits [vocab], and the likeliest ids; of equal ones the lower first."""
    scores = logits.astype(np.float64)
    scores = scores - scores.max()
    scores -= np.log(np.exp(scores).sum())
    first = np.argsort(-scores, kind="stable")[:likeliest].tolist()
    return Cost(value, float(scores[value]), tuple((each, float(scores[each])) for each in first))
