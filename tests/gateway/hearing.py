"""What a client hears of a stream, taken apart."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import httpx

from tests.gateway.conftest import MODEL, Edge

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}


class Heard:
    """Text, roles and ends by choice; the logprobs; and what came once."""

    def __init__(self) -> None:
        self.text: defaultdict[int, str] = defaultdict(str)
        self.roles: defaultdict[int, int] = defaultdict(int)
        self.ends: defaultdict[int, list[str]] = defaultdict(list)
        self.tokens: defaultdict[int, list[str]] = defaultdict(list)
        self.text_offsets: defaultdict[int, list[int]] = defaultdict(list)
        self.ids: set[str] = set()
        self.fingerprints: list[str | None] = []
        self.usage: dict[str, Any] | None = None
        self.error: dict[str, Any] | None = None
        self.comments = 0
        self.done = False
        self.events: list[tuple[str | None, str]] = []  # (id, data)

    def take(self, event: str) -> None:
        fields = dict(line.partition(": ")[::2] for line in event.split("\n"))
        if "data" not in fields:
            assert list(fields) == [""], event  # a comment
            self.comments += 1
            return
        self.events.append((fields.get("id"), fields["data"]))
        assert not self.done and self.error is None, f"after the end: {event}"
        if fields["data"] == "[DONE]":
            self.done = True
            return
        chunk = json.loads(fields["data"])
        if "error" in chunk:
            self.error = chunk["error"]
            return
        self.ids.add(chunk["id"])
        self.fingerprints.append(chunk["system_fingerprint"])
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk["choices"]:
            self._take_choice(choice)

    def _take_choice(self, choice: dict[str, Any]) -> None:
        index, delta = choice["index"], choice.get("delta", choice)
        assert not self.ends[index], f"choice {index} goes on after its end"
        self.roles[index] += "role" in delta
        self.text[index] += delta.get("content") or delta.get("text") or ""
        logprobs = choice["logprobs"] or {}
        self.tokens[index] += logprobs.get("tokens") or [score["token"] for score in logprobs.get("content", ())]
        self.text_offsets[index] += logprobs.get("text_offset", ())
        if choice["finish_reason"] is not None:
            self.ends[index].append(choice["finish_reason"])


async def listen(response: httpx.Response, heard: Heard | None = None) -> Heard:
    """All of a stream."""
    assert response.status_code == 200, await response.aread()
    heard = heard or Heard()
    rest = ""
    async for text in response.aiter_text():
        *events, rest = (rest + text).split("\n\n")
        for event in events:
            heard.take(event)
    assert rest == ""
    return heard


async def ask(
    edge: Edge,
    *,
    heard: Heard | None = None,
    client: httpx.AsyncClient | None = None,
    path: str = "/v1/chat/completions",
    headers: dict[str, str] | None = None,
    **fields: Any,
) -> Heard:
    """A stream heard to its end; `heard` fills while it comes."""
    body = {**CHAT, **fields} if "chat" in path else {"model": MODEL, "prompt": "hi", "stream": True, **fields}
    async with (client or edge.client).stream("POST", path, json=body, headers=headers) as response:
        return await listen(response, heard)
