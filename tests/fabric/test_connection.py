"""One connection for the life of a process, whatever happens to the server or to the credentials."""

from __future__ import annotations

import asyncio
import logging
import random

import pytest

from springtide.cli.lab.cable import Cable
from springtide.core.errors import SetupError
from springtide.fabric.connection import Fabric
from springtide.fabric.credentials import urls_of
from tests.fabric.conftest import World, until


async def test_subscriptions_and_callbacks_survive_a_restart_of_the_server(world: World) -> None:
    fabric = await world.platform()
    heard: list[bytes] = []
    back: list[bool] = []

    async def listen(message: object) -> None:
        heard.append(message.data)  # type: ignore[attr-defined]

    async def on_reconnect() -> None:
        back.append(fabric.connected)

    await fabric.subscribe("st.test", listen)
    fabric.on_reconnect(on_reconnect)
    world.restart()
    await until(lambda: back)
    await fabric.publish("st.test", b"after")
    await until(lambda: heard == [b"after"])
    assert back == [True] and fabric.counters["reconnects"] == 1


async def test_ending_credentials_are_replaced_from_their_file(world: World) -> None:
    """The server cuts a client whose token ends, and nats-py then gives up: we go on with what the file holds."""
    path = world.directory / "node.creds"
    world.authority.local_node("A", [world.server.url], ttl=2).save(path)
    fabric = await Fabric.connect(path, name="A")
    heard: list[bytes] = []

    async def listen(message: object) -> None:
        heard.append(message.data)  # type: ignore[attr-defined]

    await fabric.subscribe("st.node.A.x", listen)
    world.authority.local_node("A", [world.server.url]).save(path)
    await until(lambda: fabric.counters["reopened"])
    await until(lambda: fabric.connected)
    platform = await world.platform(prepare=False)
    await fabric.flush()
    await platform.publish("st.node.A.x", b"still here")
    await until(lambda: heard == [b"still here"])
    await fabric.close()


async def test_ended_credentials_are_tried_until_better_ones_come(world: World) -> None:
    path = world.directory / "node.creds"
    world.authority.local_node("A", [world.server.url], ttl=1).save(path)
    fabric = await Fabric.connect(path, name="A")
    await until(lambda: not fabric.connected)
    await asyncio.sleep(0.5)
    assert not fabric.connected
    assert await fabric.publish("st.node.A.x", b"lost") is False
    world.authority.local_node("A", [world.server.url]).save(path)
    await until(lambda: fabric.connected)
    await fabric.close()


async def test_a_server_that_is_not_there_is_said_so_in_time(world: World) -> None:
    credentials = world.authority.platform_credentials("x", ["nats://127.0.0.1:1"])
    with pytest.raises(SetupError, match=r"no answer .*nats://127\.0\.0\.1:1.*does it run"):
        await Fabric.connect(credentials, name="x", timeout=0.5)


async def test_permission_errors_are_counted_and_logged_once(world: World, caplog: pytest.LogCaptureFixture) -> None:
    node = await world.node("A")
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            await node.publish("st.node.B.x", b"")
        await node.flush()
    assert node.counters["permission_errors"] == 5
    assert len([record for record in caplog.records if "permissions violation" in record.message]) == 1


async def test_a_handler_that_fails_is_counted_and_the_next_message_handled(world: World) -> None:
    fabric = await world.platform(prepare=False)
    heard: list[bytes] = []

    async def listen(message: object) -> None:
        heard.append(message.data)  # type: ignore[attr-defined]
        if len(heard) == 1:
            raise ValueError("a bug")

    await fabric.subscribe("st.test", listen)
    await fabric.publish("st.test", b"1")
    await fabric.publish("st.test", b"2")
    await until(lambda: len(heard) == 2)
    assert fabric.counters["errors"] == 1


async def test_an_impatient_flush_does_not_deafen_the_connection(world: World) -> None:
    fabric = await world.platform(prepare=False)
    assert await fabric.flush(timeout=0.0) is False
    for _ in range(3):
        assert await fabric.flush()
    assert fabric.connected


@pytest.mark.parametrize("scheme", ["nats", "tls"])
async def test_a_server_that_is_gone_without_a_word_is_left(world: World, scheme: str) -> None:
    """Neither what was written to it nor TLS's farewell holds the new connection up."""
    cable = Cable(world.server.port, random.Random(0))
    await cable.start()
    credentials = world.authority.platform_credentials("x", [f"{scheme}://127.0.0.1:{cable.port}"])
    fabric = await Fabric.connect(credentials, name="x")
    cable.freeze(new_ones_too=False)
    for _ in range(200):
        await fabric.publish("st.test", b"x" * 100_000)  # more than the sockets take
    await until(lambda: fabric.counters["reconnects"])
    assert await fabric.flush()
    cable.freeze(new_ones_too=False)
    for _ in range(200):
        await fabric.publish("st.test", b"x" * 100_000)
    await fabric.close()
    await cable.stop()


async def test_of_several_servers_any_will_do(world: World) -> None:
    urls = urls_of(f"nats://127.0.0.1:1, {world.server.url},nats://127.0.0.1:2")
    credentials = world.authority.platform_credentials("x", urls)
    fabric = await Fabric.connect(credentials, name="x")
    assert fabric.connected
    await fabric.close()
