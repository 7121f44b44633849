"""The log: a JSON object a line and request on stdout, never with bytes of a prompt or an answer."""

import json
import logging
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any, TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from marlin_cli.serving.desk import Order
from marlin_cli.serving.exchange import NOTES
from marlin_cli.serving.metrics import Metrics

# Lines that wait for a slow reader; more are dropped, and their number is told.
MOST_WAITING = 10_000

LONGEST_PATH = 200


class LineWriter:
    """Writes lines in a thread of its own, so that a full pipe does not stop the server."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(MOST_WAITING)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, document: dict[str, Any]) -> None:
        """Write an object as a line, soon."""
        if self._dropped:
            document = {**document, "lines_dropped": self._dropped}
        try:
            self._lines.put_nowait(json.dumps(document, ensure_ascii=True) + "\n")
            self._dropped = 0
        except queue.Full:
            self._dropped += 1

    def close(self, seconds: float = 1.0) -> None:
        """Write what waits, if its reader takes it."""
        try:
            self._lines.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(seconds)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._stream.write(line)
                if self._lines.empty():
                    self._stream.flush()
            except (OSError, ValueError):  # nobody reads any more: the server goes on
                return


class Logged:
    """ASGI middleware: a line and a count for each request."""

    def __init__(self, app: ASGIApp, write: Callable[[dict[str, Any]], None], metrics: Metrics) -> None:
        self._app, self._write, self._metrics = app, write, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and tell of it when it is over."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.monotonic(), 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sent)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.responded(route, status)
            self._write(_line(scope, status, time.monotonic() - begun))


def _line(scope: Scope, status: int, seconds: float) -> dict[str, Any]:
    client = scope.get("client")
    line: dict[str, Any] = {
        "time": now(),
        "method": scope["method"],
        "path": scope["path"][:LONGEST_PATH],
        "status": status or None,  # nothing was answered: the client was gone
        "ms": round(1000 * seconds, 3),
        "client": client[0] if client else None,
    }
    notes = dict(scope.get(NOTES, {}))
    order: Order | None = notes.pop("order", None)
    if order is not None:
        document = order.document()
        told = ("prompt_bytes", "cached_bytes", "generated_bytes", "stop_reason", "seed", "first_byte_ms")
        notes |= {"state": document["state"], "error": document["error"]}
        notes["streams"] = [{name: each[name] for name in told} for each in document["streams"]]
    return line | {name: value for name, value in notes.items() if value is not None}


def now() -> str:
    """This moment, as logs have it."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


class LibraryHandler(logging.Handler):
    """What libraries have to say: a warning is a line of the log, a bug a traceback on stderr."""

    def __init__(self, write: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(logging.WARNING)
        self._to_log = write

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a record on."""
        message = record.getMessage().strip()
        self._to_log({"time": now(), "level": record.levelname.lower(), "message": message[:1000]})
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not isinstance(error, OSError):  # which is no bug: no descriptors, say
            traceback.print_exception(error, file=sys.stderr)
