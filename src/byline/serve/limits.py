"""What stands between the network and the service: size, time, token, host, content type. Plain ASGI."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOCAL = ("localhost", "127.0.0.1", "[::1]")
_OPEN = ("/healthz",)
_PAGE = "/assets/"  # the page itself tells nothing of what is served, and asks for the token
_log = logging.getLogger("byline.serve")


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        body: bytes of a request.
        batch: examples of a request, and of what is scored together.
        k: proponents and opponents per example.
        seconds: from a request's last byte to its answer; then 503 with Retry-After.
        upload: seconds for a request to arrive; then 408.
        queue: examples that may wait; then 429 with Retry-After.
    """

    body: int = 16 * 2**20
    batch: int = 64
    k: int = 100
    seconds: float = 30.0
    upload: float = 20.0
    queue: int = 256

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value!r}; expected a number above 0")


def check_token(token: str | None) -> str | None:
    """A token is printable ASCII without blanks, of at least eight characters."""
    if token is None:
        return None
    if len(token) < 8 or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("token is too short or has odd characters; expected at least 8 printable ones without blanks")
    return token


class Guard:
    """Refuses what need not reach the service, and logs every request as one line.

    Args:
        app: what is guarded.
        limits: of body and time.
        token: that every request must bear, but those for /healthz.
        hosts: names under which the service may be asked where there is no token: a page of another site could reach
            a service on localhost under a name of its own (DNS rebinding). None allows all.
        observe: (route, status, seconds) of every request.
    """

    def __init__(
        self,
        app: App,
        limits: Limits,
        token: str | None = None,
        hosts: tuple[str, ...] | None = LOCAL,
        observe: Callable[[str, int, float], None] | None = None,
    ):
        self.app, self.limits, self.observe = app, limits, observe
        self.token = None if token is None else token.encode()
        self.hosts = None if token is not None else hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status, number = time.perf_counter(), 0, uuid.uuid4().hex[:16]

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", number.encode())]
            await send(message)

        try:
            await self._guarded(scope, receive, noted)
        except Exception:
            _log.exception("a request failed", extra={"request": number})
            if not status:
                await refuse(noted, 500, "the service failed; its log says why")
        finally:
            seconds = time.perf_counter() - begun
            route = getattr(scope.get("route"), "path", "other")
            if self.observe is not None:
                self.observe(route, status, seconds)
            client = scope.get("client")
            _log.info(
                "request",
                extra={
                    "request": number,
                    "method": scope["method"],
                    "path": scope["path"][:200],
                    "status": status or "disconnected",
                    "seconds": round(seconds, 4),
                    "client": client[0] if client else None,
                },
            )

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {key.lower(): value for key, value in scope["headers"]}
        if scope["path"] not in _OPEN:
            if self.hosts is not None and _host(headers.get(b"host", b"")) not in self.hosts:
                await refuse(send, 421, "the Host header is not one of this service's; ask it as localhost")
                return
            free = scope["path"] == "/" or scope["path"].startswith(_PAGE)
            if self.token is not None and not free and not self._bears(headers.get(b"authorization", b"")):
                await refuse(send, 401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})
                return
        if scope["method"] in ("POST", "PUT", "PATCH"):
            kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
            # also keeps a page of another site from posting without asking first
            if kind != b"application/json":
                await refuse(send, 415, "the content type is another; expected application/json")
                return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self.limits.body:
            await refuse(send, 413, f"the body is larger than {self.limits.body} bytes", {"Connection": "close"})
            return
        try:
            body = await asyncio.wait_for(self._body(receive), self.limits.upload)
        except asyncio.TimeoutError:
            await refuse(send, 408, f"the body did not arrive in {self.limits.upload:g} s", {"Connection": "close"})
            return
        except ConnectionError:
            return
        if body is None:
            await refuse(send, 413, f"the body is larger than {self.limits.body} bytes", {"Connection": "close"})
            return
        given = False

        async def replayed() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replayed, send)

    async def _body(self, receive: Receive) -> bytes | None:
        """The body; None beyond the limit, however it was announced."""
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            part = message.get("body", b"")
            size += len(part)
            if size > self.limits.body:
                return None
            parts.append(part)
            if not message.get("more_body"):
                return b"".join(parts)

    def _bears(self, header: bytes) -> bool:
        kind, _, given = header.partition(b" ")
        assert self.token is not None
        return hmac.compare_digest(given.strip(), self.token) and kind.lower() == b"bearer"


async def refuse(send: Send, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
    """Answer with an error."""
    body = json.dumps({"error": sentence}).encode()
    lines = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
    encoded = [(key.lower().encode(), value.encode()) for key, value in lines.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def _host(header: bytes) -> str:
    """A Host header without its port."""
    text = header.decode("latin-1").strip().lower()
    name, colon, port = text.rpartition(":")
    return name if colon and port.isdigit() and (not name.count(":") or name.startswith("[")) else text
