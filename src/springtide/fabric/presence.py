"""Who is there: heartbeats in a bucket, judged by their age on the reader's own clock.

Each beat is a whole record, published to the record's own key of the bucket "presence": readers hear it at
once, and one who comes later reads the last of each. The subject says who speaks (a node may publish only below
its own name), the record must say the same. Nothing here knows what the records are used for.

The server tells when a connection ends; `DisconnectWatch` passes that on, so that a killed process is gone
within milliseconds. A stopped one, or one behind a cut cable, is gone when its last beat has grown old: two beats may
be missed. A reader that slept itself, or was cut off, lets nobody grow old meanwhile.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
from nats.aio.msg import Msg

from springtide.core import wire
from springtide.core.cluster import Gateway, Node, Replica
from springtide.fabric import subjects
from springtide.fabric.awake import AwakeClock
from springtide.fabric.connection import Fabric, Subscription
from springtide.fabric.credentials import Credentials
from springtide.fabric.kv import Bucket, Entry, Unavailable
from springtide.fabric.tasks import call_all, end, sleep_until

log = logging.getLogger(__name__)

Record = Node | Replica | Gateway

MAX_AGE_S = 3.0
_BEAT_S = 1.0
_LOOK_S = 0.2  # between two looks for those who have grown old
_LEAST_GAP_S = 0.05  # between two beats, however often `beat_now` is called
_CONNECTION_HEADER = "St-Connection"
_KINDS: dict[str, type[Node] | type[Replica] | type[Gateway]] = {"node": Node, "replica": Replica, "gateway": Gateway}


class Heart:
    """Publishes what `describe` says, every `every` seconds and when something changed."""

    def __init__(self, fabric: Fabric, describe: Callable[[], Record], *, every: float = _BEAT_S) -> None:
        self._fabric = fabric
        self._describe = describe
        self._every = every
        self._now = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """The first beat is out when this returns."""
        await self._beat()
        self._fabric.on_reconnect(self._on_reconnect)
        self._task = asyncio.create_task(self._run(), name="heart")

    def beat_now(self) -> None:
        """Beat at once, or as soon as the rate limit lets us (20 a second)."""
        self._now.set()

    async def stop(self, goodbye: bool = True) -> None:
        """The last beat; with `goodbye` readers drop us now and not by age."""
        self._fabric.remove_on_reconnect(self._on_reconnect)
        if self._task is None:
            return
        task, self._task = self._task, None
        await end(task)
        if goodbye:
            await self._fabric.publish(_subject_of(self._describe()), b"", headers={"KV-Operation": "DEL"})
            await self._fabric.flush()

    async def _on_reconnect(self) -> None:
        self.beat_now()

    async def _run(self) -> None:
        while True:
            await sleep_until(self._now, self._every)
            try:
                await self._beat()
            except Exception:
                log.exception("a heartbeat failed")
            await asyncio.sleep(_LEAST_GAP_S)

    async def _beat(self) -> None:
        if not self._fabric.connected:
            return  # an old beat, sent after a reconnect, would only mislead
        record = msgspec.structs.replace(self._describe(), beat=time.time())
        headers = {_CONNECTION_HEADER: self._fabric.connection_id}
        await self._fabric.publish(_subject_of(record), wire.pack(record), headers=headers)


class _Seen:
    """What a view knows of one key: the record, when it was heard, over which connection, until when it counts."""

    __slots__ = ("connection", "expires", "record")

    def __init__(self, record: Record, expires: float, connection: str) -> None:
        self.record = record
        self.expires = expires
        self.connection = connection


class PresenceView:
    """Who is alive, as heard here. Reading costs nothing between beats: lists are kept until something changes.
    While our own connection is down nobody grows old; all are given `max_age` again when it is back.

    `counters`: beats, goodbyes, gone (the server said so), expired, refused (unreadable, or another's name).
    """

    def __init__(self, fabric: Fabric, *, max_age: float = MAX_AGE_S, clock: Callable[[], float] | None = None) -> None:
        self._fabric = fabric
        self._max_age = max_age
        self._clock = clock or AwakeClock(_LOOK_S)
        self._bucket = Bucket(fabric, subjects.PRESENCE)
        self._seen: dict[str, _Seen] = {}
        self._said_goodbye: dict[str, float] = {}
        self._lists: dict[type, list[Any]] | None = None
        self._listed_until = 0.0
        self._callbacks: list[Callable[[], None]] = []
        self._subscriptions: list[Subscription] = []
        self._task: asyncio.Task[None] | None = None
        self.counters: Counter[str] = Counter()

    async def start(self) -> None:
        """Knows who is there when this returns (if the bucket could be read)."""
        self._subscriptions = [
            await self._fabric.subscribe(subjects.bucket_subject(subjects.PRESENCE, ">"), self._on_beat),
            await self._fabric.subscribe(subjects.GONE_SUBJECT, self._on_gone),
        ]
        self._fabric.on_reconnect(self._on_reconnect)
        await self._read_bucket()
        self._task = asyncio.create_task(self._expire(), name="presence")

    async def stop(self) -> None:
        self._fabric.remove_on_reconnect(self._on_reconnect)
        for subscription in self._subscriptions:
            await subscription.unsubscribe()
        await end(self._task)

    def nodes(self) -> list[Node]:
        return self._alive(Node)

    def replicas(self) -> list[Replica]:
        return self._alive(Replica)

    def gateways(self) -> list[Gateway]:
        return self._alive(Gateway)

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call back when something joined, left, or said something new (state, load) of itself."""
        self._callbacks.append(callback)

    def _alive(self, kind: type[Any]) -> list[Any]:
        """Those of `kind` whose beat is young enough. The list is shared: do not change it."""
        if self._lists is None or (self._clock() >= self._listed_until and self._fabric.connected):
            self._list()
        assert self._lists is not None
        return self._lists[kind]

    def _list(self) -> None:
        now, deaf = self._clock(), not self._fabric.connected
        alive = [seen for seen in self._seen.values() if deaf or seen.expires > now]
        self._lists = {kind: [s.record for s in alive if type(s.record) is kind] for kind in _KINDS.values()}
        self._listed_until = min((seen.expires for seen in alive), default=float("inf"))

    # What is heard.

    async def _on_beat(self, message: Msg) -> None:
        key, headers = self._bucket.key_of(message.subject), message.headers or {}
        if headers.get("KV-Operation") in ("DEL", "PURGE"):
            self._on_goodbye(key)
            return
        record = self._read(key, message.data)
        if record is not None:
            self.counters["beats"] += 1
            self._said_goodbye.pop(key, None)
            self._hear(key, record, self._max_age, headers.get(_CONNECTION_HEADER, ""))

    def _on_goodbye(self, key: str) -> None:
        self.counters["goodbyes"] += 1
        self._said_goodbye[key] = self._clock() + self._max_age
        if self._seen.pop(key, None) is not None:
            self._changed()

    async def _on_gone(self, message: Msg) -> None:
        """The server cut a connection: those who last spoke over it are gone until they speak again."""
        connection = message.data.decode("ascii", "replace")
        keys = [key for key, seen in self._seen.items() if connection and seen.connection == connection]
        for key in keys:
            del self._seen[key]
            self.counters["gone"] += 1
        if keys:
            self._changed()

    def _hear(self, key: str, record: Record, good_for: float, connection: str) -> None:
        before = self._seen.get(key)
        expires = self._clock() + good_for
        self._seen[key] = _Seen(record, expires, connection)
        if before is None or before.record != msgspec.structs.replace(record, beat=before.record.beat):
            self._changed()
        elif self._lists is not None:
            self._lists = None  # a younger beat: the same news to all but the lists

    def _read(self, key: str, data: bytes) -> Record | None:
        """The record of a key, if it is one and speaks for itself."""
        kind, _, name = key.partition(".")
        try:
            record: Record = wire.unpack(data, _KINDS[kind])
        except (KeyError, msgspec.MsgspecError) as error:
            self._refuse(key, repr(error))
            return None
        if _key_of(record) != key:
            self._refuse(key, f"it says to be {name and _key_of(record)}")
            return None
        return record

    def _refuse(self, key: str, why: str) -> None:
        if not self.counters["refused"]:
            log.warning("refused a heartbeat of %s: %s (later ones are only counted)", key, why)
        self.counters["refused"] += 1

    # What was there before, and what leaves in silence.

    async def _on_reconnect(self) -> None:
        good_until = self._clock() + self._max_age
        for seen in self._seen.values():
            seen.expires = max(seen.expires, good_until)
        self._lists = None
        await self._read_bucket()

    async def _read_bucket(self) -> None:
        """Take over who beat before we listened. How old a record is we know only against the others: all are
        stamped by one server's clock, which need not be ours."""
        try:
            entries = await self._bucket.entries()
        except Unavailable as error:
            log.info("presence could not be read, waiting for heartbeats: %s", error)
            return
        newest = max((_stamp_of(entry) for entry in entries), default=0.0)
        for entry in entries:
            left = self._max_age - (newest - _stamp_of(entry))
            if left > 0 and entry.value is not None and not self._knows_better(entry.key):
                record = self._read(entry.key, entry.value)
                if record is not None:
                    self._hear(entry.key, record, left, entry.headers.get(_CONNECTION_HEADER, ""))

    def _knows_better(self, key: str) -> bool:
        """Whether we heard of it ourselves, lately: that is younger than the bucket's answer."""
        now, seen = self._clock(), self._seen.get(key)
        return (seen is not None and seen.expires > now) or self._said_goodbye.get(key, 0.0) > now

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            now = self._clock()
            if not self._fabric.connected:
                continue
            old = [key for key, seen in self._seen.items() if seen.expires <= now]
            for key in old:
                del self._seen[key]
            self.counters["expired"] += len(old)
            for key in [key for key, until in self._said_goodbye.items() if until <= now]:
                del self._said_goodbye[key]
            if old:
                self._changed()

    def _changed(self) -> None:
        self._lists = None
        call_all(self._callbacks)


class DisconnectWatch:
    """Passes the server's disconnect events on to the views. For platform processes; several do no harm."""

    def __init__(self, fabric: Fabric, system_credentials: Credentials) -> None:
        self._fabric = fabric
        self._credentials = system_credentials
        self._system: Fabric | None = None

    async def start(self) -> None:
        """
        Raises:
            SetupError: the server refuses the system credentials.
        """
        self._system = await Fabric.connect(self._credentials, name="disconnect-watch")
        await self._system.subscribe("$SYS.ACCOUNT.*.DISCONNECT", self._on_disconnect)

    async def stop(self) -> None:
        if self._system is not None:
            await self._system.close()

    async def _on_disconnect(self, message: Msg) -> None:
        try:
            event = msgspec.json.decode(message.data, type=_DisconnectEvent)
        except msgspec.MsgspecError as error:
            log.warning("unreadable disconnect event: %s", error)
            return
        await self._fabric.publish(subjects.GONE_SUBJECT, f"{event.server.id}/{event.client.id}".encode())


class _EventServer(msgspec.Struct):
    id: str


class _EventClient(msgspec.Struct):
    id: int


class _DisconnectEvent(msgspec.Struct):
    """The part of the server's event that names the connection."""

    server: _EventServer
    client: _EventClient


def _key_of(record: Record) -> str:
    if isinstance(record, Replica):
        return f"replica.{record.node}.{record.id}"
    return f"{'node' if isinstance(record, Node) else 'gateway'}.{record.id}"


def _subject_of(record: Record) -> str:
    return subjects.bucket_subject(subjects.PRESENCE, _key_of(record))


def _stamp_of(entry: Entry) -> float:
    """Unix seconds on the server's clock. Python reads six digits of the fraction, the server writes nine."""
    text = entry.stamp.removesuffix("Z").split("+")[0]
    whole, _, fraction = text.partition(".")
    try:
        moment = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.UTC)
    except ValueError:
        return 0.0
    return moment.timestamp() + (float(f"0.{fraction}") if fraction else 0.0)
