"""The replica's end of request streams. See `streams` for the protocol."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from nats.aio.msg import Msg

from springtide.core import wire
from springtide.core.errors import InvalidRequest, RequestError
from springtide.core.request import Delta, End, Request, TokenCounts
from springtide.fabric import subjects
from springtide.fabric.awake import AwakeClock
from springtide.fabric.connection import Fabric, Subscription
from springtide.fabric.stream_keep import Keep, Kept
from springtide.fabric.stream_parts import Assembler
from springtide.fabric.stream_wire import (
    FRAME_VERSION,
    MAX_BATCH_BYTES,
    OLDEST_VERSION,
    Answer,
    Backlog,
    Control,
    Finding,
    Frame,
    OpenPart,
    Outgoing,
    StreamKey,
    Turn,
    common_version,
    decode_control,
    decode_open,
    encode,
    encode_batches,
    encode_frame,
    is_ours,
    peek,
)
from springtide.fabric.tasks import end

log = logging.getLogger(__name__)

T = TypeVar("T", OpenPart, Control)

GATEWAY_PATIENCE_S = 6.0  # it gives a sign of life each second
ORPHAN_S = 60.0
_TICK_S = 0.5


class _Gateway:
    """What a replica knows of one."""

    __slots__ = ("heard_at", "speaks")

    def __init__(self) -> None:
        self.heard_at = 0.0
        self.speaks = OLDEST_VERSION


class StreamServer:
    """All request streams that run on one replica. Call it from one event loop only.

    `on_open(key, request, gateway, turn)` starts a request, which came on the turn of that serial: it must answer soon
    with `emit(key, [])` or with a refusal, then emit what comes, and an `end` at last. `on_cancel` says that nobody
    wants it any more: nothing need be emitted after that.

    `on_backlog(gateway, backlogs)` is all that waits there, whenever that changes and once a second; `on_declined`
    names turns that are not needed; `on_gateway_lost` says that a gateway has been silent for long, or has nothing
    here any more. Turns are sent once: who grants them must take back those that nobody uses.

    `counters`: opened, refused, duplicates (opened twice), superseded, cancelled, taken_over, gateways_lost,
    streams_orphaned (their gateway died), replays, frames, frames_replayed, unsent, turns_unsent, after_end (emitted
    for a stream that is over), evicted (streams dropped to keep within `max_bytes`), parts_expired, garbage,
    wrong_version.
    """

    def __init__(
        self,
        fabric: Fabric,
        node: str,
        replica: str,
        *,
        on_open: Callable[[StreamKey, Request, str, int | None], None],
        on_cancel: Callable[[StreamKey], None],
        on_backlog: Callable[[str, list[Backlog]], None] = lambda gateway, backlogs: None,
        on_declined: Callable[[str, list[int]], None] = lambda gateway, serials: None,
        on_gateway_lost: Callable[[str], None] = lambda gateway: None,
        keep_s: float = 60.0,
        max_bytes: int = 64 * 2**20,
    ) -> None:
        self.node = subjects.check_token("node", node)
        self.replica = subjects.check_token("replica", replica)
        self.counters: Counter[str] = Counter()
        self._fabric = fabric
        self._on_open = on_open
        self._on_cancel = on_cancel
        self._on_backlog = on_backlog
        self._on_declined = on_declined
        self._on_gateway_lost = on_gateway_lost
        self._keep_s = keep_s
        self._kept = Keep(max_bytes)
        self._parts = Assembler(self.counters)
        self._closed: dict[StreamKey, float] = {}  # cancelled: a late copy of the opening must not start it again
        self._gateways: dict[str, _Gateway] = {}
        self._outbox: dict[str, Outgoing] = {}
        self._sending = asyncio.Lock()
        self._subscriptions: list[Subscription] = []
        self._task: asyncio.Task[None] | None = None
        self._now = AwakeClock(_TICK_S)

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
        stream = self._kept.streams.get(key)
        if stream is None or stream.ended_at is not None:
            self.counters["after_end"] += 1
            return
        frame = encode_frame(key, Frame(stream.next, deltas, end, prompt_tokens))
        if len(frame) > MAX_BATCH_BYTES:
            self._emit_halves(key, deltas, end, len(frame))
            return
        self._kept.append(stream, frame)
        if end is not None:
            self._kept.end(stream, self._now())
        if stream.orphaned_at is None:
            self._outgoing(stream.gateway).frames.append(frame)
        if self._kept.over:
            self._shrink()

    def _emit_halves(self, key: StreamKey, deltas: list[Delta], end: End | None, size: int) -> None:
        if len(deltas) < 2:
            raise ValueError(f"a delta of {size} bytes does not fit into a message")
        middle = len(deltas) // 2
        self.emit(key, deltas[:middle])
        self.emit(key, deltas[middle:], end)

    def grant(self, gateway: str, turns: list[Turn]) -> None:
        """Leave for the gateway to send requests. It leaves with the next `flush`."""
        self._outgoing(gateway).turns.extend(turns)

    async def flush(self) -> None:
        """Send all that was emitted since, one message per gateway (more only if it is very much)."""
        async with self._sending:  # two at once could change the order of large batches
            while self._outbox:
                gateway, outgoing = self._outbox.popitem()
                await self._send(gateway, outgoing)

    async def _send(self, gateway: str, outgoing: Outgoing) -> None:
        if not self._fabric.connected:
            self.counters["unsent"] += len(outgoing.frames)  # kept anyway, and sent again after the reconnect
            self.counters["turns_unsent"] += len(outgoing.turns)
            return
        self.counters["frames"] += len(outgoing.frames)
        known = self._gateways.get(gateway)
        version = common_version(known.speaks if known is not None else OLDEST_VERSION)
        subject = subjects.frames_subject(gateway, self.node)
        limit = min(MAX_BATCH_BYTES, self._fabric.nc.max_payload // 2)
        for message in encode_batches(version, self.replica, outgoing, limit):
            await self._fabric.publish(subject, message)

    def _outgoing(self, gateway: str) -> Outgoing:
        outgoing = self._outbox.get(gateway)
        if outgoing is None:
            outgoing = self._outbox[gateway] = Outgoing()
        return outgoing

    def _answer_unknown(self, key: StreamKey, gateway: str) -> None:
        self._outgoing(gateway).answers.append(Answer(*key, "unknown"))

    def _answer_taken(self, key: StreamKey, gateway: str) -> None:
        known = self._gateways.get(gateway)
        understands = known is not None and known.speaks >= 2
        self._outgoing(gateway).answers.append(Answer(*key, "taken" if understands else "unknown"))

    # What comes in: openings.

    async def _on_open_message(self, message: Msg) -> None:
        part = self._decode(decode_open, message.data)
        if part is not None:
            self._heard(part.gateway, part.speaks)
            self._take_part(part)
        await self.flush()

    def _take_part(self, part: OpenPart) -> None:
        key = StreamKey(part.request_id, part.attempt)
        stream = self._kept.streams.get(key)
        if stream is not None and stream.gateway == part.gateway:
            self.counters["duplicates"] += 1
            if part.part == 0:
                self._replay(key, part.gateway, 0)
        elif stream is not None or key in self._closed or self._is_superseded(key):
            self._answer_unknown(key, part.gateway)
        else:
            packed = self._parts.add(key, part, self._now())
            if packed is not None:
                self._open(key, packed, part.gateway, part.turn)

    def _is_superseded(self, key: StreamKey) -> bool:
        latest = self._kept.latest(key.request_id)
        return latest is not None and latest.key.attempt > key.attempt

    def _open(self, key: StreamKey, packed: bytes, gateway: str, turn: int | None) -> None:
        earlier = self._kept.latest(key.request_id)
        if earlier is not None:
            self.counters["superseded"] += 1
            self._cancel(earlier.key)
        stream = self._kept.open(key, gateway)
        self.counters["opened"] += 1
        try:
            request = wire.unpack(packed, Request)
            if request.fingerprint:
                self._kept.make_findable(stream, request)
            self._on_open(key, request, gateway, turn)
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

    # What comes in: acknowledgements, replays, cancels, signs of life, and what concerns more than one stream.

    async def _on_control_message(self, message: Msg) -> None:
        control = self._decode(decode_control, message.data)
        if control is not None:
            self._heard(control.gateway, control.speaks)
            self._take_control(control)
        await self.flush()

    def _take_control(self, control: Control) -> None:
        gateway = control.gateway
        for request_id, attempt, number in control.acks:
            stream = self._kept.streams.get(StreamKey(request_id, attempt))
            if stream is not None and stream.gateway == gateway:
                self._kept.acknowledge(stream, number)
        for key in control.takes:  # before the cancels: one may end what it has just taken
            self._hand_over(key, gateway)
        for key in control.releases:
            self._release(key, gateway)
        for key in control.cancels:
            self._cancel_for(gateway, key)
        for request_id, attempt, number in control.asks:
            self._replay(StreamKey(request_id, attempt), gateway, number)
        for request_id in control.finds:
            self._outgoing(gateway).findings.append(self._find(request_id))
        if control.ping:
            self._outgoing(gateway)  # a batch that says nothing says that we live
        if control.declined:  # before the backlog, which is what waits without them
            self._call(self._on_declined, gateway, control.declined)
        if control.backlogs is not None:
            self._call(self._on_backlog, gateway, control.backlogs)

    def _replay(self, key: StreamKey, gateway: str, number: int) -> None:
        stream = self._kept.streams.get(key)
        if stream is not None and stream.gateway != gateway:
            self._answer_taken(key, gateway)
            return
        frames = stream.since(number) if stream is not None else None
        if frames is None:
            self._answer_unknown(key, gateway)
        elif not frames:
            self._outgoing(gateway).answers.append(Answer(*key, "alive"))
        else:
            self._send_again(frames, gateway)

    def _send_again(self, frames: list[bytes], gateway: str) -> None:
        self.counters["replays"] += 1
        self.counters["frames_replayed"] += len(frames)
        self._outgoing(gateway).frames.extend(frames)

    def _find(self, request_id: str) -> bytes:
        stream = self._kept.latest(request_id)
        if stream is None or not stream.whole or stream.finding is None:
            return encode(Finding(request_id))
        return stream.finding

    def _hand_over(self, key: StreamKey, gateway: str) -> None:
        """The stream speaks to this gateway from now on, and says all of it again."""
        stream = self._kept.streams.get(key)
        if stream is None or not stream.whole:
            self._answer_unknown(key, gateway)
            return
        if stream.gateway != gateway:
            self.counters["taken_over"] += 1
            if stream.gateway:
                self._answer_taken(key, stream.gateway)
            stream.gateway = gateway
        stream.acked = 0
        stream.orphaned_at = None
        if stream.frames:
            self._send_again(stream.frames, gateway)
        else:
            self._outgoing(gateway).answers.append(Answer(*key, "alive"))

    def _release(self, key: StreamKey, gateway: str) -> None:
        """Its gateway does not read it any more: it waits for another."""
        stream = self._kept.streams.get(key)
        if stream is not None and stream.gateway == gateway:
            stream.gateway = ""
            self._orphan(stream, self._now())

    def _cancel_for(self, gateway: str, key: StreamKey) -> None:
        """Confirmed in any case; but a gateway can't end what another has taken over."""
        stream = self._kept.streams.get(key)
        if stream is None or stream.gateway == gateway:
            self._cancel(key)
        self._answer_unknown(key, gateway)

    def _cancel(self, key: StreamKey) -> None:
        """Nobody wants it: forget its frames, and have its work stopped if it goes on."""
        self._closed[key] = self._now()
        self._parts.drop(key)
        stream = self._kept.streams.get(key)
        if stream is None:
            return
        self._kept.forget(stream)
        if stream.ended_at is None:
            self.counters["cancelled"] += 1
            self._call(self._on_cancel, key)

    def _call(self, callback: Callable[..., None], *arguments: Any) -> None:
        try:
            callback(*arguments)
        except Exception:
            log.exception("replica %s could not take what it was told: %s", self.replica, arguments)

    def _decode(self, decode: Callable[[bytes], T], data: bytes) -> T | None:
        """A message that we can read, or None (counted, and answered where the sender can be told)."""
        try:
            value = decode(data)
            if value.version >= OLDEST_VERSION:
                return value
        except msgspec.MsgspecError:
            pass
        version, gateway = peek(data)
        if version is None or is_ours(version):
            self.counters["garbage"] += 1
            return None
        self.counters["wrong_version"] += 1
        if self.counters["wrong_version"] == 1:
            log.error("gateway %s speaks frame version %s, this replica %s", gateway, version, FRAME_VERSION)
        self._heard(gateway, version)
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
            self._excuse_gateways(now)
        for name in [name for name, known in self._gateways.items() if now - known.heard_at > GATEWAY_PATIENCE_S]:
            self._lose_gateway(name, now)
        for stream in self._kept.orphaned_before(now - ORPHAN_S):
            self._cancel(stream.key)
        for stream in self._kept.ended_before(now - self._keep_s):
            self._kept.forget(stream)
        self._parts.expire(now)
        for key in [key for key, since in self._closed.items() if now - since > self._keep_s]:
            del self._closed[key]

    def _heard(self, gateway: str, speaks: int) -> None:
        known = self._gateways.get(gateway)
        if known is None:
            known = self._gateways[gateway] = _Gateway()
            for stream in self._kept.of(gateway):  # it was silent, not dead
                stream.orphaned_at = None
        known.heard_at = self._now()
        known.speaks = speaks

    def _excuse_gateways(self, now: float) -> None:
        """Their silence was the connection's."""
        for known in self._gateways.values():
            known.heard_at = now

    def _lose_gateway(self, gateway: str, now: float) -> None:
        """It is dead. Whoever asked there can ask again elsewhere for what can be found, and for nothing else."""
        del self._gateways[gateway]
        self._outbox.pop(gateway, None)
        streams = self._kept.of(gateway)
        orphans = [stream for stream in streams if stream.ended_at is None]
        if orphans:
            self.counters["gateways_lost"] += 1
            self.counters["streams_orphaned"] += len(orphans)
            goes_on = sum(stream.survives for stream in orphans)
            log.warning("gateway %s is silent: %d of its %d streams go on", gateway, goes_on, len(orphans))
        for stream in streams:
            self._orphan(stream, now)
        self._call(self._on_gateway_lost, gateway)

    def _orphan(self, stream: Kept, now: float) -> None:
        if stream.survives:
            stream.orphaned_at = now
        elif stream.ended_at is None:
            self._cancel(stream.key)

    def _shrink(self) -> None:
        for stream in self._kept.shrink():
            self.counters["evicted"] += 1
            self._cancel(stream.key)

    async def _on_reconnect(self) -> None:
        """What was sent in between may be lost: send again what is not acknowledged. Who has nothing of that hears
        that we are back."""
        self._excuse_gateways(self._now())
        for stream in self._kept.streams.values():
            if stream.orphaned_at is None:
                self._outgoing(stream.gateway)
                frames = stream.since(max(stream.acked, stream.first))
                if frames:
                    self._send_again(frames, stream.gateway)
        await self.flush()
