"""What was used: one record a request, its attempts with it, summed as people ask. Knows tables, not where the
records come from."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime
from typing import Any

import msgspec
from sqlalchemy import BigInteger, ColumnElement, Row, Select, and_, case, cast, func, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from springtide.core.errors import InvalidRequest
from springtide.core.request import Attempt, Outcome, Usage
from springtide.ledger.keys import NotFound, check_limit
from springtide.ledger.schema import api_keys, attempts, refused_usage, tenants, usage, utc_day

log = logging.getLogger(__name__)

DIMENSIONS = ("tenant", "key", "model", "day")
_CHUNK = 200  # ids in one IN (...): older SQLite takes 999 parameters
_MAX_TEXT = 500  # characters of a name; PostgreSQL can't index much longer ones
_INT64 = 2**63

OUTCOMES: tuple[Outcome, ...] = ("finished", "failed", "cancelled")


class UsageFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which requests: those created in [since, until), of one tenant (id or name), key (id), model."""

    since: datetime | None = None
    until: datetime | None = None
    tenant: str | None = None
    key: str | None = None
    model: str | None = None


EVERYTHING = UsageFilter()


class UsageSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over the requests that share the asked dimensions; those that were not asked for are None."""

    tenant: str | None = None
    tenant_name: str | None = None
    key: str | None = None
    key_name: str | None = None
    model: str | None = None
    day: date | None = None
    requests: int
    finished: int
    failed: int
    cancelled: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


async def record_usage(connection: AsyncConnection, records: Sequence[Usage]) -> int:
    """Write down the records that are new, each with its attempts; say how many those were.

    Must run in a write transaction over the usage tables, so that what is not there yet stays not there. A
    record that was already written is passed over: that is what makes delivery at least once count exactly
    once. One that no database could hold, or that contradicts the one written for the same request, goes to
    `refused_usage`, lest it hold up all the others.
    """
    sound, new = [], dict[str, Usage]()
    for record in records:
        if fault := _fault(record):
            await _refuse(connection, record, fault)
        else:
            sound.append(record)
    written = await _written(connection, [record.request_id for record in sound])
    for record in sound:
        first = written.get(record.request_id) or new.setdefault(record.request_id, record)
        if _essence(first) != _essence(record):
            await _refuse(connection, record, "another record of the same request is already written")
    now = datetime.now(UTC)
    if new:
        await connection.execute(insert(usage), [_usage_row(record, now) for record in new.values()])
    tries = [_attempt_row(record.request_id, attempt) for record in new.values() for attempt in record.attempts]
    if tries:
        await connection.execute(insert(attempts), tries)
    return len(new)


async def summarise(
    connection: AsyncConnection, by: Sequence[str], wanted: UsageFilter, limit: int
) -> list[UsageSummary]:
    """One row for each group, in order of the dimensions; without any, one row for all."""
    for name in by:
        if name not in DIMENSIONS:
            raise InvalidRequest(f"usage can't be grouped by {name!r}", hint=f"by {', '.join(DIMENSIONS)}", param="by")
    columns: dict[str, ColumnElement[Any]] = {
        "tenant": usage.c.tenant_id.label("tenant"),
        "key": usage.c.key_id.label("key"),
        "model": usage.c.model.label("model"),
        "day": utc_day(usage.c.created).label("day"),
    }
    group = [columns[name] for name in dict.fromkeys(by)]
    query = _filtered(select(*group, *_sums()), wanted).group_by(*group).order_by(*group).limit(check_limit(limit))
    rows = [row._asdict() for row in await connection.execute(query)]
    await _add_names(connection, rows)
    return [UsageSummary(**row) for row in rows]


async def list_usage(connection: AsyncConnection, wanted: UsageFilter, limit: int, before: str | None) -> list[Usage]:
    """The newest requests first; `before` goes on after the last one of the page before (its id)."""
    query = _filtered(select(usage), wanted)
    if before is not None:
        at = (await _one_usage(connection, before)).created
        earlier = and_(usage.c.created == at, usage.c.request_id < before)
        query = query.where(or_(usage.c.created < at, earlier))
    query = query.order_by(usage.c.created.desc(), usage.c.request_id.desc()).limit(check_limit(limit))
    return await _with_attempts(connection, (await connection.execute(query)).all())


async def get_usage(connection: AsyncConnection, request_id: str) -> Usage:
    """Raises NotFound."""
    return (await _with_attempts(connection, [await _one_usage(connection, request_id)]))[0]


async def _written(connection: AsyncConnection, request_ids: Sequence[str]) -> dict[str, Usage]:
    found = {}
    for start in range(0, len(request_ids), _CHUNK):
        chunk = request_ids[start : start + _CHUNK]
        for row in await connection.execute(select(usage).where(usage.c.request_id.in_(chunk))):
            found[row.request_id] = _usage(row, [])
    return found


def _essence(record: Usage) -> tuple[Any, ...]:
    """What two records of one request must agree on (times lose their last digits in a database). Neither on
    gateway nor key: a client that lost its connection may have the same answer from another one, with another key."""
    counts = (record.prompt_tokens, record.completion_tokens, record.cached_tokens)
    return (record.tenant, record.model, record.outcome, *counts)


async def _refuse(connection: AsyncConnection, record: Usage, reason: str) -> None:
    content = msgspec.json.encode(record)
    hash = hashlib.sha256(content).hexdigest()
    log.error("usage of request %r is refused: %s (kept in refused_usage, %s)", record.request_id, reason, hash[:12])
    known = await connection.execute(select(refused_usage.c.hash).where(refused_usage.c.hash == hash))
    if known.first() is None:
        values = {"hash": hash, "received": datetime.now(UTC), "reason": reason, "record": content.decode()}
        await connection.execute(insert(refused_usage).values(**values))


def _fault(record: Usage) -> str | None:
    """Why a database would not take the record, if so."""
    texts = [record.request_id, record.tenant, record.key_id, record.model, record.gateway]
    counts = [record.prompt_tokens, record.completion_tokens, record.cached_tokens]
    times = [record.created, record.finished]
    for attempt in record.attempts:
        texts += [attempt.node, attempt.replica]
        counts += [attempt.number, attempt.prompt_tokens, attempt.completion_tokens, attempt.cached_tokens]
        times += [attempt.started, attempt.ended]
    if any("\0" in text or len(text) > _MAX_TEXT for text in texts):
        return "a name in it is too long or holds a NUL"
    if any(not 0 <= count < _INT64 for count in counts):
        return "a count in it is negative or too large"
    if len({attempt.number for attempt in record.attempts}) < len(record.attempts):
        return "two attempts in it have one number"
    try:
        for time in times:
            _moment(time)
    except (ValueError, OverflowError, OSError):
        return "a time in it is not a time"
    return None


def _sums() -> Iterable[ColumnElement[Any]]:
    # Sums of integers are decimals on PostgreSQL, and NULL where there is no row.
    def total(column: ColumnElement[Any]) -> ColumnElement[Any]:
        return cast(func.coalesce(func.sum(column), 0), BigInteger)

    yield func.count().label("requests")
    for outcome in OUTCOMES:
        yield total(case((usage.c.outcome == outcome, 1), else_=0)).label(outcome)
    for name in ("prompt_tokens", "completion_tokens", "cached_tokens"):
        yield total(usage.c[name]).label(name)


def _filtered(query: Select[Any], wanted: UsageFilter) -> Select[Any]:
    query = query.select_from(usage)
    if wanted.since is not None:
        query = query.where(usage.c.created >= wanted.since)
    if wanted.until is not None:
        query = query.where(usage.c.created < wanted.until)
    if wanted.tenant is not None:
        named = select(tenants.c.id).where(tenants.c.name == wanted.tenant)
        query = query.where(or_(usage.c.tenant_id == wanted.tenant, usage.c.tenant_id.in_(named)))
    if wanted.key is not None:
        query = query.where(usage.c.key_id == wanted.key)
    if wanted.model is not None:
        query = query.where(usage.c.model == wanted.model)
    return query


async def _add_names(connection: AsyncConnection, rows: Sequence[dict[str, Any]]) -> None:
    """To each row that has a tenant or a key, its name (None: one that this database does not know)."""
    for dimension, table in (("tenant", tenants), ("key", api_keys)):
        ids = sorted({row[dimension] for row in rows if dimension in row})
        names: dict[str, str] = {}
        for start in range(0, len(ids), _CHUNK):
            query = select(table.c.id, table.c.name).where(table.c.id.in_(ids[start : start + _CHUNK]))
            names.update((id, name) for id, name in await connection.execute(query))
        for row in rows:
            if dimension in row:
                row[f"{dimension}_name"] = names.get(row[dimension])


async def _one_usage(connection: AsyncConnection, request_id: str) -> Row[Any]:
    row = (await connection.execute(select(usage).where(usage.c.request_id == request_id))).one_or_none()
    if row is None:
        raise NotFound(f"there is no usage of a request {request_id!r}")
    return row


async def _with_attempts(connection: AsyncConnection, rows: Sequence[Row[Any]]) -> list[Usage]:
    tries: dict[str, list[Attempt]] = {row.request_id: [] for row in rows}
    ids = list(tries)
    for start in range(0, len(ids), _CHUNK):
        query = select(attempts).where(attempts.c.request_id.in_(ids[start : start + _CHUNK]))
        for row in await connection.execute(query.order_by(attempts.c.request_id, attempts.c.number)):
            tries[row.request_id].append(_attempt(row))
    return [_usage(row, tries[row.request_id]) for row in rows]


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _usage_row(record: Usage, now: datetime) -> dict[str, Any]:
    return {
        "request_id": record.request_id,
        "tenant_id": record.tenant,
        "key_id": record.key_id,
        "model": record.model,
        "gateway": record.gateway,
        "created": _moment(record.created),
        "finished": _moment(record.finished),
        "first_token_s": record.first_token_s,
        "outcome": record.outcome,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "cached_tokens": record.cached_tokens,
        "recorded": now,
    }


def _attempt_row(request_id: str, attempt: Attempt) -> dict[str, Any]:
    row = msgspec.structs.asdict(attempt)
    return {**row, "request_id": request_id, "started": _moment(attempt.started), "ended": _moment(attempt.ended)}


def _usage(row: Row[Any], tries: list[Attempt]) -> Usage:
    return Usage(
        request_id=row.request_id,
        tenant=row.tenant_id,
        key_id=row.key_id,
        model=row.model,
        gateway=row.gateway,
        created=row.created.timestamp(),
        finished=row.finished.timestamp(),
        outcome=row.outcome,
        prompt_tokens=row.prompt_tokens,
        completion_tokens=row.completion_tokens,
        cached_tokens=row.cached_tokens,
        first_token_s=row.first_token_s,
        attempts=tries,
    )


def _attempt(row: Row[Any]) -> Attempt:
    values = row._asdict()
    del values["request_id"]
    return Attempt(**{**values, "started": row.started.timestamp(), "ended": row.ended.timestamp()})
