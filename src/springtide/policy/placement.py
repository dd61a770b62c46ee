"""Which replica runs on which node. Knows deployments, nodes and what was decided before; nothing of processes,
models or clocks.

The rules, in order: nothing runs where it should not (unknown or draining nodes, vanished deployments, another
specification than the deployment's); what may stay, stays, with its id; the rest is spread. So a node's death
moves only what it ran, and a decision made twice is the same decision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from springtide.core.cluster import Deployment, DesiredReplica, Node


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """What every given node should run (draining ones: nothing), and what found no place.

    `replicas` has an entry for each node that was given, in the order of their ids. `missing` counts what each
    deployment lacks, if it lacks any.
    """

    replicas: dict[str, tuple[DesiredReplica, ...]]
    missing: dict[str, int] = {}


def place(
    deployments: Sequence[Deployment],
    nodes: Sequence[Node],
    current: Mapping[str, Sequence[DesiredReplica]],
    *,
    new_id: Callable[[], str],
) -> Placement:
    """Where each deployment's replicas should run.

    Args:
        deployments: all that should run; names are unique.
        nodes: the machines that are there.
        current: what each node was told before, by node id. Nodes that are not in `nodes` are ignored: what
            they ran is placed anew.
        new_id: draws the id of a replica that did not exist before.
    """
    board = _Board(nodes)
    for deployment in sorted(deployments, key=lambda d: d.name):
        for node, replica in _survivors(deployment, board, current):
            board.put(node, replica)
    for deployment in sorted(deployments, key=lambda d: d.name):
        board.fill(deployment, new_id)
    return Placement(
        replicas={node: tuple(sorted(held, key=_id)) for node, held in board.held.items()},
        missing=board.missing,
    )


def _survivors(
    deployment: Deployment, board: _Board, current: Mapping[str, Sequence[DesiredReplica]]
) -> list[tuple[str, DesiredReplica]]:
    """What of a deployment may stay where it is, at most as many as it wants.

    A surplus goes first where the deployment is stacked highest, and there the youngest (its id is the last) goes.
    """
    by_node = {
        node: sorted((replica for replica in current.get(node, ()) if _fits(deployment, replica)), key=_id)
        for node in board.usable
    }
    surplus = sum(map(len, by_node.values())) - max(deployment.replicas, 0)
    for _ in range(surplus):
        highest = max(by_node, key=lambda node: (len(by_node[node]), node))
        by_node[highest].pop()
    return [(node, replica) for node, held in by_node.items() for replica in held]


def _id(replica: DesiredReplica) -> str:
    return replica.id


def _fits(deployment: Deployment, replica: DesiredReplica) -> bool:
    """Whether a replica is of this deployment as it stands now."""
    return _specification(deployment, replica.id) == replica


def _specification(deployment: Deployment, replica_id: str) -> DesiredReplica:
    return DesiredReplica(
        id=replica_id,
        deployment=deployment.name,
        model=deployment.name,
        source=deployment.source,
        engine=deployment.engine,
        options=deployment.options,
    )


class _Board:
    """The nodes with what has been put on them so far."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.held: dict[str, list[DesiredReplica]] = {node.id: [] for node in nodes}
        self.usable = {node.id: node for node in sorted(nodes, key=lambda n: n.id) if node.state == "ready"}
        self.missing: dict[str, int] = {}

    def put(self, node: str, replica: DesiredReplica) -> None:
        self.held[node].append(replica)

    def fill(self, deployment: Deployment, new_id: Callable[[], str]) -> None:
        """Add what a deployment lacks, each replica on the node that spreads it best."""
        lacking = deployment.replicas - sum(self._count(deployment, node) for node in self.usable)
        if lacking > 0 and not self.usable:
            self.missing[deployment.name] = lacking
            return
        for _ in range(lacking):
            self.put(self._best_node(deployment), _specification(deployment, new_id()))

    def _best_node(self, deployment: Deployment) -> str:
        """Fewest copies of the deployment on the node, then in its site (one power cut, one uplink), then the
        emptiest node."""
        in_site: dict[tuple[str, str], int] = {}
        for id, node in self.usable.items():
            site = (node.region, node.site)
            in_site[site] = in_site.get(site, 0) + self._count(deployment, id)

        def cost(id: str) -> tuple[int, int, int, str]:
            node = self.usable[id]
            return self._count(deployment, id), in_site[node.region, node.site], len(self.held[id]), id

        return min(self.usable, key=cost)

    def _count(self, deployment: Deployment, node: str) -> int:
        return sum(replica.deployment == deployment.name for replica in self.held[node])
