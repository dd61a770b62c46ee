"""How a machine becomes a node, once, and stays one; and who does not become one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from springtide.core import wire
from springtide.core.errors import SetupError
from springtide.fabric import join as join_module
from springtide.fabric import nats_jwt, subjects
from springtide.fabric.authority import Authority
from springtide.fabric.connection import Fabric
from springtide.fabric.credentials import Credentials
from springtide.fabric.join import JoinServer, forget_node, join, renew
from springtide.fabric.join_token import JoinToken
from springtide.fabric.nats_jwt import KeyPair
from tests.fabric.conftest import World, until


@pytest.fixture
async def platform(world: World) -> AsyncIterator[Fabric]:
    fabric = await world.platform()
    server = JoinServer(fabric, world.authority)
    await server.start()
    await fabric.flush()
    yield fabric
    await server.stop()


def new_token(world: World, **options: float) -> str:
    return world.authority.join_token([world.server.node_url()], **options)


async def test_a_machine_joins_and_can_speak_as_itself(world: World, platform: Fabric) -> None:
    credentials = await join(new_token(world), "A")
    assert credentials.name == "A" and credentials.ca_pem == world.authority.ca_pem
    assert credentials.inbox_prefix == subjects.node_inbox("A")
    node = await Fabric.connect(credentials, name="A")
    heard: list[bytes] = []

    async def listen(message: object) -> None:
        heard.append(message.data)  # type: ignore[attr-defined]

    await platform.subscribe("st.node.A.x", listen)
    await platform.flush()
    await node.publish("st.node.B.x", b"not mine")
    await node.publish("st.node.A.x", b"mine")
    await until(lambda: heard == [b"mine"])
    await node.close()


async def test_other_urls_than_the_tokens_may_be_dialled(world: World, platform: Fabric) -> None:
    token = world.authority.join_token(["tls://fabric.invalid:4222"])
    assert (await join(token, "A", [f"tls://localhost:{world.server.port}"])).urls == [
        f"tls://localhost:{world.server.port}"
    ]


async def test_a_token_works_once(world: World, platform: Fabric) -> None:
    token = new_token(world)
    results = await asyncio.gather(*(join(token, name) for name in "ABCD"), return_exceptions=True)
    assert len([result for result in results if isinstance(result, Credentials)]) == 1
    refused = [result for result in results if isinstance(result, SetupError)]
    assert len(refused) == 3 and all("used already" in str(error) for error in refused)
    with pytest.raises(SetupError, match="used already"):
        await join(token, "A")


async def test_the_same_key_may_ask_again_since_an_answer_can_be_lost(world: World, platform: Fabric) -> None:
    token = new_token(world)
    first = await join(token, "A")
    assert (await join(token, "A", previous=first)).seed == first.seed


async def test_an_expired_token_is_refused_by_us_and_by_the_server(
    world: World, platform: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = new_token(world, ttl=-5)
    with pytest.raises(SetupError, match="has expired"):
        await join(token, "A")
    monkeypatch.setattr(join_module.nats_jwt, "expiry", lambda jwt: None)  # a newcomer that does not look
    with pytest.raises(SetupError, match="refuses our credentials"):
        await join(token, "A")


async def test_a_server_that_did_not_make_the_token_is_refused(world: World, platform: Fabric) -> None:
    other = Authority.open(world.directory / "other")
    token = other.join_token([world.server.node_url()])
    with pytest.raises(SetupError, match="is not ours"):
        await join(token, "A")


async def test_a_broken_token_is_no_token(world: World) -> None:
    token = new_token(world)
    for broken in ("", "hello", token[:-20], token[:40] + "x" * 40, "stj1-"):
        with pytest.raises(SetupError, match="not a join token"):
            await join(broken, "A")
    assert JoinToken.decode(f"  {token}\n").ca_pem == world.authority.ca_pem


async def test_nobody_to_ask_is_said_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join_module, "_ATTEMPTS", 1)
    with pytest.raises(SetupError, match="nobody answers"):
        await join(new_token(world), "A")


async def test_a_name_belongs_to_its_first_key_until_it_is_forgotten(world: World, platform: Fabric) -> None:
    first = await join(new_token(world), "A")
    with pytest.raises(SetupError, match="belongs to another machine"):
        await join(new_token(world), "A")
    again = await join(new_token(world), "A", previous=first)
    assert KeyPair(again.seed).public == KeyPair(first.seed).public
    await forget_node(platform, "A")
    second = await join(new_token(world), "A")
    assert second.seed != first.seed
    node = await Fabric.connect(first, name="A")
    with pytest.raises(SetupError, match="belongs to another machine"):
        await renew(node, "A", first)
    await node.close()


async def test_nobody_joins_under_the_name_of_a_local_node(world: World) -> None:
    fabric = await world.platform()
    server = JoinServer(fabric, world.authority, local_nodes=["home"])
    await server.start()
    await fabric.flush()
    with pytest.raises(SetupError, match="belongs to another machine"):
        await join(new_token(world), "home")
    local = world.authority.local_node("home", [world.server.url], ttl=60)
    node = await Fabric.connect(local, name="home")
    assert (await renew(node, "home", local)).seed == local.seed
    await node.close()
    await server.stop()


async def test_credentials_are_renewed_for_the_same_key(world: World, platform: Fabric) -> None:
    short = world.authority.local_node("A", [world.server.url], ttl=60)
    node = await Fabric.connect(short, name="A")
    longer = await renew(node, "A", short)
    assert longer.seed == short.seed and longer.expires is not None and short.expires is not None
    assert longer.expires > short.expires + 1000
    await (await Fabric.connect(longer, name="A")).close()
    await node.close()
    assert world.authority.local_node("A", [world.server.url]).seed == short.seed  # a restart renews too


async def test_a_newcomer_reaches_nothing_but_the_join_server(world: World, platform: Fabric) -> None:
    token = JoinToken.decode(new_token(world))
    bootstrap = Credentials(
        name="x", urls=[world.server.url], jwt=token.jwt, seed=token.seed, inbox_prefix=subjects.join_inbox(token.id)
    )
    fabric = await Fabric.connect(bootstrap, name="x")
    for subject in ("st.join.other", "st.node.A.x", "st.usage", "$KV.keys.x", "$JS.API.INFO"):
        await fabric.publish(subject, b"")
        await fabric.subscribe(f"{subject}.>", _ignore)
    await fabric.flush()
    assert fabric.counters["permission_errors"] == 10
    await fabric.close()


async def test_the_join_server_answers_to_the_askers_inbox_only(world: World, platform: Fabric) -> None:
    """It may publish anywhere: a node must not get it to speak on another's subject."""
    node = await world.node("A")
    heard: list[str] = []

    async def listen(message: object) -> None:
        heard.append(message.subject)  # type: ignore[attr-defined]

    await platform.subscribe("st.node.B.>", listen)
    ask = wire.pack(join_module._Ask(node="A", public_key=KeyPair.new_user().public))
    await node.nc.publish(subjects.renew_subject("A"), ask, reply="st.node.B.replica.r.open")
    await node.nc.publish(subjects.renew_subject("A"), b"garbage", reply="st.node.B.replica.r.open")
    await asyncio.sleep(0.3)
    assert heard == []


async def test_a_node_can_not_renew_for_another(world: World, platform: Fabric) -> None:
    node = await world.node("A")
    ask = join_module._Ask(node="B", public_key=KeyPair.new_user().public)
    with pytest.raises(SetupError, match="asks for credentials of B"):
        await join_module._ask(node, subjects.renew_subject("A"), ask)


@pytest.mark.parametrize(
    "key",
    ["", "UABC", KeyPair.new_account().public, KeyPair.new_user().public[:-1] + "A"],
    ids=["none", "short", "of an account", "broken"],
)
def test_only_a_users_key_is_signed(world: World, key: str) -> None:
    with pytest.raises(SetupError, match="not a user's public key"):
        world.authority.node_credentials("A", key)
    assert nats_jwt.is_user_key(KeyPair.new_user().public)


async def _ignore(message: object) -> None:
    pass
