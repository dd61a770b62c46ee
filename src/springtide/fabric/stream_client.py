"""One attempt at one request, as a gateway sees it. See `streams` for the protocol."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from springtide.fabric.stream_wire import Frame, StreamKey

if TYPE_CHECKING:  # the hub makes the streams
    from springtide.fabric.stream_hub import StreamHub

SILENCE_S = 0.75  # of one stream, before we ask what is missing
_LONGEST_SILENCE_S = 4.0  # a sequence that waits at its replica has nothing to say: ask less and less often


class StreamLost(Exception):
    """No more can come of this attempt; `reason` says why. `taken_over`: not here, but at another gateway."""

    def __init__(self, reason: str, *, taken_over: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.taken_over = taken_over


class ClientStream:
    """Read it until a frame has an `end`, or `cancel` it. All that is private belongs to its hub."""

    __slots__ = (
        "_acked",
        "_asked_at",
        "_done",
        "_heard_at",
        "_hub",
        "_lost",
        "_next",
        "_opened_at",
        "_parts",
        "_parts_sent_at",
        "_ready",
        "_silence",
        "_survives",
        "_taken_over",
        "_taking",
        "_waiter",
        "key",
        "node",
        "replica",
    )

    def __init__(
        self,
        hub: StreamHub,
        key: StreamKey,
        node: str,
        replica: str,
        now: float,
        *,
        parts: list[bytes] | None = None,
        survives: bool = False,
    ) -> None:
        """`parts` opens it; without them it is taken over from another gateway."""
        self.key = key
        self.node = node
        self.replica = replica
        self._hub = hub
        self._ready: list[Frame] = []
        self._waiter: asyncio.Future[None] | None = None
        self._next = 0  # the number that must come now; all before it came
        self._acked = 0  # what the replica was last told of `_next`
        self._done = False  # nothing more will be taken in: end, loss or cancel
        self._lost: str | None = None
        self._taken_over = False
        self._survives = survives  # another gateway can have it
        self._parts = parts  # kept until the replica is known to have them
        self._taking = parts is None  # until the replica is known to speak to us
        self._opened_at = now
        self._parts_sent_at = now
        self._heard_at = now
        self._asked_at = 0.0
        self._silence = SILENCE_S  # before we ask (again)

    async def frames(self) -> list[Frame]:
        """Every frame that is there: in order, none missing, none twice. Waits for the first.

        Raises:
            StreamLost: no more can come, and all that came was returned before.
        """
        while not self._ready:
            if self._done:
                raise StreamLost(self._lost or "the stream has ended", taken_over=self._taken_over)
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        ready, self._ready = self._ready, []
        return ready

    def cancel(self) -> None:
        """The client wants no more: tell the replica, unless the end has come. Harmless when repeated."""
        self._finish("cancelled")

    def let_go(self) -> None:
        """Stop reading, and let it run on: a gateway may take it over, this one too. Where that can't be (the request
        has no fingerprint, the replica is of version 1) this is a cancel."""
        if not self._done:
            self._hub._release(self)
            self._close("let go")

    def lose(self, reason: str) -> None:
        """The replica is known to be gone: `frames` raises StreamLost(reason) after what came before."""
        self._finish(reason)

    def _finish(self, reason: str) -> None:
        """It is over before its end came, and its replica must stop."""
        if not self._done:
            self._hub._abandon(self, cancelled=reason == "cancelled")
            self._close(reason)

    def _close(self, reason: str, *, taken_over: bool = False) -> None:
        self._done, self._lost, self._taken_over = True, reason, taken_over
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _heard(self, now: float) -> None:
        """The replica has the request, and lives."""
        self._heard_at = now
        self._parts = None
        self._taking = False

    def _is_silent(self, now: float) -> bool:
        return now - max(self._heard_at, self._asked_at) > self._silence

    def _asked(self, now: float) -> None:
        self._asked_at = now
        self._silence = min(_LONGEST_SILENCE_S, 2 * self._silence)
