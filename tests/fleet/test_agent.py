"""An agent and its replicas as real processes, killed in all the ways in which processes die."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from springtide.core.cluster import DesiredReplica, DesiredState, Node, Replica
from springtide.core.config import Settings
from springtide.core.ids import new_id
from springtide.core.request import Message, Request, SamplingParams
from springtide.fabric.connection import Fabric
from springtide.fabric.credentials import Credentials
from springtide.fabric.desired import DesiredWriter
from springtide.fabric.join import JoinServer
from springtide.fabric.presence import DisconnectWatch, PresenceView
from springtide.fabric.streams import StreamHub
from springtide.fleet.agent import Agent
from springtide.fleet.devices import parse_cards
from springtide.fleet.mock_engine import verify_chain
from springtide.fleet.mock_text import MockTokenizer
from tests.fleet.conftest import World, until
from tests.fleet.test_children import has_ended

NODE = "n1"

AGENT_PROCESS = """
import asyncio, sys
from pathlib import Path
from springtide.core.config import Settings
from springtide.fleet.agent import run_agent

credentials, node, data_dir = sys.argv[1:]
settings = Settings(data_dir=data_dir)
asyncio.run(run_agent(Path(credentials), node, settings, Path(data_dir), asyncio.Event()))
"""


class Stage:
    """A node, and the platform's view of it."""

    def __init__(self, world: World, platform: Fabric) -> None:
        self.world = world
        self.platform = platform
        self.view = PresenceView(platform)
        self.data_dir = world.directory / "node"
        self._stop: list[Callable[[], object]] = []
        self._revision = 0

    async def start_agent(self, *, credentials_ttl: float = 3600, **options: object) -> Agent:
        credentials = self.world.node_credentials(NODE, ttl=credentials_ttl)
        self.fabric = fabric = await Fabric.connect(credentials, name="agent")
        settings = Settings(data_dir=str(self.data_dir), region="coast", site="pier")
        given = {"credentials": credentials, "data_dir": self.data_dir, **options}
        agent = Agent(fabric, NODE, settings, **given)  # type: ignore[arg-type]
        await agent.start()
        self._stop += [agent.stop, fabric.close]
        return agent

    async def stop(self) -> None:
        stop, self._stop = self._stop, []
        for function in stop:
            await function()  # type: ignore[misc]

    async def want(self, *replicas: DesiredReplica, drain: bool = False) -> None:
        self._revision += 1
        state = DesiredState(node=NODE, revision=self._revision, replicas=list(replicas), drain=drain)
        await DesiredWriter(self.platform).put(state)

    def node(self) -> Node | None:
        return next(iter(self.view.nodes()), None)

    def replica(self, id: str) -> Replica | None:
        return next((replica for replica in self.view.replicas() if replica.id == id), None)

    def state(self, id: str) -> str | None:
        replica = self.replica(id)
        return replica.state if replica else None


@pytest.fixture
async def stage(world: World, platform: Fabric) -> AsyncIterator[Stage]:
    stage = Stage(world, platform)
    watch = DisconnectWatch(platform, world.authority.system_credentials([world.server.url]))
    await watch.start()
    await stage.view.start()
    yield stage
    await stage.stop()
    await stage.view.stop()
    await watch.stop()


def replica(engine: str = "mock", **options: object) -> DesiredReplica:
    return DesiredReplica(
        id=new_id("r"), deployment="mock", model="mock", source="mock", engine=engine, options=options
    )


async def test_a_node_says_what_it_is(stage: Stage):
    await stage.start_agent()
    await until(lambda: (node := stage.node()) and node.rtt_ms is not None)
    node = stage.node()
    assert node is not None
    assert (node.id, node.region, node.site, node.state) == (NODE, "coast", "pier", "ready")
    assert node.devices[0].kind == "cpu" and node.devices[0].memory > 0 and node.devices[0].cores > 0


async def test_a_replica_that_is_wanted_runs_and_answers(stage: Stage):
    await stage.start_agent()
    wanted = replica(context_length=512)
    await stage.want(wanted)
    await until(lambda: stage.state(wanted.id) == "ready")
    running = stage.replica(wanted.id)
    assert running is not None and (running.context_length, running.region) == (512, "coast")
    progress = msgspec.json.decode((stage.data_dir / "progress" / f"{wanted.id}.json").read_bytes())
    assert progress["ready"] is True

    hub = StreamHub(stage.platform, "g1")
    await hub.start()
    message = Message("user", "How high is the tide?")
    sampling = SamplingParams(seed=3, max_tokens=9)
    request = Request(id=new_id("req"), model="mock", tenant="t", sampling=sampling, messages=(message,))
    stream = await hub.open(request, 1, NODE, wanted.id)
    tokens: list[int] = []
    ended = False
    while not ended:
        for frame in await stream.frames():
            tokens += [token for delta in frame.deltas for token in delta.token_ids]
            ended = frame.end is not None
    await hub.close()
    assert len(tokens) == 9
    verify_chain(tokens, MockTokenizer().render_chat([message]), seed=3)


async def test_a_killed_replica_is_back_by_itself(stage: Stage):
    agent = await stage.start_agent()
    wanted = replica()
    await stage.want(wanted)
    await until(lambda: stage.state(wanted.id) == "ready")
    first = agent.pids[wanted.id]
    os.kill(first, signal.SIGKILL)
    await until(lambda: stage.state(wanted.id) != "ready")
    await until(lambda: stage.state(wanted.id) == "ready")
    assert agent.pids[wanted.id] != first


async def test_what_is_not_wanted_any_more_leaves(stage: Stage):
    agent = await stage.start_agent()
    stays, goes = replica(), replica()
    await stage.want(stays, goes)
    await until(lambda: stage.state(stays.id) == stage.state(goes.id) == "ready")
    pids = agent.pids
    await stage.want(stays, drain=True)
    await until(lambda: stage.replica(goes.id) is None and has_ended(pids[goes.id]))
    assert stage.state(stays.id) == "ready" and agent.pids == {stays.id: pids[stays.id]}
    await until(lambda: (node := stage.node()) and node.state == "draining")
    await stage.stop()
    assert has_ended(pids[stays.id])
    await until(lambda: stage.node() is None and stage.replica(stays.id) is None)


async def test_replicas_leave_when_their_agent_is_killed(stage: Stage):
    credentials = stage.world.node_credentials(NODE)
    command = [sys.executable, "-c", AGENT_PROCESS, str(credentials), NODE, str(stage.data_dir)]
    agent = await asyncio.create_subprocess_exec(*command)
    try:
        wanted = replica()
        await stage.want(wanted)
        await until(lambda: stage.state(wanted.id) == "ready")
        children = [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]
        assert len(children) == 1
    finally:
        agent.kill()
        await agent.wait()
    await until(lambda: has_ended(children[0]))
    await until(lambda: stage.replica(wanted.id) is None and stage.node() is None)


async def test_a_replica_that_keeps_dying_is_seen_with_its_reason(stage: Stage):
    agent = await stage.start_agent()
    broken, sound = replica(no_such_option=1), replica()
    await stage.want(broken, sound)
    await until(lambda: stage.state(broken.id) == "failed" and stage.state(sound.id) == "ready")
    seen = stage.replica(broken.id)
    assert seen is not None and seen.error is not None
    assert "unknown option no_such_option of the mock engine" in seen.error and "did you mean" in seen.error
    await stage.want(sound)
    await until(lambda: stage.replica(broken.id) is None)
    assert list(agent.pids) == [sound.id]


async def test_a_command_that_can_not_run_is_no_end_of_the_agent(stage: Stage):
    await stage.start_agent(replica_command=["/no/such/program"])
    wanted = replica()
    await stage.want(wanted)
    await until(lambda: stage.state(wanted.id) == "failed")
    seen = stage.replica(wanted.id)
    assert seen is not None and "can't be started" in (seen.error or "")
    assert stage.node() is not None


async def test_an_engine_that_is_not_on_the_list_never_starts(stage: Stage):
    agent = await stage.start_agent()
    forged, escaping = replica(engine="/bin/sh"), msgspec.structs.replace(replica(), id="../../escaped")
    await stage.want(forged, escaping)
    await until(lambda: stage.state(forged.id) == "failed")
    seen = stage.replica(forged.id)
    assert seen is not None and "runs no engine '/bin/sh'" in (seen.error or "")
    assert agent.pids == {}
    assert not list(stage.world.directory.rglob("*escaped*"))
    await stage.want()
    await until(lambda: stage.replica(forged.id) is None)


async def test_a_node_outlives_its_first_credentials(stage: Stage):
    join_server = JoinServer(stage.platform, stage.world.authority)
    await join_server.start()
    await stage.start_agent(credentials_ttl=3)
    wanted = replica()
    await stage.want(wanted)
    await until(lambda: stage.state(wanted.id) == "ready")
    await until(lambda: stage.fabric.counters["reconnects"] + stage.fabric.counters["reopened"])  # they have ended
    beat = time.time()
    await until(lambda: (node := stage.node()) and node.beat > beat)
    await until(lambda: (seen := stage.replica(wanted.id)) and seen.beat > beat and seen.state == "ready")
    assert (Credentials.load(stage.world.directory / f"{NODE}.creds").expires or 0) > beat + 600
    await join_server.stop()


def test_cards_are_read_from_the_drivers_tool():
    cards = parse_cards("NVIDIA H100 80GB HBM3, 81559\nOdd, card, [N/A]\n")
    assert [(card.name, card.memory) for card in cards] == [
        ("NVIDIA H100 80GB HBM3", 81559 * 2**20),
        ("Odd, card", 0),
    ]
