"""Usage: each request counts once, whole, and adds up; on both databases."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime, timedelta
from typing import Any

import msgspec
import pytest
from sqlalchemy import select

from springtide.core.errors import InvalidRequest
from springtide.ledger.database import Database
from springtide.ledger.keys import NotFound
from springtide.ledger.schema import refused_usage
from springtide.ledger.store import Ledger
from springtide.ledger.usage import UsageFilter
from tests.ledger.records import NOON, attempt, usage


async def test_a_record_comes_back_as_it_went_in(ledger: Ledger) -> None:
    record = usage("req-1", attempts=[attempt(1, outcome="failed"), attempt(2)], created=NOON + 0.123456)
    assert await ledger.record_usage([record]) == 1
    assert await ledger.usage("req-1") == record


async def test_a_record_delivered_again_counts_once(ledger: Ledger) -> None:
    records = [usage(f"req-{i}") for i in range(300)]
    assert await ledger.record_usage(records[:200]) == 200
    assert await ledger.record_usage(records[100:] + records[:10]) == 100
    assert await ledger.record_usage(records) == 0
    assert await ledger.record_usage([]) == 0
    (total,) = await ledger.usage_summary()
    assert total.requests == 300 and total.prompt_tokens == 3000
    assert sum(len(record.attempts) for record in await ledger.list_usage(limit=1000)) == 300


async def test_two_consumers_of_the_same_records_count_them_once(url: str) -> None:
    """For a moment two may believe that they lead."""
    ledgers = [await Ledger.open(url) for _ in range(3)]
    batches = [[usage(f"req-{i}") for i in range(start, start + 60)] for start in range(0, 100, 20)]
    new = await asyncio.gather(*(ledger.record_usage(batch) for batch in batches for ledger in ledgers))
    assert sum(new) == 140
    assert (await ledgers[0].usage_summary())[0].requests == 140
    for ledger in ledgers:
        await ledger.close()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model": "nul\0"}, "NUL"),
        ({"model": "x" * 10_000}, "too long"),
        ({"completion_tokens": 2**63}, "too large"),
        ({"prompt_tokens": -1}, "negative"),
        ({"created": float("nan")}, "time"),
        ({"finished": 1e30}, "time"),
        ({"attempts": [attempt(1), attempt(1)]}, "one number"),
        ({"attempts": [attempt(1, node="\0")]}, "NUL"),
    ],
)
async def test_a_record_that_cannot_be_held_does_not_hold_up_the_others(
    url: str, fields: dict[str, Any], reason: str
) -> None:
    ledger = await Ledger.open(url)
    batch = [usage("req-1"), usage("req-2", **fields), usage("req-3")]
    assert await ledger.record_usage(batch) == 2
    assert await ledger.record_usage(batch) == 0
    await ledger.close()
    ((why, record),) = await _refused(url)
    assert reason in why and msgspec.json.decode(record)["request_id"] == "req-2"


async def test_an_answer_that_was_delivered_twice_is_billed_once(url: str) -> None:
    """The second time by another gateway, to a client that had lost the first, and has changed its key meanwhile."""
    ledger = await Ledger.open(url)
    assert await ledger.record_usage([usage("req-1")]) == 1
    assert await ledger.record_usage([usage("req-1", gateway="another", key_id="another")]) == 0
    await ledger.close()
    assert not await _refused(url)


async def test_a_second_story_of_the_same_request_is_kept_aside(url: str) -> None:
    ledger = await Ledger.open(url)
    await ledger.record_usage([usage("req-1")])
    other = usage("req-1", completion_tokens=1000, attempts=[attempt(2)])
    assert await ledger.record_usage([other, usage("req-2"), usage("req-2", prompt_tokens=1)]) == 1
    assert await ledger.record_usage([other]) == 0
    assert (await ledger.usage("req-1")).attempts == [attempt(1)]
    await ledger.close()
    assert ["already written" in why for why, _ in await _refused(url)] == [True, True]


async def _refused(url: str) -> list[tuple[str, str]]:
    database = await Database.open(url)
    async with database.read() as connection:
        rows = (await connection.execute(select(refused_usage.c.reason, refused_usage.c.record))).tuples().all()
    await database.close()
    return list(rows)


async def test_usage_adds_up_by_every_dimension(ledger: Ledger) -> None:
    await ledger.put_tenant("acme")
    key, _ = await ledger.create_key("laptop", "acme")
    acme = {"tenant": key.tenant.id, "key_id": key.id}
    midnight = NOON + 12 * 3600
    await ledger.record_usage(
        [
            usage("req-1", **acme),
            usage("req-2", **acme, model="other", outcome="failed", created=midnight - 0.001),
            usage("req-3", outcome="cancelled", created=midnight),
        ]
    )
    by_day = await ledger.usage_summary(["day"])
    assert [(row.day, row.requests) for row in by_day] == [(date(2026, 3, 1), 2), (date(2026, 3, 2), 1)]
    by_tenant = {row.tenant: row for row in await ledger.usage_summary(["tenant"])}
    assert by_tenant[key.tenant.id].tenant_name == "acme" and by_tenant["tenant-1"].tenant_name is None
    assert by_tenant[key.tenant.id].prompt_tokens == 20
    named = [(row.key_name, row.model, row.failed) for row in await ledger.usage_summary(["key", "model"])]
    assert sorted(named, key=str) == [("laptop", "other", 1), ("laptop", "smollm2", 0), (None, "smollm2", 0)]
    (total,) = await ledger.usage_summary()
    assert (total.requests, total.finished, total.failed, total.cancelled) == (3, 1, 1, 1)


async def test_nothing_used_is_zero(ledger: Ledger) -> None:
    (total,) = await ledger.usage_summary()
    assert (total.requests, total.prompt_tokens) == (0, 0)
    assert await ledger.usage_summary(["tenant"]) == []
    assert await ledger.list_usage() == []


async def test_usage_is_filtered(ledger: Ledger) -> None:
    await ledger.put_tenant("acme")
    key, _ = await ledger.create_key("laptop", "acme")
    hour = timedelta(hours=1).total_seconds()
    await ledger.record_usage(
        [usage("req-1"), usage("req-2", created=NOON + hour, tenant=key.tenant.id, key_id=key.id, model="other")]
    )
    later = datetime.fromtimestamp(NOON + hour, UTC)
    for wanted, expected in [
        (UsageFilter(since=later), ["req-2"]),
        (UsageFilter(until=later), ["req-1"]),
        (UsageFilter(since=later, until=later), []),
        (UsageFilter(tenant="acme"), ["req-2"]),
        (UsageFilter(tenant=key.tenant.id), ["req-2"]),
        (UsageFilter(tenant="tenant-1"), ["req-1"]),
        (UsageFilter(key=key.id), ["req-2"]),
        (UsageFilter(model="other"), ["req-2"]),
        (UsageFilter(model="other", tenant="tenant-1"), []),
    ]:
        assert [record.request_id for record in await ledger.list_usage(wanted)] == expected
        assert (await ledger.usage_summary((), wanted))[0].requests == len(expected)


async def test_requests_are_listed_page_by_page(ledger: Ledger) -> None:
    # Many share a moment: a page must still neither repeat nor lose one.
    records = [usage(f"req-{i:03}", created=NOON + i // 10) for i in range(95)]
    await ledger.record_usage(records)
    seen: list[str] = []
    before = None
    while page := await ledger.list_usage(limit=20, before=before):
        seen += [record.request_id for record in page]
        before = seen[-1]
    assert seen == [record.request_id for record in reversed(records)]


async def test_questions_are_bounded(ledger: Ledger) -> None:
    for limit in (0, -1, 10_001):
        with pytest.raises(InvalidRequest, match="limit"):
            await ledger.list_usage(limit=limit)
        with pytest.raises(InvalidRequest, match="limit"):
            await ledger.usage_summary(["day"], limit=limit)
    with pytest.raises(InvalidRequest, match="grouped by 'colour'"):
        await ledger.usage_summary(["colour"])
    with pytest.raises(NotFound):
        await ledger.list_usage(before="req-unknown")
    with pytest.raises(NotFound):
        await ledger.usage("req-unknown")


async def test_tokens_add_up_beyond_32_bits(ledger: Ledger) -> None:
    await ledger.record_usage([usage(f"req-{i}", prompt_tokens=2**40) for i in range(4)])
    (total,) = await ledger.usage_summary()
    assert total.prompt_tokens == 2**42
