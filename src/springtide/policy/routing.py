"""Which replica takes a request. Knows loads, regions and recent failures as plain data; nothing of sockets
or clocks, and draws no lots: the caller hands it its randomness.

A replica may hold more than it runs at once, so that a step never waits for the network; beyond that the
request is better off waiting at the gateway, where it can still go elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from springtide.core.cluster import Replica

QUEUE_FACTOR = 2.0  # sequences at a replica (running and waiting) per sequence that it can run at once
FAILURE_MEMORY_S = 5.0  # how long a replica that just failed a request is the last choice


class Candidate(msgspec.Struct, frozen=True):
    """A replica as one gateway sees it.

    `in_flight` counts the sequences that this gateway has there: a load report is some 50 ms old, a burst is
    not. `failed_at` is when it last lost or refused one of this gateway's requests, in the units of `now`.
    """

    replica: Replica
    in_flight: int = 0
    failed_at: float | None = None

    @property
    def sequences(self) -> int:
        """Running and waiting there, as far as anybody here knows."""
        return max(self.replica.load.running + self.replica.load.waiting, self.in_flight)

    @property
    def capacity(self) -> int:
        return max(1, self.replica.max_num_seqs)


class RequestFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What routing needs to know of a request. `draw` in [0, 1) settles ties, so that gateways that share
    nothing don't all choose the same idle replica."""

    sequences: int = 1
    region: str = "local"
    draw: float = 0.0


class Route(msgspec.Struct, frozen=True):
    """Where a request goes, and why, in words."""

    node: str
    replica: str
    reason: str


class NoRoute(msgspec.Struct, frozen=True):
    """Why nobody can take it now, in words."""

    reason: str


def route(facts: RequestFacts, candidates: Sequence[Candidate], now: float) -> Route | NoRoute:
    """The replica for a request among those of its model.

    Ready ones with room, in this order: those that have not just failed, those of the same region, the least
    loaded for its capacity. A request of more sequences than a replica may hold goes to an idle one.
    """
    ready = [c for c in candidates if c.replica.state == "ready"]
    if not ready:
        return NoRoute(_why_none_is_ready(candidates))
    roomy = [c for c in ready if _has_room(c, facts.sequences)]
    if not roomy:
        return NoRoute(f"all {len(ready)} ready replicas are full")
    ranked = [(_rank(c, facts, now), c) for c in roomy]
    best = min(rank for rank, _ in ranked)
    tied = [c for rank, c in ranked if rank == best]
    chosen = tied[int(facts.draw * len(tied))]
    return Route(chosen.replica.node, chosen.replica.id, _reason(chosen, facts, len(tied), len(candidates)))


def _has_room(candidate: Candidate, sequences: int) -> bool:
    held = candidate.sequences
    return held == 0 or held + sequences <= candidate.capacity * QUEUE_FACTOR


def _rank(candidate: Candidate, facts: RequestFacts, now: float) -> tuple[bool, bool, float]:
    """Lower is better."""
    failed = candidate.failed_at is not None and now - candidate.failed_at < FAILURE_MEMORY_S
    elsewhere = candidate.replica.region != facts.region
    return failed, elsewhere, candidate.sequences / candidate.capacity


def _reason(chosen: Candidate, facts: RequestFacts, tied: int, candidates: int) -> str:
    where = "same region" if chosen.replica.region == facts.region else f"region {chosen.replica.region}"
    share = f"{chosen.sequences} of {chosen.capacity} sequences"
    lot = f", drawn among {tied} alike" if tied > 1 else ""
    return f"least loaded of {candidates}: {share}, {where}{lot}"


def _why_none_is_ready(candidates: Sequence[Candidate]) -> str:
    if not candidates:
        return "no replica of this model is up"
    states = sorted({c.replica.state for c in candidates})
    return f"no replica of this model is ready ({len(candidates)} {' or '.join(states)})"
