"""A gateway and replicas whose requests do what a test says, over a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from springtide.core.request import Delta, End, Request, TokenCounts
from springtide.fabric.connection import Fabric
from springtide.fabric.streams import Backlog, ClientStream, Frame, StreamHub, StreamKey, StreamServer

if TYPE_CHECKING:
    from tests.fabric.conftest import World

DONE = End("finished", TokenCounts(prompt=1, completion=1))


def token(number: int) -> Delta:
    return Delta(0, "text", b"x", [number], number)


class Replica:
    """A stream server whose requests do what the test says."""

    def __init__(self, fabric: Fabric, node: str = "A", name: str = "r", **options: float) -> None:
        self.opened: list[StreamKey] = []
        self.requests: dict[StreamKey, Request] = {}
        self.turns: dict[StreamKey, tuple[str, int | None]] = {}
        self.cancelled: list[StreamKey] = []
        self.backlogs: dict[str, list[Backlog]] = {}
        self.declined: list[tuple[str, list[int]]] = []
        self.gateways_lost: list[str] = []
        self.on_open: Callable[[StreamKey, Request], None] = lambda key, request: self.server.emit(key, [])
        self.server = StreamServer(
            fabric,
            node,
            name,
            on_open=self._on_open,
            on_cancel=self.cancelled.append,
            on_backlog=self.backlogs.__setitem__,
            on_declined=lambda gateway, serials: self.declined.append((gateway, serials)),
            on_gateway_lost=self.gateways_lost.append,
            **options,  # type: ignore[arg-type]
        )

    def _on_open(self, key: StreamKey, request: Request, gateway: str, turn: int | None) -> None:
        self.opened.append(key)
        self.requests[key] = request
        self.turns[key] = gateway, turn
        self.on_open(key, request)

    async def tell(self, key: StreamKey, numbers: range, end: End | None = None, pause: float = 0.0) -> None:
        """One frame for each number, each flushed by itself as an engine step would."""
        for number in numbers:
            self.server.emit(key, [token(number)])
            await self.server.flush()
            await asyncio.sleep(pause)
        if end is not None:
            self.server.emit(key, [], end)
            await self.server.flush()


class Stage:
    def __init__(self, world: World, gateway: Fabric, node: Fabric) -> None:
        self.world = world
        self.gateway = gateway
        self.node = node
        self.hub = StreamHub(gateway, "g")

    async def another_hub(self, name: str) -> StreamHub:
        """Of another gateway, with a connection of its own."""
        fabric = await self.world.platform(name, prepare=False)
        hub = StreamHub(fabric, name)
        await hub.start()
        self.world.stack.push_async_callback(hub.close)
        await fabric.flush()
        return hub

    async def replica(self, name: str = "r", **options: float) -> Replica:
        replica = Replica(self.node, "A", name, **options)
        await replica.server.start()
        self.world.stack.push_async_callback(replica.server.close)
        await self.node.flush()
        return replica


async def read(stream: ClientStream) -> list[Frame]:
    """All frames up to the end; their numbers must run without gap or repetition."""
    frames: list[Frame] = []
    while not frames or frames[-1].end is None:
        frames += await stream.frames()
    assert [frame.number for frame in frames] == list(range(len(frames)))
    return frames


def tokens(frames: list[Frame]) -> list[int]:
    return [id for frame in frames for delta in frame.deltas for id in delta.token_ids]
