"""The one thread that owns the model, its streams and their caches. Others give it commands, and it tells events.

Commands are obeyed between two quanta of the scheduler, so that a stream that is closed is free within a patch.
"""

import queue
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, replace
from typing import Any

from marlin_cli import console
from marlin_cli.engine.scheduling import Piece, Scheduler
from marlin_cli.errors import MarlinError, UsageError

# Quanta that fail one after the other, from which on the server calls itself broken.
FAILURES_OF_BROKEN = 3


@dataclass(frozen=True)
class Event:
    """What became of a stream.

    Attributes:
        key: the caller's number of it.
        piece: bytes and perhaps the end. None: the scheduler has taken the stream, unless one of the next is said.
        refusal: why it can never be run.
        failure: what broke while it ran.
    """

    key: int
    piece: Piece | None = None
    refusal: str | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Load:
    """What the engine does now: counts of streams, bytes of their caches, and how much was done so far."""

    running: int = 0
    waiting: int = 0
    cache_bytes: int = 0
    quanta: int = 0
    streams_in_quanta: int = 0  # running streams, summed over the quanta


class EngineThread:
    """See the top of this file.

    Args:
        make: loads the model and returns what makes schedulers of it; both happen in the thread.

    Attributes:
        deliver: takes the events of a quantum, in the thread.
        load: the last known.
        ended: set when the engine can do no more.
    """

    def __init__(self, make: Callable[[], Callable[[], Scheduler[Any]]]) -> None:
        self._make = make
        self.deliver: Callable[[list[Event]], None] = lambda events: None
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._started: Future[None] = Future()
        self._streams: dict[int, int] = {}  # the scheduler's numbers by ours
        self._keys: dict[int, int] = {}  # and back
        self._events: list[Event] = []
        self._failures = 0
        self.load = Load()
        self.ended = threading.Event()
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Load the model and begin.

        Raises:
            MarlinError: the model cannot be loaded.
        """
        self._thread.start()
        while True:  # signals are heard between the waits
            try:
                return self._started.result(timeout=0.1)
            except NotYet:
                if self._started.done():
                    raise

    @property
    def broken(self) -> bool:
        """Did nothing work lately?"""
        return self._failures >= FAILURES_OF_BROKEN or self.ended.is_set()

    def open(self, key: int, request: Any) -> None:
        """Begin a stream under a number that no other has."""
        self._commands.put(lambda: self._admit(key, request))

    def close(self, key: int) -> None:
        """Forget a stream, waiting or running."""
        self._commands.put(lambda: self._release(key))

    def stop(self, seconds: float) -> bool:
        """End after the quantum that runs; was it so within `seconds`?"""
        self._commands.put(None)
        return self._finished.wait(seconds)

    def _run(self) -> None:
        self._work()
        del self._make, self._events
        self._finished.set()
        # This thread never ends by itself. What MLX keeps for a thread it frees at the thread's end, when Python takes it for
        # gone already, and needs the interpreter for that: were the process at its own end by then, it would be aborted.
        threading.Event().wait()

    def _work(self) -> None:
        try:
            make_scheduler = self._make()
            self._scheduler = make_scheduler()
        except BaseException as error:
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        while True:
            try:
                if not self._obey():
                    return
                self._advance()
                self._failures = 0
                self._tell()
            except Exception as error:
                if not self._recover(error, make_scheduler):
                    self.ended.set()
                    return

    def _obey(self) -> bool:
        """Do what was asked since; wait where there is nothing else to do. False at the end."""
        while True:
            scheduler = self._scheduler
            idle = not (scheduler.running or scheduler.waiting)
            if idle:
                self._tell()
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                if self._events:  # who was taken is told before the next quantum, not after it
                    self._tell()
                return True
            if command is None:
                return False
            command()

    def _admit(self, key: int, request: Any) -> None:
        try:
            stream = self._scheduler.admit(request)
        except UsageError as error:
            self._events.append(Event(key, refusal=str(error)))
            return
        except Exception as error:
            traceback.print_exc()
            self._events.append(Event(key, failure=_said(error)))
            return
        self._streams[key], self._keys[stream] = stream, key
        self._events.append(Event(key))

    def _release(self, key: int) -> None:
        stream = self._streams.pop(key, None)
        if stream is not None:
            del self._keys[stream]
            self._scheduler.release(stream)

    def _advance(self) -> None:
        running = self._scheduler.running
        pieces = self._scheduler.advance()
        running = max(running, self._scheduler.running)
        for piece in pieces:
            key = self._keys.get(piece.stream)
            if key is None:
                continue
            self._events.append(Event(key, piece))
            if piece.stop_reason is not None:
                del self._keys[piece.stream], self._streams[key]
        last = self.load
        self.load = replace(last, quanta=last.quanta + 1, streams_in_quanta=last.streams_in_quanta + running)

    def _recover(self, error: Exception, make_scheduler: Callable[[], Scheduler[Any]]) -> bool:
        """All streams are lost, and the next ones have a new scheduler: what the old one holds is not known. Is there one?"""
        if not isinstance(error, (MarlinError, MemoryError)):
            traceback.print_exc()
        message = _said(error)
        self._events += [Event(key, failure=message) for key in self._streams]
        self._streams.clear()
        self._keys.clear()
        self._failures += 1
        console.failure(f"all streams are lost: {message}")
        events, self._events = self._events, []
        self.deliver(events)
        try:
            self._scheduler = make_scheduler()
        except Exception:
            traceback.print_exc()
            return False
        return True

    def _tell(self) -> None:
        scheduler, last = self._scheduler, self.load
        counts = {"running": scheduler.running, "waiting": scheduler.waiting, "cache_bytes": scheduler.cache_bytes}
        self.load = replace(last, **counts)
        events, self._events = self._events, []
        if events:
            self.deliver(events)


def _said(error: Exception) -> str:
    """What a client may know of an error."""
    if isinstance(error, MarlinError):
        return str(error)
    return "out of memory" if isinstance(error, MemoryError) else "an error inside of the server, which its log tells"
