"""Turns deployments into what each node should run. Several controllers may live; one, the leader, acts.

Decisions are `policy.placement`'s. Here is only when to make them, what is known at that moment, and who has to be
told. Nothing is remembered but in the fabric: a new leader reads what nodes were told and goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
import time

import msgspec

from springtide.core.cluster import Deployment, DesiredReplica, DesiredState, Node
from springtide.core.errors import SetupError
from springtide.core.ids import new_id
from springtide.fabric.connection import Fabric
from springtide.fabric.desired import DesiredWriter, NodeIntent, Registry
from springtide.fabric.leader import Leadership
from springtide.fabric.presence import PresenceView
from springtide.policy.placement import Placement, place

logger = logging.getLogger(__name__)

_INTERVAL = 2.0  # seconds between two looks when nothing is heard
_DEBOUNCE = 0.1  # seconds for news that come together
NODE_PATIENCE = 10.0  # seconds of silence after which a node's replicas are placed elsewhere


class Controller:
    """One controller, under the name `id`."""

    def __init__(self, fabric: Fabric, id: str, *, node_patience: float = NODE_PATIENCE) -> None:
        self._fabric = fabric
        self._node_patience = node_patience
        self._leadership = Leadership(fabric, "controller", id)
        self._deployments = Registry(fabric, "deployments", Deployment)
        self._intents = Registry(fabric, "intents", NodeIntent)
        self._presence = PresenceView(fabric)
        self._writer = DesiredWriter(fabric)
        self._nodes: dict[str, Node] = {}  # as last described
        self._last_seen: dict[str, float] = {}
        self._states: dict[str, DesiredState] = {}  # what each node was told last
        self._missing: dict[str, int] = {}
        self._deaf = False  # the fabric could not be heard at the last look
        self._visible: frozenset[tuple[str, str]] = frozenset()
        self._look = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def is_leader(self) -> bool:
        return self._leadership.is_leader

    async def start(self) -> None:
        """Stand for election, and act when elected."""
        await self._presence.start()
        self._presence.on_change(self._on_presence)
        await self._deployments.watch(self._look.set)
        await self._intents.watch(self._look.set)
        self._leadership.on_change(self._on_leadership)
        await self._leadership.start()
        self._task = asyncio.get_running_loop().create_task(self._run(), name="controller")

    async def stop(self) -> None:
        """Resign. What nodes were told stands."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._leadership.stop()
        await self._deployments.unwatch()
        await self._intents.unwatch()
        await self._presence.stop()

    # -- news ----------------------------------------------------------------------------------------------

    def _on_presence(self) -> None:
        """Replicas report their load many times a second; here only nodes matter."""
        visible = frozenset((node.id, node.state) for node in self._presence.nodes())
        if visible != self._visible:
            self._visible = visible
            self._look.set()

    def _on_leadership(self) -> None:
        self._forget()
        self._look.set()

    def _forget(self) -> None:
        """Another led, or we heard nobody: read all again, and judge no node by its silence before."""
        now = time.monotonic()
        self._last_seen = dict.fromkeys(self._last_seen, now)
        self._states.clear()

    # -- decisions -----------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            try:
                await asyncio.wait_for(self._look.wait(), _INTERVAL)
                await asyncio.sleep(_DEBOUNCE)
            except TimeoutError:
                self._states.clear()  # a leader before us may have written late: look at what stands there
            self._look.clear()
            try:
                await self._look_and_act()
            except SetupError as error:
                logger.warning("can't decide now: %s", error)
            except Exception:  # the next look may find a better world
                logger.exception("a decision failed")

    async def _look_and_act(self) -> None:
        """See who lives; a leader compares what should be with what nodes were told, and tells what changes."""
        if not self._fabric.connected:
            self._deaf = True
            return
        if self._deaf:
            self._forget()
            self._deaf = False
        nodes = self._living_nodes()
        if self.is_leader:
            await self._reconcile(nodes)

    async def _reconcile(self, nodes: list[Node]) -> None:
        deployments = await self._deployments.items()
        drained = {intent.node for intent in (await self._intents.items()).values() if intent.drain}
        for node in nodes:
            await self._recall(node.id)
        placement = place(
            list(deployments.values()),
            [_as_intended(node, drained) for node in nodes],
            {id: state.replicas for id, state in self._states.items()},
            new_id=lambda: new_id("r"),
        )
        self._report(placement)
        for id, replicas in placement.replicas.items():
            await self._tell(id, list(replicas), drain=id in drained)

    def _living_nodes(self) -> list[Node]:
        """Nodes that were heard lately, as they last described themselves."""
        now = time.monotonic()
        for node in self._presence.nodes():
            self._nodes[node.id] = node
            self._last_seen[node.id] = now
        for id in [id for id, seen in self._last_seen.items() if now - seen > self._node_patience]:
            logger.warning("node %s has been silent for %.0f s; its replicas go elsewhere", id, self._node_patience)
            del self._nodes[id], self._last_seen[id]
            self._states.pop(id, None)
        return list(self._nodes.values())

    async def _recall(self, node: str) -> None:
        """What a node was told before, also by another leader."""
        if node not in self._states:
            state = await self._writer.get(node)
            self._states[node] = state or DesiredState(node=node, revision=0)

    async def _tell(self, node: str, replicas: list[DesiredReplica], *, drain: bool) -> None:
        told = self._states[node]
        if told.replicas == replicas and told.drain == drain and told.revision:
            return
        if not self.is_leader:
            return
        # Milliseconds keep revisions growing even where the fabric's memory was lost.
        revision = max(told.revision + 1, int(time.time() * 1000))
        state = DesiredState(node=node, revision=revision, replicas=replicas, drain=drain)
        await self._writer.put(state)
        self._states[node] = state
        logger.info("node %s should run: %s", node, _names(replicas))

    def _report(self, placement: Placement) -> None:
        """Say once what finds no place."""
        if placement.missing != self._missing:
            self._missing = placement.missing
            for name, count in placement.missing.items():
                logger.warning("no node for %d replicas of %s", count, name)


def _names(replicas: list[DesiredReplica]) -> str:
    return ", ".join(f"{replica.id} ({replica.deployment})" for replica in replicas) or "nothing"


def _as_intended(node: Node, drained: set[str]) -> Node:
    return msgspec.structs.replace(node, state="draining") if node.id in drained else node
