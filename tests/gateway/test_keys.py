"""Who is let in: headers of every shape, and changes that reach a gateway by themselves."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from springtide.core.cluster import KeyRecord, Tenant
from springtide.core.errors import Overloaded, Unauthorized
from springtide.core.ids import new_api_key
from springtide.fabric import subjects
from springtide.fabric.desired import Registry
from springtide.gateway.keys import KeyView
from springtide.ledger.keys import hash_key
from tests.gateway.conftest import Cloud, until

TENANT = Tenant(id="tenant-1", name="acme")


def key_record(plain: str, *, revoked: bool = False) -> KeyRecord:
    return KeyRecord(id=f"key-{plain[-4:]}", hash=hash_key(plain), tenant=TENANT, revoked=revoked)


@pytest.fixture
def registry(cloud: Cloud) -> Registry[KeyRecord]:
    return Registry(cloud.platform, subjects.KEYS, KeyRecord)


@pytest.fixture
async def view(cloud: Cloud) -> AsyncIterator[KeyView]:
    view = KeyView(Registry(cloud.platform, subjects.KEYS, KeyRecord))
    await view.start()
    yield view
    await view.stop()


def knows(view: KeyView, plain: str) -> bool:
    try:
        return not view.lookup(f"Bearer {plain}").revoked
    except Unauthorized:
        return False


async def test_a_key_is_found_however_its_header_is_written(view: KeyView, registry: Registry[KeyRecord]) -> None:
    plain = new_api_key()
    await registry.put(hash_key(plain), key_record(plain))
    await until(lambda: knows(view, plain), "the key is known")
    for header in (f"Bearer {plain}", f"bearer {plain}", f"  BEARER   {plain} ", f"Bearer {plain}".encode()):
        assert view.lookup(header) == key_record(plain)


async def test_anything_else_is_refused_with_a_reason(view: KeyView) -> None:
    cases: list[tuple[bytes | str | None, str]] = [
        (None, "needs an API key"),
        ("", "malformed"),
        ("Bearer", "malformed"),
        ("Bearer ", "malformed"),
        ("sk-0123456789", "malformed"),
        ("Basic dXNlcjpwYXNz", "malformed"),
        ("Bearer two words", "malformed"),
        ("Bearer sk-unknown", "not known here"),
        (b"Bearer \xff\xfe", "not known here"),
        ("Bearer \ud800", "not known here"),
    ]
    for header, message in cases:
        with pytest.raises(Unauthorized, match=message) as raised:
            view.lookup(header)
        assert raised.value.status == 401 and raised.value.code == "invalid_api_key" and raised.value.hint


async def test_an_error_shows_no_more_of_a_key_than_its_ends(view: KeyView) -> None:
    @given(st.text(min_size=1, max_size=60).filter(lambda key: len(key.split()) == 1 and key == key.strip()))
    def shows_only_the_ends(key: str) -> None:
        with pytest.raises(Unauthorized) as raised:
            view.lookup(f"Bearer {key}")
        ends = [f"{key[:3]}…{key[-4:]}"] if len(key) >= 20 else []  # of a shorter key nothing
        assert raised.value.message in [f"the API key {shown} is not known here" for shown in ["that was sent", *ends]]

    shows_only_the_ends()
    plain = new_api_key()
    with pytest.raises(Unauthorized, match=f"sk-…{plain[-4:]}"):
        view.lookup(f"Bearer {plain}")


async def test_a_revoked_key_is_refused_as_soon_as_it_is_revoked(view: KeyView, registry: Registry[KeyRecord]) -> None:
    plain = new_api_key()
    await registry.put(hash_key(plain), key_record(plain))
    await until(lambda: knows(view, plain), "the key is known")
    await registry.put(hash_key(plain), key_record(plain, revoked=True))
    await until(lambda: not knows(view, plain), "the key is refused", timeout=5)
    with pytest.raises(Unauthorized, match="was revoked"):
        view.lookup(f"Bearer {plain}")


async def test_a_gateway_that_starts_later_knows_the_keys_at_once(cloud: Cloud, registry: Registry[KeyRecord]) -> None:
    keys = [new_api_key() for _ in range(50)]
    for plain in keys:
        await registry.put(hash_key(plain), key_record(plain))
    view = KeyView(Registry(cloud.platform, subjects.KEYS, KeyRecord))
    with pytest.raises(Overloaded, match="still starting"):
        view.lookup(f"Bearer {keys[0]}")
    await view.start()
    assert view.ready and all(knows(view, plain) for plain in keys)
    await view.stop()


async def test_keys_stay_good_while_the_fabric_is_away(
    cloud: Cloud, view: KeyView, registry: Registry[KeyRecord]
) -> None:
    first, second = new_api_key(), new_api_key()
    await registry.put(hash_key(first), key_record(first))
    await until(lambda: knows(view, first), "the first key is known")
    cloud.nats.kill()
    assert knows(view, first)
    cloud.nats.start()
    await until(lambda: cloud.platform.connected, "the connection is back")
    await registry.put(hash_key(second), key_record(second))
    await until(lambda: knows(view, second), "the second key is known")
    assert knows(view, first)


async def test_no_failure_ends_the_reading_of_keys(
    view: KeyView, registry: Registry[KeyRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = 0

    async def fail() -> dict[str, KeyRecord]:
        nonlocal failures
        failures += 1
        raise RuntimeError("the transport is closed")

    plain = new_api_key()
    with monkeypatch.context() as broken:
        broken.setattr(view._registry, "items", fail)
        await registry.put(hash_key(plain), key_record(plain))
        await until(lambda: failures, "it was read, in vain")
    await until(lambda: knows(view, plain), "the key is known")
