"""Usage records survive what kills everything around them, and come exactly once where JetStream can see to it."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from springtide.core import wire
from springtide.core.errors import SetupError
from springtide.core.request import Usage
from springtide.fabric import subjects
from springtide.fabric.connection import Fabric
from springtide.fabric.credentials import Credentials
from springtide.fabric.usage import UsageReader, UsageWriter
from tests.fabric.conftest import World, until


def usage(number: int) -> Usage:
    return Usage(
        request_id=f"r{number}",
        tenant="t",
        key_id="k",
        model="m",
        gateway="g",
        created=1.0,
        finished=2.0,
        outcome="finished",
        prompt_tokens=3,
        completion_tokens=4,
    )


async def drain(reader: UsageReader, want: int, patience: float = 20.0) -> list[str]:
    """Read and acknowledge until `want` records came, then look whether more do."""
    ids: list[str] = []
    async with asyncio.timeout(patience):
        while len(ids) < want:
            batch = await reader.fetch(timeout=0.5)
            ids += [record.request_id for record in batch.records]
            await batch.ack()
    ids += [record.request_id for record in (await reader.fetch(timeout=0.3)).records]
    return ids


async def test_records_made_together_share_a_message_and_come_once(world: World) -> None:
    fabric = await world.platform()
    writer, reader = UsageWriter(fabric, world.directory / "spool"), UsageReader(fabric)
    await asyncio.gather(*(writer.record(usage(number)) for number in range(3000)))
    assert writer.counters["batches"] <= 5
    assert sorted(await drain(reader, 3000)) == sorted(f"r{number}" for number in range(3000))
    await writer.stop()


async def test_what_was_not_acknowledged_comes_again(world: World) -> None:
    fabric = await world.platform()
    writer = UsageWriter(fabric, world.directory / "spool")
    await writer.record(usage(1))
    reader = UsageReader(fabric)
    batch = await reader.fetch()
    assert [record.request_id for record in batch.records] == ["r1"]
    for message in batch._messages:
        await message.nak()  # as JetStream does by itself when no acknowledgement comes
    assert await drain(reader, 1) == ["r1"]
    await writer.stop()


async def test_an_acknowledged_record_survives_a_kill_of_the_server(world: World) -> None:
    fabric = await world.platform()
    writer = UsageWriter(fabric, world.directory / "spool")
    await writer.record(usage(1))
    assert not list((world.directory / "spool").iterdir())
    world.restart()
    assert await drain(UsageReader(fabric), 1) == ["r1"]
    await writer.stop()


async def test_a_record_made_while_the_server_is_down_lands_once(world: World) -> None:
    fabric = await world.platform()
    writer = UsageWriter(fabric, world.directory / "spool")
    await writer.record(usage(1))
    world.server.kill()
    await asyncio.gather(writer.record(usage(2)), writer.record(usage(3)))
    await writer.record(usage(4))  # known to be down: no waiting
    assert writer.counters["spooled"] == 3
    world.server.start()
    assert Counter(await drain(UsageReader(fabric), 4)) == Counter(["r1", "r2", "r3", "r4"])
    await until(lambda: not list((world.directory / "spool").iterdir()))
    await writer.stop()


def _record_and_wait(credentials: Credentials, spool: Path, ready: multiprocessing.synchronize.Event) -> None:
    async def run() -> None:
        fabric = await Fabric.connect(credentials, name="gateway")
        writer = UsageWriter(fabric, spool)
        await writer.start()
        ready.set()
        while fabric.connected:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await writer.record(usage(7))
        ready.clear()
        await asyncio.sleep(60)

    asyncio.run(run())


async def test_a_spooled_record_lands_once_though_its_writer_was_killed(world: World) -> None:
    fabric = await world.platform()
    spool = world.directory / "spool"
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    credentials = world.authority.platform_credentials("gateway", [world.server.url])
    process = context.Process(target=_record_and_wait, args=(credentials, spool, ready))
    process.start()
    await until(ready.is_set)
    world.server.kill()
    await until(lambda: not ready.is_set())
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(list(spool.glob("*.usage"))) == 1

    world.server.start()
    successors = [UsageWriter(fabric, spool), UsageWriter(fabric, spool)]  # two that share the folder, at that
    for writer in successors:
        await writer.start()
    assert await drain(UsageReader(fabric), 1) == ["r7"]
    assert not list(spool.iterdir())
    for writer in successors:
        await writer.stop()


async def test_a_batch_whose_acknowledgement_was_lost_is_not_doubled(world: World) -> None:
    fabric = await world.platform()
    spool = world.directory / "spool"
    writer = UsageWriter(fabric, spool)
    await writer.start()
    data = wire.pack([usage(1)])
    await writer._publish("batch", data)  # it landed, but nobody was told ...
    (spool / "batch.usage").write_bytes(data)  # ... so it went to the spool as well
    writer._drain_now.set()
    await until(lambda: not list(spool.iterdir()))
    assert await drain(UsageReader(fabric), 1) == ["r1"]
    await writer.stop()


async def test_without_stream_and_disk_recording_fails_loudly(world: World) -> None:
    fabric = await world.platform()
    blocked = world.directory / "file"
    blocked.write_text("")
    writer = UsageWriter(fabric, blocked)
    with pytest.raises(SetupError, match="can't use the directory"):
        await writer.start()


async def test_an_unreadable_message_is_counted_and_does_not_block_the_rest(world: World) -> None:
    fabric = await world.platform()
    await fabric.js.publish(subjects.USAGE_SUBJECT, b"\xc1")
    writer, reader = UsageWriter(fabric, world.directory / "spool"), UsageReader(fabric)
    await writer.record(usage(1))
    assert await drain(reader, 1) == ["r1"]
    assert reader.counters["unreadable"] == 1
    await writer.stop()


async def test_a_reader_survives_the_loss_of_its_consumer(world: World) -> None:
    fabric = await world.platform()
    writer, reader = UsageWriter(fabric, world.directory / "spool"), UsageReader(fabric)
    await writer.record(usage(1))
    assert await drain(reader, 1) == ["r1"]
    await fabric.js.delete_consumer(subjects.USAGE_STREAM, "ledger")
    await writer.record(usage(2))
    assert await drain(reader, 1) == ["r2"]
    await writer.stop()
