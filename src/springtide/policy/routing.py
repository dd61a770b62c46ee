"""Which replica takes a request. Knows loads, regions and recent failures as plain data; nothing of sockets
or clocks, and draws no lots: the caller hands it its randomness.

A request goes straight to a replica that has a seat for it. Where none has, it waits at its gateway, from where it can
still go anywhere, and the replica that is the first to have room calls it (`fairness`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from springtide.core.cluster import Replica

NO_ROOM = "no_room"  # the code of a replica's refusal that is no failure: others are before it
FAILURE_MEMORY_S = 5.0  # how long a replica that just failed a request is the last choice, or has to call


class Candidate(msgspec.Struct, frozen=True):
    """A replica as one gateway sees it.

    `in_flight` counts the sequences that this gateway has there: a load report is some 50 ms old, a burst is
    not. `failed_at` is when it last lost or refused one of this gateway's requests, in the units of `now`. `shut`: it
    fails so often that it gets nothing now. `full`: it has just said that it has no room, whatever its report says.
    `calls`: it grants turns to those who wait; so after a failure, or while it is `doubted` that it lives, it gets
    nothing unasked: its next call shows that it does, where the least loaded of all would be the frozen one.
    """

    replica: Replica
    in_flight: int = 0
    failed_at: float | None = None
    shut: bool = False
    full: bool = False
    calls: bool = False
    doubted: bool = False

    def has_just_failed(self, now: float) -> bool:
        return self.failed_at is not None and now - self.failed_at < FAILURE_MEMORY_S

    @property
    def sequences(self) -> int:
        """Running and waiting there, as far as anybody here knows."""
        return max(self.replica.load.running + self.replica.load.waiting, self.in_flight)

    @property
    def capacity(self) -> int:
        return max(1, self.replica.max_num_seqs)


class RequestFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What routing needs to know of a request.

    `draw` in [0, 1) settles ties, so that gateways that share nothing don't all choose the same idle replica.
    `numerics`: of this class if there is one ready: what was begun there goes on with the same text. `avoid` holds the
    (node, replica) to be taken only if there is no other.
    """

    sequences: int = 1
    region: str = "local"
    draw: float = 0.0
    numerics: str | None = None
    avoid: frozenset[tuple[str, str]] = frozenset()


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

    Ready ones with room, in this order: those that have not just failed, those that are not to be avoided, those of
    the wanted numerics, those of the same region, the least loaded for its capacity. A request of more sequences than
    a replica has seats goes to an idle one.
    """
    ready = [c for c in candidates if c.replica.state == "ready"]
    if not ready:
        return NoRoute(_why_none_is_ready(candidates))
    willing = [c for c in ready if not c.shut]
    if not willing:
        return NoRoute(f"all {len(ready)} ready replicas have failed too often of late")
    heard_of = [c for c in willing if not (c.calls and (c.doubted or c.has_just_failed(now)))]
    if not heard_of:
        return NoRoute(f"all {len(willing)} ready replicas have just failed or are silent: the first to call gets it")
    roomy = [c for c in heard_of if _has_room(c, facts.sequences)]
    if not roomy:
        return NoRoute(_why_none_has_room(len(heard_of), len(willing) - len(heard_of)))
    ranked = [(_rank(c, facts, now), c) for c in roomy]
    best = min(rank for rank, _ in ranked)
    tied = [c for rank, c in ranked if rank == best]
    chosen = tied[int(facts.draw * len(tied))]
    return Route(chosen.replica.node, chosen.replica.id, _reason(chosen, facts, len(tied), len(candidates)))


def suits(facts: RequestFacts, replica: Replica, ready: Collection[Replica]) -> bool:
    """Whether a request that this replica calls should follow, and not wait for another of the `ready` ones."""
    if _is_avoided(replica, facts) and not all(_is_avoided(other, facts) for other in ready):
        return False
    return not (_differs(replica, facts) and not all(_differs(other, facts) for other in ready))


def _has_room(candidate: Candidate, sequences: int) -> bool:
    if candidate.full or candidate.replica.by_turn:
        return False
    held = candidate.sequences
    return held == 0 or held + sequences <= candidate.capacity


def _is_avoided(replica: Replica, facts: RequestFacts) -> bool:
    return (replica.node, replica.id) in facts.avoid


def _differs(replica: Replica, facts: RequestFacts) -> bool:
    return facts.numerics is not None and replica.numerics != facts.numerics


def _rank(candidate: Candidate, facts: RequestFacts, now: float) -> tuple[bool, bool, bool, bool, float]:
    """Lower is better."""
    replica = candidate.replica
    elsewhere = replica.region != facts.region
    load = candidate.sequences / candidate.capacity
    return candidate.has_just_failed(now), _is_avoided(replica, facts), _differs(replica, facts), elsewhere, load


def _reason(chosen: Candidate, facts: RequestFacts, tied: int, candidates: int) -> str:
    where = "same region" if chosen.replica.region == facts.region else f"region {chosen.replica.region}"
    share = f"{chosen.sequences} of {chosen.capacity} sequences"
    lot = f", drawn among {tied} alike" if tied > 1 else ""
    other = (
        f", numerics {chosen.replica.numerics} instead of {facts.numerics}" if _differs(chosen.replica, facts) else ""
    )
    return f"least loaded of {candidates}: {share}, {where}{other}{lot}"


def _why_none_has_room(full: int, failed: int) -> str:
    others = f", and {failed} just failed, or are silent, and did not call yet" if failed else ""
    return f"all {full} ready replicas are full{others}"


def _why_none_is_ready(candidates: Sequence[Candidate]) -> str:
    if not candidates:
        return "no replica of this model is up"
    states = sorted({c.replica.state for c in candidates})
    return f"no replica of this model is ready ({len(candidates)} {' or '.join(states)})"
