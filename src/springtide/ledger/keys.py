"""Who may ask: tenants and their API keys. Knows tables and hashes; a key itself passes through and is forgotten."""

from __future__ import annotations

import hashlib
import math
from datetime import UTC, datetime
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Row, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from springtide.core.cluster import KeyRecord, PrivacyClass, Tenant
from springtide.core.errors import InvalidRequest
from springtide.core.ids import new_id
from springtide.ledger.schema import api_keys, tenants

DEFAULT_TENANT = "default"
MAX_NAME = 200
MAX_ROWS = 10_000


class NotFound(InvalidRequest):
    """No tenant, key or request of that name."""

    status = 404
    code = "not_found"


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key as its owner may see it again: all but the key. `hint` is its first and last characters."""

    id: str
    name: str
    hint: str
    tenant: Tenant
    created: datetime
    revoked: datetime | None


def hash_key(key: str | bytes) -> str:
    """What we keep of a key: SHA-256, hex.

    A slow, salted hash is for passwords, whose guesses are few. A key is 160 random bits: nobody can try them,
    whatever a try costs, and no two are alike, so a salt would hide nothing. A fast hash lets every request be
    checked by one look-up, whose time tells nothing of how much of a key was right.
    """
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).hexdigest()


def key_hint(key: str) -> str:
    """`sk-…abcd`: enough to tell keys apart; the other 140 bits stay unknown."""
    return f"{key[:3]}…{key[-4:]}"


async def put_tenant(
    connection: AsyncConnection, name: str, *, weight: float | None, privacy: PrivacyClass | None
) -> Tenant:
    """The tenant of that name, made or changed; None leaves a field as it is (new: 1.0 and "trusted")."""
    check_name("a tenant's name", name)
    if weight is not None and not (weight > 0 and math.isfinite(weight)):
        raise InvalidRequest(f"weight is {weight}; it must be above 0", param="weight")
    now = datetime.now(UTC)
    row = (await connection.execute(select(tenants).where(tenants.c.name == name))).one_or_none()
    if row is None:
        tenant = Tenant(id=new_id("tenant"), name=name, weight=weight or 1.0, privacy=privacy or "trusted")
        await connection.execute(insert(tenants).values(**msgspec.structs.asdict(tenant), created=now, changed=now))
        return tenant
    old = _tenant(row)
    tenant = msgspec.structs.replace(old, weight=weight or old.weight, privacy=privacy or old.privacy)
    if tenant != old:
        changes = {"weight": tenant.weight, "privacy": tenant.privacy, "changed": now}
        await connection.execute(update(tenants).where(tenants.c.id == tenant.id).values(**changes))
    return tenant


async def list_tenants(connection: AsyncConnection) -> list[Tenant]:
    rows = await connection.execute(select(tenants).order_by(tenants.c.name))
    return [_tenant(row) for row in rows]


async def find_tenant(connection: AsyncConnection, name_or_id: str) -> Tenant:
    """Raises NotFound, naming some that there are."""
    rows = await connection.execute(
        select(tenants).where(or_(tenants.c.name == name_or_id, tenants.c.id == name_or_id))
    )
    found = {tenant.name: tenant for tenant in map(_tenant, rows)}
    if not found:
        known = ", ".join(tenant.name for tenant in (await list_tenants(connection))[:20])
        raise NotFound(f"there is no tenant {name_or_id!r}", hint=f"known: {known}" if known else "make one first")
    return found.get(name_or_id) or next(iter(found.values()))


async def add_key(connection: AsyncConnection, plain: str, name: str, tenant: Tenant) -> KeyRecord:
    """Register a key. One that is there already stays as it is: its name, its tenant, whether it is revoked."""
    check_name("a key's name", name)
    hash = hash_key(plain)
    for row in await connection.execute(_select_keys(api_keys.c.hash == hash)):
        return _record(row)
    record = KeyRecord(id=new_id("key"), hash=hash, tenant=tenant)
    await connection.execute(
        insert(api_keys).values(
            id=record.id,
            tenant_id=tenant.id,
            name=name,
            hash=hash,
            hint=key_hint(plain),
            created=datetime.now(UTC),
        )
    )
    return record


async def list_keys(connection: AsyncConnection, limit: int) -> list[ApiKey]:
    """The newest first."""
    query = _select_keys().order_by(api_keys.c.created.desc(), api_keys.c.id.desc()).limit(check_limit(limit))
    return [_api_key(row) for row in await connection.execute(query)]


async def get_key(connection: AsyncConnection, id: str) -> ApiKey:
    return _api_key(await _key_row(connection, id))


async def revoke_key(connection: AsyncConnection, id: str) -> KeyRecord:
    """For good. Revoking it again changes nothing, the time neither."""
    await connection.execute(
        update(api_keys).where(api_keys.c.id == id, api_keys.c.revoked.is_(None)).values(revoked=datetime.now(UTC))
    )
    return _record(await _key_row(connection, id))


async def key_records(connection: AsyncConnection) -> list[KeyRecord]:
    """All of them, as gateways know them."""
    return [_record(row) for row in await connection.execute(_select_keys())]


async def keys_stamp(connection: AsyncConnection) -> tuple[Any, ...]:
    """Something that differs once any tenant or key has changed: cheap to ask, so that it can be asked often."""
    keys = select(func.count(), func.count(api_keys.c.revoked), func.max(api_keys.c.created)).select_from(api_keys)
    changed = select(func.max(tenants.c.changed))
    return (*(await connection.execute(keys)).one(), *(await connection.execute(changed)).one())


def check_name(what: str, name: str) -> None:
    if not name.strip() or len(name) > MAX_NAME or not name.isprintable():
        raise InvalidRequest(f"{what} is 1 to {MAX_NAME} printable characters", param="name")


def check_limit(limit: int) -> int:
    """`limit`, if an answer may have so many rows. Raises InvalidRequest."""
    if not 1 <= limit <= MAX_ROWS:
        raise InvalidRequest(f"limit is {limit}; it must lie in [1, {MAX_ROWS}]", param="limit")
    return limit


def _select_keys(*conditions: ColumnElement[bool]) -> Any:
    columns = (tenants.c.id.label("t_id"), tenants.c.name.label("t_name"), tenants.c.weight, tenants.c.privacy)
    return select(api_keys, *columns).join_from(api_keys, tenants).where(*conditions)


async def _key_row(connection: AsyncConnection, id: str) -> Row[Any]:
    row = (await connection.execute(_select_keys(api_keys.c.id == id))).one_or_none()
    if row is None:
        raise NotFound(f"there is no key {id!r}", hint="`springtide keys list` names them")
    return row


def _tenant(row: Row[Any]) -> Tenant:
    return Tenant(id=row.id, name=row.name, weight=row.weight, privacy=row.privacy)


def _key_tenant(row: Row[Any]) -> Tenant:
    return Tenant(id=row.t_id, name=row.t_name, weight=row.weight, privacy=row.privacy)


def _record(row: Row[Any]) -> KeyRecord:
    return KeyRecord(id=row.id, hash=row.hash, tenant=_key_tenant(row), revoked=row.revoked is not None)


def _api_key(row: Row[Any]) -> ApiKey:
    return ApiKey(
        id=row.id,
        name=row.name,
        hint=row.hint,
        tenant=_key_tenant(row),
        created=row.created,
        revoked=row.revoked,
    )
