"""Connections with deadlines: uvicorn's protocol of HTTP/1.1 waits for ever for a head, for a reader, and for a closing.

What stands here ends those, and lets at most so many be open, of which the one that waits longest makes room for a new one.
"""

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


@dataclass
class Patience:
    """Seconds that a connection may take, and the connections that wait for a head, those that wait longest first."""

    most_connections: int
    head_s: float = 30.0  # from the connection, or from the last response, to the end of the next head
    reader_s: float = 30.0  # in which a reader takes nothing of what is to be sent
    rest_s: float = 5.0  # for what is left of a body, after an answer that did not wait for it
    idle: dict["Connection", None] = field(default_factory=dict)


class Connection(H11Protocol):
    """See the top of this file."""

    def __init__(self, *arguments: Any, patience: Patience, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._patience = patience
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head; where there are too many connections one has to go."""
        super().connection_made(transport)
        if len(self.connections) > self._patience.most_connections:
            longest = next(iter(self._patience.idle), self)
            longest.end()
            if longest is self:
                return
        self._wait(self._patience.head_s)
        self._patience.idle[self] = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._wait(None)
        self._patience.idle.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request.

        A request that comes before the answer to the last one is not read: while it waited, uvicorn would not read the
        connection, and not see that its client has gone. The connection ends after the answer, and the client asks again.
        """
        if self._answering:
            self.cycle.keep_alive = False
            return
        try:
            super().data_received(data)
        except h11.LocalProtocolError:  # uvicorn answers what is no HTTP, though this request has its answer already
            self.end()
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._wait(None)
            self._patience.idle.pop(self, None)
        if self._answering and self.flow.read_paused:
            self.cycle.keep_alive = False
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """Wait for the next head, or for the rest of this body."""
        super().on_response_complete()
        if self.cycle.response_complete:  # else the next request was here already
            whole = not self.cycle.more_body
            self._wait(self._patience.head_s if whole else self._patience.rest_s)
            self._patience.idle[self] = None

    def pause_writing(self) -> None:
        """The reader is slow."""
        super().pause_writing()
        self._wait(self._patience.reader_s)

    def resume_writing(self) -> None:
        """The reader has taken something."""
        super().resume_writing()
        self._wait(None if self._answering else self._patience.head_s)

    def end(self) -> None:
        """Close now, whatever is not sent yet."""
        self._patience.idle.pop(self, None)  # at once: it is lost later, and meanwhile another has to make room
        self.transport.abort()

    @property
    def _answering(self) -> bool:
        """Is a request read whole, and not answered?"""
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def _wait(self, seconds: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self.end)


def connections_with(patience: Patience) -> Callable[..., asyncio.Protocol]:
    """What makes connections for uvicorn."""
    return functools.partial(Connection, patience=patience)
