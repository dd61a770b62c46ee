"""One HTTP exchange over raw ASGI: headers in, a bounded body in, a response out. Knows nothing of models.

The server beneath limits headers (time, number, size); bodies are limited here, in bytes, in time, and in
what all of them hold together.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from typing import Any, get_args

import msgspec

from springtide.core.errors import BodyTooLarge, InvalidRequest, Overloaded, RequestError
from springtide.core.request import PriorityClass

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Header = tuple[bytes, bytes]

JSON = b"application/json"
EVENT_STREAM = b"text/event-stream; charset=utf-8"

_LINGER_S = 2.0
_STREAM_HEADERS: list[Header] = [
    (b"content-type", EVENT_STREAM),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy in between must not collect our events
]


class BodyTimeout(RequestError):
    status = 408
    type = "invalid_request_error"
    code = "body_timeout"


class MethodNotAllowed(RequestError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"

    def __init__(self, allowed: Sequence[str], method: str) -> None:
        super().__init__(f"this takes {' or '.join(allowed)}, not {method[:20]}")
        self.allowed = allowed


class ClientGone(Exception):
    """The client went away before its request was whole; there is nobody to answer."""


class ByteBudget:
    """How many bytes of request bodies a process holds at most; beyond that it says so instead of dying."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def take(self, size: int) -> None:
        """Raises Overloaded if there is no room for `size` bytes."""
        if self.held + size > self.limit:
            raise Overloaded("too many large requests are waiting at this gateway", retry_after=5.0)
        self.held += size

    def give(self, size: int) -> None:
        self.held -= size


class Cors:
    """Which web pages may call us: `*`, or a comma-separated list of origins, or none."""

    _COMMON: tuple[Header, ...] = (
        (b"access-control-expose-headers", b"x-request-id, x-springtide-ignored, retry-after"),
    )

    def __init__(self, origins: str) -> None:
        self._any = origins.strip() == "*"
        self._origins = {origin.strip().encode() for origin in origins.split(",") if origin.strip()}

    def headers(self, origin: bytes | None) -> list[Header]:
        """What a response to a page of that origin carries. None: not a page's request."""
        if origin is None:
            return []
        if self._any:
            return [(b"access-control-allow-origin", b"*"), *self._COMMON]
        if origin in self._origins:
            return [(b"access-control-allow-origin", origin), (b"vary", b"origin"), *self._COMMON]
        return [(b"vary", b"origin")]

    def preflight(self, requested: bytes | None) -> list[Header]:
        return [
            (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
            (b"access-control-allow-headers", requested or b"authorization, content-type"),
            (b"access-control-max-age", b"86400"),
        ]


class Exchange:
    """A request and the one response to it.

    `started` is whether a status has gone out. `blocked_since` is the monotonic time of the send that is
    under way, None if none is: a client that reads nothing shows as one that never ends.
    """

    def __init__(self, id: str, scope: Scope, receive: Receive, send: Send, cors: Cors) -> None:
        self.id = id
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.started = False
        self.status = 0
        self.blocked_since: float | None = None
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self._receive = receive
        self._send = send
        self._cors = cors
        self._body_held = 0
        self._body_read = False

    def header(self, name: bytes) -> str | None:
        """A request header's value, by its lower-case name."""
        value = self._headers.get(name)
        return value.decode("latin-1") if value is not None else None

    # ------------------------------------------------------------------------------------------------------
    # The request's body.

    async def read_body(self, budget: ByteBudget, *, limit: int, timeout: float) -> bytes:
        """The whole body; what it holds of the budget is given back by `release`.

        Raises:
            BodyTooLarge: it is over `limit` bytes; no more than that is kept, nor is a declared length read.
            BodyTimeout: it was not whole after `timeout` seconds.
            ClientGone: the client left before its end.
        """
        self._check_declared(limit)
        try:
            async with asyncio.timeout(timeout):
                return await self._read(budget, limit)
        except TimeoutError:
            raise BodyTimeout(f"the body was not complete after {timeout:g} seconds") from None

    def _check_declared(self, limit: int) -> None:
        declared = self._headers.get(b"content-length")
        if declared is not None and declared.isdigit() and int(declared) > limit:
            raise _too_large(limit)

    async def _read(self, budget: ByteBudget, limit: int) -> bytes:
        pieces = []
        while True:
            message = await self._receive()
            if message["type"] != "http.request":
                raise ClientGone
            piece = message.get("body", b"")
            budget.take(len(piece))
            self._body_held += len(piece)
            if self._body_held > limit:
                raise _too_large(limit)
            pieces.append(piece)
            if not message.get("more_body", False):
                self._body_read = True
                return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def release(self, budget: ByteBudget) -> None:
        budget.give(self._body_held)
        self._body_held = 0

    async def linger(self, limit: int) -> None:
        """After the response: take, and throw away, some of a body that was refused unread. A connection that is
        closed on unread bytes is reset, and the client may lose the answer that says why."""
        if self._body_read or self.method != "POST":
            return
        try:
            async with asyncio.timeout(_LINGER_S):
                while limit > 0:
                    message = await self._receive()
                    if not message.get("more_body", False):
                        return
                    limit -= len(message["body"])
        except TimeoutError:
            return

    async def until_gone(self) -> None:
        """Wait until the client has left, or the response has ended."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    # ------------------------------------------------------------------------------------------------------
    # The response.

    async def respond(
        self, status: int, body: bytes, *, content_type: bytes = JSON, headers: Iterable[Header] = ()
    ) -> None:
        """A whole response."""
        await self._start(status, [(b"content-type", content_type), (b"content-length", b"%d" % len(body)), *headers])
        await self._write(b"" if self.method == "HEAD" else body, more=False)

    async def respond_error(self, error: RequestError) -> None:
        """An error as a whole response."""
        headers: list[Header] = []
        if error.retry_after is not None:
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after))))
        if isinstance(error, MethodNotAllowed):
            headers.append((b"allow", ", ".join(error.allowed).encode()))
        if error.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if error.status in (408, 413):
            headers.append((b"connection", b"close"))  # the rest of the body is of no use
        await self.respond(error.status, error_object(error, self.id), headers=headers)

    async def respond_preflight(self) -> None:
        """What a browser asks before it lets a page call us."""
        headers = self._cors.preflight(self._headers.get(b"access-control-request-headers"))
        await self._start(204, headers)
        await self._write(b"", more=False)

    async def start_stream(self, headers: Iterable[Header] = ()) -> None:
        """Status 200 and the headers of an event stream."""
        await self._start(200, [*_STREAM_HEADERS, *headers])

    async def write(self, data: bytes) -> None:
        """Part of a stream's body. Waits while the client does not read."""
        await self._write(data, more=True)

    async def end(self, data: bytes = b"") -> None:
        """The last part of a stream's body."""
        await self._write(data, more=False)

    async def _start(self, status: int, headers: list[Header]) -> None:
        self.started, self.status = True, status
        headers.append((b"x-request-id", self.id.encode()))
        headers += self._cors.headers(self._headers.get(b"origin"))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _write(self, data: bytes, *, more: bool) -> None:
        self.blocked_since = time.monotonic()
        try:
            await self._send({"type": "http.response.body", "body": data, "more_body": more})
        finally:
            self.blocked_since = None


def error_object(error: RequestError, request_id: str) -> bytes:
    """OpenAI's error object as JSON, with the id under which the log knows the request, and the seconds after which
    it is worth another try (an event has no header to say it)."""
    values: dict[str, Any] = {
        "message": str(error),
        "type": error.type,
        "param": error.param,
        "code": error.code,
        "request_id": request_id,
    }
    if error.retry_after is not None:
        values["retry_after"] = error.retry_after
    return msgspec.json.encode({"error": values})


def read_timeout_header(value: str | None) -> float | None:
    """The client's own deadline in seconds from now, from the header `x-springtide-timeout`.

    Raises:
        InvalidRequest: it is not a positive number.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidRequest(f"x-springtide-timeout is {value[:40]!r}; it takes seconds above 0")
    return seconds


def read_priority_header(value: str | None) -> PriorityClass:
    """How urgent the client says it is, from the header `x-springtide-priority`.

    Raises:
        InvalidRequest: there is no such class.
    """
    name = "standard" if value is None else value.strip().lower()
    for known in get_args(PriorityClass):
        if name == known:
            chosen: PriorityClass = known
            return chosen
    raise InvalidRequest(f"x-springtide-priority is {name[:40]!r}; it takes {', '.join(get_args(PriorityClass))}")


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {limit} bytes, the most this gateway takes")
