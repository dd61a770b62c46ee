"""A fabric of its own for each test: a real server, and connections to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from springtide.fabric.authority import Authority
from springtide.fabric.connection import Fabric
from springtide.fabric.server import NatsServer


class World:
    """A running server and what it takes to connect to it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = Authority.open(directory / "fabric")
        self.server = NatsServer(directory / "fabric", self.authority)
        self.server.start()

    def node_credentials(self, node: str, *, ttl: float = 3600) -> Path:
        """A file with the credentials of a node."""
        path = self.directory / f"{node}.creds"
        self.authority.local_node(node, [self.server.url], ttl=ttl).save(path)
        return path

    async def connect(self, name: str) -> Fabric:
        """A connection of the platform's."""
        return await Fabric.connect(self.authority.platform_credentials(name, [self.server.url]), name=name)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.server.stop()


@pytest.fixture
async def platform(world: World) -> AsyncIterator[Fabric]:
    """The platform's connection, with all buckets there."""
    fabric = await world.connect("test")
    await fabric.prepare()
    yield fabric
    await fabric.close()


async def until(condition: Callable[[], object], patience: float = 30.0) -> None:
    """Wait for a condition, generously."""
    async with asyncio.timeout(patience):
        while not condition():  # noqa: ASYNC110  conditions here are of any kind
            await asyncio.sleep(0.02)
