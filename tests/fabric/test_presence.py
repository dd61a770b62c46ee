"""Heartbeats: who is seen, how soon somebody who left is gone, and what a reader's clock decides."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time

import msgspec
import pytest

from springtide.core.cluster import Gateway, Node, Replica
from springtide.core.engine_api import EngineLoad
from springtide.fabric.connection import Fabric
from springtide.fabric.credentials import Credentials
from springtide.fabric.presence import DisconnectWatch, Heart, PresenceView
from tests.fabric.conftest import World, until

REPLICA = Replica(id="r", node="A", model="m", engine="mock", state="starting")


class Clock:
    """A reader's clock."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_all_kinds_are_seen_and_leave_with_a_goodbye(world: World) -> None:
    platform, node = await world.platform(), await world.node("A")
    view = PresenceView(platform)
    await view.start()
    hearts = [
        Heart(node, lambda: Node(id="A")),
        Heart(node, lambda: REPLICA),
        Heart(platform, lambda: Gateway(id="g", url="http://x")),
    ]
    for heart in hearts:
        await heart.start()
    await until(lambda: view.nodes() and view.replicas() and view.gateways())
    [seen] = view.replicas()
    assert seen.beat > 0 and msgspec.structs.replace(seen, beat=0.0) == REPLICA
    for heart in hearts:
        await heart.stop()
    await until(lambda: not (view.nodes() or view.replicas() or view.gateways()))
    assert view.counters["goodbyes"] == 3
    await view.stop()


async def test_a_view_that_comes_later_knows_at_once_who_is_there(world: World) -> None:
    platform, node = await world.platform(), await world.node("A")
    heart = Heart(node, lambda: Node(id="A"), every=60.0)
    await heart.start()
    await node.flush()
    view = PresenceView(platform)
    await view.start()
    assert [seen.id for seen in view.nodes()] == ["A"]
    assert view.counters["beats"] == 0  # known from the bucket, not from a beat
    await heart.stop()
    await view.stop()


async def test_only_changes_are_told_and_they_come_quickly(world: World) -> None:
    platform, node = await world.platform(), await world.node("A")
    view = PresenceView(platform)
    await view.start()
    told: list[int] = []
    view.on_change(lambda: told.append(len(view.replicas())))
    current = REPLICA
    heart = Heart(node, lambda: current, every=0.02)
    await heart.start()
    await until(lambda: view.counters["beats"] >= 3)
    assert told == [1]  # the same news again is no news
    current = msgspec.structs.replace(REPLICA, state="ready", load=EngineLoad(running=3))
    heart.beat_now()
    await until(lambda: view.replicas()[0].load.running == 3)
    assert told == [1, 1]
    await heart.stop()
    await view.stop()


async def test_beats_on_request_are_limited_in_rate(world: World) -> None:
    platform, node = await world.platform(), await world.node("A")
    view = PresenceView(platform)
    await view.start()
    load = 0
    heart = Heart(node, lambda: msgspec.structs.replace(REPLICA, load=EngineLoad(running=load)), every=60.0)
    await heart.start()
    for load in range(200):  # noqa: B007  the heart reads it
        heart.beat_now()
        await asyncio.sleep(0.001)
    await until(lambda: view.replicas() and view.replicas()[0].load.running == 199)  # the last word is heard
    assert view.counters["beats"] <= 20
    await heart.stop()
    await view.stop()


async def test_age_is_judged_by_the_readers_own_clock(world: World) -> None:
    platform, node = await world.platform(), await world.node("A")
    clock = Clock()
    view = PresenceView(platform, max_age=5.0, clock=clock)
    await view.start()
    told: list[int] = []
    view.on_change(lambda: told.append(len(view.nodes())))
    heart = Heart(node, lambda: Node(id="A", beat=1.0), every=60.0)  # whatever the sender's clock says
    await heart.start()
    await until(view.nodes)
    clock.now += 4.9
    assert view.nodes()
    clock.now += 0.2
    assert not view.nodes()
    await until(lambda: told == [1, 0])
    await heart.stop()
    await view.stop()


def _beat_for_ever(credentials: Credentials) -> None:
    async def run() -> None:
        fabric = await Fabric.connect(credentials, name="A")
        await Heart(fabric, lambda: Node(id="A")).start()
        await Heart(fabric, lambda: REPLICA).start()
        await asyncio.sleep(60)

    asyncio.run(run())


async def test_a_killed_process_is_gone_by_the_servers_word_until_it_beats_again(world: World) -> None:
    platform, other = await world.platform(), await world.node("B")
    watch = DisconnectWatch(platform, world.authority.system_credentials([world.server.url]))
    await watch.start()
    view = PresenceView(platform, max_age=3600.0)  # age alone would never tell
    await view.start()
    heart = Heart(other, lambda: Node(id="B"))
    await heart.start()

    credentials = world.authority.local_node("A", [world.server.url])
    context = multiprocessing.get_context("spawn")
    for _ in range(2):
        process = context.Process(target=_beat_for_ever, args=(credentials,))
        process.start()
        await until(lambda: len(view.nodes()) == 2 and view.replicas())
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        await until(lambda: not view.replicas())
        process.join()
        assert [node.id for node in view.nodes()] == ["B"]
    assert view.counters["gone"] == 4
    await heart.stop()
    await view.stop()
    await watch.stop()


async def test_presence_is_back_after_a_restart_of_the_server(world: World) -> None:
    """The bucket lives in memory and is lost: the platform makes it again, and hearts beat at once."""
    platform, node = await world.platform(), await world.node("A")
    view = PresenceView(platform, max_age=60.0)
    await view.start()
    heart = Heart(node, lambda: Node(id="A"), every=0.2)
    await heart.start()
    await until(view.nodes)
    beats = view.counters["beats"]
    world.restart()
    await until(lambda: view.counters["beats"] > beats)
    late = PresenceView(platform)
    await until(lambda: platform.connected)
    await asyncio.sleep(0.3)
    heart.beat_now()
    await late.start()
    await until(late.nodes)
    for part in (view, late):
        await part.stop()
    await heart.stop()


async def test_nobody_grows_old_while_our_own_connection_is_down(world: World) -> None:
    platform, node = await world.platform(), await world.node("A")
    clock = Clock()
    view = PresenceView(platform, max_age=5.0, clock=clock)
    await view.start()
    heart = Heart(node, lambda: Node(id="A"), every=60.0)
    await heart.start()
    await until(view.nodes)
    world.server.kill()
    await until(lambda: not platform.connected)
    clock.now += 100
    assert view.nodes()
    world.server.start()
    await until(lambda: platform.connected)
    await asyncio.sleep(0.1)
    assert view.nodes()
    await heart.stop(goodbye=False)
    await view.stop()


async def test_a_reader_that_slept_sees_nobody_leave(world: World) -> None:
    platform = await world.platform()
    view = PresenceView(platform)
    await view.start()
    heart = Heart(platform, lambda: Gateway(id="g", url="http://x"), every=0.2)
    await heart.start()
    await until(view.gateways)
    told: list[int] = []
    view.on_change(lambda: told.append(len(view.gateways())))
    time.sleep(3.2)  # noqa: ASYNC251
    assert view.gateways()
    await asyncio.sleep(0.5)
    assert view.gateways() and not told
    await heart.stop()
    await view.stop()


@pytest.mark.parametrize("data", [b"", b"\xc1", msgspec.msgpack.encode({"id": 5})])
async def test_garbage_is_refused_and_counted(world: World, data: bytes) -> None:
    platform, node = await world.platform(), await world.node("A")
    view = PresenceView(platform)
    await view.start()
    await node.publish("$KV.presence.node.A", data)
    await node.publish("$KV.presence.replica.A.r.more", data)
    await until(lambda: view.counters["refused"] == 2)
    assert not view.nodes()
    await view.stop()
