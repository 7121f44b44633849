"""The ASGI application: which path is answered by what, and how errors look."""

import base64
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from marlin_cli.serving.completion_requests import read_chat, read_completion
from marlin_cli.serving.completions import Completions
from marlin_cli.serving.desk import Desk
from marlin_cli.serving.engine_thread import EngineThread
from marlin_cli.serving.exchange import Bodies, ClientGone
from marlin_cli.serving.guard import Guard
from marlin_cli.serving.metrics import Metrics
from marlin_cli.serving.native import RawBytes, Requests
from marlin_cli.serving.refusals import Refusal
from marlin_cli.serving.request_log import Logged
from marlin_cli.serving.served import Served
from marlin_cli.text import quoted

# A body holds a prompt with every byte as an int in JSON, and the other fields.
BODY_BYTES_A_BYTE = 6
BODY_BYTES_BESIDE = 1 << 18


def application(
    served: Served,
    desk: Desk,
    engine: EngineThread,
    metrics: Metrics,
    write: Callable[[dict[str, Any]], None],
    *,
    key: str | None,
    hosts: frozenset[str] | None,
    created: int,
    connections: Callable[[], int],
) -> Starlette:
    """The application.

    Args:
        write: takes what a line of the log says.
        created: when the server began, seconds since 1970.
        connections: how many are open.
    """
    bodies = Bodies(BODY_BYTES_BESIDE + BODY_BYTES_A_BYTE * served.max_bytes)
    model = _model(served, created)
    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    policy = _policy(page)

    async def health(_: Request) -> Response:
        if desk.closing or engine.broken:
            raise Refusal(503, "the server is stopping" if desk.closing else "the engine fails; the server's log tells why")
        return JSONResponse({"status": "ok"})

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != served.name:
            message = f"the model {quoted(name)} is not served here; this is {quoted(served.name)}"
            raise Refusal(404, message, parameter="model", code="model_not_found")
        return JSONResponse(model)

    async def numbers(_: Request) -> Response:
        text = metrics.text(engine.load, desk.open, connections())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def front(_: Request) -> Response:
        headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        return HTMLResponse(page, headers=headers)

    routes = [
        Route("/v1/completions", Completions(read_completion, "cmpl", served, desk, bodies), methods=["POST"]),
        Route("/v1/chat/completions", Completions(read_chat, "chatcmpl", served, desk, bodies), methods=["POST"]),
        Route("/v1/bytes", RawBytes(served, desk, bodies), methods=["POST"]),
        Route("/v1/requests/{id}", Requests(desk).find),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/health", health),
        Route("/v1/health", health),
        Route("/metrics", numbers),
        Route("/", front),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Logged, write, metrics), Middleware(Guard, key, hosts)],
        exception_handlers={Refusal: _refuse, ClientGone: _nothing, HTTPException: _http_error, Exception: _bug},
    )
    app.router.redirect_slashes = False  # else it leads to whatever Host a client names
    return app


def _model(served: Served, created: int) -> dict[str, Any]:
    """The model as /v1/models tells it. Lengths count bytes, which are its tokens."""
    return {
        "id": served.name,
        "object": "model",
        "created": created,
        "owned_by": "marlin",
        "max_model_len": served.max_bytes,
        "marlin": {
            "architecture": served.title,
            "capability": served.capability.value,
            "token": "byte",
            "chat": served.template is not None,
            "sentinels": served.has_sentinels,
        },
    }


def _policy(page: str) -> str:
    """What the page may do: run its own script, use its own style, and ask this server."""
    hashes = {}
    for tag in ("script", "style"):
        text = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        hashes[tag] = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
    return (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def _refuse(_: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    return refusal.response()


async def _nothing(_: Request, __: Exception) -> Response:
    """The client is gone; nobody reads it."""
    return Response(status_code=400)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = quoted(request.url.path)
    messages = {404: f"there is nothing at {path}", 405: f"{path} does not take {quoted(request.method)}"}
    return Refusal(error.status_code, messages.get(error.status_code, error.detail), headers=error.headers).response()


async def _bug(_: Request, __: Exception) -> Response:
    return Refusal(500, "an error inside of the server, which its log tells").response()
