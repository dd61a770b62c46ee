"""The replica's end of request streams. See `streams` for the protocol."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import msgspec
from nats.aio.msg import Msg

from springtide.core import wire
from springtide.core.errors import InvalidRequest, RequestError
from springtide.core.request import Delta, End, Request, TokenCounts
from springtide.fabric import subjects
from springtide.fabric.connection import Fabric, Subscription
from springtide.fabric.stream_wire import (
    FRAME_VERSION,
    MAX_BATCH_BYTES,
    MAX_PARTS,
    Answer,
    Control,
    Frame,
    OpenPart,
    StreamKey,
    decode_control,
    decode_open,
    encode_batches,
    encode_frame,
    peek,
)
from springtide.fabric.tasks import end

log = logging.getLogger(__name__)

T = TypeVar("T", OpenPart, Control)

GATEWAY_PATIENCE_S = 15.0
_TICK_S = 1.0
_PARTS_PATIENCE_S = 10.0
_MAX_PARTS_BYTES = 128 * 2**20  # of requests that are not whole yet


class _Kept:
    """One attempt: its frames from `first` on, encoded, until nobody can want them any more."""

    __slots__ = ("acked", "ended_at", "first", "frames", "gateway", "key", "size")

    def __init__(self, key: StreamKey, gateway: str) -> None:
        self.key = key
        self.gateway = gateway
        self.frames: list[bytes] = []
        self.first = 0
        self.acked = 0  # all before this number were received
        self.size = 0
        self.ended_at: float | None = None

    @property
    def next(self) -> int:
        return self.first + len(self.frames)

    def since(self, number: int) -> list[bytes] | None:
        """The frames from `number` on; None if some of them are gone."""
        return self.frames[number - self.first :] if number >= self.first else None

    def free_acked(self) -> int:
        """Let go of what was received; the bytes freed."""
        count = min(max(self.acked - self.first, 0), len(self.frames))
        freed = sum(map(len, self.frames[:count]))
        del self.frames[:count]
        self.first += count
        self.size -= freed
        return freed


class _Parts:
    """A request that is not whole yet."""

    __slots__ = ("pieces", "since", "total")

    def __init__(self, total: int, since: float) -> None:
        self.pieces: dict[int, bytes] = {}
        self.total = total
        self.since = since


class _Outgoing:
    __slots__ = ("answers", "frames")

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.answers: list[Answer] = []


class StreamServer:
    """All request streams that run on one replica. Call it from one event loop only.

    `on_open` starts a request: it must answer soon with `emit(key, [])` or with a refusal, then emit what comes,
    and an `end` at last. `on_cancel` says that nobody wants it any more: nothing need be emitted after that.

    `counters`: opened, refused, duplicates (opened twice), superseded, cancelled, gateways_lost, streams_orphaned
    (their gateway died), replays, frames, frames_replayed, unsent, after_end (emitted for a stream that is over),
    evicted (streams dropped to keep within `max_bytes`), parts_expired, garbage, wrong_version.
    """

    def __init__(
        self,
        fabric: Fabric,
        node: str,
        replica: str,
        *,
        on_open: Callable[[StreamKey, Request], None],
        on_cancel: Callable[[StreamKey], None],
        keep_s: float = 60.0,
        max_bytes: int = 64 * 2**20,
    ) -> None:
        self.node = subjects.check_token("node", node)
        self.replica = subjects.check_token("replica", replica)
        self._fabric = fabric
        self._on_open = on_open
        self._on_cancel = on_cancel
        self._keep_s = keep_s
        self._max_bytes = max_bytes
        self._bytes = 0
        self._streams: dict[StreamKey, _Kept] = {}  # oldest first
        self._ended: dict[StreamKey, _Kept] = {}  # those of them that ended, oldest end first
        self._latest: dict[str, StreamKey] = {}  # a request's last attempt here
        self._closed: dict[StreamKey, float] = {}  # cancelled: a late copy of the opening must not start it again
        self._parts: dict[StreamKey, _Parts] = {}
        self._parts_bytes = 0
        self._gateways: dict[str, float] = {}  # when each was last heard
        self._outbox: dict[str, _Outgoing] = {}
        self._sending = asyncio.Lock()
        self._subscriptions: list[Subscription] = []
        self._task: asyncio.Task[None] | None = None
        self._now = time.monotonic
        self.counters: Counter[str] = Counter()

    async def start(self) -> None:
        self._subscriptions = [
            await self._fabric.subscribe(subjects.open_subject(self.node, self.replica), self._on_open_message),
            await self._fabric.subscribe(subjects.control_subject(self.node, self.replica), self._on_control_message),
        ]
        self._fabric.on_reconnect(self._on_reconnect)
        self._task = asyncio.create_task(self._run(), name=f"streams of {self.replica}")

    async def close(self) -> None:
        """Send what was emitted, and stop. Open streams are not cancelled: their owner ends them first."""
        self._fabric.remove_on_reconnect(self._on_reconnect)
        for subscription in self._subscriptions:
            await subscription.unsubscribe()
        await end(self._task)
        await self.flush()

    # What goes out.

    def emit(self, key: StreamKey, deltas: list[Delta], end: End | None = None, *, prompt_tokens: int = 0) -> None:
        """The next frame of a stream. It leaves with the next `flush`. `prompt_tokens` is for the first one.

        Raises:
            ValueError: one frame of more bytes than a message may have.
        """
        stream = self._streams.get(key)
        if stream is None or stream.ended_at is not None:
            self.counters["after_end"] += 1
            return
        frame = encode_frame(key, Frame(stream.next, deltas, end, prompt_tokens))
        if len(frame) > MAX_BATCH_BYTES:
            self._emit_halves(key, deltas, end, len(frame))
            return
        stream.frames.append(frame)
        stream.size += len(frame)
        self._bytes += len(frame)
        outgoing = self._outbox.get(stream.gateway)
        if outgoing is None:
            outgoing = self._outbox[stream.gateway] = _Outgoing()
        outgoing.frames.append(frame)
        if end is not None:
            stream.ended_at = self._now()
            self._ended[key] = stream
        if self._bytes > self._max_bytes:
            self._shrink()

    def _emit_halves(self, key: StreamKey, deltas: list[Delta], end: End | None, size: int) -> None:
        if len(deltas) < 2:
            raise ValueError(f"a delta of {size} bytes does not fit into a message")
        middle = len(deltas) // 2
        self.emit(key, deltas[:middle])
        self.emit(key, deltas[middle:], end)

    async def flush(self) -> None:
        """Send all that was emitted since, one message per gateway (more only if it is very much)."""
        async with self._sending:  # two at once could change the order of large batches
            while self._outbox:
                gateway, outgoing = self._outbox.popitem()
                await self._send(gateway, outgoing)

    async def _send(self, gateway: str, outgoing: _Outgoing) -> None:
        if not self._fabric.connected:
            self.counters["unsent"] += len(outgoing.frames)  # kept anyway, and sent again after the reconnect
            return
        self.counters["frames"] += len(outgoing.frames)
        subject = subjects.frames_subject(gateway, self.node)
        limit = min(MAX_BATCH_BYTES, self._fabric.nc.max_payload // 2)
        for message in encode_batches(self.replica, outgoing.frames, outgoing.answers, limit):
            await self._fabric.publish(subject, message)

    def _outgoing(self, gateway: str) -> _Outgoing:
        return self._outbox.setdefault(gateway, _Outgoing())

    # What comes in: openings.

    async def _on_open_message(self, message: Msg) -> None:
        part = self._decode(decode_open, message.data)
        if part is not None:
            self._take_part(part)
        await self.flush()

    def _take_part(self, part: OpenPart) -> None:
        self._gateways[part.gateway] = self._now()
        key = StreamKey(part.request_id, part.attempt)
        if key in self._streams:
            self.counters["duplicates"] += 1
            if part.part == 0:
                self._replay(key, part.gateway, 0)
        elif key in self._closed or self._is_superseded(key):
            self._outgoing(part.gateway).answers.append(Answer(*key, "unknown"))
        else:
            packed = self._assemble(key, part)
            if packed is not None:
                self._open(key, part.gateway, packed)

    def _is_superseded(self, key: StreamKey) -> bool:
        latest = self._latest.get(key.request_id)
        return latest is not None and latest.attempt > key.attempt

    def _assemble(self, key: StreamKey, part: OpenPart) -> bytes | None:
        """The whole packed request, once its last part is here."""
        if not (0 <= part.part < part.parts <= MAX_PARTS):
            self.counters["garbage"] += 1
            return None
        if part.parts == 1:
            return part.data
        parts = self._parts.setdefault(key, _Parts(part.parts, self._now()))
        if part.part not in parts.pieces and part.part < parts.total:
            parts.pieces[part.part] = part.data
            self._parts_bytes += len(part.data)
        if len(parts.pieces) < parts.total:
            while self._parts_bytes > _MAX_PARTS_BYTES:
                self._drop_parts(next(iter(self._parts)))
            return None
        packed = b"".join(parts.pieces[number] for number in range(parts.total))
        self._parts_bytes -= len(packed)
        del self._parts[key]
        return packed

    def _drop_parts(self, key: StreamKey) -> None:
        parts = self._parts.pop(key)
        self._parts_bytes -= sum(map(len, parts.pieces.values()))
        self.counters["parts_expired"] += 1

    def _open(self, key: StreamKey, gateway: str, packed: bytes) -> None:
        earlier = self._latest.get(key.request_id)
        if earlier is not None:
            self.counters["superseded"] += 1
            self._cancel(earlier)
        self._streams[key] = _Kept(key, gateway)
        self._latest[key.request_id] = key
        self.counters["opened"] += 1
        try:
            self._on_open(key, wire.unpack(packed, Request))
        except msgspec.MsgspecError as error:
            self._refuse(key, InvalidRequest(f"the replica can't read the request: {error}"))
        except RequestError as error:
            self._refuse(key, error)
        except Exception as error:
            log.exception("opening %s failed", key.request_id)
            self._refuse(key, RequestError(f"the replica failed to start the request: {error!r}"))

    def _refuse(self, key: StreamKey, error: RequestError) -> None:
        self.counters["refused"] += 1
        self.emit(key, [], End("failed", TokenCounts(), error.to_wire()))

    # What comes in: acknowledgements, replays, cancels, signs of life.

    async def _on_control_message(self, message: Msg) -> None:
        control = self._decode(decode_control, message.data)
        if control is not None:
            self._take_control(control)
        await self.flush()

    def _take_control(self, control: Control) -> None:
        self._gateways[control.gateway] = self._now()
        for request_id, attempt, number in control.acks:
            stream = self._streams.get(StreamKey(request_id, attempt))
            if stream is not None and stream.acked < number <= stream.next:
                stream.acked = number
                if stream.ended_at is not None and number == stream.next:
                    self._bytes -= stream.free_acked()  # all of it was received: nobody can want it again
        for key in control.cancels:
            self._cancel(key)
            self._outgoing(control.gateway).answers.append(Answer(*key, "unknown"))
        for request_id, attempt, number in control.asks:
            self._replay(StreamKey(request_id, attempt), control.gateway, number)

    def _replay(self, key: StreamKey, gateway: str, number: int) -> None:
        stream = self._streams.get(key)
        frames = stream.since(number) if stream is not None and stream.gateway == gateway else None
        if frames is None:
            self._outgoing(gateway).answers.append(Answer(*key, "unknown"))
        elif not frames:
            self._outgoing(gateway).answers.append(Answer(*key, "alive"))
        else:
            self.counters["replays"] += 1
            self.counters["frames_replayed"] += len(frames)
            self._outgoing(gateway).frames.extend(frames)

    def _cancel(self, key: StreamKey) -> None:
        """Nobody wants it: forget its frames, and have its work stopped if it goes on."""
        self._closed[key] = self._now()
        self._drop_pending(key)
        stream = self._streams.get(key)
        if stream is None:
            return
        self._forget(stream)
        if stream.ended_at is None:
            self.counters["cancelled"] += 1
            self._call_on_cancel(key)

    def _call_on_cancel(self, key: StreamKey) -> None:
        try:
            self._on_cancel(key)
        except Exception:
            log.exception("cancelling %s failed", key.request_id)

    def _drop_pending(self, key: StreamKey) -> None:
        if key in self._parts:
            self._drop_parts(key)

    def _forget(self, stream: _Kept) -> None:
        del self._streams[stream.key]
        self._ended.pop(stream.key, None)
        if self._latest.get(stream.key.request_id) == stream.key:
            del self._latest[stream.key.request_id]
        self._bytes -= stream.size

    def _decode(self, decode: Callable[[bytes], T], data: bytes) -> T | None:
        """A message of our version, or None (counted, and answered where the sender can be told)."""
        version, gateway = FRAME_VERSION, None
        try:
            value = decode(data)
            if value.version == FRAME_VERSION:
                return value
            version, gateway = value.version, value.gateway
        except msgspec.MsgspecError:
            version, gateway = peek(data)
        if version is None or version == FRAME_VERSION:
            self.counters["garbage"] += 1
            return None
        self.counters["wrong_version"] += 1
        if self.counters["wrong_version"] == 1:
            log.error("gateway %s speaks frame version %s, this replica %s", gateway, version, FRAME_VERSION)
        self._outgoing(gateway)  # an empty batch bears our version: the gateway sees what is wrong
        return None

    # What time brings.

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            try:
                self._tick(self._now())
                await self.flush()
            except Exception:
                log.exception("a turn of the stream server failed")

    def _tick(self, now: float) -> None:
        if not self._fabric.connected:
            self._gateways = dict.fromkeys(self._gateways, now)  # their silence is the connection's
        self._drop_orphans(now)
        for stream in list(self._ended.values()):
            assert stream.ended_at is not None
            if now - stream.ended_at < self._keep_s:
                break
            self._forget(stream)
        for key in [key for key, parts in self._parts.items() if now - parts.since > _PARTS_PATIENCE_S]:
            self._drop_parts(key)
        for key in [key for key, since in self._closed.items() if now - since > self._keep_s]:
            del self._closed[key]

    def _drop_orphans(self, now: float) -> None:
        """Gateways that are silent for long are dead, and nobody waits for their streams."""
        silent = [gateway for gateway, heard in self._gateways.items() if now - heard > GATEWAY_PATIENCE_S]
        for gateway in silent:
            del self._gateways[gateway]
            orphans = [s for s in self._streams.values() if s.gateway == gateway and s.ended_at is None]
            if orphans:
                self.counters["gateways_lost"] += 1
                self.counters["streams_orphaned"] += len(orphans)
                log.warning("gateway %s is silent: cancelling its %d streams", gateway, len(orphans))
            for stream in orphans:
                self._cancel(stream.key)

    def _shrink(self) -> None:
        """Back within the bound: first what was received, then what ended, then the oldest streams."""
        for stream in self._streams.values():
            if self._bytes <= self._max_bytes:
                return
            self._bytes -= stream.free_acked()
        for stream in [*self._ended.values(), *self._streams.values()]:
            if self._bytes <= self._max_bytes:
                return
            if stream.key in self._streams:
                self.counters["evicted"] += 1
                self._cancel(stream.key)

    async def _on_reconnect(self) -> None:
        """What was sent in between may be lost: send again what is not acknowledged."""
        now = self._now()
        self._gateways = dict.fromkeys(self._gateways, now)
        for stream in self._streams.values():
            frames = stream.since(max(stream.acked, stream.first))
            if frames:
                self.counters["replays"] += 1
                self.counters["frames_replayed"] += len(frames)
                self._outgoing(stream.gateway).frames.extend(frames)
        await self.flush()
