"""What becomes of a request where it runs: the attempts, and the loss of replicas.

Knows replicas and frames; nothing of HTTP or of OpenAI, and not who is next (`waiting`). While nothing of an answer
has been sent to the client, a lost attempt is repeated from the beginning, elsewhere if there is an elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import defaultdict
from collections.abc import Callable

from springtide.core.cluster import Replica
from springtide.core.errors import ReplicaLost
from springtide.core.request import Attempt, ChoiceOutput, End, Outcome, Request, TokenCounts
from springtide.core.wire import unescape_json
from springtide.fabric.presence import PresenceView
from springtide.fabric.streams import ClientStream, Frame, StreamHub, StreamLost
from springtide.gateway.waiting import ReplicaKey, WaitingRoom

log = logging.getLogger(__name__)

MAX_LOST = 3  # replicas that may die with a request before we believe that it kills them
RETURN_GRACE_S = 1.5  # a node that lost its connection may be back, and replay, before its streams are given up
_FIRST_BACKOFF_S = 0.05
_LONGEST_BACKOFF_S = 2.0


class _Garbled(Exception):
    """A replica said what can't be an answer to this request."""


class Transcript:
    """What an attempt has said, per choice: escaped text and token ids, enough for another replica to go on."""

    def __init__(self, choices: int) -> None:
        self._texts: list[list[bytes]] = [[] for _ in range(choices)]
        self._token_ids: list[list[int]] = [[] for _ in range(choices)]

    def add(self, frames: list[Frame]) -> None:
        """Raises _Garbled: a choice that was not asked for."""
        texts, token_ids = self._texts, self._token_ids
        choices = len(texts)
        for frame in frames:
            for delta in frame.deltas:
                choice = delta.choice
                if not 0 <= choice < choices:
                    raise _Garbled(f"the replica speaks of choice {choice} of {choices}")
                texts[choice].append(delta.text)
                token_ids[choice] += delta.token_ids

    @property
    def tokens(self) -> int:
        return sum(map(len, self._token_ids))

    def outputs(self) -> tuple[ChoiceOutput, ...]:
        """The choices that have begun, as a resuming request carries them."""
        return tuple(
            ChoiceOutput(choice, token_ids, unescape_json(b"".join(texts)))
            for choice, (token_ids, texts) in enumerate(zip(self._token_ids, self._texts, strict=True))
            if token_ids or texts
        )


class Dispatcher:
    """What one gateway has in flight where, and who hears when a replica goes away.

    `silence_counts` says whether a replica that is not heard of may be taken for dead: not while this process
    is itself cut off from the fabric, nor just after.
    """

    def __init__(
        self,
        hub: StreamHub,
        presence: PresenceView,
        room: WaitingRoom,
        *,
        silence_counts: Callable[[], bool] = lambda: True,
    ) -> None:
        self.hub = hub
        self.room = room
        self.attempts_lost = 0
        self._silence_counts = silence_counts
        self._running: defaultdict[ReplicaKey, set[Dispatch]] = defaultdict(set)
        self._seen_started = room.alive()  # as last looked at
        presence.on_change(self._presence_changed)

    def dispatch(self, request: Request, on_start_over: Callable[[], None]) -> Dispatch:
        return Dispatch(self, request, on_start_over)

    def follow(self, replica: Replica, dispatch: Dispatch) -> None:
        """Tell this dispatch when its replica goes away."""
        self._running[ReplicaKey(replica.node, replica.id)].add(dispatch)

    def unfollow(self, replica: Replica, dispatch: Dispatch) -> None:
        key = ReplicaKey(replica.node, replica.id)
        running = self._running.get(key)
        if running is not None:
            running.discard(dispatch)
            if not running:
                del self._running[key]

    def _presence_changed(self) -> None:
        self.room.presence_changed()
        before, now = self._seen_started, self.room.alive()
        self._seen_started = now
        for key, started in before.items():
            if key not in self._running:
                continue
            if key not in now:
                self._replica_gone(key)
            elif now[key] != started:
                self._lose(key, "the replica was started anew")

    def _replica_gone(self, key: ReplicaKey) -> None:
        """Requests that lose nothing by it begin elsewhere at once; the others give it a moment to come back."""
        if self._silence_counts():
            self._lose(key, "the replica is gone", which=lambda dispatch: not dispatch.transcript.tokens)
            asyncio.get_running_loop().call_later(RETURN_GRACE_S, self._lose_if_still_gone, key)

    def _lose_if_still_gone(self, key: ReplicaKey) -> None:
        if key not in self._seen_started and self._silence_counts():
            self._lose(key, "the replica is gone")

    def _lose(self, key: ReplicaKey, reason: str, which: Callable[[Dispatch], bool] = lambda _: True) -> None:
        for dispatch in list(self._running.get(key, ())):
            if which(dispatch):
                dispatch.lose(reason)


class Dispatch:
    """One request on its way: attempts, one after another, until one of them ends.

    `replica` is where the current or last attempt runs. `attempts` holds the attempts that are over. `sent` is
    for whoever writes to the client to set, before the first byte of an answer: from then on there is no starting
    over. Until then, `on_start_over` says that whatever came before is void.
    """

    def __init__(self, dispatcher: Dispatcher, request: Request, on_start_over: Callable[[], None]) -> None:
        self.request = request
        self.sent = False
        self.replica: Replica | None = None
        self.attempts: list[Attempt] = []
        self.transcript = Transcript(request.num_choices)
        self._dispatcher = dispatcher
        self._on_start_over = on_start_over
        self._stream: ClientStream | None = None
        self._started = 0.0
        self._accepted = False
        self._prompt_tokens = 0  # as the replica of this attempt counts them
        self._lost = 0

    async def frames(self) -> list[Frame]:
        """The next frames that say something: deltas, or the end.

        Raises:
            ReplicaLost: the replica went away after something had been sent, or several went away with this
                request.
        """
        while True:
            stream = self._stream or await self._open()
            try:
                frames = await stream.frames()
            except StreamLost as lost:
                await self._recover(lost.reason)
                continue
            self._accepted = self._accepted or frames[0].end is None  # else it is a refusal
            self._prompt_tokens = frames[0].prompt_tokens or self._prompt_tokens
            end = frames[-1].end
            if end is not None and not self.sent and _should_go_elsewhere(end):
                if self._accepted:
                    await self._recover("the replica gave it up", end.counts)
                else:
                    self._give_up_attempt(end.counts)
                    await self._start_over()
                continue
            if end is not None and end.outcome == "cancelled":  # not by us: its host stopped it
                await self._recover("the replica stopped it")
                continue
            try:
                self.transcript.add(frames)
            except _Garbled as garbled:
                await self._recover(str(garbled))
                continue
            if end is not None:
                self._close(end.outcome, end.counts)
                return frames
            if any(frame.deltas for frame in frames):
                return frames

    def cancel(self) -> None:
        """Nobody waits for it any more. Ends the attempt that is under way, if one is."""
        if self._stream is not None:
            self._close("cancelled", self._counts_so_far())

    def lose(self, reason: str) -> None:
        """The replica of the current attempt is known to be gone."""
        if self._stream is not None:
            self._stream.lose(reason)

    async def _open(self) -> ClientStream:
        dispatcher, request = self._dispatcher, self.request
        replica = await dispatcher.room.place(request, first_in_line=bool(self.attempts))
        self.replica, self._started, self._accepted, self._prompt_tokens = replica, time.time(), False, 0
        self.transcript = Transcript(request.num_choices)
        try:
            stream = await dispatcher.hub.open(request, len(self.attempts) + 1, replica.node, replica.id)
        except BaseException:
            dispatcher.room.leave(replica, request)
            raise
        dispatcher.follow(replica, self)
        self._stream = stream
        return stream

    async def _recover(self, reason: str, counts: TokenCounts | None = None) -> None:
        """The attempt is lost: prepare another one, or give up. `counts`: what it did, if its replica said so."""
        assert self.replica is not None
        log.warning("request %s: attempt %d lost: %s", self.request.id, len(self.attempts) + 1, reason)
        self._dispatcher.attempts_lost += 1
        if self._accepted:
            self._lost += 1
        self._give_up_attempt(counts or self._counts_so_far())
        if self.sent:
            raise ReplicaLost(f"the replica was lost in the middle of the answer: {reason}", hint="send it again")
        if self._lost >= MAX_LOST:
            raise ReplicaLost(f"{self._lost} replicas were lost while they ran this request")
        await self._start_over()

    def _counts_so_far(self) -> TokenCounts:
        """What an attempt without an end has done: a token says that the prompt was computed, too."""
        tokens = self.transcript.tokens
        return TokenCounts(prompt=self._prompt_tokens if tokens else 0, completion=tokens)

    def _give_up_attempt(self, counts: TokenCounts) -> None:
        """It failed for the replica's reasons, not the request's: others are better choices for a while."""
        assert self.replica is not None
        self._dispatcher.room.failed(self.replica)
        self._close("failed", counts)

    async def _start_over(self) -> None:
        """Forget what the attempt said, and wait a moment. The next has the same seed, so it says the same."""
        self._on_start_over()
        longest = min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** min(len(self.attempts), 10))
        await asyncio.sleep(random.uniform(longest / 2, longest))

    def _close(self, outcome: Outcome, counts: TokenCounts) -> None:
        """The attempt is over: note what it did, give its room back."""
        assert self.replica is not None and self._stream is not None
        stream, self._stream = self._stream, None
        self.attempts.append(
            Attempt(
                number=len(self.attempts) + 1,
                node=self.replica.node,
                replica=self.replica.id,
                started=self._started,
                ended=time.time(),
                outcome=outcome,
                prompt_tokens=counts.prompt,
                completion_tokens=counts.completion,
                cached_tokens=counts.cached,
            )
        )
        stream.cancel()
        self._dispatcher.unfollow(self.replica, self)
        self._dispatcher.room.leave(self.replica, self.request)


def _should_go_elsewhere(end: End) -> bool:
    """It ended for a reason that is the replica's, not the request's: it is full, is leaving, or has failed."""
    return end.error is not None and (end.error.status == 503 or end.error.code == ReplicaLost.code)
