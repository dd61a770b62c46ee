"""A replica is lost by a signal or a cable, or only seems to be."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator

import msgspec
import pytest

from springtide.cli.lab.cable import Cable
from springtide.core.request import Request
from springtide.fabric.connection import Fabric
from springtide.fabric.credentials import Credentials
from springtide.fabric.streams import ClientStream, StreamHub, StreamKey, StreamLost
from tests.fabric.conftest import World, make_request, until
from tests.fabric.stage import DONE, Replica, Stage, read, token, tokens


def through(credentials: Credentials, cable: Cable) -> Credentials:
    return msgspec.structs.replace(credentials, urls=[f"nats://127.0.0.1:{cable.port}"])


@pytest.fixture
async def cable(world: World) -> AsyncIterator[Cable]:
    cable = Cable(world.server.port, random.Random(0))
    await cable.start()
    yield cable
    await cable.stop()


# Processes.


@pytest.fixture(autouse=True)
def continued() -> Iterator[None]:
    """No process stays stopped: multiprocessing would wait for it at the end."""
    yield
    for child in multiprocessing.active_children():
        assert child.pid is not None
        os.kill(child.pid, signal.SIGCONT)


def _speak_for_ever(credentials: Credentials) -> None:
    async def run() -> None:
        replica = Replica(await Fabric.connect(credentials, name="A"))
        await replica.server.start()
        await replica.server._fabric.publish("st.node.A.ready", b"")
        number = 0
        while True:
            for key in replica.opened:
                replica.server.emit(key, [token(number)])
            number += 1
            await replica.server.flush()
            await asyncio.sleep(0.02)

    asyncio.run(run())


@pytest.fixture
async def stranger(stage: Stage) -> AsyncIterator[int]:
    """A replica "r" in a process of its own, that speaks all the time: its pid."""
    credentials = stage.world.authority.local_node("A", [stage.world.server.url])
    ready = asyncio.Event()

    async def on_ready(message: object) -> None:
        ready.set()

    await stage.gateway.subscribe("st.node.A.ready", on_ready)
    await stage.gateway.flush()
    process = multiprocessing.get_context("spawn").Process(target=_speak_for_ever, args=(credentials,))
    process.start()
    await ready.wait()
    assert process.pid is not None
    yield process.pid
    process.kill()
    await asyncio.to_thread(process.join)


async def _lost(stream: ClientStream) -> str:
    with pytest.raises(StreamLost) as lost:
        while True:
            await stream.frames()
    return lost.value.reason


@pytest.mark.parametrize("signal_number", [signal.SIGSTOP, signal.SIGKILL])
async def test_a_stopped_or_killed_replica_is_lost_with_all_its_streams(
    stage: Stage, stranger: int, signal_number: int
) -> None:
    streams = [await stage.hub.open(make_request(f"r{index}"), 1, "A", "r") for index in range(30)]
    for stream in streams:
        await stream.frames()
    os.kill(stranger, signal_number)
    assert {await _lost(stream) for stream in streams} == {"replica r is silent"}
    assert stage.hub.counters["probes"] == 2  # two questions, however many streams


async def test_a_replica_that_is_said_to_be_gone_but_speaks_is_not_lost(stage: Stage, stranger: int) -> None:
    stream = await stage.hub.open(make_request(), 1, "A", "r")
    await stream.frames()
    for _ in range(3):
        stage.hub.suspect("A", "r")
        probes = stage.hub.counters["probes"]
        await until(lambda: stage.hub.counters["probes"] > probes)  # noqa: B023
        await stream.frames()
    stage.hub.suspect("A", "nobody")
    assert stage.hub.counters["lost"] == 0
    os.kill(stranger, signal.SIGKILL)
    stage.hub.suspect("A", "r")
    assert await _lost(stream) == "replica r is silent"


async def test_a_gateway_that_slept_blames_nobody(stage: Stage, stranger: int) -> None:
    stream = await stage.hub.open(make_request(), 1, "A", "r")
    await stream.frames()
    time.sleep(2.5)  # noqa: ASYNC251  the whole process stands still, as after SIGSTOP
    await asyncio.sleep(0.3)
    await stream.frames()
    assert stage.hub.counters["lost"] == 0
    stream.cancel()


# Cables.


@pytest.fixture
async def far_replica(world: World, stage: Stage, cable: Cable) -> AsyncIterator[Replica]:
    """A replica "r" at the end of a cable."""
    fabric = await Fabric.connect(through(world.authority.local_node("A", [world.server.url]), cable), name="A")
    replica = Replica(fabric)
    await replica.server.start()
    await fabric.flush()
    yield replica
    await replica.server.close()
    await fabric.close()


async def test_a_cut_cable_costs_a_replay(stage: Stage, cable: Cable, far_replica: Replica) -> None:
    speakers: list[asyncio.Future[None]] = []

    def speak(key: StreamKey, request: Request) -> None:
        far_replica.server.emit(key, [])
        speakers.append(asyncio.ensure_future(far_replica.tell(key, range(150), DONE, pause=0.01)))

    far_replica.on_open = speak
    streams = [await stage.hub.open(make_request(f"r{index}"), 1, "A", "r") for index in range(4)]
    readers = [asyncio.ensure_future(read(stream)) for stream in streams]
    await asyncio.sleep(0.3)
    cable.cut()
    stage.hub.suspect("A", "r")  # as the server's disconnect event says
    for frames in await asyncio.gather(*readers):
        assert tokens(frames) == list(range(150))
    await asyncio.gather(*speakers)


async def test_a_replica_behind_a_dead_cable_is_lost_and_fenced_when_it_is_back(
    stage: Stage, cable: Cable, far_replica: Replica
) -> None:
    stream = await stage.hub.open(make_request(), 1, "A", "r")
    await stream.frames()
    cable.freeze(new_ones_too=False)
    assert await _lost(stream) == "replica r is silent"
    await until(lambda: far_replica.server._fabric.counters["reconnects"])  # it found out by itself
    await until(lambda: far_replica.cancelled == [stream.key])


async def test_a_gateway_behind_a_dead_cable_blames_no_replica(world: World, stage: Stage, cable: Cable) -> None:
    replica = await stage.replica()
    fabric = await Fabric.connect(
        through(world.authority.platform_credentials("h", [world.server.url]), cable), name="h"
    )
    hub = StreamHub(fabric, "h")
    await hub.start()
    stream = await hub.open(make_request(), 1, "A", "r")
    await stream.frames()
    cable.freeze(new_ones_too=False)
    await replica.tell(stream.key, range(20), DONE)
    frames = await stream.frames()
    while frames[-1].end is None:
        frames += await stream.frames()
    assert tokens(frames) == list(range(20))
    assert hub.counters["lost"] == 0 and fabric.counters["reconnects"] == 1
    await hub.close()
    await fabric.close()
