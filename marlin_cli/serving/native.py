"""`POST /v1/bytes`: raw bytes in, raw bytes out as they come, options in the query; `GET /v1/requests/{id}`: how it ended."""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from marlin_cli.serving.asks import Ask, read_ask
from marlin_cli.serving.desk import Desk, Order
from marlin_cli.serving.exchange import Bodies, send_head, send_part, serve_order
from marlin_cli.serving.fields import Fields
from marlin_cli.serving.refusals import Refusal, bad
from marlin_cli.serving.served import Served
from marlin_cli.text import quoted

# What each option of a query is; `stop` and `stop_hex` may stand several times.
WHOLE = ("max_bytes", "min_bytes", "top_k", "seed")
NUMBERS = ("temperature", "top_p", "min_p")
SEVERAL = ("stop", "stop_hex")
FLAGS = ("sentinels",)
DRAFTS = ("prediction", "prediction_hex")  # one of them

# Options that have another name in a body.
NAMES = {"max_bytes": "max_tokens", "min_bytes": "min_tokens"}


@dataclass(frozen=True)
class RawBytes:
    """The ASGI application of `/v1/bytes`."""

    served: Served
    desk: Desk
    bodies: Bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request.

        Raises:
            Refusal, ClientGone: see there.
        """
        query = QueryParams(scope["query_string"])
        prompt = await self.bodies.read(scope, receive)
        order = self.desk.take([read_query(query, self.served, prompt)], "bytes")
        await serve_order(self.desk, order, scope, receive, self._stream(send, order))

    async def _stream(self, send: Send, order: Order) -> None:
        await self.desk.settle(order)
        where = {"Content-Type": "application/octet-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        where |= {"X-Content-Type-Options": "nosniff", "X-Request-Id": order.id, "Content-Location": f"/v1/requests/{order.id}"}
        await send_head(send, 200, where)
        try:
            async for news in self.desk.pieces(order):
                data = b"".join(piece.data for _, piece in news)
                if data:
                    await send_part(send, data)
        except Refusal:
            return  # without its last chunk the body is cut short, and every client sees that it is
        await send_part(send, b"", last=True)


@dataclass(frozen=True)
class Requests:
    """The endpoint of `/v1/requests/{id}`."""

    desk: Desk

    async def find(self, request: Request) -> Response:
        """What became of an order.

        Raises:
            Refusal: 404: there is none of this id, or it ended long ago.
        """
        order = self.desk.find(request.path_params["id"])
        if order is None:
            raise Refusal(404, f"no request {quoted(request.path_params['id'])}; the last thousand that ended are remembered")
        return JSONResponse(order.document(), headers={"Cache-Control": "no-store"})


def read_query(query: QueryParams, served: Served, prompt: bytes) -> Ask:
    """The options of a query.

    Raises:
        Refusal: 400: an unknown one, one twice, or a value that cannot be.
    """
    document: dict[str, Any] = {}
    stops: list[Any] = []
    for name, text in query.multi_items():
        if name in SEVERAL:
            stops.append(text if name == "stop" else list(_hex(text, name)))
            continue
        if name in DRAFTS and "prediction" not in document:
            content = text if name == "prediction" else list(_hex(text, name))
            document["prediction"] = {"type": "content", "content": content}
            continue
        if NAMES.get(name, name) in document or name in DRAFTS:
            raise bad(f"{quoted(name)} stands twice in the query; give one", name[:80])
        document[NAMES.get(name, name)] = _value(name, text)
    if stops:
        document["stop"] = stops
    fields = Fields(document)
    ask = read_ask(fields, served, prompt)
    fields.finish()
    return ask


def _value(name: str, text: str) -> Any:
    """An option's text as the field that it stands for."""
    if name in FLAGS:
        values: Mapping[str, bool] = {"true": True, "1": True, "false": False, "0": False}
        if text not in values:
            raise bad(f"{name}: expected true or false, found {quoted(text)}", name)
        return values[text]
    if name not in (*WHOLE, *NUMBERS):
        known = ", ".join((*WHOLE, *NUMBERS, *SEVERAL, *FLAGS, *DRAFTS))
        raise bad(f"unknown option {quoted(name)}; known: {known}", name[:80])
    # Python's own readers take spaces, underscores and the digits of every script.
    if name in WHOLE and re.fullmatch("-?[0-9]{1,32}", text):
        return int(text)
    if name in NUMBERS and re.fullmatch("-?[0-9]{0,32}[.]?[0-9]{0,32}([eE][-+]?[0-9]{1,4})?", text):
        with contextlib.suppress(ValueError):  # it has no digits
            return float(text)
    raise bad(f"{name}: expected a {'whole ' if name in WHOLE else ''}number, found {quoted(text)}", name)


def _hex(text: str, name: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise bad(f"{name}: {quoted(text)} is not hexadecimal; write for example 0a0a", name) from None
