"""Who waits for a replica, and who gets the next place. Knows replicas, loads and order; nothing of frames or HTTP.

A request goes straight to a replica that has room for it. If none has, or others wait already, it waits here in the
line of its flow (a tenant in one priority class), and all ready replicas of the model hear how many wait in each flow.
The replica that is the first to have room grants a turn to a flow, and the request of that flow that suits the replica
best follows it. Replicas of an older version grant no turns: they get whoever waits longest, when their reports say
that they have room.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from heapq import nsmallest
from typing import Protocol

from springtide.core.cluster import Replica
from springtide.core.errors import BacklogTooLong
from springtide.core.request import Request
from springtide.fabric.streams import Backlog, Flow, Turn
from springtide.gateway.lines import Line, Lines, Place, ReplicaKey, Served, Waiter
from springtide.policy.retries import Breaker, Ticket
from springtide.policy.routing import Candidate, NoRoute, RequestFacts, Route, route, suits

__all__ = ["Place", "ReplicaKey", "WaitingRoom"]

TURNS_SINCE = 2  # the version of frames that brought turns
MAX_WAITING = 16384
MAX_WAITING_BYTES = 256 * 2**20
_LOOK_S = 0.25  # how often what changes by itself is looked at, while somebody waits
_FULL_S = 0.25  # how long a replica that said so counts as full
_CHOOSY_S = 1.0  # how long a request waits for a replica that suits it, when another one calls
_FULL_RETRY_S = 5.0
_MAX_FLOWS_TOLD = 4096  # in one message; who has waited longest comes first


class TurnDesk(Protocol):
    """What the room needs of a `StreamHub`."""

    def advertise(self, node: str, replica: str, backlogs: list[Backlog]) -> None: ...
    def decline(self, node: str, replica: str, serials: list[int]) -> None: ...
    def doubts(self, node: str, replica: str) -> bool: ...
    def on_turns(self, callback: Callable[[str, str, list[Turn]], None]) -> None: ...


class Present(Protocol):
    """What the room needs of a `PresenceView`."""

    def replicas(self) -> list[Replica]: ...


class WaitingRoom:
    """The lines of one gateway, and how many sequences it has in flight where."""

    def __init__(
        self,
        presence: Present,
        hub: TurnDesk,
        *,
        region: str,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
        max_waiting: int = MAX_WAITING,
        max_bytes: int = MAX_WAITING_BYTES,
    ) -> None:
        self._presence = presence
        self._hub = hub
        self._region = region
        self._clock = clock
        self._draw = draw
        self._by_model: dict[str, list[Replica]] | None = None  # None: to be looked up
        self._by_key: dict[ReplicaKey, Replica] = {}
        self._lines = Lines(max_requests=max_waiting, max_bytes=max_bytes)
        self._arrivals = 0
        self._in_flight: defaultdict[ReplicaKey, int] = defaultdict(int)
        self._served: defaultdict[str, Served] = defaultdict(Served)
        self._breakers: defaultdict[ReplicaKey, Breaker] = defaultdict(Breaker)
        self._tickets: dict[tuple[ReplicaKey, str], Ticket] = {}  # of the attempts that have shown nothing yet
        self._failed_at: dict[ReplicaKey, float] = {}
        self._full_at: dict[ReplicaKey, float] = {}
        self._told: defaultdict[str, set[ReplicaKey]] = defaultdict(set)  # who knows that somebody waits
        self._news: set[str] = set()  # models of which the backlog is to be told anew
        self._look: asyncio.TimerHandle | None = None
        hub.on_turns(self._on_turns)

    # -- who is there ----------------------------------------------------------------------------------------

    def replicas(self, model: str) -> list[Replica]:
        """The living replicas of a model."""
        return self._models().get(model, [])

    def models(self) -> set[str]:
        return set(self._models())

    def alive(self) -> dict[ReplicaKey, float]:
        """When each living replica was started."""
        return {_key(replica): replica.started for replicas in self._models().values() for replica in replicas}

    def waiting(self) -> dict[str, int]:
        """How many requests wait for a replica, per model."""
        return {model: self._lines.count(model) for model in self._lines.models()}

    def why_waiting(self, request: Request) -> str:
        """Why a request has no replica yet, in words."""
        answer = self._route(request.model, self._facts(request))
        return answer.reason if isinstance(answer, NoRoute) else "others wait before it"

    # -- places ----------------------------------------------------------------------------------------------

    async def place(
        self,
        request: Request,
        *,
        first_in_line: bool,
        numerics: str | None = None,
        avoid: Collection[tuple[str, str]] = (),
    ) -> Place:
        """Wait for a replica and take the room; `leave` gives it back.

        Args:
            first_in_line: it was begun: it goes before the others of its flow, and keeps its place when too many wait.
            numerics: the class that it should go on in.
            avoid: the (node, replica) to be taken only if there is no other.

        Raises:
            BacklogTooLong: too many wait here, and the most of them are of its flow.
        """
        facts = self._facts(request, numerics, avoid)
        if not self._lines.of(request.model):
            place = self._place_now(request, facts)
            if place is not None:
                return place
        waiter = self._join(request, facts, first_in_line)
        try:
            return await waiter.placed
        except asyncio.CancelledError:
            self._give_up(waiter)
            raise

    def spare(self, request: Request, avoid: Collection[tuple[str, str]]) -> Place | None:
        """Room that is there now, at another replica than these; None if others wait for it."""
        if self._lines.of(request.model):
            return None
        return self._place_now(request, self._facts(request), besides=avoid)

    def occupy(self, replica: Replica, request: Request) -> None:
        """The request runs at this replica already: it was taken over. `leave` gives its room back."""
        self._in_flight[_key(replica)] += request.num_choices

    def leave(self, replica: Replica, request: Request) -> None:
        """The request has left this replica: there is room for the next."""
        key = _key(replica)
        self._in_flight[key] -= request.num_choices
        if self._in_flight[key] <= 0:
            del self._in_flight[key]
        ticket = self._tickets.pop((key, request.id), None)
        if ticket is not None:
            self._breakers[key].dropped(ticket)
        self._place_by_report(request.model)

    # -- what became of attempts -----------------------------------------------------------------------------

    def failed(self, replica: Replica, request: Request) -> None:
        """Remember that this replica lost a request."""
        key, now = _key(replica), self._clock()
        self._failed_at[key] = now
        ticket = self._tickets.pop((key, request.id), None)
        if ticket is not None:
            self._breakers[key].failed(ticket, now)

    def refused(self, replica: Replica) -> None:
        """Remember that this replica turned a request away: others are better choices for a while, though nothing has
        broken."""
        self._failed_at[_key(replica)] = self._clock()

    def succeeded(self, replica: Replica, request: Request) -> None:
        """This replica has answered a request, or begun to."""
        key = _key(replica)
        ticket = self._tickets.pop((key, request.id), None)
        if ticket is not None:
            self._breakers[key].succeeded(ticket)

    def no_room(self, replica: Replica) -> None:
        """This replica refused a request because others are before it: no failure. It will call when it has room."""
        self._full_at[_key(replica)] = self._clock()

    def served(self, replica: Replica, request: Request, cost: float) -> None:
        """So much more was served to a request, by `policy.fairness.cost`. The other replicas of the model hear it."""
        flow = Flow(request.tenant, request.priority_class)
        self._served[request.model].add(flow, _key(replica), cost)

    def presence_changed(self) -> None:
        """Replicas came, went or changed their load: forget what was known, and place whom that helps."""
        self._by_model = None
        alive = self.alive()
        for known in (self._failed_at, self._full_at, self._breakers):
            for key in [key for key in known if key not in alive]:
                del known[key]
        for served in self._served.values():
            served.forget_all_but(alive)
        for model in {*self._lines.models(), *self._told}:
            self._place_by_report(model)
            self._tell_soon(model)

    # -- waiting ---------------------------------------------------------------------------------------------

    def _join(self, request: Request, facts: RequestFacts, begun: bool) -> Waiter:
        self._arrivals += 1
        placed: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        waiter = Waiter(request, facts, self._arrivals, begun, self._clock(), placed)
        for last in self._lines.join(waiter):
            last.placed.set_exception(_full())
            self._tell_soon(last.request.model)
        self._tell_soon(request.model)
        self._look_later()
        return waiter

    def _give_up(self, waiter: Waiter) -> None:
        """Whoever waited is gone; perhaps just after it was called."""
        placed, request = waiter.placed, waiter.request
        if self._lines.remove(waiter):
            self._tell_soon(request.model)
            self._place_by_report(request.model)  # it may have stood in the way of smaller ones
        elif not placed.cancelled() and placed.exception() is None:
            place = placed.result()
            if place.turn is not None:
                self._hub.decline(place.replica.node, place.replica.id, [place.turn])
            self.leave(place.replica, request)

    def _look_later(self) -> None:
        if self._look is None:
            self._look = asyncio.get_running_loop().call_later(_LOOK_S, self._look_again)

    def _look_again(self) -> None:
        """While somebody waits: breakers let their probes through, and tokens are served elsewhere."""
        self._look = None
        for model in self._lines.models():
            self._place_by_report(model)
            self._tell_soon(model)
        if self._lines.models():
            self._look_later()

    # -- turns -----------------------------------------------------------------------------------------------

    def _on_turns(self, node: str, replica: str, turns: list[Turn]) -> None:
        caller = self._find(ReplicaKey(node, replica))
        self._full_at.pop(ReplicaKey(node, replica), None)
        unused = [turn.serial for turn in turns if caller is None or not self._follow(caller, turn)]
        if unused:
            self._hub.decline(node, replica, unused)

    def _follow(self, caller: Replica, turn: Turn) -> bool:
        """Whether somebody follows the call."""
        model, now = caller.model, self._clock()
        if not self._breakers[_key(caller)].admits(now):
            return False
        ready = [replica for replica in self.replicas(model) if replica.state == "ready"]
        waiter = self._lines.first(
            model,
            turn.flow,
            lambda one: now - one.since > _CHOOSY_S or suits(one.facts, caller, ready),
        )
        if waiter is None:
            return False
        self._call(waiter, caller, f"it called, {now - waiter.since:.1f} s after the request had come", turn.serial)
        self._tell_soon(model)
        return True

    def _tell_soon(self, model: str) -> None:
        if not self._news:
            asyncio.get_running_loop().call_soon(self._tell)
        self._news.add(model)

    def _tell(self) -> None:
        """Tell the replicas who waits for them; and those that were told, if nobody does any more."""
        news, self._news = self._news, set()
        now = self._clock()
        for model in news:
            flows = self._longest_waiting(model)
            callers = [r for r in self.replicas(model) if self._calls(r, now)] if flows else []
            served = self._served[model]
            for replica in callers:
                key = _key(replica)
                backlogs = [
                    Backlog(*flow, line.weight, line.sequences, served.elsewhere(flow, key)) for flow, line in flows
                ]
                self._hub.advertise(*key, backlogs)
            told = {_key(replica) for replica in callers}
            for key in self._told.pop(model, set()) - told:
                self._hub.advertise(*key, [])
            if told:
                self._told[model] = told

    def _longest_waiting(self, model: str) -> Sequence[tuple[Flow, Line]]:
        flows = self._lines.of(model).items()
        if len(flows) <= _MAX_FLOWS_TOLD:
            return list(flows)
        return nsmallest(_MAX_FLOWS_TOLD, flows, key=lambda item: item[1].head.number)

    def _calls(self, replica: Replica, now: float) -> bool:
        """Whether a replica is to call those who wait."""
        return (
            replica.state == "ready"
            and replica.frame_version >= TURNS_SINCE
            and self._breakers[_key(replica)].admits(now)
        )

    # -- routes ----------------------------------------------------------------------------------------------

    def _place_now(
        self, request: Request, facts: RequestFacts, besides: Collection[tuple[str, str]] = ()
    ) -> Place | None:
        answer = self._route(request.model, facts, besides=besides)
        if isinstance(answer, NoRoute):
            return None
        replica = self._find(ReplicaKey(answer.node, answer.replica))
        assert replica is not None, "the router chose one of those that it was shown"
        self._take(replica, request)
        return Place(replica, answer.reason)

    def _place_by_report(self, model: str) -> None:
        """Place who waits at replicas that grant no turns, as far as they report room."""
        if all(replica.frame_version >= TURNS_SINCE for replica in self.replicas(model)):
            return
        while (waiter := self._lines.oldest(model)) is not None:
            answer = self._route(model, waiter.facts, by_report=True)
            if isinstance(answer, NoRoute):
                return
            replica = self._find(ReplicaKey(answer.node, answer.replica))
            assert replica is not None, "the router chose one of those that it was shown"
            self._call(waiter, replica, answer.reason, None)
            self._tell_soon(model)

    def _call(self, waiter: Waiter, replica: Replica, reason: str, turn: int | None) -> None:
        self._lines.remove(waiter)
        if not waiter.placed.done():
            self._take(replica, waiter.request)
            waiter.placed.set_result(Place(replica, reason, turn, waited=True))

    def _take(self, replica: Replica, request: Request) -> None:
        key = _key(replica)
        self._in_flight[key] += request.num_choices
        ticket = self._breakers[key].attempt(self._clock())
        if ticket is not None:
            self._tickets[key, request.id] = ticket

    def _route(
        self,
        model: str,
        facts: RequestFacts,
        *,
        besides: Collection[tuple[str, str]] = (),
        by_report: bool = False,
    ) -> Route | NoRoute:
        """`by_report`: only among those that grant no turns."""
        now = self._clock()
        candidates = []
        for replica in self.replicas(model):
            key = _key(replica)
            if key in besides or (by_report and replica.frame_version >= TURNS_SINCE):
                continue
            candidates.append(
                Candidate(
                    replica,
                    in_flight=self._in_flight.get(key, 0),
                    failed_at=self._failed_at.get(key),
                    shut=not self._breakers[key].admits(now),
                    full=now - self._full_at.get(key, -_FULL_S) < _FULL_S,
                    calls=replica.frame_version >= TURNS_SINCE,
                    doubted=self._hub.doubts(*key),
                )
            )
        return route(facts, candidates, now)

    def _facts(
        self, request: Request, numerics: str | None = None, avoid: Collection[tuple[str, str]] = ()
    ) -> RequestFacts:
        return RequestFacts(
            sequences=request.num_choices,
            region=self._region,
            draw=self._draw(),
            numerics=numerics,
            avoid=frozenset(avoid),
        )

    def _find(self, key: ReplicaKey) -> Replica | None:
        self._models()
        return self._by_key.get(key)

    def _models(self) -> dict[str, list[Replica]]:
        if self._by_model is None:
            by_model: defaultdict[str, list[Replica]] = defaultdict(list)
            for replica in self._presence.replicas():
                by_model[replica.model].append(replica)
            self._by_model = dict(by_model)
            self._by_key = {_key(replica): replica for replicas in by_model.values() for replica in replicas}
        return self._by_model


def _key(replica: Replica) -> ReplicaKey:
    return ReplicaKey(replica.node, replica.id)


def _full() -> BacklogTooLong:
    return BacklogTooLong(
        "too many requests wait at this gateway, and most of them are this tenant's",
        hint="send fewer at once, or later",
        retry_after=_FULL_RETRY_S,
    )
