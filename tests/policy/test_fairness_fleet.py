"""Whose turn it is, in a fleet in virtual time: shares, waits and throughput with stale news and skewed ingress."""

from __future__ import annotations

import pytest

from tests.policy.fleet_model import Fleet

INGRESS = [
    pytest.param(1, [0], [0], id="one gateway"),
    pytest.param(2, [0], [1], id="two, each tenant at his own"),
    pytest.param(2, [0, 1], [0], id="two, one tenant at both"),
    pytest.param(4, [0], [1, 2, 3], id="four, the heavy one at one"),
    pytest.param(4, [0, 1, 2], [3], id="four, the light one at one"),
]


@pytest.mark.parametrize("replicas", [1, 4])
@pytest.mark.parametrize(("gateways", "heavy", "light"), INGRESS)
def test_four_to_one_stays_four_to_one(replicas: int, gateways: int, heavy: list[int], light: list[int]) -> None:
    fleet = Fleet(gateways=gateways, replicas=replicas, step=0.02)
    fleet.clients(40 * replicas, "heavy", at=heavy, weight=4.0)
    fleet.clients(40 * replicas, "light", at=light)
    tokens = fleet.measure(60)
    assert tokens["heavy"] / tokens["light"] == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize("replicas", [1, 4])
def test_the_classes_keep_their_shares_and_batch_is_not_starved(replicas: int) -> None:
    fleet = Fleet(gateways=2, replicas=replicas, step=0.02)
    for priority_class in ("interactive", "standard", "batch"):
        fleet.clients(30 * replicas, priority_class, priority_class=priority_class)  # type: ignore[arg-type]
    tokens = fleet.measure(60)
    assert tokens["interactive"] / tokens["standard"] == pytest.approx(4.0, rel=0.1)
    assert tokens["standard"] / tokens["batch"] == pytest.approx(4.0, rel=0.15)
    assert max(fleet.world.waits["batch", "batch"]) < 60


def p99(waits: list[float]) -> float:
    return sorted(waits)[int(0.99 * len(waits))]


@pytest.mark.parametrize("replicas", [1, 4])
def test_a_tenant_with_a_hundred_times_the_load_changes_little_for_the_other(replicas: int) -> None:
    def wait_beside(factor: int) -> float:
        fleet = Fleet(gateways=2, replicas=replicas, step=0.02)
        fleet.clients(14 * replicas, "modest", at=[0])
        fleet.clients(14 * replicas * factor, "other", at=[1])
        fleet.measure(60)
        return p99(fleet.world.waits["modest", "standard"])

    assert wait_beside(100) <= 1.5 * wait_beside(1)


@pytest.mark.parametrize("replicas", [1, 4])
@pytest.mark.parametrize(("way", "clients"), [(0.001, 40), (0.02, 40), (0.15, 40), (0.01, 16)])
def test_fairness_costs_no_throughput(replicas: int, way: float, clients: int) -> None:
    """`way` is up to seven steps long: then more must wait inside, to be there in time. With sixteen clients of each
    tenant there are as many as seats: hardly anybody waits, and all replicas call the same few."""

    def tokens(fair: bool) -> int:
        fleet = Fleet(gateways=2, replicas=replicas, capacity=32, step=0.02, way=way, fair=fair)
        fleet.clients(clients * replicas, "a", weight=4.0)
        fleet.clients(clients * replicas, "b")
        return sum(fleet.measure(30).values())

    assert tokens(fair=True) >= 0.98 * tokens(fair=False)


def test_requests_of_many_sequences_change_no_shares_and_leave_no_seat_empty() -> None:
    fleet = Fleet(gateways=2, step=0.02)
    fleet.clients(40, "single", at=[0])
    fleet.clients(10, "eightfold", at=[1], sequences=8)
    tokens = fleet.measure(60)
    assert tokens["single"] / tokens["eightfold"] == pytest.approx(1.0, rel=0.1)
    assert fleet.replicas[0].idle <= 0.02 * 16 * fleet.replicas[0].steps


def test_an_engine_short_of_memory_is_kept_busy_and_its_inside_short() -> None:
    fleet = Fleet(gateways=2, capacity=32, memory=10, step=0.02)
    fleet.clients(40, "a", weight=4.0)
    fleet.clients(40, "b")
    replica = fleet.replicas[0]
    fleet.world.run(5)
    replica.most_held = replica.steps = replica.idle = 0
    tokens = fleet.measure(60, warm_up=0)
    assert tokens["a"] / tokens["b"] == pytest.approx(4.0, rel=0.05)
    assert replica.idle <= 0.02 * 10 * replica.steps
    assert replica.most_held <= 10 + 4 * fleet.keepers[0].slack


def test_a_gateway_that_asks_for_turns_but_never_takes_them_gets_one_at_a_time() -> None:
    fleet = Fleet(gateways=2, step=0.02)
    fleet.clients(40, "a", at=[0])
    fleet.clients(40, "b", at=[1])
    fleet.measure(10)
    fleet.gateways[0].deaf = True
    fleet.measure(5)
    tokens = fleet.measure(20)
    assert set(tokens) == {"b"}
    assert tokens["b"] >= 15 / 16 * 20 * 16 / 0.02
    fleet.gateways[0].deaf = False
    tokens = fleet.measure(20)
    assert tokens["a"] / tokens["b"] == pytest.approx(1.0, rel=0.1)
