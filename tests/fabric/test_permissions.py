"""What a node's credentials can do, and above all what they can't: proved against a real server."""

from __future__ import annotations

import nats.errors
import pytest

from springtide.core import wire
from springtide.core.cluster import DesiredState, Node
from springtide.core.errors import SetupError
from springtide.fabric import subjects
from springtide.fabric.connection import Fabric
from springtide.fabric.credentials import Credentials
from springtide.fabric.desired import DesiredReader, DesiredWriter, Registry
from springtide.fabric.kv import Bucket, Unavailable
from springtide.fabric.presence import Heart, PresenceView
from tests.fabric.conftest import World, until


class Ear:
    """Hears everything in the account but what the server itself tells of its streams."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    async def start(self, fabric: Fabric) -> Ear:
        await fabric.subscribe(">", self._on_message)
        await fabric.flush()
        return self

    async def _on_message(self, message: object) -> None:
        subject: str = message.subject  # type: ignore[attr-defined]
        if not subject.startswith("$JS.EVENT."):
            self.heard.append(subject)


FORBIDDEN_TO_PUBLISH = [
    "st.node.B.x",
    "st.node.B.renew",
    "st.node.B.replica.r.open",
    "st.node.B.replica.r.control",
    "st.gateway.g.frames.B",
    "st.gateway.g.frames.A.B",
    "st.presence.gone",
    "st.usage",
    "st.join.token",
    "$KV.presence.node.B",
    "$KV.presence.replica.B.r",
    "$KV.presence.gateway.g",
    "$KV.desired.A",
    "$KV.desired.B",
    "$KV.keys.k",
    "$KV.leaders.ledger",
    "_INBOX.node.B.x",
    "_INBOX.platform.platform.x",
    "$JS.API.INFO",
    "$JS.API.STREAM.CREATE.KV_keys",
    "$JS.API.STREAM.PURGE.KV_desired",
    "$JS.API.STREAM.MSG.GET.KV_desired",
    "$JS.API.CONSUMER.CREATE.KV_keys",
    "$JS.API.DIRECT.GET.KV_keys",
    "$JS.API.DIRECT.GET.KV_keys.$KV.keys.k",
    "$JS.API.DIRECT.GET.KV_desired",
    "$JS.API.DIRECT.GET.KV_desired.$KV.desired.A",
    "$JS.API.DIRECT.GET.KV_desired.$KV.desired.B",
]

FORBIDDEN_TO_SUBSCRIBE = [
    ">",
    "st.>",
    "st.node.*.replica.>",
    "st.node.B.>",
    "st.gateway.g.frames.A",
    "st.gateway.>",
    "st.usage",
    "st.join.*",
    "$KV.>",
    "$KV.desired.*",
    "$KV.desired.B",
    "$KV.presence.>",
    "$KV.keys.>",
    "_INBOX.>",
    "_INBOX.node.>",
    "_INBOX.node.B.>",
    "_INBOX.platform.>",
    "$JS.>",
    "$SYS.>",
]


async def test_a_node_can_publish_under_its_own_name_only(world: World) -> None:
    ear = await Ear().start(await world.platform())
    a = await world.node("A")
    allowed = [
        "st.node.A.renew",
        "st.gateway.g1.frames.A",
        "st.gateway.g2.frames.A",
        "$KV.presence.node.A",
        "$KV.presence.replica.A.r1",
    ]
    for subject in [*FORBIDDEN_TO_PUBLISH, *allowed]:
        await a.publish(subject, b"hello")
    await a.flush()
    await until(lambda: len(ear.heard) >= len(allowed))
    assert sorted(ear.heard) == sorted(allowed)
    assert a.counters["permission_errors"] == len(FORBIDDEN_TO_PUBLISH)
    assert a.connected


async def test_a_node_can_not_wipe_the_presence_of_others(world: World) -> None:
    platform = await world.platform()
    bucket = Bucket(platform, subjects.PRESENCE)
    for name in ("A", "B"):
        heart = Heart(await world.node(name), lambda name=name: Node(id=name))  # type: ignore[misc]
        await heart.start()
        await heart.stop(goodbye=False)
    a = await world.node("A")
    for scope in ("all", "sub"):
        await a.publish("$KV.presence.node.A", b"", headers={"Nats-Rollup": scope})
    await a.flush()
    assert {entry.key for entry in await bucket.entries()} == {"node.A", "node.B"}


async def test_a_node_can_not_listen_to_others(world: World) -> None:
    platform, a = await world.platform(), await world.node("A")
    heard: list[str] = []

    async def listen(message: object) -> None:
        heard.append(message.subject)  # type: ignore[attr-defined]

    own = ["st.node.A.x", "$KV.desired.A", "_INBOX.node.A.x"]
    for subject in [*FORBIDDEN_TO_SUBSCRIBE, "st.node.A.>", "$KV.desired.A", "_INBOX.node.A.>"]:
        await a.subscribe(subject, listen)
    await a.flush()
    assert a.counters["permission_errors"] == len(FORBIDDEN_TO_SUBSCRIBE)
    others = ["st.node.B.x", "st.gateway.g.frames.A", "st.usage", "$KV.desired.B", "$KV.keys.k", "_INBOX.node.B.x"]
    for subject in [*others, *own]:
        await platform.publish(subject, b"hello")
    await until(lambda: len(heard) >= len(own))
    assert sorted(heard) == sorted(own)


async def test_a_node_reads_its_own_desired_state_and_nobody_elses(world: World) -> None:
    platform, a = await world.platform(), await world.node("A")
    writer = DesiredWriter(platform)
    for node in ("A", "B"):
        await writer.put(DesiredState(node=node, revision=1))
    states: list[DesiredState] = []
    reader = DesiredReader(a, "A", states.append)
    await reader.start()
    await until(lambda: states)
    await reader.stop()
    assert states == [DesiredState(node="A", revision=1)]
    with pytest.raises(nats.errors.Error):
        await a.request(subjects.desired_subject("B"), timeout=0.3)
    with pytest.raises(Unavailable):
        await Bucket(a, subjects.DESIRED).get("B", timeout=0.3)


async def test_a_node_can_not_read_the_keys(world: World) -> None:
    keys = Registry(await world.platform(), subjects.KEYS, str)
    await keys.put("hash", "secret")
    bucket = Bucket(await world.node("A"), subjects.KEYS)
    with pytest.raises(Unavailable):
        await bucket.get("hash", timeout=0.3)
    with pytest.raises(Unavailable):
        await bucket.entries(timeout=0.3)


async def test_presence_works_with_a_nodes_permissions(world: World) -> None:
    view = PresenceView(await world.platform())
    await view.start()
    a = await world.node("A")
    heart = Heart(a, lambda: Node(id="A"))
    await heart.start()
    await until(view.nodes)
    impostor = Heart(a, lambda: Node(id="B"))
    await impostor.start()
    await a.publish("$KV.presence.node.A", wire.pack(Node(id="B")))  # its own subject, another's name
    await until(lambda: view.counters["refused"])
    assert [node.id for node in view.nodes()] == ["A"]
    assert a.counters["permission_errors"] >= 1
    await impostor.stop()
    await heart.stop()
    await view.stop()


async def test_nobody_answers_a_node_on_anothers_subject(world: World) -> None:
    """A node may name any subject as where to answer: whoever answers it must not write there for it."""
    platform, a = await world.platform(), await world.node("A")
    writer = DesiredWriter(platform)
    for node in ("A", "B"):
        await writer.put(DesiredState(node=node, revision=1))
    presence = Bucket(platform, subjects.PRESENCE)
    for question in (subjects.desired_subject("A"), "$KV.presence.node.A", subjects.frames_subject("g", "A")):
        for victim in ("$KV.desired.B", "$KV.presence.node.B", "$KV.keys.k", "st.node.B.replica.r.open"):
            await a.nc.publish(question, wire.pack(Node(id="A")), reply=victim)
    await a.flush()
    assert (await a.request(subjects.desired_subject("A"))).data == wire.pack(DesiredState(node="A", revision=1))
    assert await writer.get("B") == DesiredState(node="B", revision=1)
    assert [entry.key for entry in await presence.entries()] == ["node.A"]
    assert await Bucket(platform, subjects.KEYS).entries() == []


async def test_a_request_of_a_node_is_answered_at_its_own_inbox(world: World) -> None:
    platform, a = await world.platform(), await world.node("A")

    async def answer(message: object) -> None:
        await message.respond(b"yes")  # type: ignore[attr-defined]

    await platform.subscribe("st.node.A.question", answer)
    await platform.flush()
    assert (await a.request("st.node.A.question")).data == b"yes"
    with pytest.raises(nats.errors.Error):
        await a.request("st.node.B.question", timeout=0.3)


async def test_ended_and_foreign_credentials_are_refused_by_the_server(world: World) -> None:
    ended = world.authority.local_node("A", [world.server.url], ttl=-5)
    with pytest.raises(SetupError, match=r"refuses our credentials .*ended"):
        await Fabric.connect(ended, name="A")
    other = type(world.authority).open(world.directory / "other")
    foreign = other.platform_credentials("x", [world.server.url])
    with pytest.raises(SetupError, match=r"refuses our credentials .*another installation"):
        await Fabric.connect(foreign, name="x")


async def test_a_server_of_another_authority_is_refused_before_anything_is_said(world: World) -> None:
    other = type(world.authority).open(world.directory / "other")
    mistaken = other.platform_credentials("x", [world.server.node_url()])
    with pytest.raises(SetupError, match="is not ours"):
        await Fabric.connect(mistaken, name="x")
    right = world.authority.platform_credentials("x", [world.server.node_url()])
    fabric = await Fabric.connect(right, name="x")
    assert fabric.connected
    await fabric.close()


def test_credentials_never_go_unencrypted_to_another_machine(world: World) -> None:
    with pytest.raises(SetupError, match="unencrypted"):
        world.authority.platform_credentials("x", ["nats://192.0.2.7:4222"])
    with pytest.raises(SetupError, match="all tls:// or all nats://"):
        world.authority.platform_credentials("x", ["nats://127.0.0.1:4222", "tls://192.0.2.7:4222"])


@pytest.mark.parametrize("name", ["", "a.b", "*", ">", "a b", "é", "x" * 129])
def test_names_that_could_be_more_than_one_token_are_refused(world: World, name: str) -> None:
    with pytest.raises(SetupError, match="can't be used as a name"):
        world.authority.local_node(name, [world.server.url])


def test_broken_credentials_files_are_clear_errors(world: World) -> None:
    file = world.directory / "file.creds"
    with pytest.raises(SetupError, match="can't read the credentials"):
        Credentials.load(file)
    file.write_text("{}")
    with pytest.raises(SetupError, match="holds no credentials"):
        Credentials.load(file)
    world.authority.local_node("A", [world.server.url]).save(file)
    assert Credentials.load(file).name == "A"
