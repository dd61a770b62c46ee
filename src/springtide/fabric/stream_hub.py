"""The gateway's end of request streams. See `streams` for the protocol."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter

import msgspec
from nats.aio.msg import Msg

from springtide.core import wire
from springtide.core.request import Request
from springtide.fabric import subjects
from springtide.fabric.connection import Fabric, Subscription
from springtide.fabric.stream_wire import (
    FRAME_VERSION,
    MAX_PART_BYTES,
    MAX_PARTS,
    Control,
    Frame,
    StreamKey,
    decode_batch,
    encode,
    peek,
    split_request,
)
from springtide.fabric.tasks import end, sleep_until

log = logging.getLogger(__name__)

TICK_S = 0.1  # acknowledgements are gathered this long
LIFE_SIGN_S = 1.0
OPEN_AGAIN_S = 1.0
OPEN_PATIENCE_S = 5.0
SILENCE_S = 2.0  # of one stream, before we ask
PROBE_S = 1.0
PROBES = 2
_ASK_AGAIN_S = 0.5
_CANCEL_TRIES = 5
_MAX_CANCELLING = 4096


class StreamLost(Exception):
    """No more can come of this attempt; `reason` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ClientStream:
    """One attempt at one request, as the gateway sees it. Read it until a frame has an `end`, or `cancel` it."""

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
        "_probes",
        "_ready",
        "_waiter",
        "key",
        "node",
        "replica",
    )

    def __init__(self, hub: StreamHub, key: StreamKey, node: str, replica: str, parts: list[bytes], now: float) -> None:
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
        self._parts: list[bytes] | None = parts  # kept until the replica is known to have them
        self._opened_at = now
        self._parts_sent_at = now
        self._heard_at = now
        self._asked_at = 0.0
        self._probes = 0

    async def frames(self) -> list[Frame]:
        """Every frame that is there: in order, none missing, none twice. Waits for the first.

        Raises:
            StreamLost: no more can come, and all that came was returned before.
        """
        while not self._ready:
            if self._done:
                raise StreamLost(self._lost or "the stream has ended")
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

    def lose(self, reason: str) -> None:
        """The replica is known to be gone: `frames` raises StreamLost(reason) after what came before."""
        self._finish(reason)

    def _finish(self, reason: str) -> None:
        if not self._done:
            self._done, self._lost = True, reason
            self._hub._abandon(self)
            self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _heard(self, now: float) -> None:
        """The replica has the request, and lives."""
        self._heard_at = now
        self._probes = 0
        self._parts = None


class _Peer:
    """What goes to one replica with the next message."""

    __slots__ = ("asks", "cancels", "ended", "node", "replica", "sent_at", "streams", "urgent")

    def __init__(self, node: str, replica: str) -> None:
        self.node = node
        self.replica = replica
        self.streams: dict[StreamKey, ClientStream] = {}
        self.ended: list[tuple[str, int, int]] = []  # their last acknowledgement
        self.asks: set[StreamKey] = set()
        self.cancels: dict[StreamKey, tuple[int, float]] = {}  # tries left, when to try (again)
        self.urgent = False
        self.sent_at = 0.0

    @property
    def idle(self) -> bool:
        return not (self.streams or self.ended or self.cancels)


class StreamHub:
    """All request streams of one gateway process.

    `counters`: opened, opened_again, frames, duplicates, gaps, stale (frames of streams that are over or were
    never ours), probes, replays_asked, lost, cancelled, garbage, wrong_version.
    """

    def __init__(self, fabric: Fabric, gateway_id: str) -> None:
        self.gateway_id = subjects.check_token("gateway", gateway_id)
        self._fabric = fabric
        self._streams: dict[tuple[str, int], ClientStream] = {}
        self._peers: dict[tuple[str, str], _Peer] = {}
        self._subscription: Subscription | None = None
        self._task: asyncio.Task[None] | None = None
        self._urgent = asyncio.Event()
        self._now = time.monotonic
        self._node_at = len(subjects.frames_subject(gateway_id, ""))
        self.counters: Counter[str] = Counter()

    async def start(self) -> None:
        subject = subjects.frames_subject(self.gateway_id, "*")
        self._subscription = await self._fabric.subscribe(subject, self._on_message)
        self._fabric.on_reconnect(self._on_reconnect)
        self._task = asyncio.create_task(self._run(), name="stream hub")

    async def close(self) -> None:
        """Cancel what is open, and tell the replicas."""
        for stream in list(self._streams.values()):
            stream.lose("the gateway stops")
        self._fabric.remove_on_reconnect(self._on_reconnect)
        await end(self._task)
        await self._tick()
        if self._subscription is not None:
            await self._subscription.unsubscribe()

    async def open(self, request: Request, attempt: int, node: str, replica: str) -> ClientStream:
        """Send a request to a replica. Its first frame says whether it is accepted.

        Raises:
            ValueError: this attempt is open already, or the request is too large for any replica.
        """
        key = StreamKey(request.id, attempt)
        packed = wire.pack(request)
        if key in self._streams:
            raise ValueError(f"attempt {attempt} of {request.id} is open already")
        if len(packed) > MAX_PARTS * MAX_PART_BYTES:
            raise ValueError(f"a request of {len(packed)} bytes is more than a replica takes")
        parts = split_request(self.gateway_id, key, packed)
        stream = ClientStream(self, key, node, replica, parts, self._now())
        self._streams[key] = stream
        self._peer(node, replica).streams[key] = stream
        self.counters["opened"] += 1
        try:
            await self._send_parts(stream)
        except BaseException:
            stream.cancel()
            raise
        return stream

    async def _send_parts(self, stream: ClientStream) -> None:
        stream._parts_sent_at = self._now()
        subject = subjects.open_subject(stream.node, stream.replica)
        for part in stream._parts or ():
            await self._fabric.publish(subject, part)

    def _peer(self, node: str, replica: str) -> _Peer:
        peer = self._peers.get((node, replica))
        if peer is None:
            peer = self._peers[node, replica] = _Peer(node, replica)
        return peer

    # What comes in. This is the hot path: no task, no lock, one wake-up per stream and message.

    async def _on_message(self, message: Msg) -> None:
        node = message.subject[self._node_at :]  # the server lets a node publish under its own name only
        try:
            batch = decode_batch(message.data)
        except msgspec.MsgspecError as error:
            self._on_unreadable(node, message.data, error)
            return
        if batch.version != FRAME_VERSION:
            self._on_unreadable(node, message.data, None)
            return
        now, streams, replica = self._now(), self._streams, batch.replica
        for request_id, attempt, frame in batch.frames:
            stream = streams.get((request_id, attempt))
            if stream is None or stream.node != node or stream.replica != replica:
                self._on_stale(node, replica, StreamKey(request_id, attempt))
            elif frame.number == stream._next:
                stream._next += 1
                stream._heard_at = now
                stream._ready.append(frame)
                if frame.number == 0:
                    stream._heard(now)
                if frame.end is not None:
                    self._on_end(stream)
                waiter = stream._waiter
                if waiter is not None and not waiter.done():
                    waiter.set_result(None)
            else:
                self._on_out_of_order(stream, frame.number, now)
        self.counters["frames"] += len(batch.frames)
        for answer in batch.answers:
            stream = streams.get((answer.request_id, answer.attempt))
            if stream is not None and stream.node == node and stream.replica == replica:
                self._on_answer(stream, answer.state, now)
            elif answer.state == "unknown":
                self._on_cancel_confirmed(node, replica, StreamKey(answer.request_id, answer.attempt))

    def _on_end(self, stream: ClientStream) -> None:
        stream._done = True
        del self._streams[stream.key]
        peer = self._peer(stream.node, stream.replica)
        del peer.streams[stream.key]
        peer.ended.append((*stream.key, stream._next))

    def _on_out_of_order(self, stream: ClientStream, number: int, now: float) -> None:
        """A number that came before is dropped. One that is too high shows a loss: what is missing is asked
        for, and everything from there on comes again."""
        stream._heard(now)
        if number < stream._next:
            self.counters["duplicates"] += 1
            return
        self.counters["gaps"] += 1
        if now - stream._asked_at >= _ASK_AGAIN_S:
            self._ask(stream, now, urgent=True)

    def _on_stale(self, node: str, replica: str, key: StreamKey) -> None:
        """Somebody still works for a stream that is over: an attempt that was given up, a cancel that was lost.
        Tell it (again) that nobody listens."""
        self.counters["stale"] += 1
        self._cancel_later(self._peer(node, replica), key, tries=1)

    def _on_answer(self, stream: ClientStream, state: str, now: float) -> None:
        if state == "alive":
            stream._heard(now)
        elif stream._parts is None:
            stream._finish(f"replica {stream.replica} does not know this request any more")
        else:
            stream._finish(f"replica {stream.replica} refuses this attempt")

    def _on_cancel_confirmed(self, node: str, replica: str, key: StreamKey) -> None:
        peer = self._peers.get((node, replica))
        if peer is not None:
            peer.cancels.pop(key, None)

    def _on_unreadable(self, node: str, data: bytes, error: Exception | None) -> None:
        version, replica = peek(data)
        if version is None or version == FRAME_VERSION:
            self.counters["garbage"] += 1
            if self.counters["garbage"] == 1:
                log.warning("unreadable frames from node %s: %s (later ones are only counted)", node, error)
            return
        self.counters["wrong_version"] += 1
        reason = f"replica {replica} speaks frame version {version}, this gateway {FRAME_VERSION}: update the older"
        peer = self._peers.get((node, replica))
        streams = list(peer.streams.values()) if peer is not None else []
        if streams:
            log.error("%s", reason)
        for stream in streams:
            stream._finish(reason)

    # What goes out, gathered.

    def _ask(self, stream: ClientStream, now: float, *, urgent: bool) -> None:
        stream._asked_at = now
        self.counters["replays_asked"] += 1
        peer = self._peer(stream.node, stream.replica)
        peer.asks.add(stream.key)
        if urgent:
            peer.urgent = True
            self._urgent.set()

    def _abandon(self, stream: ClientStream) -> None:
        """A stream is over before its end came: its replica must stop."""
        self.counters["cancelled" if stream._lost == "cancelled" else "lost"] += 1
        peer = self._peer(stream.node, stream.replica)
        self._streams.pop(stream.key, None)
        peer.streams.pop(stream.key, None)
        peer.asks.discard(stream.key)
        self._cancel_later(peer, stream.key, tries=_CANCEL_TRIES)
        peer.urgent = True
        self._urgent.set()

    def _cancel_later(self, peer: _Peer, key: StreamKey, *, tries: int) -> None:
        """With the next message to this replica; again each second until it confirms."""
        if key not in peer.cancels and len(peer.cancels) < _MAX_CANCELLING:
            peer.cancels[key] = (tries, 0.0)

    async def _run(self) -> None:
        while True:
            await sleep_until(self._urgent, TICK_S)
            try:
                await self._tick()
            except Exception:
                log.exception("a turn of the stream hub failed")

    async def _tick(self) -> None:
        now = self._now()
        if self._fabric.connected:
            for stream in list(self._streams.values()):
                await self._look_after(stream, now)
        for peer in list(self._peers.values()):
            await self._send_control(peer, now)
            if peer.idle:
                self._peers.pop((peer.node, peer.replica), None)

    async def _look_after(self, stream: ClientStream, now: float) -> None:
        """Open again what was not accepted, ask where it is silent, give up where nobody answers."""
        if stream._done:
            return
        if stream._parts is not None:
            if now - stream._opened_at > OPEN_PATIENCE_S:
                stream._finish(f"not accepted by replica {stream.replica} within {OPEN_PATIENCE_S:.0f} s")
            elif now - stream._parts_sent_at > OPEN_AGAIN_S:
                self.counters["opened_again"] += 1
                await self._send_parts(stream)
        elif now - stream._heard_at > SILENCE_S and now - stream._asked_at > PROBE_S:
            if stream._probes >= PROBES:
                stream._finish(f"replica {stream.replica} is silent")
                return
            stream._probes += 1
            self.counters["probes"] += 1
            self._ask(stream, now, urgent=False)

    async def _send_control(self, peer: _Peer, now: float) -> None:
        """Everything that one replica must hear, in one message; nothing if there is nothing to say."""
        if not self._fabric.connected:
            return
        moved = [stream for stream in peer.streams.values() if stream._next != stream._acked]
        cancels = [key for key, (_, due) in peer.cancels.items() if due <= now]
        lifeless = bool(peer.streams) and now - peer.sent_at >= LIFE_SIGN_S
        if not (moved or cancels or peer.ended or peer.asks or lifeless):
            return
        if not peer.urgent and now - peer.sent_at < TICK_S and not lifeless:
            return  # woken for another replica's sake
        acks = [(*stream.key, stream._next) for stream in moved] + peer.ended
        asks = [(*key, peer.streams[key]._next) for key in peer.asks if key in peer.streams]
        for stream in moved:
            stream._acked = stream._next
        for key in cancels:
            tries, _ = peer.cancels[key]
            peer.cancels[key] = (tries - 1, now + PROBE_S)
        peer.cancels = {key: left for key, left in peer.cancels.items() if left[0] > 0}
        peer.ended, peer.urgent, peer.sent_at = [], False, now
        peer.asks.clear()
        control = Control(FRAME_VERSION, self.gateway_id, acks, asks, cancels)
        await self._fabric.publish(subjects.control_subject(peer.node, peer.replica), encode(control))

    async def _on_reconnect(self) -> None:
        """What was sent in between may be lost, on either side: say all again, and ask for what is missing. The
        silence was the connection's, not the replicas'."""
        now = self._now()
        for stream in list(self._streams.values()):
            stream._heard_at = stream._opened_at = now
            stream._probes = 0
            stream._acked = -1
            if stream._parts is not None:
                await self._send_parts(stream)
            else:
                self._ask(stream, now, urgent=True)
        for peer in self._peers.values():
            peer.cancels = {key: (max(tries, 1), 0.0) for key, (tries, _) in peer.cancels.items()}
