"""The gateway's end of request streams. See `streams` for the protocol."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec
from nats.aio.msg import Msg

from springtide.core import wire
from springtide.core.request import Request
from springtide.fabric import subjects
from springtide.fabric.awake import AwakeClock
from springtide.fabric.connection import Fabric, Subscription
from springtide.fabric.stream_client import SILENCE_S, ClientStream
from springtide.fabric.stream_peer import TICK_S, Peer
from springtide.fabric.stream_search import Found, Search
from springtide.fabric.stream_wire import (
    FRAME_VERSION,
    MAX_PART_BYTES,
    MAX_PARTS,
    OLDEST_VERSION,
    Answer,
    Backlog,
    StreamKey,
    Turn,
    common_version,
    decode_batch,
    encode,
    is_ours,
    peek,
    split_request,
)
from springtide.fabric.tasks import end, sleep_until

log = logging.getLogger(__name__)

OPEN_AGAIN_S = 1.0
OPEN_PATIENCE_S = 5.0
SLOW_LINK = 2**20  # bytes a second: a long prompt may take that long to arrive
_LEAST_GAP_S = 0.01  # between two turns of the loop, however urgent
_ASKING_TICK_S = 0.025  # while somebody's life is in doubt
_ASK_AGAIN_S = 0.5  # for what is missing
_TAKE_AGAIN_S = 0.3
_FIND_AGAIN_S = 0.2
_RETURN_S = 1.0  # what cut us off may have cut off the replicas too
_LEAVING_S = 2.0  # for a question to leave us
_CANCEL_TRIES = 5
_FORGET_RELEASED_S = 60.0

OnTurns = Callable[[str, str, list[Turn]], None]


class StreamHub:
    """All request streams of one gateway process. `gateway_id` must be a new one at each start: what was opened under
    it and is not known here is cancelled. `open_patience`: seconds for a replica to accept a request; None: five.

    `counters`: opened, opened_again, taken_over (from other gateways), taken_away (by others), let_go, frames,
    duplicates, gaps, stale (frames of streams that are over or were never ours), probes (questions whether a replica
    lives), replays_asked, lost, cancelled, garbage, wrong_version.
    """

    def __init__(self, fabric: Fabric, gateway_id: str, *, open_patience: float | None = None) -> None:
        self.gateway_id = subjects.check_token("gateway", gateway_id)
        self._open_patience = open_patience
        self.counters: Counter[str] = Counter()
        self._fabric = fabric
        self._streams: dict[tuple[str, int], ClientStream] = {}
        self._peers: dict[tuple[str, str], Peer] = {}
        self._released: dict[StreamKey, float] = {}  # when; their replicas may not know it yet
        self._searches: dict[str, list[Search]] = {}
        self._turn_callbacks: list[OnTurns] = []
        self._subscription: Subscription | None = None
        self._task: asyncio.Task[None] | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self._urgent = asyncio.Event()
        self._now = AwakeClock(TICK_S)
        self._node_at = len(subjects.frames_subject(gateway_id, ""))

    async def start(self) -> None:
        subject = subjects.frames_subject(self.gateway_id, "*")
        self._subscription = await self._fabric.subscribe(subject, self._on_message)
        self._fabric.on_reconnect(self._on_reconnect)
        self._task = asyncio.create_task(self._run(), name="stream hub")

    async def close(self) -> None:
        """Cancel what is open, and tell the replicas; but what another gateway can take over is left running."""
        if self._subscription is not None:
            await self._subscription.unsubscribe()  # or their next frames would look like strangers'
        for stream in list(self._streams.values()):
            if stream._survives:
                stream.let_go()
            else:
                stream.lose("the gateway stops")
        for peer in self._peers.values():
            peer.advertise([])
        self._fabric.remove_on_reconnect(self._on_reconnect)
        await end(self._task)
        for task in list(self._leaving):
            await end(task)
        await self._tick()

    # Streams.

    async def open(
        self, request: Request, attempt: int, node: str, replica: str, *, turn: int | None = None
    ) -> ClientStream:
        """Send a request to a replica, on the turn of that serial. Its first frame says whether it is accepted.

        Raises:
            ValueError: this attempt is open already, or the request is too large for any replica.
        """
        key = StreamKey(request.id, attempt)
        packed = wire.pack(request)
        if key in self._streams:
            raise ValueError(f"attempt {attempt} of {request.id} is open already")
        if len(packed) > MAX_PARTS * MAX_PART_BYTES:
            raise ValueError(f"a request of {len(packed)} bytes is more than a replica takes")
        now, peer = self._now(), self._peer(node, replica)
        parts = split_request(common_version(peer.speaks), self.gateway_id, key, packed, turn)
        stream = ClientStream(self, key, node, replica, now, parts=parts, survives=bool(request.fingerprint))
        self._add(stream, peer, now)
        self.counters["opened"] += 1
        try:
            await self._send_parts(stream)
        except BaseException:
            stream.cancel()
            raise
        return stream

    async def find(self, request_id: str, replicas: Sequence[tuple[str, str]], timeout: float = 0.5) -> Found | None:
        """Ask these (node, replica) for a request that has a fingerprint: the latest attempt that another gateway, or
        this one, opened at one of them and that is there from its first frame on. None if none of them knows one,
        within `timeout` seconds."""
        search = Search(replicas)
        self._searches.setdefault(request_id, []).append(search)
        try:
            async with asyncio.timeout(timeout):
                while search.missing:
                    for node, replica in search.missing:
                        peer = self._peer(node, replica)
                        peer.finds.add(request_id)
                        self._hurry(peer)
                    await sleep_until(search.complete, _FIND_AGAIN_S)
        except TimeoutError:
            pass
        finally:
            self._searches[request_id].remove(search)
            if not self._searches[request_id]:
                del self._searches[request_id]
        return search.best

    async def take_over(self, found: Found) -> ClientStream:
        """The stream that was found, from frame 0 on. Whoever read it, here or at another gateway, loses it."""
        key = StreamKey(found.request_id, found.attempt)
        former = self._streams.get(key)
        if former is not None:
            self._on_taken(former)
        now, peer = self._now(), self._peer(found.node, found.replica)
        peer.cancels.pop(key, None)
        peer.releases.discard(key)
        self._released.pop(key, None)
        stream = ClientStream(self, key, found.node, found.replica, now, survives=True)
        self._add(stream, peer, now)
        self.counters["taken_over"] += 1
        self._ask(stream, now, urgent=True)
        return stream

    def suspect(self, node: str, replica: str) -> None:
        """Somebody says that this replica is gone: ask it now, and do not wait long for an answer. If it lives, and
        is only connected anew, nothing is lost."""
        peer = self._peers.get((node, replica))
        if peer is not None:
            peer.patience.suspect()
            self._urgent.set()

    def doubts(self, node: str, replica: str) -> bool:
        """Whether this replica has just let a question pass: it may be about to be lost."""
        peer = self._peers.get((node, replica))
        return peer is not None and peer.patience.doubtful

    # Turns.

    def advertise(self, node: str, replica: str, backlogs: list[Backlog]) -> None:
        """What waits here for turns of this replica, all of it. Told at once if it is news, and then each second."""
        peer = self._peer(node, replica)
        peer.advertise(backlogs)
        if peer.urgent:
            self._urgent.set()

    def on_turns(self, callback: OnTurns) -> None:
        """Call back with (node, replica, turns) when a replica grants some."""
        self._turn_callbacks.append(callback)

    def decline(self, node: str, replica: str, serials: list[int]) -> None:
        """Turns that nobody here needs any more."""
        peer = self._peer(node, replica)
        peer.declined += serials
        self._hurry(peer)

    # Bookkeeping.

    def _add(self, stream: ClientStream, peer: Peer, now: float) -> None:
        if not peer.streams:
            peer.patience.begin(now)  # until now it had no reason to speak
        peer.patience.excuse(now + _travel_s(stream))
        self._streams[stream.key] = peer.streams[stream.key] = stream

    def _peer(self, node: str, replica: str) -> Peer:
        peer = self._peers.get((node, replica))
        if peer is None:
            peer = self._peers[node, replica] = Peer(node, replica, self._now())
        return peer

    def _hurry(self, peer: Peer) -> None:
        peer.urgent = True
        self._urgent.set()

    async def _send_parts(self, stream: ClientStream) -> None:
        stream._parts_sent_at = self._now()
        subject = subjects.open_subject(stream.node, stream.replica)
        for part in stream._parts or ():
            await self._fabric.publish(subject, part)

    def _remove(self, stream: ClientStream) -> Peer:
        """Its frames are not taken in any more."""
        peer = self._peer(stream.node, stream.replica)
        self._streams.pop(stream.key, None)
        peer.streams.pop(stream.key, None)
        peer.asks.discard(stream.key)
        return peer

    def _abandon(self, stream: ClientStream, *, cancelled: bool) -> None:
        """A stream is over before its end came: its replica must stop."""
        self.counters["cancelled" if cancelled else "lost"] += 1
        peer = self._remove(stream)
        peer.cancel(stream.key, tries=_CANCEL_TRIES)
        self._hurry(peer)

    def _release(self, stream: ClientStream) -> None:
        """A stream is over here, and goes on at its replica."""
        if not (stream._survives and self._peer(stream.node, stream.replica).speaks >= 2):
            self._abandon(stream, cancelled=True)
            return
        self.counters["let_go"] += 1
        peer = self._remove(stream)
        peer.releases.add(stream.key)
        self._released[stream.key] = self._now()
        self._hurry(peer)

    # What comes in. This is the hot path: no task, no lock, one wake-up per stream and message.

    async def _on_message(self, message: Msg) -> None:
        node = message.subject[self._node_at :]  # the server lets a node publish under its own name only
        try:
            batch = decode_batch(message.data)
        except msgspec.MsgspecError as error:
            self._on_unreadable(node, message.data, error)
            return
        if batch.version < OLDEST_VERSION:
            self._on_unreadable(node, message.data, None)
            return
        now, streams, replica = self._now(), self._streams, batch.replica
        peer = self._peers.get((node, replica))
        if peer is not None:
            peer.patience.heard(now)
            peer.speaks = batch.speaks
        for request_id, attempt, frame in batch.frames:
            stream = streams.get((request_id, attempt))
            if stream is None or stream.node != node or stream.replica != replica:
                self._on_stale(node, replica, StreamKey(request_id, attempt))
            elif frame.number == stream._next:
                stream._next += 1
                stream._heard_at = now
                stream._silence = SILENCE_S
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
            self._on_answer(node, replica, answer, now)
        for finding in batch.findings:
            for search in self._searches.get(finding.request_id, ()):
                search.answered(node, replica, finding)
        if batch.turns:
            self._on_turns(node, replica, batch.turns)

    def _on_end(self, stream: ClientStream) -> None:
        stream._done = True
        self._remove(stream).ended.append((*stream.key, stream._next))

    def _on_out_of_order(self, stream: ClientStream, number: int, now: float) -> None:
        """A number that came before is dropped. One that is too high shows a loss: what is missing is asked
        for, and everything from there on comes again."""
        stream._heard_at = now
        if number < stream._next:
            self.counters["duplicates"] += 1
            return
        self.counters["gaps"] += 1
        if now - stream._asked_at >= _ASK_AGAIN_S:
            self._ask(stream, now, urgent=True)

    def _on_stale(self, node: str, replica: str, key: StreamKey) -> None:
        """Somebody still works for a stream that is over: an attempt that was given up, a cancel that was lost.
        Tell it (again) that nobody listens. Where another gateway took the stream over, that does no harm."""
        self.counters["stale"] += 1
        peer = self._peer(node, replica)
        if key in self._released:
            peer.releases.add(key)
        else:
            peer.cancel(key, tries=1)

    def _on_answer(self, node: str, replica: str, answer: Answer, now: float) -> None:
        key = StreamKey(answer.request_id, answer.attempt)
        stream = self._streams.get(key)
        if stream is None or stream.node != node or stream.replica != replica:
            peer = self._peers.get((node, replica))
            if answer.state != "alive" and peer is not None:
                peer.cancels.pop(key, None)  # confirmed
        elif answer.state == "alive":
            stream._heard(now)
        elif answer.state == "taken":
            self._on_taken(stream)
        elif stream._parts is None:
            stream._finish(f"replica {replica} does not know this request any more")
        else:
            stream._finish(f"replica {replica} refuses this attempt")

    def _on_taken(self, stream: ClientStream) -> None:
        self.counters["taken_away"] += 1
        self._remove(stream)
        stream._close("somebody else reads this stream now", taken_over=True)

    def _on_turns(self, node: str, replica: str, turns: list[Turn]) -> None:
        for callback in self._turn_callbacks:
            try:
                callback(node, replica, turns)
            except Exception:
                log.exception("turns of replica %s could not be used", replica)

    def _on_unreadable(self, node: str, data: bytes, error: Exception | None) -> None:
        version, replica = peek(data)
        if version is None or is_ours(version):
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

    def _ask(self, stream: ClientStream, now: float, *, urgent: bool = False) -> None:
        """For everything from the next number on; for the stream itself, if it is to be taken over."""
        stream._asked(now)
        self.counters["replays_asked"] += 1
        peer = self._peer(stream.node, stream.replica)
        (peer.takes if stream._taking else peer.asks).add(stream.key)
        if urgent:
            self._hurry(peer)

    async def _run(self) -> None:
        while True:
            asking = any(peer.patience.asking for peer in self._peers.values())
            await sleep_until(self._urgent, _ASKING_TICK_S if asking else TICK_S)
            try:
                await self._tick()
            except Exception:
                log.exception("a turn of the stream hub failed")
            await asyncio.sleep(_LEAST_GAP_S)

    async def _tick(self) -> None:
        now = self._now()
        if not self._fabric.connected:
            return
        asked = []
        for peer in list(self._peers.values()):
            if peer.streams and await self._judge(peer, now):
                asked.append(peer)
            control = peer.next_control(self.gateway_id, now)
            if control is not None:
                subject = subjects.control_subject(peer.node, peer.replica)
                await self._fabric.publish(subject, encode(control))
            if peer.idle:
                self._peers.pop((peer.node, peer.replica), None)
        for key in [key for key, since in self._released.items() if now - since > _FORGET_RELEASED_S]:
            del self._released[key]
        if asked:
            task = asyncio.create_task(self._see_them_leave(asked), name="questions")
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def _judge(self, peer: Peer, now: float) -> bool:
        """Give up a replica that is silent, or look after its streams. Whether it must be asked if it lives."""
        verdict = peer.patience.verdict(now)
        if verdict == "lost":
            self._lose(peer)
            return False
        if not peer.patience.asking:  # else it has a question to answer first
            for stream in list(peer.streams.values()):
                await self._look_after(stream, now)
        if verdict == "ask":
            await self._ask_whether_it_lives(peer, now)
        return verdict == "ask"

    def _lose(self, peer: Peer) -> None:
        log.warning("replica %s on %s is silent: %d streams are lost", peer.replica, peer.node, len(peer.streams))
        for stream in list(peer.streams.values()):
            stream.lose(f"replica {peer.replica} is silent")

    async def _ask_whether_it_lives(self, peer: Peer, now: float) -> None:
        """One question, however many streams it has. Version 1 answers only to such as concern a stream."""
        self.counters["probes"] += 1
        peer.patience.asked()
        peer.ping = peer.urgent = True
        if peer.speaks == 1:
            stream = min(peer.streams.values(), key=lambda stream: stream._parts is not None)
            if stream._parts is None:
                self._ask(stream, now)
            else:
                await self._send_parts(stream)

    async def _see_them_leave(self, asked: list[Peer]) -> None:
        """Time for an answer runs from when our server has the question."""
        left = await self._fabric.flush(_LEAVING_S)
        for peer in asked:
            if left:
                peer.patience.left(self._now())
            else:
                peer.patience.stuck()

    async def _look_after(self, stream: ClientStream, now: float) -> None:
        """Open again what was not accepted, ask where it is silent, give up what can't be opened."""
        if stream._taking:
            if now - stream._opened_at > OPEN_PATIENCE_S:
                stream._finish(f"replica {stream.replica} does not hand it over")
            elif now - stream._asked_at > _TAKE_AGAIN_S:
                self._ask(stream, now, urgent=True)
        elif stream._parts is not None:
            travel = _travel_s(stream)
            patience = travel + (OPEN_PATIENCE_S if self._open_patience is None else self._open_patience)
            if now - stream._opened_at > patience:
                stream._finish(f"not accepted by replica {stream.replica} within {patience:.1f} s")
            elif now - stream._parts_sent_at > OPEN_AGAIN_S + travel:
                self.counters["opened_again"] += 1
                await self._send_parts(stream)
        elif stream._is_silent(now):
            self._ask(stream, now)

    async def _on_reconnect(self) -> None:
        """What was sent in between may be lost, on either side: say all again, and ask for what is missing. The
        silence was the connection's, not the replicas'."""
        now = self._now()
        for peer in self._peers.values():
            peer.begin_anew(now, now + _RETURN_S)
        for stream in list(self._streams.values()):
            stream._heard_at = stream._opened_at = now
            stream._acked = -1
            if stream._parts is not None:
                await self._send_parts(stream)
            else:
                self._ask(stream, now, urgent=True)
        self._urgent.set()


def _travel_s(stream: ClientStream) -> float:
    """How long what opens a stream may take over a slow link."""
    return sum(map(len, stream._parts or ())) / SLOW_LINK
