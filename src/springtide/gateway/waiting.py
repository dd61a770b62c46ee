"""Who waits for a replica, and who gets the next place. Knows replicas, loads and order; nothing of frames or HTTP.

A request waits here, in the order of arrival for each model, until the router finds it a replica.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import NamedTuple

from springtide.core.cluster import Replica
from springtide.core.request import Request
from springtide.fabric.presence import PresenceView
from springtide.policy.routing import Candidate, NoRoute, RequestFacts, Route, route

log = logging.getLogger(__name__)


class ReplicaKey(NamedTuple):
    node: str
    replica: str


class _Waiter(NamedTuple):
    facts: RequestFacts
    placed: asyncio.Future[Replica]


class WaitingRoom:
    """The queues of one gateway, and how many sequences it has in flight where."""

    def __init__(
        self,
        presence: PresenceView,
        *,
        region: str,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._presence = presence
        self._region = region
        self._clock = clock
        self._draw = draw
        self._by_model: dict[str, list[Replica]] | None = None
        self._queues: defaultdict[str, deque[_Waiter]] = defaultdict(deque)
        self._in_flight: defaultdict[ReplicaKey, int] = defaultdict(int)
        self._failed_at: dict[ReplicaKey, float] = {}

    def replicas(self, model: str) -> list[Replica]:
        """The living replicas of a model."""
        return self._models().get(model, [])

    def models(self) -> set[str]:
        return set(self._models())

    def alive(self) -> dict[ReplicaKey, float]:
        """When each living replica was started."""
        return {ReplicaKey(r.node, r.id): r.started for replicas in self._models().values() for r in replicas}

    def waiting(self) -> dict[str, int]:
        """How many requests wait for a replica, per model."""
        return {model: len(queue) for model, queue in self._queues.items()}

    def why_waiting(self, request: Request) -> str:
        """Why a request has no replica yet, in words."""
        answer = self._route(request.model, self._facts(request))
        return answer.reason if isinstance(answer, NoRoute) else "others wait before it"

    async def place(self, request: Request, *, first_in_line: bool) -> Replica:
        """Wait for a replica and take the room; `leave` gives it back."""
        facts = self._facts(request)
        queue = self._queues[request.model]
        if not queue:
            answer = self._route(request.model, facts)
            if isinstance(answer, Route):
                return self._take(answer, request.model, facts)
        waiter = _Waiter(facts, asyncio.get_running_loop().create_future())
        if first_in_line:
            queue.appendleft(waiter)
        else:
            queue.append(waiter)
        try:
            return await waiter.placed
        except asyncio.CancelledError:
            if waiter in queue:
                queue.remove(waiter)
            elif waiter.placed.done() and not waiter.placed.cancelled():
                self.leave(waiter.placed.result(), request)
            self._pump(request.model)  # it may have stood in the way of smaller ones
            raise

    def leave(self, replica: Replica, request: Request) -> None:
        """The request has left this replica: there is room for the next."""
        key = ReplicaKey(replica.node, replica.id)
        self._in_flight[key] -= request.num_choices
        if self._in_flight[key] <= 0:
            del self._in_flight[key]
        self._pump(request.model)

    def failed(self, replica: Replica) -> None:
        """Remember that this replica lost or refused a request."""
        self._failed_at[ReplicaKey(replica.node, replica.id)] = self._clock()

    def presence_changed(self) -> None:
        """Replicas came, went or changed their load: forget what was known, and place whom that helps."""
        self._by_model = None
        alive = self.alive()
        for key in [key for key in self._failed_at if key not in alive]:
            del self._failed_at[key]
        for model in list(self._queues):
            self._pump(model)

    def _pump(self, model: str) -> None:
        queue = self._queues.get(model)
        while queue:
            waiter = queue[0]
            answer = self._route(model, waiter.facts)
            if isinstance(answer, NoRoute):
                return
            queue.popleft()
            if not waiter.placed.cancelled():
                waiter.placed.set_result(self._take(answer, model, waiter.facts))
        self._queues.pop(model, None)

    def _take(self, chosen: Route, model: str, facts: RequestFacts) -> Replica:
        key = ReplicaKey(chosen.node, chosen.replica)
        self._in_flight[key] += facts.sequences
        log.debug("routed to %s on %s: %s", chosen.replica, chosen.node, chosen.reason)
        return next(r for r in self.replicas(model) if (r.node, r.id) == key)

    def _route(self, model: str, facts: RequestFacts) -> Route | NoRoute:
        candidates = []
        for replica in self.replicas(model):
            key = ReplicaKey(replica.node, replica.id)
            candidates.append(Candidate(replica, self._in_flight.get(key, 0), self._failed_at.get(key)))
        return route(facts, candidates, self._clock())

    def _facts(self, request: Request) -> RequestFacts:
        return RequestFacts(sequences=request.num_choices, region=self._region, draw=self._draw())

    def _models(self) -> dict[str, list[Replica]]:
        if self._by_model is None:
            by_model: defaultdict[str, list[Replica]] = defaultdict(list)
            for replica in self._presence.replicas():
                by_model[replica.model].append(replica)
            self._by_model = dict(by_model)
        return self._by_model
