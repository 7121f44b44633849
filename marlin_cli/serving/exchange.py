"""One HTTP exchange below starlette's responses: bodies with a bound and a deadline, and clients that go away."""

import asyncio
import time
from collections.abc import Coroutine, Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from marlin_cli.serving.desk import Desk, Order
from marlin_cli.serving.refusals import Refusal

# A body must be there so long after its head.
BODY_S = 30.0

# Bytes of all bodies that are being read together.
MOST_BODIES = 64 << 20

# In the scope of a request: what its line in the log says beside the usual.
NOTES = "marlin.notes"


class ClientGone(Exception):
    """The connection was closed before the exchange was over. Nobody reads an answer."""


class Bodies:
    """Reads bodies of requests.

    Args:
        most_bytes: that one may have.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._held = 0

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """The body of a request.

        Raises:
            Refusal: 408, 413, 415 or 503: too slow, too large, packed, or too much at once.
            ClientGone: see there.
        """
        headers = Headers(scope=scope)
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise Refusal(415, "content-encoding: bodies are read as they are; send it unpacked")
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or len(declared) > 15 or int(declared) > self._most_bytes:
            raise self._too_large()
        deadline = time.monotonic() + BODY_S
        body = bytearray()
        try:
            more = True
            while more:
                try:
                    message = await asyncio.wait_for(receive(), max(deadline - time.monotonic(), 0))
                except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
                    message_text = f"the body was not there {BODY_S:.0f} seconds after its head"
                    raise Refusal(408, message_text, headers={"Connection": "close"}) from None
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                body += part
                self._held += len(part)
                if len(body) > self._most_bytes:
                    raise self._too_large()
                if self._held > MOST_BODIES:
                    raise Refusal(503, "too many large requests at once; try again", headers={"Retry-After": "1"})
                more = message.get("more_body", False)
            return bytes(body)
        finally:
            self._held -= len(body)

    def _too_large(self) -> Refusal:
        return Refusal(413, f"the body has more than {self._most_bytes:,} bytes, all that this model has a use for")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work` after the body was read; it is cancelled, and waited for, when the client goes away.

    Raises:
        ClientGone: it did.
    """
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.wait((working, watching))
        if not working.cancelled() and (error := working.exception()) is not None:
            raise error


async def serve_order(desk: Desk, order: Order, scope: Scope, receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Answer an order by `work` while its client is there; whatever happens, no stream of it is left."""
    note(scope, id=order.id, order=order)
    try:
        await while_connected(receive, work)
    except ClientGone:
        note(scope, gone=True)
    finally:
        desk.close(order)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_head(send: Send, status: int, headers: Mapping[str, str]) -> None:
    """The status and the headers of a response whose body comes in parts."""
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})


async def send_part(send: Send, data: bytes, *, last: bool = False) -> None:
    """A part of a body."""
    await send({"type": "http.response.body", "body": data, "more_body": not last})


def note(scope: Scope, **values: Any) -> None:
    """Say more about a request in its line of the log."""
    scope.setdefault(NOTES, {}).update(values)
