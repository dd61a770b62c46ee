"""Whose turn it is: stories about one keeper, and properties that hold for any traffic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.core.request import PriorityClass, TokenCounts
from springtide.policy.fairness import TURN_S, Turn, TurnKeeper, cost
from springtide.policy.shares import CLASS_WEIGHTS, Flow
from tests.policy.fleet_model import Ad

A: Flow = ("a", "standard")
B: Flow = ("b", "standard")
BEFORE: Flow = ("before", "standard")


def ad(
    tenant: str,
    waiting: int = 100,
    *,
    weight: float = 1.0,
    elsewhere: float = 0.0,
    priority_class: PriorityClass = "standard",
) -> Ad:
    return Ad(tenant, priority_class, weight, waiting, elsewhere)


@dataclass
class House:
    """A keeper with an engine that runs whatever is let in. Who has been here longest leaves first."""

    keeper: TurnKeeper
    now: float = 0.0
    guests: list[tuple[str, Flow]] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    count: int = 0

    def tell(self, gateway: str, *ads: Ad) -> None:
        self.weights.update({ad.tenant: ad.weight for ad in ads})
        self.keeper.backlog(gateway, ads, self.now)

    def enter(self, flow: Flow, turn: int | None = None, *, sequences: int = 1) -> bool:
        self.count += 1
        key = f"r{self.count}"
        entered = self.keeper.arrived(key, flow, self.weights.get(flow[0], 1.0), sequences, self.now, turn)
        if entered:
            self.guests.append((key, flow))
        return entered

    def leave(self, tokens: float = 100.0) -> None:
        key, _ = self.guests.pop(0)
        self.keeper.left(key, tokens)

    def grants(self) -> list[tuple[str, Turn]]:
        return self.keeper.grants(len(self.guests), 0, self.now)

    def fill(self, flow: Flow) -> None:
        while self.enter(flow):
            pass

    def succession(self, turns: int, tokens: Mapping[str, float] = {}) -> list[tuple[str, Turn]]:
        """Who gets in, one after another, as one after another leaves; `tokens` is what requests of a tenant use."""
        granted = []
        for _ in range(turns):
            self.leave(tokens.get(self.guests[0][1][0], 100.0))
            for gateway, turn in self.grants():
                granted.append((gateway, turn))
                assert self.enter((turn.tenant, turn.priority_class), turn.serial)
        return granted


def full_house(capacity: int = 8) -> House:
    """It has seen enough requests to know what they use."""
    house = House(TurnKeeper(capacity))
    for _ in range(40):
        house.fill(BEFORE)
        house.leave()
        house.grants()
    house.fill(BEFORE)
    return house


def tenants(granted: list[tuple[str, Turn]]) -> Counter[str]:
    return Counter(turn.tenant for _, turn in granted)


# ---- stories: room


def test_with_room_and_nobody_waiting_all_are_taken_directly() -> None:
    house = House(TurnKeeper(4))
    assert not house.keeper.by_turn
    assert [house.enter(A) for _ in range(6)] == [True] * 5 + [False]  # four run, one waits inside
    assert house.keeper.by_turn
    assert house.grants() == []


def test_while_others_wait_nobody_comes_without_a_turn_even_if_there_is_room() -> None:
    house = full_house()
    house.tell("gw", ad("a"))
    house.leave()
    assert not house.enter(B)
    [(gateway, turn)] = house.grants()
    assert (gateway, turn.tenant, turn.priority_class) == ("gw", "a", "standard")
    assert house.enter(A, turn.serial)


def test_when_all_who_wait_have_a_turn_the_rest_of_the_room_is_free_for_all() -> None:
    house = full_house()
    for _ in range(4):
        house.leave()
    house.tell("gw", ad("a", waiting=2))
    assert len(house.grants()) == 2
    assert not house.keeper.by_turn
    assert [house.enter(B) for _ in range(3)] == [True, True, False]


def test_a_request_of_many_sequences_takes_as_many_seats_and_an_empty_replica_takes_any() -> None:
    house = House(TurnKeeper(8))
    assert house.enter(A, sequences=6)
    assert not house.enter(B, sequences=4)
    assert house.enter(B, sequences=3)
    house.leave()
    house.leave()
    assert house.enter(A, sequences=20)
    assert not house.enter(B)


def test_with_a_turn_a_large_request_needs_one_seat_and_nobody_is_called_before_it_has_found_the_others() -> None:
    house = full_house(8)
    house.tell("gw", ad("a", waiting=20))
    house.leave()
    [(_, turn)] = house.grants()
    assert house.enter(A, turn.serial, sequences=5)
    assert house.keeper.by_turn
    for _ in range(4):
        house.leave()
        assert house.grants() == []
    house.leave()
    [(_, turn)] = house.grants()  # the next is expected to be as large
    house.leave()
    assert house.grants() == []


def test_turns_for_unexpectedly_large_requests_can_not_flood_the_replica() -> None:
    house = House(TurnKeeper(8))
    house.tell("gw", ad("a", waiting=1000))
    turns = house.grants()
    assert len(turns) == 9
    entered = [house.enter(A, turn.serial, sequences=10) for _, turn in turns]
    assert entered == [True, True] + [False] * 7
    assert house.keeper.counters["crowded"] == 7
    house.leave()
    house.leave()
    assert len(house.grants()) == 1  # now it is known what they are like


def test_seats_that_the_engines_memory_can_not_fill_are_not_given_away() -> None:
    keeper = TurnKeeper(32)  # the memory holds ten
    keeper.backlog("gw", [ad("a", waiting=1000)], 0.0)
    for number, (_, turn) in enumerate(keeper.grants(0, 0, 0.0)):
        assert keeper.arrived(number, A, 1.0, 1, 0.0, turn.serial)
    for waiting in range(24, keeper.slack, -1):
        assert keeper.grants(10, waiting, 0.0) == []
        keeper.left(waiting, 100)
    assert keeper.grants(10, keeper.slack, 0.0) == []
    keeper.left(30, 100)
    assert len(keeper.grants(10, keeper.slack - 1, 0.0)) == 1
    for number in (31, 32, 33):
        keeper.left(number, 100)
    assert 1 < len(keeper.grants(8, 0, 0.0)) <= 3 + 2 * keeper.slack  # perhaps there is more memory by now


# ---- stories: turns


def test_a_turn_that_nobody_needs_goes_to_the_next_at_once() -> None:
    house = full_house()
    house.tell("one", ad("a", waiting=1))
    house.tell("two", ad("b", waiting=1))
    house.leave()
    [(first, turn)] = house.grants()
    house.keeper.declined(first, turn.serial, 0.0)
    [(second, _)] = house.grants()
    assert {first, second} == {"one", "two"}


def test_a_turn_expires_and_whoever_comes_late_with_it_is_still_let_in() -> None:
    house = full_house()
    house.tell("slow", ad("a", waiting=5))
    house.leave()
    [(_, turn)] = house.grants()
    house.tell("quick", ad("b"))
    house.now = TURN_S - 0.01
    assert house.grants() == []
    house.now = TURN_S
    [(gateway, _)] = house.grants()
    assert gateway == "quick"
    assert house.enter(A, turn.serial)
    assert not house.enter(A, turn.serial)  # once
    assert house.keeper.counters == Counter(granted=2, expired=1, late=1)


def test_a_gateway_that_let_a_turn_expire_gets_no_more_until_it_speaks_again() -> None:
    house = full_house()
    house.tell("gw", ad("a", waiting=5))
    house.leave()
    house.grants()
    house.now = 2.0
    assert house.grants() == []
    assert not house.keeper.by_turn
    house.tell("gw", ad("a", waiting=5))
    assert len(house.grants()) == 1


def test_a_lost_gateways_turns_are_free_and_its_requests_stay() -> None:
    house = full_house()
    house.tell("gw", ad("a", waiting=5))
    house.leave()
    [(_, turn)] = house.grants()
    house.keeper.gateway_lost("gw")
    assert house.grants() == []
    assert house.enter(B)
    assert house.keeper.by_turn
    assert not house.enter(A, turn.serial)


def test_a_turn_of_somebody_else_or_of_a_former_life_is_none() -> None:
    house = full_house()
    house.tell("gw", ad("a"))
    house.leave()
    [(_, turn)] = house.grants()
    assert not house.enter(B, turn.serial)
    assert not house.enter(A, 12345)
    assert house.enter(A, turn.serial)


def test_a_backlog_that_is_not_named_any_more_is_gone() -> None:
    house = full_house()
    house.tell("gw", ad("a"), ad("b"))
    house.tell("gw", ad("b"))
    assert tenants(house.succession(5)) == {"b": 5}
    house.tell("gw")
    house.leave()
    assert house.grants() == []


def test_gateways_take_turns_in_proportion_to_who_waits_there() -> None:
    house = full_house()
    house.tell("large", ad("a", waiting=300))
    house.tell("small", ad("a", waiting=100))
    gateways = [gateway for gateway, _ in house.succession(40)]
    assert Counter(gateways) == {"large": 30, "small": 10}
    assert "small" in gateways[:4]


# ---- stories: shares


def test_tenants_of_a_class_share_by_weight() -> None:
    house = full_house()
    house.tell("gw", ad("a", 900, weight=4.0), ad("b", 900))
    assert tenants(house.succession(100)) == {"a": 80, "b": 20}


def test_shares_are_of_tokens_not_of_requests() -> None:
    house = full_house()
    house.tell("gw", ad("a", 900), ad("b", 900))
    house.succession(40, tokens := {"a": 30.0, "b": 90.0})  # until it is known what they are like
    turns = tenants(house.succession(200, tokens))
    assert turns["a"] / turns["b"] == pytest.approx(3.0, rel=0.05)


def test_what_other_replicas_served_counts() -> None:
    house = full_house()
    house.tell("gw", ad("a", 900, elsewhere=5000.0), ad("b", 900))  # told of for the first time
    assert tenants(house.succession(10)) == {"a": 5, "b": 5}
    house.tell("gw", ad("a", 900, elsewhere=5800.0), ad("b", 900))
    assert tenants(house.succession(10)) == {"a": 1, "b": 9}


def test_a_gateway_that_starts_anew_counts_from_nothing() -> None:
    house = full_house()
    house.tell("gw", ad("a", 900, elsewhere=50_000.0), ad("b", 900))
    house.succession(10)
    house.tell("gw", ad("a", 900, elsewhere=800.0), ad("b", 900))
    assert tenants(house.succession(10)) == {"a": 1, "b": 9}


def test_who_was_idle_has_no_credit() -> None:
    house = full_house()
    house.tell("gw", ad("a", 900))
    house.succession(100)
    house.tell("gw", ad("a", 900), ad("b", 900))
    assert tenants(house.succession(20)) == {"a": 10, "b": 10}


def test_what_was_had_while_nobody_wanted_it_is_no_debt() -> None:
    house = House(TurnKeeper(8))
    for _ in range(50):
        house.fill(A)
        house.leave(100.0)
    house.fill(A)
    house.tell("gw", ad("a", 900), ad("b", 900))
    assert tenants(house.succession(20))["a"] >= 9


def test_a_debt_from_elsewhere_starves_nobody_for_long() -> None:
    house = full_house()
    house.tell("gw", ad("a", 900), ad("b", 900))
    house.tell("gw", ad("a", 900, elsewhere=1e9), ad("b", 900))
    turns = house.succession(60)
    assert 0 < tenants(turns)["a"] < 30


def test_classes_share_sixteen_to_four_to_one() -> None:
    house = full_house()
    classes: tuple[PriorityClass, ...] = ("batch", "standard", "interactive")
    house.tell("gw", *[ad(c, 900, priority_class=c) for c in classes])
    turns = tenants(house.succession(210))
    assert turns == pytest.approx({"interactive": 160, "standard": 40, "batch": 10}, abs=1)


def test_a_crowd_in_one_class_takes_nothing_from_another() -> None:
    house = full_house()
    crowd = [ad(f"t{number}", 900, priority_class="batch") for number in range(50)]
    house.tell("gw", *crowd, ad("a", 900, priority_class="interactive"))
    assert tenants(house.succession(170))["a"] == 160


def test_a_burst_of_turns_is_shared_before_a_single_token_is_served() -> None:
    house = full_house(16)
    while house.guests:
        house.leave()
    house.tell("gw", ad("a", weight=3.0), ad("b"))
    turns = house.grants()
    assert len(turns) == 17
    assert tenants(turns)["a"] == pytest.approx(17 * 3 / 4, abs=1)


def test_who_comes_second_to_a_new_replica_is_not_left_behind_by_a_wrong_guess_of_what_requests_cost() -> None:
    house = House(TurnKeeper(8))
    house.fill(A)
    house.tell("gw", ad("a", 900), ad("b", 900))
    assert tenants(house.succession(30, {"a": 20.0, "b": 20.0}))["b"] >= 12


def test_a_long_answer_is_charged_while_it_runs() -> None:
    house = full_house()
    house.tell("gw", ad("a", 900), ad("b", 900))
    house.succession(20)
    long = next(guest for guest in house.guests if guest[1] == A)
    for tokens in (50.0, 100.0, 400.0, 700.0):
        house.keeper.served(long[0], tokens)
    house.guests.remove(long)
    assert tenants(house.succession(6)) == {"b": 6}
    house.keeper.left(long[0], 700.0)  # settled: nothing is charged twice
    house.grants()
    assert tenants(house.succession(20))["a"] == pytest.approx(10, abs=2)


def test_prompts_cost_a_quarter_and_cached_ones_nothing() -> None:
    assert cost(TokenCounts(prompt=400, completion=50, cached=0)) == 150
    assert cost(TokenCounts(prompt=400, completion=50, cached=400)) == 50


def test_a_weight_of_nothing_is_little_but_not_never() -> None:
    house = full_house()
    house.tell("gw", ad("a", 900, weight=0.0))
    assert tenants(house.succession(3)) == {"a": 3}


# ---- stories: memory and time


def test_idle_flows_are_forgotten_the_longest_idle_first() -> None:
    keeper = TurnKeeper(4, max_idle_flows=100)
    keeper.arrived("stays", ("guest", "standard"), 1.0, 1, 0.0)
    for number in range(1000):
        keeper.backlog(f"gw{number % 3}", [ad(f"t{number}")], float(number))
        keeper.arrived(number, (f"t{number}", "batch"), 1.0, 1, float(number))
        keeper.left(number, 10.0)
    for gateway in ("gw0", "gw1", "gw2"):
        keeper.gateway_lost(gateway)
    assert keeper.num_flows == 101


# ---- properties


class Witness:
    """What anybody can know of a keeper from outside."""

    def __init__(self, capacity: int, largest: int) -> None:
        self.keeper = TurnKeeper(capacity)
        self.capacity = capacity
        self.largest = largest  # sequences of a request
        self.now = 0.0
        self.out: dict[int, tuple[str, Turn, float]] = {}
        self.expired: dict[int, tuple[str, Turn, float]] = {}
        self.guests: dict[int, int] = {}  # sequences
        self.waiting_at: dict[str, set[Flow]] = {}
        self.count = 0

    @property
    def held(self) -> int:
        return sum(self.guests.values())

    def advertise(self, gateway: str, lines: list[tuple[Flow, int, float]]) -> None:
        ads = {flow: Ad(*flow, 1.0, waiting, elsewhere) for flow, waiting, elsewhere in lines}
        self.keeper.backlog(gateway, ads.values(), self.now)
        self.waiting_at[gateway] = {flow for flow, ad in ads.items() if ad.waiting}

    def enter(self, flow: Flow, sequences: int, serial: int | None = None) -> None:
        keeper, held, sequences = self.keeper, self.held, min(sequences, self.largest)
        by_turn = keeper.by_turn
        self.count += 1
        if keeper.arrived(self.count, flow, 1.0, sequences, self.now, serial):
            self.guests[self.count] = sequences
            assert serial is not None or not held or held + sequences <= self.capacity + keeper.slack
        elif serial is None and sequences == 1:
            assert by_turn

    def use_turn(self, which: int, sequences: int) -> None:
        if turns := self.out | self.expired:
            serial = list(turns)[which % len(turns)]
            _, turn, _ = turns[serial]
            self.out.pop(serial, None)
            self.expired.pop(serial, None)
            self.enter((turn.tenant, turn.priority_class), sequences, serial)

    def decline(self, which: int) -> None:
        if self.out:
            serial = list(self.out)[which % len(self.out)]
            gateway, _, _ = self.out.pop(serial)
            self.keeper.declined(gateway, serial, self.now)

    def guest(self, which: int) -> int | None:
        return list(self.guests)[which % len(self.guests)] if self.guests else None

    def serve(self, which: int, tokens: float) -> None:
        if (key := self.guest(which)) is not None:
            self.keeper.served(key, tokens)

    def leave(self, which: int, tokens: float) -> None:
        if (key := self.guest(which)) is not None:
            del self.guests[key]
            self.keeper.left(key, tokens)

    def lose(self, gateway: str) -> None:
        self.keeper.gateway_lost(gateway)
        self.waiting_at.pop(gateway, None)
        self.out = {serial: out for serial, out in self.out.items() if out[0] != gateway}

    def pause(self, seconds: float) -> None:
        self.now += seconds

    def call(self) -> None:
        for gateway, turn in self.keeper.grants(self.held, 0, self.now):
            assert (turn.tenant, turn.priority_class) in self.waiting_at[gateway]
            assert turn.serial not in self.out
            self.out[turn.serial] = gateway, turn, self.now
        self.expired |= {serial: out for serial, out in self.out.items() if self.now - out[2] >= TURN_S}
        self.out = {serial: out for serial, out in self.out.items() if serial not in self.expired}

    def check(self) -> None:
        counters = self.keeper.counters
        over = counters["taken"] + counters["returned"] + counters["expired"] + counters["crowded"]
        assert counters["granted"] == over + len(self.out)
        late = counters["late"] * self.largest
        assert self.held < 2 * self.capacity + self.largest + late
        if self.keeper.by_turn:  # then nothing is unused
            assert self.held + len(self.out) * self.largest >= self.capacity


GATEWAYS = ("one", "two", "three")
FLOWS: list[Flow] = [(t, c) for t in "xy" for c in CLASS_WEIGHTS]
gateways, flows, which = st.sampled_from(GATEWAYS), st.sampled_from(FLOWS), st.integers(0, 50)
lines = st.tuples(flows, st.integers(0, 9), st.floats(0, 1e6))
events = st.lists(
    st.one_of(
        st.tuples(st.just(Witness.advertise), gateways, st.lists(lines, max_size=4)),
        st.tuples(st.just(Witness.enter), flows, st.integers(1, 5)),
        st.tuples(st.just(Witness.use_turn), which, st.integers(1, 5)),
        st.tuples(st.just(Witness.decline), which),
        st.tuples(st.just(Witness.serve), which, st.floats(0, 1000)),
        st.tuples(st.just(Witness.leave), which, st.floats(0, 1000)),
        st.tuples(st.just(Witness.lose), gateways),
        st.tuples(st.just(Witness.pause), st.floats(0, 0.7)),
    ),
    max_size=60,
)


@settings(max_examples=200)
@given(st.integers(1, 20), st.sampled_from([1, 5]), events)
def test_no_traffic_loses_a_turn_floods_the_replica_or_leaves_room_unused(
    capacity: int, largest: int, events: list[tuple[Any, ...]]
) -> None:
    witness = Witness(capacity, largest)
    for what, *arguments in events:
        what(witness, *arguments)
        witness.call()
        witness.check()
    for gateway in GATEWAYS:
        witness.lose(gateway)
    while witness.guests:
        witness.leave(0, 1.0)
    assert witness.keeper.grants(0, 0, witness.now) == []
    assert not witness.keeper.by_turn


@given(
    st.lists(st.floats(0.5, 8), min_size=2, max_size=5),
    st.lists(st.floats(20, 200), min_size=5, max_size=5),
    st.integers(2, 16),
)
@settings(max_examples=25)
def test_any_weights_and_lengths_give_tokens_by_weight(
    weights: list[float], lengths: list[float], capacity: int
) -> None:
    house = full_house(capacity)
    backlogs = [ad(str(number), 10**6, weight=weight) for number, weight in enumerate(weights)]
    house.tell("gw", *backlogs)
    tokens = {str(number): length for number, length in enumerate(lengths)}
    had: Counter[str] = Counter()
    for _, turn in house.succession(1200, tokens)[200:]:
        had[turn.tenant] += tokens[turn.tenant]  # type: ignore[assignment]
    shares = [had[str(number)] / weight for number, weight in enumerate(weights)]
    slack = 4 * max(lengths) / min(weights)  # a request or two more or less, at each end
    assert max(shares) - min(shares) <= slack
