"""Tenants and keys, on both databases."""

from __future__ import annotations

import asyncio
import re

import pytest

from springtide.core.errors import InvalidRequest
from springtide.ledger.keys import NotFound, hash_key
from springtide.ledger.store import Ledger


async def test_a_key_is_shown_once_and_kept_as_its_hash(ledger: Ledger) -> None:
    tenant = await ledger.put_tenant("acme", privacy="any")
    record, plain = await ledger.create_key("laptop", "acme")
    assert re.fullmatch(r"sk-[0-9a-z]{32}", plain)
    assert record.hash == hash_key(plain) and record.tenant == tenant and not record.revoked
    (key,) = await ledger.list_keys()
    assert key.id == record.id and key.name == "laptop" and key.hint == f"sk-…{plain[-4:]}" and key.revoked is None
    assert plain not in repr(key) and plain not in repr(record)


async def test_a_tenant_is_found_by_name_or_id(ledger: Ledger) -> None:
    tenant = await ledger.put_tenant("acme")
    by_name, _ = await ledger.create_key("a", "acme")
    by_id, _ = await ledger.create_key("b", tenant.id)
    assert by_name.tenant == by_id.tenant == tenant
    with pytest.raises(NotFound, match=r"no tenant 'acne' \(known: acme\)"):
        await ledger.create_key("c", "acne")


async def test_a_revoked_key_stays_revoked(ledger: Ledger) -> None:
    await ledger.put_tenant("default")
    record, plain = await ledger.create_key("old")
    assert (await ledger.revoke_key(record.id)).revoked
    when = (await ledger.key(record.id)).revoked
    assert when is not None and when.utcoffset() is not None
    await ledger.revoke_key(record.id)
    assert (await ledger.key(record.id)).revoked == when
    assert (await ledger.add_key(plain, "again")).revoked
    assert (await ledger.key_records())[0].revoked
    with pytest.raises(NotFound):
        await ledger.revoke_key("key-unknown")
    with pytest.raises(NotFound):
        await ledger.key("key-unknown")


async def test_putting_a_tenant_changes_only_what_is_given(ledger: Ledger) -> None:
    made = await ledger.put_tenant("acme")
    assert (made.weight, made.privacy) == (1.0, "trusted")
    heavier = await ledger.put_tenant("acme", weight=4.0)
    open_to_all = await ledger.put_tenant("acme", privacy="any")
    assert heavier.id == open_to_all.id == made.id
    assert (open_to_all.weight, open_to_all.privacy) == (4.0, "any")
    assert await ledger.tenants() == [open_to_all]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
async def test_a_weight_is_above_zero_and_finite(ledger: Ledger, weight: float) -> None:
    with pytest.raises(InvalidRequest, match="weight"):
        await ledger.put_tenant("acme", weight=weight)


@pytest.mark.parametrize("name", ["", "  ", "x" * 201, "two\nlines", "nul\0"])
async def test_names_are_printable_and_short(ledger: Ledger, name: str) -> None:
    await ledger.put_tenant("default")
    with pytest.raises(InvalidRequest, match="printable"):
        await ledger.put_tenant(name)
    with pytest.raises(InvalidRequest, match="printable"):
        await ledger.create_key(name)


async def test_the_stamp_tells_every_change(ledger: Ledger) -> None:
    stamps = [await ledger.keys_stamp()]

    async def changed() -> bool:
        stamps.append(await ledger.keys_stamp())
        return stamps[-1] != stamps[-2]

    await ledger.put_tenant("default")
    assert await changed()
    record, _ = await ledger.create_key("a")
    assert await changed()
    await ledger.put_tenant("default", weight=1.0)
    assert not await changed()
    await ledger.put_tenant("default", weight=2.0)
    assert await changed()
    await ledger.revoke_key(record.id)
    assert await changed()


async def test_keys_are_listed_newest_first_and_bounded(ledger: Ledger) -> None:
    await ledger.put_tenant("default")
    for name in "abc":
        await ledger.create_key(name)
    assert [key.name for key in await ledger.list_keys(limit=2)] == ["c", "b"]
    assert len(await ledger.key_records()) == 3


async def test_many_keys_at_once_are_all_different(ledger: Ledger) -> None:
    await ledger.put_tenant("default")
    made = await asyncio.gather(*(ledger.create_key(f"key {i}") for i in range(10)))
    assert len({plain for _, plain in made}) == len({record.id for record, _ in made}) == 10
