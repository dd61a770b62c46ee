"""What becomes of a request where it runs: the attempts, the loss of replicas, and how the next one goes on.

Knows replicas and frames; nothing of HTTP or of OpenAI, and not who is next (`waiting`). An attempt that is lost is
followed by one that begins where it stopped: all that was heard of the answer travels with the request.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import defaultdict
from collections.abc import Callable, Collection

import msgspec

from springtide.core.cluster import Replica
from springtide.core.errors import BacklogTooLong, KeyReused, ReplicaLost, TakenOver
from springtide.core.request import Attempt, End, Outcome, Request, TokenCounts
from springtide.fabric.presence import PresenceView
from springtide.fabric.streams import Found, Frame, StreamHub, StreamLost
from springtide.gateway.attempt import Heard, OpenAttempt, Timeouts, first_to_be_heard
from springtide.gateway.trace import Trace
from springtide.gateway.transcript import Garbled, Transcript, as_frame
from springtide.gateway.waiting import Place, ReplicaKey, WaitingRoom
from springtide.policy.fairness import cost
from springtide.policy.movement import Movement, Queue
from springtide.policy.retries import RetryBudget, hedge
from springtide.policy.routing import NO_ROOM

log = logging.getLogger(__name__)

# Replicas that may die in a row with a request before we believe that it kills them. In a fleet where something breaks
# every other second three early deaths in a row are still chance, once in some thousand requests; five are not.
MAX_LOST = 5
PROGRESS = 8  # tokens of an attempt that show that it is not the request: a row ends with them
_FIRST_BACKOFF_S = 0.05
_LONGEST_BACKOFF_S = 2.0
_CERTAINTY = 1.5  # how far beyond the deadline the expected wait must lie, so that we refuse at once


class Patience(Timeouts, frozen=True, kw_only=True):
    """What the dispatches of one gateway share, in seconds. `hedge_after` 0: never ask a second replica as well."""

    queue: float
    hedge_after: float = 0.0


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
        budget: RetryBudget,
        *,
        patience: Patience,
        silence_counts: Callable[[], bool] = lambda: True,
    ) -> None:
        self.hub = hub
        self.room = room
        self.budget = budget
        self.patience = patience
        self.movement = Movement()
        self.attempts_lost = 0
        self.resumed = 0  # attempts that went on with what another had begun
        self.hedged = 0
        self._silence_counts = silence_counts
        self._running: defaultdict[ReplicaKey, set[OpenAttempt]] = defaultdict(set)
        self._seen: Collection[ReplicaKey] = room.alive().keys()  # as last looked at
        presence.on_change(self._presence_changed)

    def dispatch(self, request: Request, trace: Trace, before: Dispatch | None = None) -> Dispatch:
        """`before` is an earlier dispatch of the same request that was let go here."""
        self.budget.requested()
        return Dispatch(self, request, trace, before)

    def expected_wait(self, request: Request) -> float | None:
        """Seconds that one more request like it would wait for a replica; None if nobody can say."""
        return self.movement.wait(Queue(request.tenant, request.model), time.monotonic())

    def follow(self, attempt: OpenAttempt) -> None:
        """Tell this attempt when its replica goes away."""
        self._running[_key(attempt.replica)].add(attempt)

    def unfollow(self, attempt: OpenAttempt) -> None:
        key = _key(attempt.replica)
        running = self._running.get(key)
        if running is not None:
            running.discard(attempt)
            if not running:
                del self._running[key]

    def _presence_changed(self) -> None:
        self.room.presence_changed()
        before, now = self._seen, self.room.alive()
        self._seen = now.keys()
        for key, running in list(self._running.items()):
            if key not in now:
                if key in before:
                    self._replica_gone(key)
            elif next(iter(running)).replica.started != now[key]:
                self._process_ended(key, now[key])

    def _process_ended(self, key: ReplicaKey, started: float) -> None:
        """Another process speaks for this replica, started then: the next one, or its agent, to say that it is dead.
        The replica may have been out of sight in between."""
        self._lose(key, "its process has ended", which=lambda attempt: attempt.replica.started != started)

    def _replica_gone(self, key: ReplicaKey) -> None:
        """Requests that lose nothing by it begin elsewhere at once; for the others it is asked whether it is still
        there: what it can replay need not be computed again."""
        if self._silence_counts():
            self._lose(key, "the replica is gone", which=lambda attempt: not attempt.spoken)
            self.hub.suspect(*key)

    def _lose(self, key: ReplicaKey, reason: str, which: Callable[[OpenAttempt], bool] = lambda _: True) -> None:
        for attempt in list(self._running.get(key, ())):
            if which(attempt):
                attempt.stream.lose(reason)


class Dispatch:
    """One request on its way: attempts, one after another, until one of them comes to the end of the answer.

    `replica` is where the last attempt that spoke, or else the last one at all, runs. `attempts` holds the attempts
    that are over. `counts` is what the client owes: the prompt once, and each token of the answer once.
    """

    def __init__(self, dispatcher: Dispatcher, request: Request, trace: Trace, before: Dispatch | None = None) -> None:
        self.request = request
        self.trace = trace
        self.replica: Replica | None = None
        self.attempts: list[Attempt] = list(before.attempts) if before is not None and before.passed_on else []
        self.waiting = False  # for a replica to have room
        self.took_over = False  # what another connection had begun
        self.passed_on: bool = False  # to another connection, which accounts for it
        self._dispatcher = dispatcher
        self._transcript = Transcript(request.num_choices)
        self._open: list[OpenAttempt] = []  # two while a hedge is on, the older one first
        self._number: int = before._number if before is not None else 0  # of the last attempt
        self._may_be_found = bool(request.fingerprint)
        self._numerics: set[str] = set()  # of the replicas that spoke
        self._final: TokenCounts | None = None
        self._failed: set[ReplicaKey] = set()  # replicas that it was lost at, or that refused it
        self._lost = 0  # replicas in a row
        self._setbacks = 0  # failures in a row, refusals among them
        self._hedge_at = 0.0  # silent for so long, ask another as well

    # What its owner asks of it.

    async def frames(self) -> list[Frame]:
        """The next frames that say something: deltas, or the end. They go on exactly where the last ones stopped.

        Raises:
            ReplicaLost: several replicas in a row went away with this request, or none could go on.
            KeyReused: the answer that runs under this id is one to another request.
            TakenOver: another connection goes on with this answer.
        """
        if self._may_be_found:
            self._may_be_found = False
            said = await self._find()
            if said is not None:
                return [said]
        while True:
            heard = await self._listen()
            if heard is not None:
                frames = await self._judge(*heard)
                if frames is not None:
                    return frames

    def cancel(self) -> None:
        """Nobody waits for it any more. Ends what is under way, if anything is."""
        for attempt in list(self._open):
            self._close(attempt, "cancelled", attempt.counts_so_far)

    def let_go(self) -> bool:
        """Stop listening, but let it run on: another connection may take it over. Whether there is anything to take."""
        self.passed_on = True
        if not self._open:
            return False
        kept, *others = self._open
        for other in others:
            self._close(other, "cancelled", other.counts_so_far)
        kept.stream.let_go()
        self._leave(kept)
        return True

    def tick(self, now: float) -> None:
        """Look at the clock (monotonic): an attempt that is silent for too long is lost."""
        for attempt in self._open:
            late = attempt.overdue(self._dispatcher.patience, now)
            if late is not None:
                attempt.stream.lose(late)

    @property
    def speaking(self) -> bool:
        """Whether a replica is in the middle of the answer; else one is waited for, or its first word."""
        return bool(self._open) and self._open[0].spoken

    @property
    def counts(self) -> TokenCounts:
        if self._final is not None:
            return self._final
        prompt = max((attempt.prompt_tokens for attempt in self.attempts), default=0)
        return TokenCounts(prompt=prompt, completion=self._transcript.tokens)

    @property
    def numerics(self) -> str:
        """The numerics class of the answer; "" if it is of several, or not known."""
        return next(iter(self._numerics)) if len(self._numerics) == 1 else ""

    # Finding what runs already.

    async def _find(self) -> Frame | None:
        """Take over what runs, or ran, under this id. What its earlier attempts had said, if anything."""
        request, room = self.request, self._dispatcher.room
        replicas = {_key(replica): replica for replica in room.replicas(request.model)}
        found = await self._dispatcher.hub.find(request.id, list(replicas))
        if found is None:
            return None
        if found.fingerprint != request.fingerprint:
            raise KeyReused(
                "this Idempotency-Key was used for another request", hint="a key belongs to one body; choose a new one"
            )
        replica = replicas.get(ReplicaKey(found.node, found.replica))
        if replica is None:
            return None
        self._number = max(self._number, found.attempt)
        if request.sampling.logprobs is not None and any(output.token_ids for output in found.outputs):
            (await self._dispatcher.hub.take_over(found)).cancel()
            return None  # the scores of what earlier attempts said are not kept: it is run again, with the same seed
        return await self._take_over(found, replica)

    async def _take_over(self, found: Found, replica: Replica) -> Frame | None:
        dispatcher = self._dispatcher
        stream = await dispatcher.hub.take_over(found)
        self.attempts = [attempt for attempt in self.attempts if attempt.number < found.attempt]
        dispatcher.room.occupy(replica, self.request)
        attempt = OpenAttempt(found.attempt, replica, stream)
        self.took_over = True
        self._began(attempt, "taken over", f"{sum(len(o.token_ids) for o in found.outputs)} tokens said before it")
        if not found.outputs:
            return None
        said = as_frame(found.outputs)
        self._transcript.add([said])
        self._transcript.new_speaker()
        return said

    # Listening.

    async def _listen(self) -> tuple[OpenAttempt, Heard] | None:
        """What is heard next, and of which attempt. None: nothing yet, but the attempts have changed."""
        if not self._open:
            await self._open_next()
        first = self._open[0]
        hedge_after = self._dispatcher.patience.hedge_after
        if len(self._open) == 1 and (first.spoken or not hedge_after):
            return first, await first.listen()
        if len(self._open) > 1:
            return await first_to_be_heard(self._open)
        heard = await first_to_be_heard(self._open, self._hedge_at - first.silent_for(time.monotonic()))
        if heard is None:
            self._hedge_at += hedge_after
            await self._hedge(first)
        return heard

    async def _judge(self, attempt: OpenAttempt, heard: Heard) -> list[Frame] | None:
        """What of it is the answer's: nothing, if it is a loss or a mere acceptance."""
        if isinstance(heard, StreamLost):
            await self._on_lost(attempt, heard)
            return self._ending()
        if attempt.take_in(heard):
            self._note("accepted", attempt, f"{attempt.prompt_tokens} prompt tokens" if attempt.prompt_tokens else "")
        heard = _words_first(attempt, heard)
        end = heard[-1].end
        if end is not None and end.error is not None and end.error.code == NO_ROOM:
            self._on_no_room(attempt, end.error.message)
            return None
        trouble = self._trouble(attempt, end)
        if trouble is None:
            before = self._transcript.tokens
            try:
                self._transcript.add(heard)
            except Garbled as garbled:
                trouble = str(garbled)
        if trouble is not None:
            await self._recover(attempt, trouble, end.counts if end is not None else None)
            return self._ending()
        if end is None and not any(frame.deltas for frame in heard):
            return None
        self._on_spoken(attempt, self._transcript.tokens - before)
        if end is not None:
            self._on_end(attempt, end)
        return heard

    def _trouble(self, attempt: OpenAttempt, end: End | None) -> str | None:
        """Why an attempt that ends so has to be followed by another, if it has."""
        if end is None or end.outcome == "finished":
            return None
        if end.outcome == "cancelled" or end.error is None:  # not by us: its host stopped it
            return "the replica stopped it"
        if end.error.status == 503 or end.error.code == ReplicaLost.code:
            return end.error.message
        if self._transcript.tokens and not attempt.spoken:
            attempt.accepted = True  # it is no refusal for want of room: each one that says so brings the end nearer
            return f"the replica can't go on with it: {end.error.message}"
        return None

    def _on_spoken(self, attempt: OpenAttempt, tokens: int) -> None:
        """From now on this attempt is the one."""
        if not attempt.spoken:
            self._note("first token", attempt)
            self.replica = attempt.replica
            self._numerics.add(attempt.replica.numerics)
            self._dispatcher.room.succeeded(attempt.replica, self.request)
            for other in [other for other in self._open if other is not attempt]:
                self._note("given up", other, "another one spoke first")
                self._close(other, "cancelled", other.counts_so_far)
        self._dispatcher.room.served(attempt.replica, self.request, cost(TokenCounts(completion=tokens)))
        attempt.has_spoken(tokens)
        if attempt.tokens >= PROGRESS:
            self._lost = self._setbacks = 0

    def _on_end(self, attempt: OpenAttempt, end: End) -> None:
        """It came to its end. Its own count of what it did is better than ours."""
        before = self._transcript.tokens - attempt.tokens
        prompt = max([end.counts.prompt, *(earlier.prompt_tokens for earlier in self.attempts)])
        completion = before + end.counts.completion
        self._final = TokenCounts(prompt=prompt, completion=completion, cached=min(end.counts.cached, prompt))
        read = TokenCounts(prompt=end.counts.prompt, cached=end.counts.cached)
        self._dispatcher.room.served(attempt.replica, self.request, cost(read))
        self._close(attempt, end.outcome, end.counts)

    def _ending(self) -> list[Frame] | None:
        """The end of an answer of which only the replica's word that it has ended was lost."""
        if self._open or not self._transcript.complete:
            return None
        self._final = self.counts
        return [Frame(0, [], End("finished", self._final))]

    # Opening.

    async def _open_next(self) -> None:
        """Wait for a replica, and send it the request with all that was said so far."""
        dispatcher = self._dispatcher
        resumes = bool(self._transcript.outputs())
        place = await self._place()
        attempt = await self._open_at(place.replica, place.turn, place.reason)
        self._hedge_at = dispatcher.patience.hedge_after
        if resumes:
            dispatcher.resumed += 1
            self._note("resumed", attempt, f"{self._transcript.tokens} tokens were said before it")

    async def _place(self) -> Place:
        """Wait for a replica. What was begun goes first.

        Raises:
            BacklogTooLong: as those before it move, it would wait until after its deadline.
        """
        room, movement = self._dispatcher.room, self._dispatcher.movement
        queue = Queue(self.request.tenant, self.request.model)
        begun = self._number > 0
        if not begun:
            self._check_wait(self._dispatcher.expected_wait(self.request))
        movement.joined(queue)
        self.waiting = True
        try:
            place = await room.place(
                self.request, first_in_line=begun, numerics=self.numerics or None, avoid=self._failed
            )
        finally:
            self.waiting = False
            movement.left(queue)
        if place.waited:
            movement.started(queue, time.monotonic())
        return place

    def _check_wait(self, wait: float | None) -> None:
        queue = self._dispatcher.patience.queue
        left = queue if self.request.deadline is None else min(queue, self.request.deadline - time.time())
        if wait is not None and wait > left * _CERTAINTY:
            raise BacklogTooLong(
                f"this tenant's requests for this model wait about {wait:.0f} s now, this one has {left:.0f} s",
                hint="send fewer at once, or allow more time",
                retry_after=wait - left,
            )

    async def _hedge(self, first: OpenAttempt) -> None:
        """Ask a second replica as well, if one has room now and the budget for it is there."""
        dispatcher, now = self._dispatcher, time.monotonic()
        place = dispatcher.room.spare(self.request, avoid=(_key(first.replica),))
        if place is None:
            return
        if not hedge(first.silent_for(now), dispatcher.budget, now, after_s=dispatcher.patience.hedge_after):
            dispatcher.room.leave(place.replica, self.request)
            return
        dispatcher.hedged += 1
        attempt = await self._open_at(place.replica, place.turn, place.reason)
        self._note("hedged", attempt, f"attempt {first.number} has not said a word yet")

    async def _open_at(self, replica: Replica, turn: int | None, reason: str) -> OpenAttempt:
        """The room in which it runs was taken before."""
        dispatcher = self._dispatcher
        self._number += 1
        outputs = self._transcript.outputs()
        request = msgspec.structs.replace(self.request, outputs=outputs) if outputs else self.request
        try:
            stream = await dispatcher.hub.open(request, self._number, replica.node, replica.id, turn=turn)
        except BaseException:
            dispatcher.room.leave(replica, self.request)
            raise
        attempt = OpenAttempt(self._number, replica, stream)
        self._began(attempt, "routed", reason)
        return attempt

    def _began(self, attempt: OpenAttempt, what: str, why: str) -> None:
        self._dispatcher.follow(attempt)
        self._open.append(attempt)
        self._transcript.new_speaker()
        self.replica = self.replica or attempt.replica
        self._note(what, attempt, why)

    # Losing, and closing.

    async def _on_lost(self, attempt: OpenAttempt, lost: StreamLost) -> None:
        if lost.taken_over:
            self._note("handed over", attempt, lost.reason)
            self._leave(attempt)
            self.cancel()
            raise TakenOver("another connection goes on with this answer")
        await self._recover(attempt, lost.reason)

    def _on_no_room(self, attempt: OpenAttempt, reason: str) -> None:
        """It is back in its line, and the first there. Nothing has failed, and nothing ran that would have to be paid:
        others had filled the replica meanwhile."""
        self._note("refused", attempt, reason)
        self._dispatcher.room.no_room(attempt.replica)
        attempt.stream.cancel()
        self._leave(attempt)

    async def _recover(self, attempt: OpenAttempt, reason: str, counts: TokenCounts | None = None) -> None:
        """The attempt is of no use any more: prepare another one, or give up. `counts`: what it did, if its replica
        said so. A refusal is no loss: nobody was harmed by it."""
        log.warning("request %s: attempt %d lost: %s", self.request.id, attempt.number, reason)
        self._note("lost" if attempt.accepted else "refused", attempt, reason)
        self._dispatcher.attempts_lost += 1
        self._setbacks += 1
        self._lost += attempt.accepted
        self._failed.add(_key(attempt.replica))
        self._blame(attempt, by_word=counts is not None)
        self._close(attempt, "failed", counts or attempt.counts_so_far)
        if self._open or self._transcript.complete:
            return
        if self._lost >= MAX_LOST:
            raise ReplicaLost(self._why_given_up(reason))
        await self._pause()

    def _blame(self, attempt: OpenAttempt, *, by_word: bool) -> None:
        """Who refuses by word is well; who says nothing, or loses what it had accepted, is not."""
        room = self._dispatcher.room
        if by_word and not attempt.accepted:
            room.refused(attempt.replica)
        else:
            room.failed(attempt.replica, self.request)

    def _why_given_up(self, reason: str) -> str:
        said = self._transcript.tokens
        sent = f"; {said} tokens of the answer had been said" if said else ""
        return f"{self._lost} replicas in a row could not go on with this request{sent}; the last one: {reason}"

    async def _pause(self) -> None:
        """A moment before the next attempt, longer each time; and until the gateway's budget allows for it: when many
        fail at once, retries must not be what brings the others down."""
        longest = min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** min(self._setbacks, 10))
        await asyncio.sleep(random.uniform(longest / 2, longest))
        budget = self._dispatcher.budget
        while True:
            now = time.monotonic()
            if budget.take(now):
                return
            await asyncio.sleep(budget.seconds_until(now) * random.uniform(1, 2))

    def _close(self, attempt: OpenAttempt, outcome: Outcome, counts: TokenCounts) -> None:
        """The attempt is over: note what it did, give its room back."""
        self.attempts.append(attempt.close(outcome, counts))
        self._leave(attempt)

    def _leave(self, attempt: OpenAttempt) -> None:
        self._open.remove(attempt)
        self._dispatcher.unfollow(attempt)
        self._dispatcher.room.leave(attempt.replica, self.request)

    def _note(self, what: str, attempt: OpenAttempt, why: str = "") -> None:
        replica = attempt.replica
        self.trace.note(what, why, attempt=attempt.number, node=replica.node, replica=replica.id)


def _words_first(attempt: OpenAttempt, frames: list[Frame]) -> list[Frame]:
    """The words of an attempt that fails are part of the answer like any others: they are judged before its end is."""
    last = frames[-1]
    if last.end is None or last.end.outcome == "finished" or not any(frame.deltas for frame in frames):
        return frames
    attempt.unhear([Frame(last.number, [], last.end)])
    return [*frames[:-1], Frame(last.number, last.deltas)]


def _key(replica: Replica) -> ReplicaKey:
    return ReplicaKey(replica.node, replica.id)
