"""The same request sent again: one answer, one bill, whichever gateway it comes to and whatever became of the first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from springtide.core.request import End, Request
from springtide.fabric.streams import StreamKey
from springtide.gateway.limits import Limits
from tests.gateway.conftest import LIMITS, Cloud, Edge, running_edge, until
from tests.gateway.hearing import CHAT, Heard, ask, listen
from tests.gateway.replica import PROMPT_TOKENS, TinyReplica, counts, delta, said, speak, speak_only, speak_slowly, text

KEY = {"idempotency-key": "order-66"}


@asynccontextmanager
async def another_gateway(edge: Edge, **settings: object) -> AsyncIterator[Edge]:
    """A second way in to the same replicas, for the same client."""
    async with edge.cloud.gateway(**settings) as url:  # type: ignore[arg-type]
        other = Edge(edge.cloud, edge.replica, url, edge.key)
        async with other.client:
            await until(lambda: _is_ready(other), "the other gateway is ready")
            yield other


async def _is_ready(edge: Edge) -> bool:
    return (await edge.client.get("/ready")).status_code == 200


async def bills(edge: Edge) -> list[tuple[str, str, int]]:
    """(id, outcome, tokens) of all usage that is in the ledger, once some is."""
    records = await until(edge.cloud.ledger.list_usage, "a usage")
    return [(record.request_id, record.outcome, record.completion_tokens) for record in records]


async def settled(edge: Edge) -> None:
    """All that will reach the ledger has reached it: one that was recorded later is there."""
    heard = await ask(edge, model=edge.replica.describe().model)
    await edge.cloud.usage(next(iter(heard.ids)))


async def test_the_same_request_again_is_answered_from_what_the_replica_kept(edge: Edge) -> None:
    first = await edge.client.post("/v1/chat/completions", json={**CHAT, "stream": False}, headers=KEY)
    again = await edge.client.post("/v1/chat/completions", json={**CHAT, "stream": False}, headers=KEY)
    assert first.status_code == again.status_code == 200
    assert first.json() == {**again.json(), "created": first.json()["created"]}
    assert first.headers["x-request-id"] == again.headers["x-request-id"] == first.json()["id"]
    assert len(edge.replica.opened) == 1
    async with another_gateway(edge) as other:
        heard = await ask(other, headers=KEY)  # streamed this time
        assert heard.text == {0: first.json()["choices"][0]["message"]["content"]}
        assert heard.ids == {first.json()["id"]}
    assert len(edge.replica.opened) == 1
    await settled(edge)
    assert len(await bills(edge)) == 2
    assert (first.json()["id"], "finished", 5) in await bills(edge)


async def test_the_seed_comes_from_the_key(edge: Edge) -> None:
    for key in ("a", "b"):
        await edge.client.post("/v1/chat/completions", json=CHAT, headers={"idempotency-key": key})
    one, other = (request.sampling.seed for _, request in edge.replica.opened)
    assert one is not None and one != other


async def test_a_key_for_another_request_is_refused(edge: Edge) -> None:
    await ask(edge, headers=KEY)
    response = await edge.chat_with(KEY, max_tokens=3)
    assert (response.status_code, response.json()["error"]["code"]) == (422, "idempotency_key_reused")
    edge.replica.behaviour = speak_only(2)
    heard = Heard()
    running = asyncio.create_task(ask(edge, heard=heard, headers={"idempotency-key": "busy"}))
    await until(lambda: heard.text[0], "it runs")
    response = await edge.chat_with({"idempotency-key": "busy"}, max_tokens=3)
    assert (response.status_code, response.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert not running.done(), "the one that runs is left in peace"
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_the_same_request_while_it_runs_takes_the_stream(edge: Edge) -> None:
    edge.replica.behaviour = speak_slowly
    first = Heard()
    before = asyncio.create_task(ask(edge, heard=first, headers=KEY, max_tokens=20))
    await until(lambda: first.text[0], "it runs")
    second = await ask(edge, headers=KEY, max_tokens=20)
    await before
    assert first.error is not None and first.error["code"] == "taken_over"
    assert text(20).startswith(first.text[0])
    assert (second.text, second.roles, second.done) == ({0: text(20)}, {0: 1}, True)
    assert len(edge.replica.opened) == 1 and not edge.replica.cancelled
    await settled(edge)
    assert sorted(bill[1:] for bill in await bills(edge)) == [("finished", 5), ("finished", 20)]


async def test_many_with_the_same_key_at_once_are_one_request(edge: Edge) -> None:
    edge.replica.behaviour = speak_slowly
    async with another_gateway(edge) as other:
        asked = [asyncio.create_task(ask(way, headers=KEY, max_tokens=10)) for way in (edge, edge, other, edge, other)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
    heard = [answer for answer in answers if isinstance(answer, Heard)]
    whole = [one for one in heard if one.done]
    assert whole and all(one.text == {0: text(10)} for one in whole)
    assert all(one.error is not None and one.error["code"] == "taken_over" for one in heard if not one.done)
    await settled(edge)
    ids = {next(iter(one.ids)) for one in whole}
    assert len(ids) == 1
    assert [bill[1:] for bill in await bills(edge) if bill[0] in ids] == [("finished", 10)]


async def test_another_gateway_takes_the_stream_over(edge: Edge) -> None:
    edge.replica.behaviour = speak_slowly
    async with another_gateway(edge) as other:
        first = Heard()
        before = asyncio.create_task(ask(edge, heard=first, headers=KEY, max_tokens=20))
        await until(lambda: first.text[0], "it runs")
        second = await ask(other, headers=KEY, max_tokens=20)
        await before
    assert first.error is not None and first.error["code"] == "taken_over"
    assert (second.text, second.done) == ({0: text(20)}, True)
    assert len(edge.replica.opened) == 1 and not edge.replica.cancelled
    await settled(edge)
    (request_id,) = second.ids
    assert [bill[1:] for bill in await bills(edge) if bill[0] == request_id] == [("finished", 20)]
    usage = await edge.cloud.usage(request_id)
    assert [(a.number, a.outcome, a.completion_tokens) for a in usage.attempts] == [(1, "finished", 20)]


async def test_a_stream_that_was_resumed_is_taken_over_with_all_that_was_said(edge: Edge) -> None:
    """What the first replica had said is known to the second, and so to whoever takes over from there."""
    edge.replica.behaviour = speak_only(2)
    first = Heard()
    before = asyncio.create_task(ask(edge, heard=first, headers=KEY, max_tokens=8))
    await until(lambda: first.text[0] == text(2), "two words are there")
    second = await edge.cloud.add_replica("r2")
    go_on = asyncio.Event()

    async def two_and_more(replica: TinyReplica, key: StreamKey, request: Request) -> None:
        await replica.accept(key)
        assert said(request, 0) == 2
        for i in (2, 3):
            await replica.emit(key, [delta(0, i)])
        await go_on.wait()
        for i in range(4, 7):
            await replica.emit(key, [delta(0, i)])
        await replica.emit(key, [delta(0, 7, finish="length")], End("finished", counts(request, 6)))

    second.behaviour = two_and_more
    await edge.cloud.remove_replica(edge.replica)
    await until(lambda: first.text[0] == text(4), "it goes on")
    async with another_gateway(edge) as other:
        heard = Heard()
        after = asyncio.create_task(ask(other, heard=heard, headers=KEY, max_tokens=8))
        await until(lambda: heard.text[0] == text(4), "all that was said is said again")
        go_on.set()
        await after
        await before
        assert (heard.text, heard.roles, heard.done) == ({0: text(8)}, {0: 1}, True)
        usage = await edge.cloud.usage(next(iter(heard.ids)))
    assert (usage.prompt_tokens, usage.completion_tokens) == (PROMPT_TOKENS, 8)
    assert [(a.number, a.replica, a.completion_tokens) for a in usage.attempts] == [(2, "r2", 6)]


async def test_scores_that_nobody_kept_are_made_again(edge: Edge) -> None:
    """Of what an earlier attempt said only text and tokens are known: with logprobs, all is said once more."""
    edge.replica.behaviour = speak_only(2)
    first = Heard()
    scored: dict[str, Any] = {"max_tokens": 8, "logprobs": True}
    before = asyncio.create_task(ask(edge, heard=first, headers=KEY, **scored))
    await until(lambda: first.text[0] == text(2), "two words are there")
    second = await edge.cloud.add_replica("r2")
    second.behaviour = speak_only(2)
    await edge.cloud.remove_replica(edge.replica)
    await until(lambda: first.text[0] == text(4), "it goes on")
    second.behaviour = speak
    heard = await ask(edge, headers=KEY, **scored)
    await before
    assert heard.text == {0: text(8)} and len(heard.tokens[0]) == 8
    assert [(key.attempt, said(request, 0)) for key, request in second.opened] == [(2, 2), (3, 0)]


# A client that goes on where it was.


async def take_part(edge: Edge, events: int, **fields: Any) -> tuple[Heard, str]:
    """The first events of a stream, whose connection then breaks; and the id of the last one."""
    heard = Heard()
    async with httpx.AsyncClient(base_url=edge.url, headers={"authorization": f"Bearer {edge.key}"}) as client:
        asking = asyncio.create_task(ask(edge, heard=heard, client=client, headers=KEY, **fields))
        await until(lambda: len(heard.events) >= events, "some of it is there")
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    last = heard.events[events - 1][0]
    assert last is not None
    rest = Heard()
    for id, data in heard.events[:events]:
        rest.take(f"id: {id}\ndata: {data}")
    return rest, last


async def test_the_rest_of_a_stream(edge: Edge) -> None:
    whole = await ask(edge, headers=KEY, n=2, max_tokens=4)
    for at, (id, _) in enumerate(whole.events[:-1], 1):
        assert id is not None
        rest = await ask(edge, headers={**KEY, "last-event-id": id}, n=2, max_tokens=4)
        assert [event[0] for event in rest.events] == [event[0] for event in whole.events[at:]]
    assert len(edge.replica.opened) == 1


async def test_a_client_whose_connection_broke_and_was_cancelled_goes_on_where_it_was(edge: Edge) -> None:
    """The gateway noticed, and stopped the work: it is done anew, with the same seed, but not sent anew. What was done
    in vain has a record of its own, so that neither passes for the other."""
    edge.replica.behaviour = speak_slowly
    first, last = await take_part(edge, 4, max_tokens=12)
    await until(lambda: edge.replica.cancelled, "it was stopped")
    edge.replica.behaviour = speak
    async with edge.client.stream(
        "POST", "/v1/chat/completions", json={**CHAT, "max_tokens": 12}, headers={**KEY, "last-event-id": last}
    ) as response:
        heard = await listen(response, first)
    assert (heard.text, heard.roles, heard.done) == ({0: text(12)}, {0: 1}, True)
    (request_id,) = heard.ids
    assert (await edge.cloud.usage(request_id)).outcome == "finished"
    records = await until(lambda: _records(edge, 2), "both records")
    (other,) = [record for record in records if record.request_id != request_id]
    assert (other.request_id.partition(".")[0], other.outcome) == (request_id, "cancelled")


async def _records(edge: Edge, count: int) -> list[Any] | None:
    records = await edge.cloud.ledger.list_usage()
    return records if len(records) == count else None


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"idempotency-key": ""}, "invalid_idempotency_key"),
        ({"idempotency-key": "x" * 300}, "invalid_idempotency_key"),
        ({"last-event-id": "chatcmpl-1:0"}, "invalid_last_event_id"),
        ({**KEY, "last-event-id": "chatcmpl-1:0"}, "invalid_last_event_id"),
    ],
)
async def test_headers_that_make_no_sense(edge: Edge, headers: dict[str, str], code: str) -> None:
    response = await edge.client.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (400, code)


# A gateway that stops.


@pytest.mark.parametrize("survivor", ["another", "nobody"])
async def test_what_a_stopping_gateway_leaves_another_one_finishes(cloud: Cloud, survivor: str) -> None:
    stop = asyncio.Event()
    limits = Limits(header_timeout=1.0, grace=0.3)
    async with running_edge(cloud, stop=stop, limits=limits) as edge:
        edge.replica.behaviour = speak_slowly
        first = Heard()
        before = asyncio.create_task(ask(edge, heard=first, headers=KEY, max_tokens=40))
        await until(lambda: first.text[0], "it runs")
        stop.set()
        await before
        assert first.error is not None and first.error["code"] == "gateway_stopping"
        assert first.error["retry_after"] > 0
        last = first.events[-2][0]
    assert last is not None
    async with cloud.gateway(limits=LIMITS) as url:
        other = Edge(cloud, edge.replica, url, edge.key)
        async with other.client:
            await until(lambda: _is_ready(other), "the other gateway is ready")
            said_before, first.error = first.text[0], None
            if survivor == "another":
                body = {**CHAT, "max_tokens": 40}
                headers = {**KEY, "last-event-id": last}
                async with other.client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
                    await listen(response, first)
                assert len(first.text[0]) > len(said_before)
                assert (first.text, first.roles, first.done) == ({0: text(40)}, {0: 1}, True)
                assert (await cloud.usage(next(iter(first.ids)))).completion_tokens == 40
            await settled(other)
            taken = [bill for bill in await bills(other) if bill[0] in first.ids]
            assert [bill[1:] for bill in taken] == ([("finished", 40)] if survivor == "another" else [])
    assert not edge.replica.cancelled


async def test_what_waits_at_a_stopping_gateway_is_over_and_accounted_for(cloud: Cloud) -> None:
    await cloud.deploy("later")
    stop = asyncio.Event()
    async with running_edge(cloud, stop=stop, limits=Limits(header_timeout=1.0, grace=0.2)) as edge:
        await until(lambda: _knows(edge, "later"), "the deployment is known")
        asking = asyncio.create_task(edge.chat_with(KEY, model="later", stream=True))
        await until(lambda: _waits(edge), "it waits")
        stop.set()
        response = await asking
        assert (response.status_code, response.json()["error"]["code"]) == (503, "gateway_stopping")
        assert int(response.headers["retry-after"]) > 0
    async with cloud.gateway():  # the ledger's worker is within a gateway
        usage = await cloud.ledger_usage()
    assert (usage.outcome, usage.attempts) == ("failed", [])
    assert usage.request_id.startswith(f"{response.headers['x-request-id']}.")


async def _knows(edge: Edge, model: str) -> bool:
    return (await edge.client.get(f"/v1/models/{model}")).status_code == 200


async def _waits(edge: Edge) -> bool:
    return await edge.metric("springtide_requests_queued", model="later") == 1
