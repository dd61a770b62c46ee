"""One of several: a lease in a bucket, taken and renewed by compare-and-set.

No clock is compared with another machine's. A candidate that sees the lease unchanged for `ttl` seconds of its
own time takes it; a holder that could not renew it for three quarters of that steps down first. So at most one
leads, as long as a process that hangs does not act on what it believed before (level-triggered work is safe).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

import msgspec
from nats.aio.msg import Msg

from springtide.core import wire
from springtide.fabric import subjects
from springtide.fabric.connection import Fabric, Subscription
from springtide.fabric.kv import Bucket, Conflict, Entry, Unavailable
from springtide.fabric.tasks import call_all, end, sleep_until

log = logging.getLogger(__name__)


class _Lease(msgspec.Struct, frozen=True):
    """Who leads; "" when the last one left in order."""

    holder: str


class Leadership:
    """One candidate of the election `name`. `candidate_id` must be unique among all that ever run."""

    def __init__(self, fabric: Fabric, name: str, candidate_id: str, ttl: float = 2.0) -> None:
        self.name = subjects.check_token("election", name)
        self._fabric = fabric
        self._me = candidate_id
        self._ttl = ttl
        self._bucket = Bucket(fabric, subjects.LEADERS)
        self._callbacks: list[Callable[[], None]] = []
        self._subscription: Subscription | None = None
        self._task: asyncio.Task[None] | None = None
        self._look = asyncio.Event()
        self._now = time.monotonic
        self._revision = 0  # of the lease as last seen
        self._seen_at = 0.0  # when it was first seen so
        self._leads_until = 0.0
        self._leads = False

    @property
    def is_leader(self) -> bool:
        """Whether we lead, this very moment."""
        return self._leads and self._now() < self._leads_until

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call back when we begin to lead, and when we no longer do: `is_leader` says which."""
        self._callbacks.append(callback)

    async def start(self) -> None:
        subject = subjects.bucket_subject(subjects.LEADERS, self.name)
        self._subscription = await self._fabric.subscribe(subject, self._on_lease)
        self._task = asyncio.create_task(self._run(), name=f"election {self.name}")

    async def stop(self) -> None:
        """Leave in order: another takes over at once."""
        await end(self._task)
        if self._subscription is not None:
            await self._subscription.unsubscribe()
        if self.is_leader:
            self._set(False)
            with contextlib.suppress(Conflict, Unavailable):
                await self._bucket.put(self.name, wire.pack(_Lease("")), expect=self._revision, timeout=0.5)

    async def _on_lease(self, message: Msg) -> None:
        if not self._leads:  # the news may overtake its own storage: look a moment later
            asyncio.get_running_loop().call_later(0.01, self._look.set)

    async def _run(self) -> None:
        while True:
            try:
                await (self._renew() if self._leads else self._try())
            except Unavailable:
                pass  # the lease runs out, ours as well as another's
            except Exception:
                log.exception("election %s", self.name)
            if self._leads and not self.is_leader:
                self._set(False)
            await sleep_until(self._look, self._ttl / 4)

    async def _renew(self) -> None:
        started = self._now()
        try:
            await self._write(started)
        except Conflict:  # another holds it; or our last write came through and its answer did not
            self._set(False)

    async def _try(self) -> None:
        """Take the lease if it is free, or has not moved for its whole time."""
        entry = await self._bucket.get(self.name, timeout=self._ttl / 4)
        now = self._now()
        if entry is None:
            self._revision = 0
        elif entry.revision != self._revision:
            self._revision, self._seen_at = entry.revision, now
            if _holder(entry):
                return
        elif _holder(entry) and now - self._seen_at < self._ttl:
            return
        try:
            await self._write(now)
        except Conflict:
            self._look.set()  # another was faster: see who
            return
        self._set(True)

    async def _write(self, started: float) -> None:
        """Put our name on the lease; it holds from when we began to write."""
        lease = wire.pack(_Lease(self._me))
        self._revision = await self._bucket.put(self.name, lease, expect=self._revision, timeout=self._ttl / 4)
        self._leads_until = started + 0.75 * self._ttl

    def _set(self, leads: bool) -> None:
        if leads == self._leads:
            return
        self._leads = leads
        self._seen_at = self._now()
        log.info("%s %s of %s", self._me, "is leader" if leads else "is no longer leader", self.name)
        call_all(self._callbacks)


def _holder(entry: Entry) -> str:
    """Who holds the lease; "" if nobody does, or it can't be read."""
    if entry.value is None:
        return ""
    try:
        return wire.unpack(entry.value, _Lease).holder
    except msgspec.MsgspecError:
        return ""
