"""Who may ask: clients with the key, and no page of another origin that a browser was led to."""

import hashlib
import hmac
import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from marlin_cli.serving.refusals import Refusal
from marlin_cli.text import quoted

# What may be seen without a key: that the server lives, and the page, which asks for the key itself.
OPEN = frozenset(("/", "/health", "/v1/health"))

MOST_HEAD_BYTES = 16 << 10

LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))


@dataclass(frozen=True)
class Guard:
    """ASGI middleware.

    Attributes:
        key: what `Authorization: Bearer` must say; None: nothing.
        hosts: names by which the server may be called; None: any. A page elsewhere could else let a name of its own
            point to this machine, and read the answers as its own.
    """

    app: ASGIApp
    key: str | None = None
    hosts: frozenset[str] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer 401, 403 or 431."""
        try:
            if scope["type"] == "http":
                _check_head(scope)
                headers = Headers(scope=scope)
                if scope["path"] not in OPEN:
                    self._check_key(headers.get("authorization", ""))
                self._check_origin(headers)
        except Refusal as refusal:
            await refusal.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check_key(self, given: str) -> None:
        if self.key is None:
            return
        scheme, _, key = given.partition(" ")
        # Digests are compared, in a time that tells neither the key nor its length.
        known, found = (hashlib.sha256(text.strip().encode("utf-8", "replace")).digest() for text in (self.key, key))
        if not hmac.compare_digest(known, found) or scheme.lower() != "bearer":
            message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
            raise Refusal(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _check_origin(self, headers: Headers) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.hosts is not None and host and _name(f"//{host}") not in self.hosts:
            raise Refusal(403, f"the host {quoted(host)} is not this server's name; call it by its address, or give it a key")
        if origin is not None and _place(origin) != host.lower():
            raise Refusal(403, f"pages of {quoted(origin)} may not ask this server; ask from its own page, or from no browser")


def _check_head(scope: Scope) -> None:
    """The parser has a bound of heads that are not there yet; one that came in a single read has passed it.

    It also takes heads that say twice where their body ends; what stands between could take the other one.
    """
    if {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
        message = "the head has a Content-Length and a Transfer-Encoding; send one"
        raise Refusal(400, message, headers={"Connection": "close"})
    size = len(scope.get("raw_path", b"")) + len(scope["query_string"])
    size += sum(len(name) + len(value) for name, value in scope["headers"])
    if size > MOST_HEAD_BYTES:
        message = f"the head has {size:,} bytes, more than {MOST_HEAD_BYTES:,}; put what is long into the body"
        raise Refusal(431, message, headers={"Connection": "close"})


def hosts_of(bound: str, key: str | None) -> frozenset[str] | None:
    """The names by which a server bound to this address may be called: with a key, or an address that others reach, any."""
    try:
        loopback = bound == "localhost" or ipaddress.ip_address(bound).is_loopback
    except ValueError:  # a name
        loopback = False
    return LOOPBACK | {bound} if key is None and loopback else None


def _place(url: str) -> str | None:
    """Host and port of a URL in lower case; None where there is none."""
    try:
        return urlsplit(url).netloc.lower() or None
    except ValueError:
        return None


def _name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
