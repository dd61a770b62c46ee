"""The waiting room: alone with replicas that are mere words, then with real streams, replicas and rivals."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from itertools import count
from statistics import median
from typing import Any

import msgspec
import pytest

from springtide.core.cluster import Replica
from springtide.core.engine_api import EngineLoad
from springtide.core.errors import BacklogTooLong
from springtide.core.request import Message, PriorityClass, Request, SamplingParams, TokenCounts
from springtide.fabric.connection import Fabric
from springtide.fabric.presence import PresenceView
from springtide.fabric.streams import Backlog, StreamHub, Turn
from springtide.fleet.announcer import Announcer
from springtide.fleet.mock_engine import MockConfig, MockEngine
from springtide.fleet.mock_text import MockTokenizer
from springtide.fleet.replica_host import ReplicaHost
from springtide.gateway.waiting import Place, WaitingRoom
from springtide.policy.fairness import cost
from springtide.policy.routing import NO_ROOM
from tests.gateway.conftest import Cloud, until

_numbers = count()


def ask(
    tenant: str = "t", *, n: int = 1, weight: float = 1.0, priority_class: PriorityClass = "standard", tokens: int = 8
) -> Request:
    return Request(
        id=f"r{next(_numbers)}",
        model="m",
        tenant=tenant,
        weight=weight,
        priority_class=priority_class,
        sampling=SamplingParams(n=n, max_tokens=tokens, seed=1),
        messages=(Message("user", "hi"),),
    )


# -- alone ---------------------------------------------------------------------------------------------------


class Desk:
    """In the place of the hub: what was told to replicas, and their calls."""

    def __init__(self) -> None:
        self.told: dict[str, list[Backlog]] = {}
        self.declined: list[int] = []
        self.doubted: set[str] = set()
        self.call: Callable[[str, str, list[Turn]], None]

    def advertise(self, node: str, replica: str, backlogs: list[Backlog]) -> None:
        self.told[replica] = backlogs

    def decline(self, node: str, replica: str, serials: list[int]) -> None:
        self.declined += serials

    def doubts(self, node: str, replica: str) -> bool:
        return replica in self.doubted

    def on_turns(self, callback: Callable[[str, str, list[Turn]], None]) -> None:
        self.call = callback


class Little:
    """A room with made-up replicas and a clock that is set by hand."""

    def __init__(self, **bounds: int) -> None:
        self.desk = Desk()
        self.present: dict[str, Replica] = {}
        self.now = 100.0
        self.room = WaitingRoom(self, self.desk, region="local", clock=lambda: self.now, draw=lambda: 0.0, **bounds)

    def replicas(self) -> list[Replica]:
        return list(self.present.values())

    def has(self, id: str, *, running: int = 0, **fields: Any) -> Replica:
        self.present[id] = replica = Replica(
            **{
                "id": id,
                "node": "n",
                "model": "m",
                "engine": "mock",
                "state": "ready",
                "max_num_seqs": 2,
                "frame_version": 2,
                "load": EngineLoad(running=running),
                **fields,
            }
        )
        self.room.presence_changed()
        return replica

    async def waits(self, request: Request, **how: Any) -> asyncio.Task[Place]:
        """A request that found no place at once."""
        task = asyncio.create_task(self.room.place(request, **{"first_in_line": False, **how}))
        await asyncio.sleep(0.01)
        assert not task.done()
        return task

    def calls(self, replica: str, serial: int, tenant: str = "t", priority_class: PriorityClass = "standard") -> None:
        self.desk.call("n", replica, [Turn(serial, tenant, priority_class)])

    def waiting(self, replica: str) -> dict[str, int]:
        """What a replica was told, by tenant."""
        return {backlog.tenant: backlog.waiting for backlog in self.desk.told.get(replica, [])}


@pytest.fixture
async def little() -> Little:
    return Little()


async def test_a_request_goes_straight_to_a_replica_with_room(little: Little) -> None:
    little.has("a", running=2)
    little.has("b", running=1)
    place = await little.room.place(ask(), first_in_line=False)
    assert (place.replica.id, place.turn, place.waited) == ("b", None, False)
    assert little.desk.told == {}


async def test_all_replicas_hear_who_waits_and_whoever_calls_first_gets_it(little: Little) -> None:
    little.has("a", running=2)
    little.has("b", by_turn=True)
    first, second = await little.waits(ask("t", n=2, weight=3.0)), await little.waits(ask("other"))
    assert little.waiting("a") == little.waiting("b") == {"t": 2, "other": 1}
    assert little.desk.told["a"][0].weight == 3.0
    little.calls("b", 7, "other")
    assert (await second).turn == 7 and (await second).replica.id == "b"
    little.calls("a", 1)
    assert (await first).waited
    await asyncio.sleep(0)
    assert little.waiting("a") == little.waiting("b") == {}


async def test_a_call_that_nobody_follows_is_declined_at_once(little: Little) -> None:
    little.has("a", running=2)
    waiting = await little.waits(ask())
    little.calls("a", 1, "stranger")
    little.calls("gone", 2)
    little.calls("a", 3, priority_class="batch")
    assert little.desk.declined == [1, 2, 3] and not waiting.done()
    waiting.cancel()


async def test_who_leaves_just_as_he_is_called_gives_his_turn_back(little: Little) -> None:
    little.has("a", running=2)
    waiting = await little.waits(ask())
    little.calls("a", 5)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert little.desk.declined == [5]
    little.has("a")
    assert (await little.room.place(ask(n=2), first_in_line=False)).replica.id == "a", "its room was given back"


async def test_what_was_begun_goes_first_and_where_its_text_stays_the_same(little: Little) -> None:
    little.has("cpu", running=2, numerics="cpu")
    little.has("gpu", running=2, numerics="gpu")
    fresh = await little.waits(ask())
    begun = await little.waits(ask(), first_in_line=True, numerics="gpu", avoid=[("n", "cpu")])
    little.calls("cpu", 1)
    assert (await fresh).replica.id == "cpu", "another one suits this replica better"
    little.calls("cpu", 2)
    assert little.desk.declined == [2] and not begun.done()
    little.now += 2.0
    little.calls("cpu", 3)
    assert (await begun).turn == 3, "nobody is choosy for long"


async def test_a_refusal_for_want_of_room_is_no_failure(little: Little) -> None:
    replica = little.has("a", running=1)
    request = ask()
    for _ in range(20):
        place = await little.room.place(request, first_in_line=False)
        little.room.no_room(replica)
        little.room.leave(place.replica, request)
        again = await little.waits(request, first_in_line=True)
        little.calls("a", 1)
        little.room.leave((await again).replica, request)
    assert not little.desk.declined


async def test_a_replica_of_which_nobody_knows_whether_it_lives_gets_nothing_until_it_calls(little: Little) -> None:
    little.has("a")
    little.desk.doubted.add("a")
    request = ask()
    waiting = await little.waits(request)
    assert "silent" in little.room.why_waiting(ask())
    little.calls("a", 1)
    assert (await waiting).turn == 1


async def test_a_replica_that_fails_again_and_again_is_left_alone_and_probed_later(little: Little) -> None:
    replica = little.has("a")
    request = ask()
    await little.room.place(request, first_in_line=False)
    for serial in range(-4, 1):
        little.room.failed(replica, request)
        little.room.leave(replica, request)
        if serial < 0:
            request = ask()
            again = await little.waits(request)
            little.calls("a", serial)
            await again
    request = ask()
    waiting, other = await little.waits(request), await little.waits(ask())
    little.calls("a", 1)
    assert little.desk.declined == [1] and little.waiting("a") == {}
    assert "failed too often" in little.room.why_waiting(ask())
    little.now += 3.0
    await until(lambda: little.waiting("a") == {"t": 2}, "it may call again")
    little.calls("a", 2)
    probe = await waiting
    little.calls("a", 3)
    assert little.desk.declined == [1, 3], "one probe at a time"
    little.room.succeeded(probe.replica, request)
    little.calls("a", 4)
    assert (await other).turn == 4


async def test_replicas_of_before_turns_get_whoever_waits_longest_by_their_reports(little: Little) -> None:
    little.has("old", running=2, frame_version=1)
    first, second = await little.waits(ask("a")), await little.waits(ask("b", n=2))
    assert little.desk.told == {}
    little.has("old", running=1, frame_version=1)
    assert (await first).turn is None and not second.done()
    second.cancel()


async def test_a_full_room_sends_away_the_last_of_who_has_the_most_there() -> None:
    little = Little(max_waiting=3)
    little.has("a", running=2)
    loud = [await little.waits(ask("loud"), first_in_line=i == 2) for i in range(3)]
    quiet = await little.waits(ask("quiet"))
    with pytest.raises(BacklogTooLong) as refused:
        await loud[1]
    assert refused.value.status == 429 and refused.value.retry_after
    assert not any(task.done() for task in (loud[0], loud[2], quiet))
    with pytest.raises(BacklogTooLong):
        await little.room.place(ask("loud"), first_in_line=False)
    for task in (loud[0], loud[2], quiet):
        task.cancel()


async def test_the_room_is_bounded_in_bytes_too() -> None:
    little = Little(max_bytes=100_000)
    large = msgspec.structs.replace(ask(), messages=(Message("user", "x" * 90_000),))
    first = await little.waits(large)
    with pytest.raises(BacklogTooLong):
        await little.room.place(msgspec.structs.replace(large, id="second"), first_in_line=False)
    first.cancel()


async def test_others_hear_what_one_replica_served(little: Little) -> None:
    a, b = little.has("a", running=2), little.has("b", running=2)
    waiting = await little.waits(ask())
    little.room.served(a, ask(), 30.0)
    little.room.served(b, ask(), 5.0)
    await until(lambda: little.desk.told["a"][0].served_elsewhere == 5.0, "a heard of b")
    assert little.desk.told["b"][0].served_elsewhere == 30.0
    del little.present["b"]
    little.room.presence_changed()
    await asyncio.sleep(0)
    assert little.desk.told["a"][0].served_elsewhere == 5.0 and little.desk.told["b"] == []
    waiting.cancel()


async def test_a_hedge_takes_spare_room_only(little: Little) -> None:
    little.has("a")
    assert little.room.spare(ask(), avoid=[("n", "a")]) is None
    little.has("b", running=1)
    place = little.room.spare(ask(), avoid=[("n", "a")])
    assert place is not None and place.replica.id == "b"
    little.has("a", running=1)
    waiting = await little.waits(ask(n=2))
    assert little.room.spare(ask(), avoid=[("n", "a")]) is None, "others wait for it"
    waiting.cancel()


# -- with real streams and replicas --------------------------------------------------------------------------


class Front:
    """One gateway's room, and clients that always want something."""

    def __init__(self, fabric: Fabric, name: str) -> None:
        self.fabric = fabric
        self.presence = PresenceView(fabric)
        self.hub = StreamHub(fabric, name)
        self.tokens: Counter[str] = Counter()
        self.took: defaultdict[str, list[float]] = defaultdict(list)  # seconds of each answer
        self._clients: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self.presence.start()
        await self.hub.start()
        self.room = WaitingRoom(self.presence, self.hub, region="local")
        self.presence.on_change(self.room.presence_changed)

    async def stop(self) -> None:
        self.send_away()
        await asyncio.gather(*self._clients, return_exceptions=True)
        await self.hub.close()
        await self.presence.stop()

    @property
    def sees_ready(self) -> int:
        return [replica.state for replica in self.room.replicas("m")].count("ready")

    def send_away(self) -> None:
        for client in self._clients:
            client.cancel()

    def wants(self, tenant: str, clients: int, **request: Any) -> None:
        """So many clients of a tenant, each of which asks again as soon as it has an answer."""
        for _ in range(clients):
            self._clients.append(asyncio.create_task(self._go_on(tenant, request)))

    async def _go_on(self, tenant: str, fields: dict[str, Any]) -> None:
        while True:
            began = time.monotonic()
            await self.serve(ask(tenant, **fields))
            self.took[tenant].append(time.monotonic() - began)

    async def serve(self, request: Request) -> Place:
        """Have it answered, as a dispatcher would."""
        for attempt in count(1):
            place = await self.room.place(request, first_in_line=attempt > 1)
            try:
                if await self._attempt(request, attempt, place):
                    return place
            finally:
                self.room.leave(place.replica, request)
        raise AssertionError

    async def _attempt(self, request: Request, number: int, place: Place) -> bool:
        replica = place.replica
        stream = await self.hub.open(request, number, replica.node, replica.id, turn=place.turn)
        try:
            while True:
                for frame in await stream.frames():
                    new = sum(len(delta.token_ids) for delta in frame.deltas)
                    self.tokens[request.tenant] += new
                    self.room.served(replica, request, cost(TokenCounts(completion=new)))
                    if frame.end is None:
                        continue
                    if frame.end.error is not None and frame.end.error.code == NO_ROOM:
                        self.room.no_room(replica)
                        return False
                    assert frame.end.outcome == "finished", frame.end
                    self.room.succeeded(replica, request)
                    return True
        finally:
            stream.cancel()


class Contest:
    """Two gateways before two replicas."""

    def __init__(self, fronts: list[Front], hosts: list[ReplicaHost]) -> None:
        self.fronts = fronts
        self.hosts = hosts

    def tokens(self, tenant: str) -> int:
        return sum(front.tokens[tenant] for front in self.fronts)

    async def until_served(self, tokens: int) -> None:
        before = sum(front.tokens.total() for front in self.fronts)
        await until(lambda: sum(f.tokens.total() for f in self.fronts) - before >= tokens, f"{tokens} tokens", 60.0)


@asynccontextmanager
async def contest(cloud: Cloud, *, replicas: int = 2, **config: Any) -> AsyncIterator[Contest]:
    fabrics, fronts, hosts, announcers = [], [], [], []
    for number in range(replicas):
        node = f"n{number}"
        fabric = await Fabric.connect(cloud.authority.local_node(node, [cloud.nats.url]), name=node)
        engine = MockEngine(config=MockConfig.from_options({"max_num_seqs": 4, "step_base_ms": 2, **config}))
        identity = Replica(id=f"r{number}", node=node, model="m", engine="mock", state="starting")
        announcer = Announcer(fabric, identity)
        await announcer.start()
        host = ReplicaHost(fabric, announcer, engine, MockTokenizer())
        await host.start()
        fabrics.append(fabric)
        hosts.append(host)
        announcers.append(announcer)
    for number in range(2):
        fabric = await Fabric.connect(
            cloud.authority.platform_credentials(f"g{number}", [cloud.nats.url]), name=f"g{number}"
        )
        front = Front(fabric, f"g{number}")
        await front.start()
        fabrics.append(fabric)
        fronts.append(front)
    await until(lambda: all(front.sees_ready == replicas for front in fronts), "all see that all are ready")
    yield Contest(fronts, hosts)
    for front in fronts:
        await front.stop()
    for host, announcer in zip(hosts, announcers, strict=True):
        await host.close()
        await announcer.stop()
    for fabric in fabrics:
        await fabric.close()


async def test_where_there_is_room_nobody_needs_a_turn(cloud: Cloud) -> None:
    async with contest(cloud) as world:
        places = [await front.serve(ask()) for front in world.fronts for _ in range(5)]
        assert {(place.turn, place.waited) for place in places} == {(None, False)}


async def test_weights_of_four_to_one_give_tokens_of_four_to_one(cloud: Cloud) -> None:
    async with contest(cloud) as world:
        left, right = world.fronts
        left.wants("heavy", 30, weight=4.0)
        right.wants("light", 30, weight=1.0)
        await world.until_served(500)
        heavy, light = world.tokens("heavy"), world.tokens("light")
        await world.until_served(3000)
        ratio = (world.tokens("heavy") - heavy) / (world.tokens("light") - light)
        assert 3.0 < ratio < 5.3, ratio


async def test_a_loud_tenant_does_not_starve_a_quiet_one(cloud: Cloud) -> None:
    async with contest(cloud, replicas=1) as world:
        left, right = world.fronts
        left.wants("loud", 80, tokens=40)
        await world.until_served(200)
        right.wants("quiet", 2, tokens=40)
        await until(lambda: len(right.took["quiet"]) >= 8 and len(left.took["loud"]) >= 40, "both have answers", 60.0)
        # In order of arrival both would take the same time: that of 82 requests on four seats.
        assert median(right.took["quiet"]) < median(left.took["loud"][-20:]) / 2


async def test_when_a_gateway_dies_its_turns_go_to_the_others(cloud: Cloud) -> None:
    async with contest(cloud) as world:
        dying, other = world.fronts
        dying.wants("t", 40)
        await world.until_served(200)
        await dying.fabric.close()
        dying.send_away()
        answers = await asyncio.wait_for(_together(other.serve(ask("t")) for _ in range(40)), 60)
        assert len(answers) == 40


async def _together(work: Any) -> list[Place]:
    tasks: list[Coroutine[Any, Any, Place]] = list(work)
    return await asyncio.gather(*tasks)
