"""The controller over a real fabric: deployments become orders, through deaths of nodes, leaders and the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from springtide.core.cluster import Deployment, DesiredState, Node
from springtide.fabric.connection import Fabric
from springtide.fabric.desired import DesiredWriter, NodeIntent, Registry
from springtide.fabric.presence import Heart
from springtide.fleet.controller import Controller
from tests.fleet.conftest import World, until


class Stage:
    """Nodes that do nothing but live, and what they are told."""

    def __init__(self, world: World, platform: Fabric) -> None:
        self.world = world
        self.platform = platform
        self.deployments = Registry(platform, "deployments", Deployment)
        self.intents = Registry(platform, "intents", NodeIntent)
        self.told: dict[str, DesiredState] = {}
        self._hearts: dict[str, Heart] = {}
        self._controllers: dict[Controller, Fabric] = {}
        self._listening = asyncio.get_running_loop().create_task(self._listen())

    async def node(self, id: str, **fields: object) -> None:
        """Let a node live, or live on with other words."""
        if id in self._hearts:
            await self._hearts[id].stop(goodbye=False)
        node = Node(id=id, **fields)  # type: ignore[arg-type]
        self._hearts[id] = Heart(self.platform, lambda: node, every=0.2)
        await self._hearts[id].start()

    async def leave(self, id: str) -> None:
        await self._hearts.pop(id).stop()

    async def controller(self, id: str = "c1", node_patience: float = 1.0) -> Controller:
        fabric = await self.world.connect(id)
        controller = Controller(fabric, id, node_patience=node_patience)
        self._controllers[controller] = fabric
        await controller.start()
        return controller

    async def kill(self, controller: Controller) -> None:
        """Its process is gone: no goodbye, no resignation."""
        await self._controllers.pop(controller).close()
        await controller.stop()

    async def stop(self, controller: Controller) -> None:
        await controller.stop()
        await self._controllers.pop(controller).close()

    async def deploy(self, name: str = "chat", replicas: int = 1) -> None:
        deployment = Deployment(name=name, source="mock", engine="mock", replicas=replicas)
        await self.deployments.put(name, deployment)

    def ids(self, node: str) -> set[str]:
        """The replicas that a node should run."""
        return {replica.id for replica in self.told[node].replicas} if node in self.told else set()

    async def close(self) -> None:
        self._listening.cancel()
        for controller in tuple(self._controllers):
            await self.stop(controller)
        for id in tuple(self._hearts):
            await self.leave(id)

    async def _listen(self) -> None:
        writer = DesiredWriter(self.platform)
        while True:
            for id in tuple(self._hearts):
                state = await writer.get(id)
                if state is not None:
                    before = self.told.get(id)
                    assert before is None or state.revision >= before.revision
                    self.told[id] = state
            await asyncio.sleep(0.02)


@pytest.fixture
async def stage(world: World, platform: Fabric) -> AsyncIterator[Stage]:
    stage = Stage(world, platform)
    yield stage
    await stage.close()


async def test_deployments_become_orders_and_follow_every_change(stage: Stage):
    await stage.controller()
    await stage.node("a")
    await stage.node("b")
    await stage.deploy(replicas=2)
    await until(lambda: len(stage.ids("a")) == len(stage.ids("b")) == 1)
    replica = stage.told["a"].replicas[0]
    assert (replica.deployment, replica.model, replica.source, replica.engine) == ("chat", "chat", "mock", "mock")
    before = stage.ids("a") | stage.ids("b")
    await stage.deploy(replicas=4)
    await until(lambda: len(stage.ids("a") | stage.ids("b")) == 4)
    assert before < stage.ids("a") | stage.ids("b")
    await stage.deployments.delete("chat")
    await until(lambda: not stage.ids("a") | stage.ids("b"))


async def test_nothing_is_written_while_nothing_changes(stage: Stage):
    await stage.controller()
    await stage.node("a")
    await stage.deploy()
    await until(lambda: stage.ids("a"))
    revision = stage.told["a"].revision
    await stage.node("a", rtt_ms=3.0)  # a node's news that concern nobody here
    await asyncio.sleep(2.5)  # a whole round
    assert stage.told["a"].revision == revision


async def test_a_silent_nodes_replicas_go_elsewhere_and_back_they_do_not_double(stage: Stage):
    await stage.controller()
    await stage.node("a")
    await stage.node("b")
    await stage.deploy(replicas=2)
    await until(lambda: len(stage.ids("a")) == len(stage.ids("b")) == 1)
    kept = stage.ids("a")
    await stage.leave("b")
    await until(lambda: len(stage.ids("a")) == 2)
    assert kept < stage.ids("a")
    await stage.node("b")  # with its old orders
    await until(lambda: len(stage.ids("a")) == 1 and len(stage.ids("b")) == 1)
    assert stage.ids("a") == kept


async def test_a_drained_node_gets_nothing(stage: Stage):
    await stage.controller()
    await stage.node("a")
    await stage.node("b")
    await stage.deploy(replicas=2)
    await until(lambda: len(stage.ids("a")) == len(stage.ids("b")) == 1)
    await stage.intents.put("a", NodeIntent(node="a", drain=True))
    await until(lambda: len(stage.ids("b")) == 2 and not stage.ids("a"))
    assert stage.told["a"].drain
    await stage.intents.delete("a")
    await until(lambda: not stage.told["a"].drain)


async def test_another_controller_takes_over_and_changes_nothing(stage: Stage):
    first = await stage.controller("c1")
    await until(lambda: first.is_leader)
    second = await stage.controller("c2")
    await stage.node("a")
    await stage.deploy()
    await until(lambda: stage.ids("a"))
    before = stage.told["a"]
    assert not second.is_leader
    await stage.kill(first)
    await until(lambda: second.is_leader)
    await stage.deploy("code")
    await until(lambda: len(stage.ids("a")) == 2)
    assert before.replicas[0] in stage.told["a"].replicas


async def test_a_restarted_controller_finds_what_it_had_ordered(stage: Stage):
    first = await stage.controller("c1")
    await stage.node("a")
    await stage.deploy(replicas=2)
    await until(lambda: len(stage.ids("a")) == 2)
    before = stage.told["a"]
    await stage.stop(first)
    second = await stage.controller("c1")
    await until(lambda: second.is_leader)
    await stage.deploy("code")
    await until(lambda: len(stage.ids("a")) == 3)
    assert all(replica in stage.told["a"].replicas for replica in before.replicas)


async def test_a_restarted_server_moves_no_replica(stage: Stage):
    controller = await stage.controller(node_patience=1.0)
    await stage.node("a")
    await stage.node("b")
    await stage.deploy(replicas=2)
    await until(lambda: len(stage.ids("a")) == len(stage.ids("b")) == 1)
    before = dict(stage.told)
    stage._listening.cancel()
    await asyncio.to_thread(stage.world.server.kill)
    await asyncio.sleep(2.0)  # longer than its patience with nodes
    await asyncio.to_thread(stage.world.server.start)
    await until(lambda: controller.is_leader and stage.platform.connected)
    await asyncio.sleep(3.0)  # a whole round, and more
    writer = DesiredWriter(stage.platform)
    for node, state in before.items():
        assert await writer.get(node) == state
