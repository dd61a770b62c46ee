"""Frame versions side by side, as in a rolling upgrade: one end is new, the other speaks version 1."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from springtide.fabric.connection import Fabric
from springtide.fabric.streams import Backlog, ClientStream, StreamHub, StreamKey, StreamLost, Turn
from tests.fabric.conftest import World, make_request, until
from tests.fabric.stage import DONE, Replica, Stage, read, tokens

_FIELDS = {"open": 7, "control": 5, "frames": 4}  # of version 1


class VersionOne:
    """A connection that lets nothing through but version 1: whoever speaks over it has never heard of more. What is
    marked as another version is `refused`, as version 1 refused it."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self.refused = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fabric, name)

    async def publish(self, subject: str, data: bytes) -> bool:
        return await self._fabric.publish(subject, self._cut(subject, data))

    async def subscribe(self, subject: str, handler: Callable[[Any], Awaitable[None]]) -> Any:
        async def pass_on(message: Any) -> None:
            if msgspec.msgpack.decode(message.data)[0] == 1:
                await handler(SimpleNamespace(subject=message.subject, data=self._cut(subject, message.data)))
            else:
                self.refused += 1

        return await self._fabric.subscribe(subject, pass_on)

    def _cut(self, subject: str, data: bytes) -> bytes:
        (fields,) = [count for kind, count in _FIELDS.items() if kind in subject.split(".")]
        return msgspec.msgpack.encode(msgspec.msgpack.decode(data)[:fields])


class Mixed:
    """Gateways "g" (new) and "old", replicas "r" (new) and "old"."""

    def __init__(self, stage: Stage, gateway: Fabric) -> None:
        self.wires = [VersionOne(gateway), VersionOne(stage.node)]
        self.hubs = {"new": stage.hub, "old": StreamHub(self.wires[0], "old")}  # type: ignore[arg-type]
        self.old_replica = Replica(self.wires[1], "A", "old")  # type: ignore[arg-type]


@pytest.fixture
async def mixed(stage: Stage, world: World) -> Mixed:
    mixed = Mixed(stage, await world.platform("old", prepare=False))
    await mixed.hubs["old"].start()
    world.stack.push_async_callback(mixed.hubs["old"].close)
    await mixed.old_replica.server.start()
    world.stack.push_async_callback(mixed.old_replica.server.close)
    await stage.node.flush()
    await mixed.wires[0].flush()
    return mixed


async def test_streams_between_all_versions_go_on_through_a_restart_and_lose_nothing(
    stage: Stage, mixed: Mixed
) -> None:
    replicas = {"r": await stage.replica(), "old": mixed.old_replica}
    speakers: list[asyncio.Future[None]] = []
    streams: list[ClientStream] = []
    for number, replica in enumerate(replicas.values()):

        def speak(key: StreamKey, request: object, replica: Replica = replica) -> None:
            replica.server.emit(key, [])
            speakers.append(asyncio.ensure_future(replica.tell(key, range(150), DONE, pause=0.005)))

        replica.on_open = speak
        for hub in mixed.hubs.values():
            request = make_request(f"{hub.gateway_id}-{number}", fingerprint="hash")
            streams.append(await hub.open(request, 1, "A", replica.server.replica))
    readers = [asyncio.ensure_future(read(stream)) for stream in streams]
    await asyncio.sleep(0.2)
    stage.world.server.kill()
    await asyncio.sleep(0.2)
    stage.world.server.start()
    for frames in await asyncio.gather(*readers):
        assert tokens(frames) == list(range(150))
    await asyncio.gather(*speakers)
    assert all(replica.cancelled == [] for replica in replicas.values())
    for side in (*mixed.hubs.values(), *(replica.server for replica in replicas.values())):
        assert side.counters["garbage"] == side.counters["wrong_version"] == 0
    assert sum(wire.refused for wire in mixed.wires) == 0


async def test_silent_streams_of_another_version_are_asked_and_live(stage: Stage, mixed: Mixed) -> None:
    replicas = {"r": await stage.replica(), "old": mixed.old_replica}
    for hub in mixed.hubs.values():
        for name in replicas:
            await (await hub.open(make_request(f"{hub.gateway_id}-{name}"), 1, "A", name)).frames()
    for hub in mixed.hubs.values():
        await until(lambda hub=hub: hub.counters["probes"] >= 4)  # type: ignore[misc]
        assert hub.counters["lost"] == 0 and len(hub._streams) == 2
        for stream in list(hub._streams.values()):
            stream.cancel()
    for replica in replicas.values():
        await until(lambda replica=replica: len(replica.cancelled) == 2)  # type: ignore[misc]
    assert sum(wire.refused for wire in mixed.wires) == 0


async def test_an_old_replica_knows_nothing_of_finding_and_turns(stage: Stage, mixed: Mixed) -> None:
    stream = await stage.hub.open(make_request(fingerprint="hash"), 1, "A", "old")
    await stream.frames()
    stage.hub.advertise("A", "old", [Backlog("t", "standard", 1.0, 3, 0.0)])
    assert await stage.hub.find("request", [("A", "old")], timeout=0.3) is None
    assert mixed.old_replica.backlogs == {}
    stream.let_go()  # which it can't be told
    await until(lambda: mixed.old_replica.cancelled)


async def test_an_old_gateway_loses_what_a_new_one_takes_over(stage: Stage, mixed: Mixed) -> None:
    replica = await stage.replica()
    theirs = await mixed.hubs["old"].open(make_request(fingerprint="hash"), 1, "A", "r")
    await theirs.frames()
    found = await stage.hub.find("request", [("A", "r")])
    assert found is not None
    mine = await stage.hub.take_over(found)
    with pytest.raises(StreamLost, match="does not know"):
        await theirs.frames()
    await replica.tell(mine.key, range(5), DONE)
    assert tokens(await read(mine)) == list(range(5))
    replica.server.grant("old", [Turn(1, "t", "standard")])  # which it does not see
    await replica.server.flush()
    assert replica.cancelled == [] and sum(wire.refused for wire in mixed.wires) == 0
