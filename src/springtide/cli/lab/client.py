"""A client that notes all that it hears: every event with its time, so that others can judge what was lost.

HTTP/1.1 over asyncio's streams, a connection a request: it costs a fraction of what a full HTTP client does, on cores
that are shared with what is being tested. Knows OpenAI's formats; nothing of what the answer should be.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

_BUFFER = 2**20
_RETRY_S = 0.2


class _Token(msgspec.Struct):
    token: str


class _Scores(msgspec.Struct):
    content: list[_Token] | None = None  # of a chat
    tokens: list[str] | None = None  # of a completion


class _Part(msgspec.Struct):
    role: str | None = None
    content: str | None = None


class _Choice(msgspec.Struct):
    index: int
    delta: _Part | None = None
    message: _Part | None = None
    text: str | None = None
    logprobs: _Scores | None = None
    finish_reason: str | None = None


class Used(msgspec.Struct):
    """The `usage` of an answer."""

    prompt_tokens: int
    completion_tokens: int


class _Event(msgspec.Struct):
    id: str = ""
    choices: list[_Choice] = []
    usage: Used | None = None
    error: dict[str, Any] | None = None


_event = msgspec.json.Decoder(_Event)


class Broken(Exception):
    """The connection ended before the answer did, or the gateway said that it can't go on. `again`: a client may try
    again with its idempotency key."""

    def __init__(self, message: str, *, again: bool) -> None:
        super().__init__(message)
        self.again = again


@dataclass(slots=True)
class Heard:
    """All that a client heard of one answer. Times are unix seconds; `texts`, `scored` and so on are by choice."""

    sent: float = 0.0
    ids: set[str] = field(default_factory=set)
    times: list[float] = field(default_factory=list)  # of the arrival of text
    texts: defaultdict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    scored: defaultdict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    roles: Counter[int] = field(default_factory=Counter)
    finishes: defaultdict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    usages: list[Used] = field(default_factory=list)
    done: bool = False
    error: str | None = None
    connections: int = 0
    last_event_id: str | None = None

    @property
    def id(self) -> str | None:
        """Of the answer, if it had just one."""
        return next(iter(self.ids)) if len(self.ids) == 1 else None

    @property
    def characters(self) -> int:
        return sum(len(part) for parts in self.texts.values() for part in parts)

    @property
    def first_after(self) -> float | None:
        """Seconds from the request to the first text."""
        return self.times[0] - self.sent if self.times else None

    def longest_silence(self) -> tuple[float, float]:
        """The longest time between two arrivals of text: when it began, and its seconds."""
        gaps = [(after - before, before) for before, after in zip(self.times, self.times[1:], strict=False)]
        seconds, began = max(gaps, default=(0.0, 0.0))
        return began, seconds

    def take(self, data: bytes, at: float) -> None:
        """An event, or a whole answer."""
        event = _event.decode(data)
        if event.error is not None:
            self.error = f"{event.error.get('code')}: {event.error.get('message')}"
            raise Broken(self.error, again=True)
        self.ids.add(event.id)
        if event.usage is not None:
            self.usages.append(event.usage)
        for choice in event.choices:
            self._take_choice(choice, at)

    def _take_choice(self, choice: _Choice, at: float) -> None:
        part = choice.delta or choice.message or _Part(content=choice.text)
        self.roles[choice.index] += part.role is not None
        if part.content:
            self.texts[choice.index].append(part.content)
            self.times.append(at)
        if choice.logprobs is not None:
            tokens = choice.logprobs.tokens or [token.token for token in choice.logprobs.content or ()]
            self.scored[choice.index] += tokens
        if choice.finish_reason is not None:
            self.finishes[choice.index].append(choice.finish_reason)


class Client:
    """Asks gateways, on loopback, with one API key."""

    def __init__(self, key: str) -> None:
        self._key = key

    async def ask(self, port: int, path: str, body: bytes, heard: Heard | None = None) -> Heard:
        """One request; what came of it is in the answer's `done` and `error`. `heard`: where to note what is heard, for
        those who want to see it while it comes."""
        heard = heard or Heard(sent=time.time())
        try:
            await self._hear(heard, port, path, body, {})
        except Broken as broken:
            heard.error = str(broken)
        return heard

    async def ask_until_done(self, ports: list[int], path: str, body: bytes, key: str, *, patience: float) -> Heard:
        """One request with an `Idempotency-Key`, again and again, at one gateway after another, until it is answered:
        a stream goes on after the last event that was heard. For `patience` seconds at most."""
        heard = Heard(sent=time.time())
        while True:
            port = ports[heard.connections % len(ports)]
            headers = {"idempotency-key": key}
            if heard.last_event_id is not None:
                headers["last-event-id"] = heard.last_event_id
            heard.error = None
            try:
                await self._hear(heard, port, path, body, headers)
                return heard
            except Broken as broken:
                heard.error = str(broken)
                if not broken.again or time.time() - heard.sent > patience:
                    return heard
            await asyncio.sleep(_RETRY_S)

    async def _hear(self, heard: Heard, port: int, path: str, body: bytes, headers: dict[str, str]) -> None:
        heard.connections += 1
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=_BUFFER)
        except OSError as error:
            raise Broken(f"no connection: {error.strerror}", again=True) from None
        try:
            writer.write(self._request(path, body, headers))
            await _read_answer(reader, heard)
        except (OSError, asyncio.IncompleteReadError):
            raise Broken("the connection ended before the answer", again=True) from None
        finally:
            writer.transport.abort()

    def _request(self, path: str, body: bytes, headers: dict[str, str]) -> bytes:
        lines = [f"POST {path} HTTP/1.1", "host: localhost", f"authorization: Bearer {self._key}"]
        lines += ["content-type: application/json", f"content-length: {len(body)}", "connection: close"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode() + body


async def _read_answer(reader: asyncio.StreamReader, heard: Heard) -> None:
    """Raises Broken, IncompleteReadError, OSError."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
    status = int(head[0].split(" ")[1])
    fields = dict(line.split(": ", 1) for line in head[1:] if ": " in line)
    if status != 200:
        text = b"".join([piece async for piece in _body(reader, fields)]).decode("utf-8", "replace")
        raise Broken(f"{status}: {text[:300]}", again=status >= 500 or status == 409)
    if fields.get("content-type", "").startswith("text/event-stream"):
        await _read_events(_body(reader, fields), heard)
    else:
        whole = b"".join([piece async for piece in _body(reader, fields)])
        heard.take(whole, time.time())
        heard.done = True


async def _body(reader: asyncio.StreamReader, fields: dict[str, str]) -> AsyncIterator[bytes]:
    """The pieces of a body, as they come."""
    if "content-length" in fields:
        yield await reader.readexactly(int(fields["content-length"]))
        return
    while size := int(await reader.readuntil(b"\r\n"), 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _read_events(pieces: AsyncIterator[bytes], heard: Heard) -> None:
    rest = b""
    async for piece in pieces:
        now = time.time()
        *events, rest = (rest + piece).split(b"\n\n")
        for event in events:
            _take_event(event, heard, now)
    if not heard.done:
        raise Broken("the stream ended without [DONE]", again=True)


def _take_event(event: bytes, heard: Heard, now: float) -> None:
    event_id = None
    for line in event.split(b"\n"):
        if line.startswith(b"id: "):
            event_id = line[4:].decode()
        elif line == b"data: [DONE]":
            heard.done = True
        elif line.startswith(b"data: "):
            heard.take(line[6:], now)
    if event_id is not None:  # only now: all of the event was heard
        heard.last_event_id = event_id
