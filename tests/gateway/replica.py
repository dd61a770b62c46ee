"""A replica of a few lines: real fabric, real streams, no engine. Its words are numbered, so that what is lost,
doubled or out of order shows."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count

from springtide.core.cluster import Replica
from springtide.core.engine_api import EngineLoad
from springtide.core.request import Delta, End, Request, TokenCounts, TokenLogprob, TopLogprob
from springtide.core.wire import escape_json
from springtide.fabric.connection import Fabric
from springtide.fabric.presence import Heart
from springtide.fabric.streams import Backlog, StreamKey, StreamServer, Turn

Behaviour = Callable[["TinyReplica", StreamKey, Request], Awaitable[None]]

PROMPT_TOKENS = 7


class TinyReplica:
    """Runs `behaviour` for each request that is opened; what happened is in `opened` and `cancelled`."""

    def __init__(self, fabric: Fabric, node: str, id: str, model: str, **description: object) -> None:
        self.behaviour: Behaviour = speak
        self.opened: list[tuple[StreamKey, Request]] = []
        self.cancelled: list[StreamKey] = []
        self.load = EngineLoad(blocks_free=90, blocks_total=100)
        self.state = "ready"
        self._describe = {"max_num_seqs": 8, "context_length": 512, "numerics": "tiny/fp32", **description}
        self._identity = {"id": id, "node": node, "model": model, "engine": "tiny"}
        self._tasks: dict[StreamKey, asyncio.Task[None]] = {}
        self._serials = count(1)
        self.server = StreamServer(
            fabric, node, id, on_open=self._on_open, on_cancel=self._on_cancel, on_backlog=self._on_backlog
        )
        self.heart = Heart(fabric, self.describe, every=0.25)

    def describe(self) -> Replica:
        return Replica(state=self.state, load=self.load, **self._identity, **self._describe)  # type: ignore[arg-type]

    async def start(self) -> TinyReplica:
        await self.server.start()
        await self.heart.start()
        return self

    async def stop(self, *, goodbye: bool = True) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await self.heart.stop(goodbye)
        await self.server.close()

    def _on_open(self, key: StreamKey, request: Request, gateway: str, turn: int | None) -> None:
        self.opened.append((key, request))
        self._tasks[key] = asyncio.create_task(self.behaviour(self, key, request))

    def _on_backlog(self, gateway: str, backlogs: list[Backlog]) -> None:
        """Call one of each flow that waits, while there is room."""
        seats = self.describe().max_num_seqs - self.load.running - self.load.waiting
        if self.state == "ready" and backlogs and seats > 0:
            turns = [Turn(next(self._serials), b.tenant, b.priority_class) for b in backlogs if b.waiting]
            self.server.grant(gateway, turns)

    def _on_cancel(self, key: StreamKey) -> None:
        self.cancelled.append(key)
        task = self._tasks.pop(key, None)
        if task is not None:
            task.cancel()

    async def accept(self, key: StreamKey) -> None:
        self.server.emit(key, [], prompt_tokens=PROMPT_TOKENS)
        await self.server.flush()

    async def emit(self, key: StreamKey, deltas: list[Delta], end: End | None = None) -> None:
        self.server.emit(key, deltas, end)
        await self.server.flush()


def word(i: int) -> str:
    return f"w{i} "


def text(count: int) -> str:
    """What `speak` says in `count` tokens."""
    return "".join(word(i) for i in range(count))


def delta(choice: int, i: int, *, scored: bool = False, finish: str | None = None) -> Delta:
    token = word(i).encode()
    logprobs = None
    if scored:
        logprobs = [TokenLogprob(i, token, -0.5, [TopLogprob(i, token, -0.5), TopLogprob(99, b"\xe2\x82", -2.0)])]
    offset = len(text(i).encode())
    return Delta(choice, "text", escape_json(word(i)), [i], offset, logprobs, finish)  # type: ignore[arg-type]


def counts(request: Request, completion: int) -> TokenCounts:
    return TokenCounts(prompt=PROMPT_TOKENS, completion=completion, cached=3)


def said(request: Request, choice: int) -> int:
    """How many words of a choice were said before this attempt."""
    return next((len(output.token_ids) for output in request.outputs if output.choice == choice), 0)


async def speak(
    replica: TinyReplica, key: StreamKey, request: Request, *, pause: float = 0.0, only: int | None = None
) -> None:
    """`max_tokens` words for each choice (5 without), one a step, from where an earlier attempt stopped; after `only`
    steps it falls silent."""
    await replica.accept(key)
    steps = request.sampling.max_tokens or 5
    scored = request.sampling.logprobs is not None
    made = 0
    for i in range(min((said(request, choice) for choice in range(request.num_choices)), default=0), steps):
        if only is not None and made >= only * request.num_choices:
            break
        finish = "length" if i == steps - 1 else None
        deltas = [
            delta(choice, i, scored=scored, finish=finish)
            for choice in range(request.num_choices)
            if i >= said(request, choice)
        ]
        made += len(deltas)
        await replica.emit(key, deltas, End("finished", counts(request, made)) if finish else None)
        await asyncio.sleep(pause)
        if finish:
            return
    await asyncio.Event().wait()


def speak_only(words: int) -> Behaviour:
    """Some words more, and then nothing."""

    async def behave(replica: TinyReplica, key: StreamKey, request: Request) -> None:
        await speak(replica, key, request, only=words)

    return behave


async def speak_slowly(replica: TinyReplica, key: StreamKey, request: Request) -> None:
    await speak(replica, key, request, pause=0.05)


async def accept_and_wait(replica: TinyReplica, key: StreamKey, request: Request) -> None:
    """Take it, and say nothing: a sequence that waits in the replica's own queue."""
    await replica.emit(key, [])
    await asyncio.Event().wait()


say_two_and_wait = speak_only(2)
