"""From the fabric into the ledger: a real NATS, real processes, and what happens when they are killed."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from springtide.core.cluster import KeyRecord
from springtide.core.request import Usage
from springtide.fabric import subjects
from springtide.fabric.authority import Authority
from springtide.fabric.connection import Fabric
from springtide.fabric.desired import Registry
from springtide.fabric.server import NatsServer
from springtide.fabric.usage import UsageWriter
from springtide.ledger.store import Ledger
from springtide.ledger.worker import LedgerWorker
from tests.ledger.postgres import Postgres
from tests.ledger.records import attempt, usage

CONSUMER = [sys.executable, "-m", "tests.ledger.consumer"]
ROOT = Path(__file__).parents[2]


async def until(condition: Callable[[], Awaitable[bool]], what: str, patience: float = 90.0) -> None:
    give_up = time.monotonic() + patience
    while not await condition():
        assert time.monotonic() < give_up, f"gave up waiting until {what}"
        await asyncio.sleep(0.05)


class Stage(msgspec.Struct):
    """A fabric with one connection to it, and a gateway's usage writer."""

    nats: NatsServer
    credentials: Path
    fabric: Fabric
    writer: UsageWriter
    keys: Registry[KeyRecord]


@contextlib.asynccontextmanager
async def open_stage(directory: Path) -> AsyncIterator[Stage]:
    authority = Authority.open(directory / "fabric")
    nats = NatsServer(directory / "fabric", authority)
    nats.start()
    try:
        credentials = directory / "platform.creds"
        authority.platform_credentials("test", [nats.url]).save(credentials)
        fabric = await Fabric.connect(credentials, name="test")
        await fabric.prepare()
        writer = UsageWriter(fabric, directory / "spool")
        await writer.start()
        yield Stage(nats, credentials, fabric, writer, Registry(fabric, subjects.KEYS, KeyRecord))
        await writer.stop()
        await fabric.close()
    finally:
        nats.stop()


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with open_stage(tmp_path) as stage:
        yield stage


@pytest.fixture
async def worker(ledger: Ledger, stage: Stage) -> AsyncIterator[LedgerWorker]:
    worker = LedgerWorker(ledger, stage.fabric, "worker-1")
    await worker.start()
    yield worker
    await worker.stop()


async def start_consumer(credentials: Path, url: str, die: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(*CONSUMER, str(credentials), url, die, cwd=ROOT)


async def counted(ledger: Ledger, number: int) -> bool:
    return (await ledger.usage_summary())[0].requests == number


async def check_exactly_once(ledger: Ledger, number: int) -> None:
    """Each of the requests is there once, with both its attempts."""
    records = await ledger.list_usage(limit=10_000)
    assert Counter(record.request_id for record in records) == Counter(f"req-{i:04}" for i in range(number))
    assert all([attempt.number for attempt in record.attempts] == [1, 2] for record in records)


def record(i: int) -> Usage:
    return usage(f"req-{i:04}", attempts=[attempt(1, outcome="failed"), attempt(2)])


async def test_what_gateways_record_ends_in_the_ledger(stage: Stage, worker: LedgerWorker, ledger: Ledger) -> None:
    await asyncio.gather(*(stage.writer.record(record(i)) for i in range(500)))
    await until(lambda: counted(ledger, 500), "all is written down")
    await check_exactly_once(ledger, 500)
    assert worker.is_leader and worker.recorded == 500 and worker.repeated == 0


async def test_a_consumer_killed_anywhere_loses_and_doubles_nothing(postgres: Postgres, tmp_path: Path) -> None:
    # Both databases side by side: what a dead consumer had fetched comes again only after a while.
    await asyncio.gather(
        kill_consumers(tmp_path / "a", f"sqlite:///{tmp_path}/ledger.db"),
        kill_consumers(tmp_path / "b", postgres.new("killed_consumers")),
    )


async def kill_consumers(directory: Path, url: str) -> None:
    ledger = await Ledger.open(url)
    async with open_stage(directory) as stage:
        number = 0
        for where in ("before-commit", "in-commit", "after-commit"):
            for _ in range(100):
                await stage.writer.record(record(number))
                number += 1
            process = await start_consumer(stage.credentials, url, where)
            assert await process.wait() == -signal.SIGKILL
            assert await counted(ledger, 0) == (where != "after-commit")
        survivor = await start_consumer(stage.credentials, url, "never")
        await until(lambda: counted(ledger, number), "all is written down")
        survivor.kill()
        await survivor.wait()
    await check_exactly_once(ledger, number)
    await ledger.close()


async def test_a_killed_fabric_loses_and_doubles_nothing(stage: Stage, worker: LedgerWorker, ledger: Ledger) -> None:
    number = 0
    for _ in range(3):
        recording = []
        for _ in range(100):
            recording.append(asyncio.create_task(stage.writer.record(record(number))))
            number += 1
            await asyncio.sleep(0.002)
        stage.nats.kill()  # with records on their way in, and out
        stage.nats.start()
        await asyncio.gather(*recording)
    await until(lambda: counted(ledger, number), "all is written down")
    await check_exactly_once(ledger, number)


async def test_a_database_that_is_away_is_waited_for(stage: Stage, postgres: Postgres) -> None:
    ledger = await Ledger.open(postgres.new("away"))
    worker = LedgerWorker(ledger, stage.fabric, "worker-1")
    await worker.start()
    await stage.writer.record(record(0))
    await until(lambda: counted(ledger, 1), "the first is written down")
    postgres.stop()
    await stage.writer.record(record(1))
    await asyncio.sleep(0.5)
    postgres.start()
    await until(lambda: counted(ledger, 2), "the second is written down")
    await check_exactly_once(ledger, 2)
    await worker.stop()
    await ledger.close()


async def test_one_of_two_workers_leads_and_the_other_takes_over(stage: Stage, ledger: Ledger) -> None:
    workers = [LedgerWorker(ledger, stage.fabric, f"worker-{i}") for i in range(2)]
    for worker in workers:
        await worker.start()

    async def one_leads() -> bool:
        return sum(worker.is_leader for worker in workers) == 1

    await until(one_leads, "one leads")
    leader, other = sorted(workers, key=lambda worker: not worker.is_leader)
    await stage.writer.record(record(0))
    await until(lambda: counted(ledger, 1), "the leader wrote")
    await leader.stop()
    await stage.writer.record(record(1))
    await until(lambda: counted(ledger, 2), "the other wrote")
    assert (leader.recorded, other.recorded) == (1, 1)
    await other.stop()


async def test_keys_are_published_and_follow_every_change(stage: Stage, ledger: Ledger) -> None:
    tenant = await ledger.put_tenant("default")
    old, _ = await ledger.create_key("old")
    stranger = KeyRecord(id="key-0", hash="0" * 64, tenant=tenant)
    await stage.keys.put(stranger.hash, stranger)  # from a ledger that was restored from a backup, say
    worker = LedgerWorker(ledger, stage.fabric, "worker-1")
    await worker.start()

    async def published() -> bool:
        wanted = {record.hash: record for record in await ledger.key_records()}
        wanted[stranger.hash] = msgspec.structs.replace(stranger, revoked=True)
        return await stage.keys.items() == wanted

    await until(published, "the first keys are there")
    await ledger.create_key("new")
    await until(published, "a new key is there")
    await ledger.revoke_key(old.id)
    await until(published, "the revoked key is revoked")
    await ledger.put_tenant("default", weight=4.0)
    await until(published, "the keys know their tenant's new weight")
    await stage.keys.delete(old.hash)
    stage.nats.kill()
    stage.nats.start()
    await until(published, "what the fabric had lost is there again")
    await worker.stop()
