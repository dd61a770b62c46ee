"""Waiting, losing replicas, leaving clients, deadlines: every request ends once, and is accounted for once."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from springtide.core.errors import InvalidRequest, Overloaded, ReplicaLost, WireError
from springtide.core.request import Delta, End, Request, TokenCounts
from springtide.fabric.streams import StreamKey
from springtide.gateway.dispatch import MAX_LOST
from springtide.gateway.limits import Limits
from tests.gateway.conftest import MODEL, Cloud, Edge, running_edge, until
from tests.gateway.replica import (
    PROMPT_TOKENS,
    TinyReplica,
    accept_and_wait,
    delta,
    say_two_and_wait,
    speak,
    speak_slowly,
    text,
)

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


async def read_stream(response: httpx.Response) -> tuple[str, list[str], dict[str, Any] | None]:
    """Text, comments, and the error event of a streamed chat. Whatever is neither is a failure."""
    said, comments, error = "", [], None
    done = False
    async for line in response.aiter_lines():
        if line.startswith(":"):
            comments.append(line)
        elif line == "data: [DONE]":
            done = True
        elif line:
            event = json.loads(line.removeprefix("data: "))
            error = event.get("error", error)
            for choice in event.get("choices", []):
                said += choice["delta"].get("content", "")
    assert done == (error is None)
    return said, comments, error


async def ask(edge: Edge, **fields: Any) -> tuple[str, list[str], dict[str, Any] | None]:
    async with edge.client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True, **fields}) as response:
        assert response.status_code == 200, await response.aread()
        return await read_stream(response)


# Clients that leave.


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("behaviour", [accept_and_wait, say_two_and_wait])
async def test_a_client_that_leaves_cancels_at_once(edge: Edge, streamed: bool, behaviour: Any) -> None:
    edge.replica.behaviour = behaviour
    client = httpx.AsyncClient(base_url=edge.url, headers={"authorization": f"Bearer {edge.key}"})
    task = asyncio.create_task(client.post("/v1/chat/completions", json={**CHAT, "stream": streamed}))
    await until(lambda: edge.replica.opened, "the replica has it")
    await asyncio.sleep(0.1)
    task.cancel()
    await client.aclose()
    await until(lambda: edge.replica.cancelled, "the replica is told")
    (key, _), *_ = edge.replica.opened
    assert edge.replica.cancelled == [key]
    usage = await edge.cloud.usage(key.request_id)
    assert usage.outcome == "cancelled"
    said = (PROMPT_TOKENS, 2) if behaviour is say_two_and_wait else (0, 0)
    assert (usage.prompt_tokens, usage.completion_tokens) == said
    assert [attempt.outcome for attempt in usage.attempts] == ["cancelled"]
    await until(lambda: _metric_is(edge, 0, "springtide_requests_in_flight"), "nothing is in flight")


async def _metric_is(edge: Edge, wanted: float, name: str, **labels: str) -> bool:
    return await edge.metric(name, **labels) == wanted


async def test_a_client_that_leaves_the_queue_is_forgotten(edge: Edge) -> None:
    await edge.cloud.deploy("later")
    await until(lambda: _is_known(edge, "later"), "the deployment is known")
    client = httpx.AsyncClient(base_url=edge.url, headers={"authorization": f"Bearer {edge.key}"})
    task = asyncio.create_task(client.post("/v1/chat/completions", json={**CHAT, "model": "later"}))
    await until(lambda: _metric_is(edge, 1, "springtide_requests_queued", model="later"), "it waits")
    task.cancel()
    await client.aclose()
    await until(lambda: _metric_is(edge, 0, "springtide_requests_queued"), "nobody waits")
    (usage,) = await until(lambda: edge.cloud.ledger.list_usage(), "its usage")
    assert (usage.outcome, usage.attempts) == ("cancelled", [])


async def test_a_client_that_does_not_read_is_let_go(cloud: Cloud) -> None:
    async def flood(replica: TinyReplica, key: StreamKey, request: Request) -> None:
        await replica.emit(key, [])
        while True:
            await replica.emit(key, [Delta(0, "text", b"x" * 500_000, [1], 0)])
            await asyncio.sleep(0.01)

    async with running_edge(cloud, limits=Limits(header_timeout=1.0, send_timeout=0.5)) as edge:
        edge.replica.behaviour = flood
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.port, limit=1024)
        body = json.dumps({**CHAT, "stream": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {edge.key}\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        await reader.readline()
        await until(lambda: edge.replica.cancelled, "the replica is told")
        usage = await cloud.usage(edge.replica.opened[0][0].request_id)
        assert usage.outcome == "cancelled"
        writer.transport.abort()


# Waiting.


async def test_a_request_waits_for_a_model_that_is_on_its_way(edge: Edge) -> None:
    await edge.cloud.deploy("later")
    await until(lambda: _is_known(edge, "later"), "the deployment is known")
    waiting = asyncio.create_task(ask(edge, model="later", max_tokens=3))
    await until(lambda: _metric_is(edge, 1, "springtide_requests_queued", model="later"), "it waits")
    await asyncio.sleep(0.6)
    await edge.cloud.add_replica("r2", model="later")
    said, comments, error = await waiting
    assert (said, error) == (text(3), None)
    assert comments and set(comments) == {": waiting"}


async def _is_known(edge: Edge, model: str) -> bool:
    return (await edge.client.get(f"/v1/models/{model}")).status_code == 200


async def test_waiting_in_the_replica_has_heartbeats_too_but_none_within_an_answer(edge: Edge) -> None:
    async def late(replica: TinyReplica, key: StreamKey, request: Request) -> None:
        await asyncio.sleep(0.8)
        await speak(replica, key, request, pause=0.3)

    edge.replica.behaviour = late
    async with edge.client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
        lines = [line async for line in response.aiter_lines() if line]
    first_word = next(i for i, line in enumerate(lines) if "w0" in line)
    assert ": waiting" in lines[:first_word]
    assert ": waiting" not in lines[first_word:]


async def test_a_short_wait_is_silent_so_that_an_error_has_its_status(cloud: Cloud) -> None:
    async def refuse_late(replica: TinyReplica, key: StreamKey, request: Request) -> None:
        await asyncio.sleep(0.4)
        await replica.emit(key, [], End("failed", TokenCounts(), _bad_request()))

    async with running_edge(cloud, silent_wait=30.0) as edge:
        edge.replica.behaviour = refuse_late
        response = await edge.chat(stream=True)
    assert response.status_code == 400


async def test_after_a_heartbeat_an_error_is_an_event(edge: Edge) -> None:
    async def refuse_later(replica: TinyReplica, key: StreamKey, request: Request) -> None:
        await asyncio.sleep(0.8)
        await replica.emit(key, [], End("failed", TokenCounts(), _bad_request()))

    edge.replica.behaviour = refuse_later
    said, comments, error = await ask(edge)
    assert said == "" and comments
    assert error is not None and error["message"] == "no"


async def test_an_error_after_heartbeats_says_when_to_try_again(cloud: Cloud) -> None:
    await cloud.deploy("never")
    async with running_edge(cloud, queue_timeout=1.0, silent_wait=0.2) as edge:
        await until(lambda: _is_known(edge, "never"), "the deployment is known")
        _, comments, error = await ask(edge, model="never")
    assert comments
    assert error is not None and (error["code"], error["retry_after"]) == ("no_capacity", 10.0)


def _bad_request() -> WireError:
    return InvalidRequest("no").to_wire()


async def test_nobody_takes_it_within_the_queue_timeout(cloud: Cloud) -> None:
    await cloud.deploy("never")
    async with running_edge(cloud, queue_timeout=0.5) as edge:
        await until(lambda: _is_known(edge, "never"), "the deployment is known")
        response = await edge.chat(model="never")
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) > 0
    assert "no replica of this model is up" in response.json()["error"]["message"]
    usage = await cloud.usage(response.headers["x-request-id"])
    assert (usage.outcome, usage.attempts) == ("failed", [])


async def test_the_clients_own_deadline(edge: Edge) -> None:
    edge.replica.behaviour = accept_and_wait
    headers = {"x-springtide-timeout": "0.3"}
    response = await edge.client.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"
    await until(lambda: edge.replica.cancelled, "the replica is told")


async def test_a_deadline_within_an_answer_is_an_event(edge: Edge) -> None:
    edge.replica.behaviour = say_two_and_wait
    headers = {"x-springtide-timeout": "0.5"}
    body = {**CHAT, "stream": True}
    async with edge.client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
        said, _, error = await read_stream(response)
    assert said == text(2)
    assert error is not None and error["code"] == "deadline_exceeded"


async def test_a_full_replica_lets_the_queue_in_in_order(cloud: Cloud) -> None:
    gate = asyncio.Event()

    async def gated(replica: TinyReplica, key: StreamKey, request: Request) -> None:
        await gate.wait()
        await speak(replica, key, request)

    async with running_edge(cloud) as edge:
        edge.replica.behaviour = gated
        room = 8
        tasks = []
        for i in range(room + 4):
            tasks.append(asyncio.create_task(edge.chat(seed=i)))
            await until(lambda i=i: _seen(edge, i + 1), f"request {i} has arrived")  # type: ignore[misc]
        assert len(edge.replica.opened) == room
        assert await edge.metric("springtide_requests_queued", model=MODEL) == 4
        gate.set()
        assert {response.status_code for response in await asyncio.gather(*tasks)} == {200}
        seeds = [request.sampling.seed for _, request in edge.replica.opened]
        assert seeds[room:] == list(range(room, room + 4))


async def _seen(edge: Edge, count: int) -> bool:
    queued = await edge.metric("springtide_requests_queued", model=MODEL)
    return len(edge.replica.opened) + queued >= count


# Losing replicas.


async def test_a_refusal_for_want_of_room_goes_elsewhere(edge: Edge) -> None:
    async def full(replica: TinyReplica, key: StreamKey, request: Request) -> None:
        await replica.emit(key, [], End("failed", TokenCounts(), Overloaded("full").to_wire()))

    edge.replica.behaviour = full
    other = await edge.cloud.add_replica("r2")
    await until(lambda: _ready_replicas(edge, 2), "both are known")
    responses = [await edge.chat() for _ in range(4)]
    assert {response.status_code for response in responses} == {200}
    assert len(other.opened) == 4
    refused = [key.request_id for key, _ in edge.replica.opened]
    for response in responses:
        usage = await edge.cloud.usage(response.json()["id"])
        tried_twice = usage.request_id in refused
        assert [attempt.outcome for attempt in usage.attempts] == (["failed"] if tried_twice else []) + ["finished"]
        assert usage.attempts[-1].number == len(usage.attempts)


async def _ready_replicas(edge: Edge, count: int) -> bool:
    return bool((await edge.client.get("/ready")).json()["ready_replicas"] == count)


async def test_a_replica_that_dies_before_a_word_is_replaced_unseen(edge: Edge) -> None:
    edge.replica.behaviour = accept_and_wait
    waiting = asyncio.create_task(ask(edge, max_tokens=3, seed=5))
    await until(lambda: edge.replica.opened, "the first has it")
    first = edge.replica
    second = await edge.cloud.add_replica("r2")
    await edge.cloud.remove_replica(first)
    said, _, error = await waiting
    assert (said, error) == (text(3), None)
    (key, request), *_ = second.opened
    assert key.attempt == 2
    assert (request.id, request.sampling.seed) == (first.opened[0][1].id, 5)
    usage = await edge.cloud.usage(request.id)
    assert [(a.number, a.replica, a.outcome) for a in usage.attempts] == [(1, "r1", "failed"), (2, "r2", "finished")]


async def test_a_stream_that_has_sent_only_heartbeats_starts_over(edge: Edge) -> None:
    edge.replica.behaviour = accept_and_wait
    body = {**CHAT, "stream": True, "max_tokens": 3}
    async with edge.client.stream("POST", "/v1/chat/completions", json=body) as response:  # open at the first comment
        second = await edge.cloud.add_replica("r2")
        await edge.cloud.remove_replica(edge.replica)
        said, comments, error = await read_stream(response)
    assert (said, error) == (text(3), None)
    assert comments and second.opened[0][0].attempt == 2


async def test_a_refusal_that_is_the_clients_fault_is_not_held_against_the_replica(edge: Edge) -> None:
    async def refuse(replica: TinyReplica, key: StreamKey, request: Request) -> None:
        await replica.emit(key, [], End("failed", TokenCounts(), _bad_request()))

    await edge.cloud.add_replica("far", region="elsewhere")
    await until(lambda: _ready_replicas(edge, 2), "both are known")
    edge.replica.behaviour = refuse
    assert (await edge.chat()).status_code == 400
    edge.replica.behaviour = speak
    assert (await edge.chat()).status_code == 200
    assert len(edge.replica.opened) == 2


@pytest.mark.parametrize("words", [0, 2])
@pytest.mark.parametrize(
    "end",
    [
        End("cancelled", TokenCounts()),
        End("failed", TokenCounts(), Overloaded("the engine failed").to_wire()),
        End("failed", TokenCounts(), ReplicaLost("the engine failed").to_wire()),
    ],
)
async def test_a_request_that_kills_every_replica_does_not_get_them_all(edge: Edge, words: int, end: End) -> None:
    async def lose_it(replica: TinyReplica, key: StreamKey, request: Request) -> None:
        await replica.emit(key, [])
        for i in range(words):
            await replica.emit(key, [delta(0, i)])
        await replica.emit(key, [], end)

    edge.replica.behaviour = lose_it
    response = await edge.chat()
    assert (response.status_code, response.json()["error"]["code"]) == (502, "replica_lost")
    assert len(edge.replica.opened) == MAX_LOST
    usage = await edge.cloud.usage(response.headers["x-request-id"])
    assert (usage.outcome, [attempt.outcome for attempt in usage.attempts]) == ("failed", ["failed"] * MAX_LOST)


async def test_a_restarted_fabric_costs_no_answer(edge: Edge) -> None:
    edge.replica.behaviour = speak_slowly
    asking = asyncio.create_task(ask(edge, max_tokens=40))
    await until(lambda: edge.replica.opened, "the replica has it")
    await asyncio.sleep(0.3)
    edge.cloud.nats.kill()
    edge.cloud.nats.start()
    said, _, error = await asking
    assert (said, error) == (text(40), None)
    usage = await edge.cloud.usage(edge.replica.opened[0][0].request_id)
    assert (usage.outcome, usage.completion_tokens) == ("finished", 40)
    assert await edge.metric("springtide_stream_events_total", event="replays_asked") > 0


async def test_a_choice_that_was_not_asked_for_harms_nobody_else(edge: Edge) -> None:
    async def garble(replica: TinyReplica, key: StreamKey, request: Request) -> None:
        await replica.emit(key, [])
        await replica.emit(key, [Delta(77, "text", b"x", [1], 0)])

    edge.replica.behaviour = garble
    response = await edge.chat()
    assert response.status_code == 502
    edge.replica.behaviour = speak
    assert (await edge.chat()).status_code == 200


# Stopping.


async def test_a_gateway_that_stops_lets_answers_end(cloud: Cloud) -> None:
    stop = asyncio.Event()
    async with running_edge(cloud, stop=stop) as edge:
        edge.replica.behaviour = speak_slowly
        asking = asyncio.create_task(ask(edge, max_tokens=20))
        await until(lambda: edge.replica.opened, "the replica has it")
        stop.set()
        await until(lambda: _refuses(edge), "no new connections are taken")
        said, _, error = await asking
        assert (said, error) == (text(20), None)


async def _refuses(edge: Edge) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    except ConnectionRefusedError:
        return True
    writer.close()
    return False


async def test_what_outlasts_the_grace_ends_with_an_error_and_its_usage(cloud: Cloud) -> None:
    stop = asyncio.Event()
    limits = Limits(header_timeout=1.0, grace=0.3)
    async with running_edge(cloud, stop=stop, limits=limits) as edge:
        edge.replica.behaviour = say_two_and_wait
        asking = asyncio.create_task(ask(edge))
        await until(lambda: edge.replica.opened, "the replica has it")
        await asyncio.sleep(0.2)
        stop.set()
        said, _, error = await asking
        assert said == text(2)
        assert error is not None and "stopping" in error["message"]
        request_id = edge.replica.opened[0][0].request_id
    async with cloud.gateway():  # the ledger's worker is within a gateway
        assert (await cloud.usage(request_id)).outcome == "failed"
