"""From the fabric into the ledger, and back: usage records in, keys out. Knows no table and no HTTP.

Of all workers one leads, and the others wait. Usage is written down, then acknowledged: whatever dies between,
the records come again, and the ledger counts each request once. Keys are as the ledger says: the leader compares
them with the fabric's registry when it takes over, when a key or a tenant has changed, when the connection is
back, and now and then. So a lost message, or a lost registry, costs seconds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import msgspec

from springtide.core.cluster import KeyRecord
from springtide.fabric import subjects
from springtide.fabric.connection import Fabric
from springtide.fabric.desired import Registry
from springtide.fabric.leader import Leadership
from springtide.fabric.usage import UsageBatch, UsageReader
from springtide.ledger.store import Ledger

log = logging.getLogger(__name__)

_MESSAGES = 64  # fetched at a time; each may hold many records
_FETCH_S = 0.5
_GATHER_S = 0.25
_SLICE = 200  # records a transaction: a gateway's streams share this event loop, and must not wait long
_LOOK_EVERY_S = 0.25
_COMPARE_EVERY_S = 30.0
_STOP_PATIENCE_S = 3.0
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.1, 5.0


class LedgerWorker:
    """Runs in every process that has the ledger open; works in the one that leads.

    All of them must have the same ledger open: the registry of keys becomes what the leader's says.
    `recorded` and `repeated` count the usage records that were new, and those that had been delivered before.
    """

    def __init__(self, ledger: Ledger, fabric: Fabric, candidate_id: str) -> None:
        self._ledger = ledger
        self._fabric = fabric
        self._leadership = Leadership(fabric, "ledger", candidate_id)
        self._reader = UsageReader(fabric, durable="ledger")
        self._keys = Registry(fabric, subjects.KEYS, KeyRecord)
        self._batch: UsageBatch | None = None  # fetched, not yet acknowledged
        self._published: tuple[object, ...] | None = None  # the ledger's stamp when the registry last equalled it
        self._compare_at = 0.0
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self.recorded = 0
        self.repeated = 0

    @property
    def is_leader(self) -> bool:
        return self._leadership.is_leader

    async def start(self) -> None:
        self._fabric.on_reconnect(self._compare_again)
        await self._leadership.start()
        self._tasks = [
            asyncio.create_task(self._while_leading("writing usage down", self._write_usage)),
            asyncio.create_task(self._while_leading("publishing keys", self._publish_keys)),
        ]

    async def stop(self) -> None:
        """Write down and acknowledge what was fetched, and resign. Takes a moment: a fetch that is broken off
        could still be answered, and what it is answered comes again only when its acknowledgement is overdue."""
        self._stopping = True
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=_STOP_PATIENCE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        self._fabric.remove_on_reconnect(self._compare_again)
        await self._leadership.stop()

    async def _while_leading(self, what: str, step: Callable[[], Awaitable[None]]) -> None:
        """Do `step` again and again. One that fails is tried again, ever more slowly, until it works."""
        pause = _FIRST_PAUSE_S
        while not self._stopping:
            if not self.is_leader:
                self._published = None
                await asyncio.sleep(_LOOK_EVERY_S)
                continue
            try:
                await step()
                pause = _FIRST_PAUSE_S
            except Exception as error:  # a database or a server that is away must not end the worker
                log.warning("%s failed, next try in %.1f s: %s: %s", what, pause, type(error).__name__, error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LAST_PAUSE_S)

    async def _write_usage(self) -> None:
        if self._batch is None:
            self._batch = await self._reader.fetch(max=_MESSAGES, timeout=_FETCH_S)
        records = self._batch.records
        new = 0
        for start in range(0, len(records), _SLICE):
            new += await self._ledger.record_usage(records[start : start + _SLICE])
        await self._batch.ack()
        self._batch = None
        self.recorded += new
        self.repeated += len(records) - new
        if not self._stopping:  # a transaction costs the loop the same for one record as for many: let some gather
            await asyncio.sleep(_GATHER_S)

    async def _publish_keys(self) -> None:
        now = asyncio.get_running_loop().time()
        stamp = await self._ledger.keys_stamp()
        if stamp != self._published or now >= self._compare_at:
            # Set first: a reconnect in the meantime asks for another comparison, and a failure does too.
            self._published, self._compare_at = None, now + _COMPARE_EVERY_S
            changed = await publish_keys(self._ledger, self._keys)
            self._published = stamp
            if changed:
                log.info("published %d changed keys", changed)
        await asyncio.sleep(_LOOK_EVERY_S)

    async def _compare_again(self) -> None:
        self._compare_at = 0.0


async def publish_keys(ledger: Ledger, registry: Registry[KeyRecord]) -> int:
    """Make the registry say what the ledger says; a key that the ledger does not know counts as revoked. Returns
    how many entries that changed."""
    published = await registry.items()  # read first, so that the ledger's word is the newer one
    wanted = {record.hash: record for record in await ledger.key_records()}
    for hash, record in published.items():
        wanted.setdefault(hash, msgspec.structs.replace(record, revoked=True))
    changed = [record for record in wanted.values() if published.get(record.hash) != record]
    for record in sorted(changed, key=lambda record: not record.revoked):  # what must end, ends first
        await registry.put(record.hash, record)
    return len(changed)
