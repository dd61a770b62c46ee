"""Usage records survive what kills everything around them, and come exactly once where JetStream can see to it."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from springtide.core import wire
from springtide.core.errors import SetupError
from springtide.core.request import Attempt, Usage
from springtide.fabric import subjects
from springtide.fabric.connection import Fabric
from springtide.fabric.credentials import Credentials
from springtide.fabric.server import MAX_PAYLOAD
from springtide.fabric.usage import UsageReader, UsageWriter
from tests.fabric.conftest import World, until


def attempts(count: int) -> list[Attempt]:
    return [
        Attempt(
            number=number,
            node="a-node-with-a-name-of-some-length",
            replica=f"replica-{number}",
            started=1.0,
            ended=2.0,
            outcome="failed",
        )
        for number in range(1, count + 1)
    ]


def usage(number: int, num_attempts: int = 0) -> Usage:
    return Usage(
        attempts=attempts(num_attempts),
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


async def test_batches_are_bounded_in_bytes_too(world: World) -> None:
    fabric = await world.platform()
    writer, reader = UsageWriter(fabric, world.directory / "spool"), UsageReader(fabric)
    records = [usage(number, num_attempts=300) for number in range(300)]
    assert len(wire.pack(records)) > MAX_PAYLOAD  # of which one message could not be made
    await asyncio.gather(*(writer.record(record) for record in records))
    assert writer.counters["spooled"] == 0

    sizes: list[int] = []
    found: dict[str, Usage] = {}
    while len(found) < len(records):
        batch = await reader.fetch(max=4)
        sizes += [len(message.data) for message in batch._messages]
        found |= {record.request_id: record for record in batch.records}
        await batch.ack()
    assert max(sizes) < 2**20
    assert found == {record.request_id: record for record in records}
    await writer.stop()


async def test_a_record_larger_than_a_batch_goes_alone(world: World) -> None:
    fabric = await world.platform()
    writer, reader = UsageWriter(fabric, world.directory / "spool"), UsageReader(fabric)
    records = [usage(1), usage(2, num_attempts=20_000), usage(3)]
    assert 2**20 < len(wire.pack(records[1])) < MAX_PAYLOAD
    await asyncio.gather(*(writer.record(record) for record in records))
    assert writer.counters["spooled"] == 0
    messages = []
    while len(messages) < 3:
        batch = await reader.fetch()
        messages += [[record.request_id for record in wire.unpack(m.data, list[Usage])] for m in batch._messages]
        await batch.ack()
    assert messages == [["r1"], ["r2"], ["r3"]]
    await writer.stop()


@pytest.mark.parametrize("headers_tip_it", [False, True])
async def test_a_record_that_no_message_holds_is_put_aside_and_said(
    world: World, caplog: pytest.LogCaptureFixture, headers_tip_it: bool
) -> None:
    """With headers the server counts more than the client library does, and would cut the connection."""
    fabric = await world.platform()
    spool = world.directory / "spool"
    writer, reader = UsageWriter(fabric, spool), UsageReader(fabric)
    record = usage(1)
    excess = MAX_PAYLOAD - len(wire.pack([msgspec.structs.replace(record, model="m" * 2**20)])) + 2**20
    record = msgspec.structs.replace(record, model="m" * (excess if headers_tip_it else 2 * excess))
    assert (len(wire.pack([record])) <= MAX_PAYLOAD) == headers_tip_it
    with caplog.at_level(logging.ERROR):
        await asyncio.gather(writer.record(record), writer.record(usage(2)))
        assert await drain(reader, 1) == ["r2"]
        await until(lambda: writer.counters["set_aside"])
    (file,) = spool.iterdir()
    assert file.name.endswith(".usage.unsendable")
    assert wire.unpack(file.read_bytes(), list[Usage]) == [record]
    (logged,) = [entry.getMessage() for entry in caplog.records if entry.name == "springtide.fabric.usage"]
    assert str(file) in logged and "not counted" in logged
    assert fabric.counters["reconnects"] + fabric.counters["reopened"] == 0
    await writer.stop()


async def test_a_file_that_can_not_be_sent_does_not_hold_up_the_others(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    fabric = await world.platform()
    spool = world.directory / "spool"
    spool.mkdir()
    too_large = wire.pack([usage(1, num_attempts=100_000)])
    assert len(too_large) > MAX_PAYLOAD
    (spool / "a.usage").write_bytes(too_large)
    (spool / "b.usage").write_bytes(b"\xc1 no record")
    (spool / "c.usage").mkdir()  # can't be read, as on a disk with a fault
    (spool / "d.usage").write_bytes(wire.pack([usage(4)]))
    writer = UsageWriter(fabric, spool)
    with caplog.at_level(logging.ERROR):
        await writer.start()
        assert await drain(UsageReader(fabric), 1) == ["r4"]
        await until(lambda: writer.counters["drained"])
    names = {"a.usage.unsendable", "b.usage.unsendable", "c.usage"}
    assert {file.name for file in spool.iterdir()} == names
    assert (spool / "a.usage.unsendable").read_bytes() == too_large
    logged = [entry.getMessage() for entry in caplog.records if entry.name == "springtide.fabric.usage"]
    assert len(logged) == 3 and all(name in text for name, text in zip(sorted(names), logged, strict=True))

    (spool / "c.usage").rmdir()
    (spool / "c.usage").write_bytes(wire.pack([usage(3)]))  # it can be read again
    assert await drain(UsageReader(fabric), 1) == ["r3"]
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
