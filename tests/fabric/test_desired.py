"""What should be: whole states that arrive in the end, and registries that any platform process can read."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from springtide.core.cluster import Deployment, DesiredState
from springtide.core.errors import SetupError
from springtide.fabric import desired, subjects
from springtide.fabric.desired import DesiredReader, DesiredWriter, NodeIntent, Registry, _decode_key, _encode_key
from springtide.fabric.kv import Bucket, Conflict
from tests.fabric.conftest import World, until


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desired, "_LOOK_EVERY_S", 0.2)


async def test_a_state_written_before_during_and_after_an_outage_arrives(world: World) -> None:
    platform, node = await world.platform(), await world.node("A")
    writer = DesiredWriter(platform)
    await writer.put(DesiredState(node="A", revision=1))
    states: list[DesiredState] = []
    reader = DesiredReader(node, "A", states.append)
    await reader.start()
    await until(lambda: len(states) == 1)
    await writer.put(DesiredState(node="A", revision=2, drain=True))
    await until(lambda: len(states) == 2)
    world.server.kill()
    write = asyncio.ensure_future(writer.put(DesiredState(node="A", revision=3)))
    await asyncio.sleep(0.1)
    world.server.start()
    await write
    await until(lambda: len(states) == 3)
    assert [state.revision for state in states] == [1, 2, 3]
    assert await writer.get("A") == states[-1]
    assert await writer.get("B") is None
    await reader.stop()


async def test_a_lost_message_costs_seconds_and_an_old_one_nothing(world: World) -> None:
    platform, node = await world.platform(), await world.node("A")
    states: list[DesiredState] = []
    reader = DesiredReader(node, "A", states.append)
    await reader.start()
    await node.flush()
    assert reader._subscription is not None
    await reader._subscription.unsubscribe()  # from now on no message arrives
    await DesiredWriter(platform).put(DesiredState(node="A", revision=5))
    await until(lambda: [state.revision for state in states] == [5])
    await reader.stop()


async def test_a_store_that_was_set_back_is_believed_in_the_end(world: World) -> None:
    platform, node = await world.platform(), await world.node("A")
    writer, states = DesiredWriter(platform), list[DesiredState]()
    await writer.put(DesiredState(node="A", revision=7))
    reader = DesiredReader(node, "A", states.append)
    await reader.start()
    await until(lambda: states)
    await writer.put(DesiredState(node="A", revision=1))
    await until(lambda: [state.revision for state in states] == [7, 1])
    await reader.stop()


async def test_a_registry_keeps_typed_values_and_tells_of_changes(world: World) -> None:
    fabric = await world.platform()
    registry = Registry(fabric, subjects.DEPLOYMENTS, Deployment)
    told: list[int] = []
    elsewhere = await world.platform("other")
    other = Registry(elsewhere, subjects.DEPLOYMENTS, Deployment)
    await other.watch(lambda: told.append(1))
    await elsewhere.flush()
    value = Deployment(name="meta/llama 3.1", source="mock", options={"a": 1})
    await registry.put(value.name, value)
    await until(lambda: told)
    assert await other.get(value.name) == value
    assert await other.items() == {value.name: value}
    assert await other.get("nothing") is None
    seen = len(told)
    await registry.delete(value.name)
    await until(lambda: len(told) > seen)
    assert await other.items() == {} and await other.get(value.name) is None
    seen = len(told)
    world.restart()
    await until(lambda: len(told) > seen)  # after a reconnect: something may have been missed
    await registry.put("again", value)
    assert await other.items() == {"again": value}
    await other.unwatch()


async def test_a_registry_of_thousands_is_listed_whole(world: World) -> None:
    fabric = await world.platform()
    intents = Registry(fabric, subjects.INTENTS, NodeIntent)
    await asyncio.gather(*(intents.put(f"n{i}", NodeIntent(node=f"n{i}")) for i in range(2100)))
    await intents.delete("n7")
    assert set(await intents.items()) == {f"n{i}" for i in range(2100) if i != 7}


async def test_values_of_another_shape_are_left_out_and_counted(world: World) -> None:
    fabric = await world.platform()
    await Registry(fabric, subjects.INTENTS, str).put("odd", "text")
    intents = Registry(fabric, subjects.INTENTS, NodeIntent)
    await intents.put("even", NodeIntent(node="even"))
    assert await intents.items() == {"even": NodeIntent(node="even")}
    assert intents.counters["unreadable"] == 1


async def test_writes_without_a_server_fail_clearly(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desired, "_ATTEMPTS", 1)
    fabric = await world.platform()
    registry = Registry(fabric, subjects.KEYS, str)
    world.server.kill()
    with pytest.raises(SetupError, match="store can't be reached"):
        await registry.put("a", "b")


async def test_compare_and_set(world: World) -> None:
    bucket = Bucket(await world.platform(), subjects.LEADERS)
    first = await bucket.put("k", b"1", expect=0)
    with pytest.raises(Conflict):
        await bucket.put("k", b"2", expect=0)
    second = await bucket.put("k", b"2", expect=first)
    with pytest.raises(Conflict):
        await bucket.put("k", b"3", expect=first)
    await bucket.delete("k")
    entry = await bucket.get("k")
    assert entry is not None and entry.value is None and entry.revision > second
    await bucket.put("k", b"4", expect=entry.revision)


@given(st.text(min_size=1))
def test_any_text_can_be_a_key(key: str) -> None:
    encoded = _encode_key(key)
    assert all(character.isascii() and (character.isalnum() or character in "_-=") for character in encoded)
    assert _decode_key(encoded) == key.encode("utf-8", "replace").decode()
