"""Stories about trying again, and properties that hold for any weather."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from springtide.policy.retries import Breaker, RetryBudget, hedge

# ---- budget


def test_a_quiet_gateway_may_retry_and_saves_up_no_more_than_the_most() -> None:
    budget = RetryBudget(0.0, share=0.2, floor_per_s=1.0, most=3)
    assert [budget.take(1000.0) for _ in range(4)] == [True, True, True, False]
    assert budget.take(1001.0)


def test_an_outage_adds_just_a_share_to_the_load() -> None:
    budget = RetryBudget(0.0, share=0.1, floor_per_s=1.0, most=10)
    retries = 0
    for request in range(10_000):  # a thousand a second; all of them fail, and would try again three times
        budget.requested()
        retries += sum(budget.take(request / 1000) for _ in range(3))
    assert retries == pytest.approx(10_000 * 0.1 + 10 * 1.0 + 10, abs=2)


def test_who_finds_it_empty_knows_how_long_to_wait() -> None:
    budget = RetryBudget(0.0, floor_per_s=2.0, most=1)
    assert budget.seconds_until(0.0) == 0
    assert budget.take(0.0)
    wait = budget.seconds_until(0.0)
    assert wait == pytest.approx(0.5)
    assert not budget.take(0.4)
    assert budget.take(wait)


@given(st.lists(st.tuples(st.floats(0, 5), st.booleans()), max_size=60), st.floats(0, 1), st.floats(0.1, 5))
def test_no_weather_gives_more_retries_than_the_budget(
    events: list[tuple[float, bool]], share: float, floor: float
) -> None:
    budget = RetryBudget(0.0, share=share, floor_per_s=floor, most=5)
    now, requests, retries = 0.0, 0, 0
    for pause, is_request in events:
        now += pause
        if is_request:
            budget.requested()
            requests += 1
        else:
            retries += budget.take(now)
        assert retries <= 5 + share * requests + floor * now + 1e-6
        assert budget.seconds_until(now) <= 1 / floor


# ---- breaker


def fail(breaker: Breaker, now: float, times: int = 1) -> None:
    for _ in range(times):
        ticket = breaker.attempt(now)
        assert ticket is not None
        breaker.failed(ticket, now)


def test_a_broken_replica_is_left_alone_probed_and_trusted_again() -> None:
    breaker = Breaker(failures=3, window_s=10, cool_down_s=2)
    fail(breaker, 0.0, times=3)
    assert breaker.state(1.9) == "open" and breaker.attempt(1.9) is None
    assert breaker.state(2.0) == "half-open"
    probe = breaker.attempt(2.0)
    assert probe is not None
    assert not breaker.admits(2.1)  # one at a time
    breaker.succeeded(probe)
    assert breaker.state(2.2) == "closed"
    assert all(breaker.attempt(2.2) is not None for _ in range(10))


def test_each_failed_probe_doubles_the_pause_up_to_the_longest() -> None:
    breaker = Breaker(failures=1, cool_down_s=2, longest_s=10)
    now, pauses = 0.0, []
    for _ in range(4):
        fail(breaker, now)
        opened = now
        while breaker.state(now) == "open":
            now += 1
        pauses.append(now - opened)
    assert pauses == [2, 4, 8, 10]


def test_scattered_failures_and_a_busy_replica_with_few_of_them_change_nothing() -> None:
    scattered = Breaker(failures=3, window_s=10)
    for now in range(0, 100, 6):
        fail(scattered, float(now))
    busy = Breaker(failures=3, window_s=10)
    for number in range(300):
        ticket = busy.attempt(number / 100)
        assert ticket is not None
        if number % 50 == 0:
            busy.failed(ticket, number / 100)
        else:
            busy.succeeded(ticket)
    assert scattered.state(100.0) == busy.state(3.0) == "closed"


def test_a_refusal_for_want_of_room_is_no_failure_and_lets_the_next_probe_go() -> None:
    breaker = Breaker(failures=1, cool_down_s=2)
    for _ in range(10):
        refused = breaker.attempt(0.0)
        assert refused is not None
        breaker.dropped(refused)
    assert breaker.state(0.0) == "closed"
    fail(breaker, 0.0)
    probe = breaker.attempt(2.0)
    assert probe is not None
    breaker.dropped(probe)
    assert breaker.state(2.0) == "half-open" and breaker.admits(2.0)


def test_old_news_neither_closes_nor_opens() -> None:
    breaker = Breaker(failures=2, cool_down_s=2)
    before = breaker.attempt(0.0)
    assert before is not None
    fail(breaker, 0.0, times=2)
    breaker.succeeded(before)  # sent when all was well
    assert breaker.state(1.0) == "open"
    probe = breaker.attempt(2.0)
    assert probe is not None
    breaker.succeeded(probe)
    breaker.failed(before, 3.0)
    breaker.failed(before, 3.0)
    assert breaker.state(3.0) == "closed"


def test_a_probe_that_never_reports_gives_way_and_is_not_heard_later() -> None:
    breaker = Breaker(failures=1, cool_down_s=2, probe_s=30)
    fail(breaker, 0.0)
    silent = breaker.attempt(2.0)
    assert silent is not None
    assert breaker.attempt(31.9) is None
    second = breaker.attempt(32.0)
    assert second is not None
    breaker.failed(silent, 33.0)
    assert breaker.state(33.0) == "half-open"
    breaker.succeeded(second)
    assert breaker.state(33.0) == "closed"


moves = st.sampled_from(["attempt", "succeed", "fail", "drop"])


@given(st.lists(st.tuples(moves, st.floats(0, 3), st.integers(0, 20)), max_size=80))
def test_whatever_happens_it_admits_again_after_the_longest_pause(moves: list[tuple[str, float, int]]) -> None:
    breaker = Breaker(failures=2, window_s=5, cool_down_s=1, longest_s=8, probe_s=4)
    now = 0.0
    tickets: list[int] = []
    for move, pause, which in moves:
        now += pause
        if move == "attempt":
            probing = breaker.state(now) == "half-open"
            ticket = breaker.attempt(now)
            if ticket is not None:
                assert breaker.state(now) != "open"
                assert not probing or not breaker.admits(now)
                tickets.append(ticket)
        elif tickets:
            ticket = tickets.pop(which % len(tickets))
            if move == "succeed":
                breaker.succeeded(ticket)
            elif move == "fail":
                breaker.failed(ticket, now)
            else:
                breaker.dropped(ticket)
    assert breaker.admits(now + 8)


# ---- hedging


def test_nobody_is_asked_twice_unless_that_was_wished_for() -> None:
    budget = RetryBudget(0.0, most=1)
    assert not hedge(1000.0, budget, 0.0)
    assert not hedge(0.9, budget, 0.0, after_s=1.0)
    assert budget.take(0.0)  # nothing was spent until now


def test_a_hedge_costs_a_retry() -> None:
    budget = RetryBudget(0.0, floor_per_s=1.0, most=1)
    assert hedge(1.0, budget, 0.0, after_s=1.0)
    assert not hedge(1.0, budget, 0.0, after_s=1.0)
    assert hedge(2.0, budget, 1.0, after_s=1.0)
