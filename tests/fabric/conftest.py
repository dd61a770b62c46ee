"""A fabric of its own for each test: a real server, and connections that are closed at the end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from springtide.core.request import Request, SamplingParams
from springtide.fabric.authority import Authority
from springtide.fabric.connection import Fabric
from springtide.fabric.server import NatsServer
from tests.fabric.stage import Stage


class World:
    """An authority, a server that trusts it, and who is connected."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = Authority.open(directory / "authority")
        self.server = NatsServer(directory / "nats", self.authority)
        self.stack = contextlib.AsyncExitStack()

    async def platform(self, name: str = "platform", *, prepare: bool = True) -> Fabric:
        fabric = await Fabric.connect(self.authority.platform_credentials(name, [self.server.url]), name=name)
        self.stack.push_async_callback(fabric.close)
        if prepare:
            await fabric.prepare()
        return fabric

    async def node(self, name: str) -> Fabric:
        fabric = await Fabric.connect(self.authority.local_node(name, [self.server.url]), name=name)
        self.stack.push_async_callback(fabric.close)
        return fabric

    def restart(self) -> None:
        """As after a crash: killed, and started again on the same port and store."""
        self.server.kill()
        self.server.start()


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    world.server.start()
    yield world
    world.server.stop()


@pytest.fixture
async def world(nats: World) -> AsyncIterator[World]:
    async with nats.stack:
        yield nats


@pytest.fixture
async def stage(world: World) -> AsyncIterator[Stage]:
    stage = Stage(world, await world.platform("gateway", prepare=False), await world.node("A"))
    await stage.hub.start()
    await stage.gateway.flush()
    yield stage
    await stage.hub.close()


async def until(condition: Callable[[], object], patience: float = 20.0) -> None:
    """Wait for a condition; fail if it never comes."""
    async with asyncio.timeout(patience):
        while not condition():  # noqa: ASYNC110  conditions of other processes have no event
            await asyncio.sleep(0.005)


def make_request(id: str = "request", prompt: str = "hello", **changes: object) -> Request:
    return Request(id=id, model="m", tenant="t", sampling=SamplingParams(), prompts=(prompt,), **changes)  # type: ignore[arg-type]
