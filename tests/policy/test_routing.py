"""The router's promises, told on plain data."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from springtide.core.cluster import Replica
from springtide.core.engine_api import EngineLoad
from springtide.policy.routing import FAILURE_MEMORY_S, Candidate, NoRoute, RequestFacts, Route, route, suits


def candidate(name: str, *, running: int = 0, waiting: int = 0, seqs: int = 8, **rest: object) -> Candidate:
    state = rest.pop("state", "ready")
    described = {name: rest.pop(name) for name in ("region", "numerics", "by_turn") if name in rest}
    load = EngineLoad(running=running, waiting=waiting)
    replica = Replica(
        id=name,
        node=f"node-of-{name}",
        model="m",
        engine="mock",
        state=state,
        max_num_seqs=seqs,
        load=load,
        **described,  # type: ignore[arg-type]
    )
    return Candidate(replica, **rest)  # type: ignore[arg-type]


def chosen(facts: RequestFacts, *candidates: Candidate, now: float = 100.0) -> str:
    answer = route(facts, candidates, now)
    assert isinstance(answer, Route), answer
    return answer.replica


def test_the_least_loaded_for_its_capacity_takes_it() -> None:
    small = candidate("small", running=3, seqs=4)
    large = candidate("large", running=20, seqs=64)
    assert chosen(RequestFacts(), small, large) == "large"


def test_the_gateways_own_burst_counts_before_the_load_report_says_so() -> None:
    assert chosen(RequestFacts(), candidate("a", in_flight=5), candidate("b", running=2)) == "b"


def test_the_same_region_comes_first_while_it_has_room() -> None:
    facts = RequestFacts(region="eu")
    near, far = candidate("near", running=7, region="eu"), candidate("far", region="us")
    assert chosen(facts, near, far) == "near"
    full = candidate("near", running=8, region="eu")
    assert chosen(facts, full, far) == "far"


def test_a_replica_that_just_failed_is_the_last_choice_and_is_forgiven_later() -> None:
    failed, busy = candidate("failed", failed_at=99.0), candidate("busy", running=7)
    assert chosen(RequestFacts(), failed, busy) == "busy"
    assert chosen(RequestFacts(), failed) == "failed"
    assert chosen(RequestFacts(), failed, busy, now=99.0 + FAILURE_MEMORY_S) == "failed"


def test_one_that_grants_turns_and_just_failed_is_waited_for_not_tried() -> None:
    failed, busy = candidate("failed", failed_at=99.0, calls=True), candidate("busy", running=7)
    assert chosen(RequestFacts(), failed, busy) == "busy"
    answer = route(RequestFacts(), [failed, candidate("full", running=8)], 100.0)
    assert isinstance(answer, NoRoute) and "1 just failed" in answer.reason
    answer = route(RequestFacts(), [failed], 100.0)
    assert isinstance(answer, NoRoute) and "the first to call" in answer.reason
    assert chosen(RequestFacts(), failed, now=99.0 + FAILURE_MEMORY_S) == "failed"


def test_a_request_of_many_sequences_needs_room_for_all_or_an_idle_replica() -> None:
    facts = RequestFacts(sequences=10)
    assert isinstance(route(facts, [candidate("a", running=7)], 0.0), NoRoute)
    assert chosen(facts, candidate("idle")) == "idle"


def test_where_one_comes_only_by_turn_nobody_goes_uncalled() -> None:
    assert chosen(RequestFacts(), candidate("a", by_turn=True), candidate("b", running=7)) == "b"
    assert isinstance(route(RequestFacts(), [candidate("a", by_turn=True)], 0.0), NoRoute)
    assert isinstance(route(RequestFacts(), [candidate("a", full=True)], 0.0), NoRoute), "it has just said so"


def test_what_was_begun_goes_on_in_its_class_of_numerics_if_it_can() -> None:
    facts = RequestFacts(numerics="cpu")
    cpu, gpu = candidate("cpu", running=7, numerics="cpu"), candidate("gpu", numerics="gpu")
    assert chosen(facts, cpu, gpu) == "cpu"
    answer = route(facts, [gpu], 0.0)
    assert isinstance(answer, Route) and "numerics gpu instead of cpu" in answer.reason
    assert suits(facts, cpu.replica, [cpu.replica, gpu.replica])
    assert not suits(facts, gpu.replica, [cpu.replica, gpu.replica])
    assert suits(facts, gpu.replica, [gpu.replica])


def test_whom_to_avoid_is_the_last_choice_but_one() -> None:
    avoided, other = candidate("avoided"), candidate("other", running=7)
    facts = RequestFacts(avoid=frozenset({("node-of-avoided", "avoided")}))
    assert chosen(facts, avoided, other) == "other"
    assert chosen(facts, avoided) == "avoided"
    assert not suits(facts, avoided.replica, [avoided.replica, other.replica])
    assert suits(facts, avoided.replica, [avoided.replica])
    assert chosen(facts, avoided, candidate("failed", failed_at=99.0)) == "avoided"


def test_no_route_says_why() -> None:
    def reason(*candidates: Candidate) -> str:
        answer = route(RequestFacts(), candidates, 0.0)
        assert isinstance(answer, NoRoute)
        return answer.reason

    assert reason() == "no replica of this model is up"
    assert reason(candidate("a", state="starting"), candidate("b", state="draining")) == (
        "no replica of this model is ready (2 draining or starting)"
    )
    assert reason(candidate("a", running=8)) == "all 1 ready replicas are full"
    assert reason(candidate("a", shut=True)) == "all 1 ready replicas have failed too often of late"


def test_ties_are_settled_by_the_draw() -> None:
    alike = [candidate(name) for name in "abcd"]
    assert [chosen(RequestFacts(draw=d), *alike) for d in (0.0, 0.3, 0.6, 0.99)] == ["a", "b", "c", "d"]


loads = st.lists(
    st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20), st.booleans(), st.booleans()), max_size=8
)


@given(loads, st.integers(1, 8), st.floats(0, 1, exclude_max=True))
def test_who_is_chosen_is_ready_has_room_and_is_no_worse_than_any_like_it(
    drawn: list[tuple[int, int, int, bool, bool]], sequences: int, draw: float
) -> None:
    candidates = [
        candidate(
            str(i),
            running=r,
            waiting=w,
            in_flight=f,
            state="ready" if up else "starting",
            region="local" if near else "far",
        )
        for i, (r, w, f, up, near) in enumerate(drawn)
    ]
    answer = route(RequestFacts(sequences=sequences, draw=draw), candidates, 0.0)
    able = [c for c in candidates if c.replica.state == "ready" and (c.sequences == 0 or c.sequences + sequences <= 8)]
    if isinstance(answer, NoRoute):
        assert not able
        return
    best = next(c for c in able if c.replica.id == answer.replica)
    rivals = [c for c in able if c.replica.region == best.replica.region]
    assert all(best.sequences <= c.sequences for c in rivals)
    assert best.replica.region == "local" or all(c.replica.region != "local" for c in able)
