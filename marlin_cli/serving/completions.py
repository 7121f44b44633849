"""`/v1/completions` and `/v1/chat/completions`: an order of streams, told whole or by server-sent events."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from marlin_cli.documents import parse_json
from marlin_cli.engine.scheduling import Piece
from marlin_cli.errors import UsageError
from marlin_cli.serving.choices import Choice, as_chat_delta, as_chat_message
from marlin_cli.serving.completion_requests import CompletionRequest
from marlin_cli.serving.desk import Desk, Order
from marlin_cli.serving.exchange import Bodies, send_head, send_part, serve_order
from marlin_cli.serving.refusals import Refusal, bad
from marlin_cli.serving.served import Served

EVENTS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

# A comment of server-sent events, which clients pass over.
STILL_HERE = b": still here\n\n"


@dataclass(frozen=True)
class Completions:
    """The ASGI application of one path.

    Attributes:
        read: a JSON document as a request.
        prefix: of the ids.
    """

    read: Callable[[Any, Served], CompletionRequest]
    prefix: str
    served: Served
    desk: Desk
    bodies: Bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request.

        Raises:
            Refusal, ClientGone: see there.
        """
        body = await self.bodies.read(scope, receive)
        try:
            document = parse_json(body, "the body", UsageError)
        except UsageError as error:
            raise bad(str(error)) from None
        request = self.read(document, self.served)
        order = self.desk.take(request.asks, self.prefix)
        answer = self._stream if request.stream else self._whole
        await serve_order(self.desk, order, scope, receive, answer(scope, receive, send, request, order))

    async def _whole(self, scope: Scope, receive: Receive, send: Send, request: CompletionRequest, order: Order) -> None:
        found: dict[int, list[Piece]] = defaultdict(list)
        async for news in self.desk.pieces(order):
            for number, piece in news:
                found[number].append(piece)
        choices: list[dict[str, Any]] = []
        growing = self._choices(request)
        for number, choice in enumerate(growing):
            if choice.ask.beams is None:
                choices.append(choice.push(found[number], choice.echo() if request.echo else ""))
                continue
            for each in getattr(found[number][-1], "answers", ()):
                data = self.served.data_of(each.ids, choice.ask.sentinels)
                choices.append(choice.answer(data, each.stop_reason, each.score, len(choices)))
        if request.chat:
            choices = [as_chat_message(choice) for choice in choices]
        document = self._head(request, order, streamed=False) | {"choices": choices, "usage": _usage(request, order, growing)}
        await JSONResponse(document, headers={"X-Request-Id": order.id})(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send, request: CompletionRequest, order: Order) -> None:
        await self.desk.settle(order)
        await send_head(send, 200, {**EVENTS, "X-Request-Id": order.id})
        growing = self._choices(request)
        head = self._head(request, order, streamed=True)
        if request.include_usage:
            head["usage"] = None
        begun: set[int] = set()
        try:
            async for news in self.desk.pieces(order):
                by_stream: dict[int, list[Piece]] = defaultdict(list)
                for number, piece in news:
                    by_stream[number].append(piece)
                events = []
                for number, pieces in by_stream.items():
                    choice, first = growing[number], number not in begun
                    begun.add(number)
                    told = choice.push(pieces, choice.echo() if request.echo and first else "")
                    told = as_chat_delta(told, first=first) if request.chat else told
                    events.append(_event({**head, "choices": [told]}))
                await send_part(send, b"".join(events) or STILL_HERE)
            if request.include_usage:
                await send_part(send, _event({**head, "choices": [], "usage": _usage(request, order, growing)}))
            await send_part(send, b"data: [DONE]\n\n", last=True)
        except Refusal as refusal:
            await send_part(send, _event(refusal.document()), last=True)

    def _choices(self, request: CompletionRequest) -> list[Choice]:
        return [
            Choice(self.served, ask, index, request.chat, request.return_token_ids) for index, ask in enumerate(request.asks)
        ]

    def _head(self, request: CompletionRequest, order: Order, *, streamed: bool) -> dict[str, Any]:
        kind = "text_completion" if not request.chat else f"chat.completion{'.chunk' if streamed else ''}"
        return {"id": order.id, "object": kind, "created": int(order.opened_at), "model": self.served.name}


def _usage(request: CompletionRequest, order: Order, choices: Sequence[Choice]) -> dict[str, Any]:
    """Counts of bytes; a prompt of several choices counts once, and as read if its first choice read it.

    What was drafted counts as predicted, whoever drafted it.
    """
    firsts = order.streams[:: request.count]
    prompts, known = (sum(each) for each in zip(*((one.prompt_bytes, one.known_bytes) for one in firsts), strict=True))
    generated = sum(choice.generated_bytes for choice in choices)
    usage: dict[str, Any] = {
        "prompt_tokens": prompts,
        "completion_tokens": generated,
        "total_tokens": prompts + generated,
        "prompt_tokens_details": {"cached_tokens": known},
    }
    drafts = [choice.speculated for choice in choices if choice.speculated is not None]
    if drafts:
        accepted = sum(each.accepted_bytes for each in drafts)
        usage["completion_tokens_details"] = {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": sum(each.drafted_bytes for each in drafts) - accepted,
            "passes": sum(each.passes for each in drafts),
        }
    return usage


def _event(document: dict[str, Any]) -> bytes:
    """A server-sent event: ASCII alone, so that no line can be broken by what stands in it."""
    return b"data: " + json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n\n"
