"""Usage records on their way from the gateways to the ledger: stored by JetStream, or on disk until it is back.

A batch of records is one message with an id of its own. If its acknowledgement does not come in time the batch
goes to a spool file under that id and is sent again from there: JetStream drops a repetition of the last hour,
and the ledger, which knows each request's id, any other. A file that can never be sent is put aside in the spool
under another name, for an operator to look at: the others go on, and nothing is thrown away.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import Counter, deque
from pathlib import Path

import msgspec
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig

from springtide.core import wire
from springtide.core.request import Usage
from springtide.fabric import subjects
from springtide.fabric.connection import Fabric
from springtide.fabric.files import private_directory, write_private
from springtide.fabric.kv import TooLarge, Unavailable, publish_stored
from springtide.fabric.tasks import end

log = logging.getLogger(__name__)

_PATIENCE_S = 1.5  # for the stream, before the spool takes over
_TRY_S = 0.5
_MAX_BATCH = 1000
# Of packed records in one message: what any NATS server takes by default, less the headers. A record has no bound
# of its own (each attempt is a fact); one that is larger goes alone.
_MAX_BATCH_BYTES = 2**20 - 4096
_SUFFIX = ".usage"
_ASIDE_SUFFIX = ".unsendable"  # behind the other one, so that a file that was put right is sent once renamed back


class _Waiting:
    """Records of one message, packed, and who waits for it."""

    def __init__(self) -> None:
        self.id = secrets.token_hex(12)
        self.records: list[msgspec.Raw] = []
        self.size = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def has_room(self, packed: bytes) -> bool:
        return len(self.records) < _MAX_BATCH and self.size + len(packed) <= _MAX_BATCH_BYTES

    def add(self, packed: bytes) -> None:
        self.records.append(msgspec.Raw(packed))
        self.size += len(packed)


class UsageWriter:
    """One per gateway process. `spool` is a folder; several processes may share it. Starts with its first record,
    if not before.

    `counters`: records, batches, spooled (records), drained (batches sent from the spool), set_aside (batches that
    can't be sent).
    """

    def __init__(self, fabric: Fabric, spool: Path) -> None:
        self._fabric = fabric
        self._spool = spool
        self._waiting: deque[_Waiting] = deque()
        self._sending: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None
        self._drain_now = asyncio.Event()
        self._down = False
        self._reported: set[str] = set()  # names of files that can't be read
        self.counters: Counter[str] = Counter()

    async def start(self) -> None:
        """Begin to drain what an earlier process left in the spool.

        Raises:
            SetupError: the folder can't be used.
        """
        private_directory(self._spool)
        self._fabric.on_reconnect(self._on_reconnect)
        self._drain_now.set()
        self._draining = asyncio.create_task(self._drain(), name="usage spool")

    async def stop(self) -> None:
        """Everything recorded is safe when this returns: in the stream, or in the spool."""
        self._fabric.remove_on_reconnect(self._on_reconnect)
        while self._sending is not None:
            await self._sending
        await end(self._draining)

    async def record(self, usage: Usage) -> None:
        """Returns once the record is safe. Records made at the same time share messages.

        Raises:
            SetupError: neither the stream nor the disk took it.
        """
        self.counters["records"] += 1
        if self._draining is None:
            await self.start()
        packed = wire.pack(usage)
        if not self._waiting or not self._waiting[-1].has_room(packed):
            self._waiting.append(_Waiting())
        batch = self._waiting[-1]
        batch.add(packed)
        if self._sending is None:
            self._sending = asyncio.create_task(self._send_waiting(), name="usage")
        await asyncio.shield(batch.done)

    async def _send_waiting(self) -> None:
        """While one batch is under way the next one gathers."""
        try:
            while self._waiting:
                batch = self._waiting.popleft()
                try:
                    await self._keep(batch.id, wire.pack(batch.records), len(batch.records))
                except Exception as error:
                    batch.done.set_exception(error)
                else:
                    batch.done.set_result(None)
        finally:
            self._sending = None

    async def _keep(self, batch_id: str, data: bytes, count: int) -> None:
        """In the stream, or on disk."""
        self.counters["batches"] += 1
        if await self._sent(batch_id, data):
            return
        private_directory(self._spool)
        await asyncio.to_thread(write_private, self._spool / f"{batch_id}{_SUFFIX}", data)
        self.counters["spooled"] += count
        self._drain_now.set()

    async def _sent(self, batch_id: str, data: bytes) -> bool:
        """Whether the stream has it; false once our patience has ended, or at once where that can't help. Where the
        last batch went to the spool, one try will do: an election among the servers takes seconds."""
        deadline = asyncio.get_running_loop().time() + (_TRY_S if self._down else _PATIENCE_S)
        while not self._down or self._fabric.connected:
            try:
                await self._publish(batch_id, data)
                return True
            except TooLarge:
                return False  # the spool's own round puts it aside, and says so
            except Unavailable as error:
                if asyncio.get_running_loop().time() + _TRY_S > deadline:
                    log.warning("usage goes to the spool: %s", error)
                    break
                await asyncio.sleep(0.05)
        self._down = True
        return False

    async def _publish(self, batch_id: str, data: bytes) -> None:
        headers = {"Nats-Msg-Id": batch_id}
        await publish_stored(self._fabric, subjects.USAGE_SUBJECT, data, headers=headers, timeout=_TRY_S)
        self._down = False

    async def _on_reconnect(self) -> None:
        self._drain_now.set()

    async def _drain(self) -> None:
        """Send what lies in the spool, now and whenever something was put there, until it is empty."""
        while True:
            await self._drain_now.wait()
            self._drain_now.clear()
            wait = 0.1
            while not await self._drain_once():
                await asyncio.sleep(wait)
                wait = min(5.0, 2 * wait)

    async def _drain_once(self) -> bool:
        """Send all that can be sent; whether nothing is left that is worth another try."""
        done = True
        for file in sorted(self._spool.glob(f"*{_SUFFIX}")):
            try:
                done &= await self._send_file(file)
            except FileNotFoundError:
                pass  # another process of this machine was faster
            except TooLarge as error:
                done &= self._set_aside(file, error)
            except (Unavailable, OSError):
                return False
        return done

    async def _send_file(self, file: Path) -> bool:
        """Whether it is settled: sent, or put aside. False: it can't be read, now at least; that is its own
        trouble, and the others don't wait for it.

        Raises:
            FileNotFoundError, TooLarge, Unavailable
            OSError: it was sent and can't be removed.
        """
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            if file.name not in self._reported:
                self._reported.add(file.name)
                log.error("the usage records in %s can't be read, and are not counted yet: %s", file, error)
            return False
        try:
            wire.unpack(data, list[Usage])
        except msgspec.MsgspecError as error:  # whoever reads the stream would have to drop it
            return self._set_aside(file, error)
        await self._publish(file.stem, data)
        file.unlink()
        self.counters["drained"] += 1
        return True

    def _set_aside(self, file: Path, error: Exception) -> bool:
        """Move a file that can never be sent out of the way. Whether that worked."""
        aside = file.with_name(file.name + _ASIDE_SUFFIX)
        try:
            file.rename(aside)
        except FileNotFoundError:
            return True  # another process of this machine did it
        except OSError as problem:
            log.error("the usage records in %s can't be sent (%s), nor moved aside: %s", file, error, problem)
            return False
        self.counters["set_aside"] += 1
        log.error("usage records can't be sent and are not counted; they are kept in %s: %s", aside, error)
        return True


class UsageBatch:
    """Records that the ledger should keep, and then acknowledge. Without that they come again."""

    def __init__(self, records: list[Usage], messages: list[Msg]) -> None:
        self.records = records
        self._messages = messages

    async def ack(self) -> None:
        """They are in the ledger. If this is lost they come again."""
        for message in self._messages:
            with contextlib.suppress(nats.errors.Error):
                await message.ack()


class UsageReader:
    """The ledger's end. Records may come more than once; each at least once. One at a time should read."""

    def __init__(self, fabric: Fabric, durable: str = "ledger") -> None:
        self._fabric = fabric
        self._durable = durable
        self._source: JetStreamContext.PullSubscription | None = None
        self._client: Client | None = None
        self.counters: Counter[str] = Counter()

    async def fetch(self, max: int = 256, timeout: float = 1.0) -> UsageBatch:
        """What up to `max` messages hold; empty if there is nothing within `timeout` seconds, or no connection."""
        if not self._fabric.connected:
            await asyncio.sleep(min(timeout, 0.2))
            return UsageBatch([], [])
        try:
            source = await self._subscribe()
            messages = await source.fetch(max, timeout=timeout)
        except (TimeoutError, nats.errors.TimeoutError):
            return UsageBatch([], [])
        except (nats.errors.Error, nats.js.errors.Error) as error:
            log.info("usage can't be fetched: %r", error)
            self._source = None
            await asyncio.sleep(min(timeout, 0.2))
            return UsageBatch([], [])
        return UsageBatch([usage for message in messages for usage in self._decode(message)], messages)

    def _decode(self, message: Msg) -> list[Usage]:
        try:
            return wire.unpack(message.data, list[Usage])
        except msgspec.MsgspecError as error:
            self.counters["unreadable"] += 1
            log.error("a usage message can't be read and is dropped: %s", error)
            return []

    async def _subscribe(self) -> JetStreamContext.PullSubscription:
        """The durable consumer; made anew where the connection is a new one, or the consumer is gone."""
        if self._source is None or self._client is not self._fabric.nc:
            self._client = self._fabric.nc
            config = ConsumerConfig(
                durable_name=self._durable, ack_policy=AckPolicy.EXPLICIT, ack_wait=5, max_ack_pending=10_000
            )
            js = self._client.jetstream(timeout=1.0)
            self._source = await js.pull_subscribe(
                subjects.USAGE_SUBJECT, self._durable, stream=subjects.USAGE_STREAM, config=config
            )
        return self._source
