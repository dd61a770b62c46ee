"""What must not take a gateway down, nor reach a replica: each is refused, and the next request is served."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from springtide.core.cluster import KeyRecord
from springtide.core.errors import ContextTooLong
from springtide.core.request import End, Request, TokenCounts
from springtide.fabric.desired import Registry
from springtide.fabric.streams import StreamKey
from tests.gateway.conftest import MODEL, Edge, raw, until
from tests.gateway.replica import TinyReplica, speak

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def still_serves(shared_edge: Edge) -> AsyncIterator[None]:
    """After each test the gateway answers, and holds nothing."""
    yield
    assert (await shared_edge.chat(max_tokens=1)).status_code == 200
    await until(lambda: _holds_nothing(shared_edge), "no request is held")


async def _holds_nothing(edge: Edge) -> bool:
    held = [await edge.metric(f"springtide_{name}") for name in ("requests_in_flight", "body_bytes_held")]
    return held == [0, 0]


async def post(edge: Edge, body: bytes, path: str = "/v1/chat/completions") -> httpx.Response:
    return await edge.client.post(path, content=body, headers={"content-type": "application/json"})


def request_head(edge: Edge, *headers: str) -> bytes:
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "host: x",
        f"authorization: Bearer {edge.key}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b'{"model":"tiny","messages":[]}', "messages"),
        (b'{"model":"tiny","messages":[{"role":"user","content":"a"}],"temperature":3}', "temperature"),
        (b'{"model":"tiny","messages":[{"role":"user","content":"a"}],"max_tokens":"many"}', "max_tokens"),
        (b'{"model":"tiny","messages":[{"role":"user","content":"\xff\xfe"}]}', None),
        (b'{"model":"tiny","messages":[{"role":"user","content":"\\ud800"}]}', None),
        (b"[" * 200_000, None),
        (b'{"model":"tiny","messages":[{"role":"user","content":[{"type":"file"}]}]}', "messages[0].content[0].type"),
        (b'{"model":"tiny","messages":[{"role":"user","content":"a"}],"tools":[{}]}', "tools"),
    ],
)
async def test_a_wrong_body_is_a_400_that_names_the_place(shared_edge: Edge, body: bytes, param: str | None) -> None:
    response = await post(shared_edge, body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"]
    assert error["request_id"] == response.headers["x-request-id"]
    assert shared_edge.replica.opened == []


async def test_an_unknown_model_is_a_404_that_names_the_known(shared_edge: Edge) -> None:
    response = await shared_edge.chat(model="gpt-7")
    error = response.json()["error"]
    assert response.status_code == 404
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert MODEL in error["message"]


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Basic x", "Bearer sk-wrong", "Bearer \xff"])
async def test_without_a_good_key_it_is_a_401(shared_edge: Edge, authorization: str | None) -> None:
    headers = {} if authorization is None else {"authorization": authorization.encode("latin-1")}
    async with httpx.AsyncClient(base_url=shared_edge.url) as anonymous:
        response = await anonymous.post("/v1/chat/completions", json={}, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        assert (await anonymous.get("/v1/models", headers=headers)).status_code == 401


async def test_a_revoked_key_stops_working(shared_edge: Edge) -> None:
    record, key = await shared_edge.cloud.new_key("soon gone")
    headers = {"authorization": f"Bearer {key}"}

    async def status() -> int:
        return (await shared_edge.client.get("/v1/models", headers=headers)).status_code

    await until(lambda: _equals(status, 200), "the new key works")
    revoked = await shared_edge.cloud.ledger.revoke_key(record.id)
    await Registry(shared_edge.cloud.platform, "keys", KeyRecord).put(revoked.hash, revoked)
    await until(lambda: _equals(status, 401), "the revoked key is refused")


async def _equals(ask: object, wanted: int) -> bool:
    return await ask() == wanted  # type: ignore[operator,no-any-return]


async def test_a_prompt_beyond_the_context_is_a_400_before_any_event(shared_edge: Edge) -> None:
    async def refuse(replica: TinyReplica, key: StreamKey, request: Request) -> None:
        error = ContextTooLong("the prompt has 900 tokens, the model's context is 512", param="messages")
        await replica.emit(key, [], End("failed", TokenCounts(), error.to_wire()))

    shared_edge.replica.behaviour = refuse
    response = await shared_edge.chat(stream=True)
    shared_edge.replica.behaviour = speak
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "900" in error["message"] and "512" in error["message"]
    usage = await shared_edge.cloud.usage(response.headers["x-request-id"])
    assert usage.outcome == "failed"


BIG = 20 * 1024 * 1024


async def test_a_body_that_says_it_is_too_large_is_not_read(shared_edge: Edge) -> None:
    answer = await raw(shared_edge.port, request_head(shared_edge, f"content-length: {BIG}") + b"\r\n{")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"body_too_large" in answer


async def test_a_client_that_sends_20_mb_learns_why_it_was_refused(shared_edge: Edge) -> None:
    response = await post(shared_edge, b" " * BIG)
    assert response.status_code == 413


async def test_a_chunked_body_of_20_mb_is_a_413_too(shared_edge: Edge) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(BIG // 65536):
            yield b" " * 65536

    response = await shared_edge.client.post("/v1/chat/completions", content=pieces())
    assert response.status_code == 413


async def test_a_body_without_end_is_cut_not_swallowed(shared_edge: Edge) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 65536
            yield b" " * 65536

    with contextlib.suppress(httpx.TransportError):  # cut while it still sends
        await shared_edge.client.post("/v1/chat/completions", content=endless())
    assert sent < 4 * BIG


async def test_a_body_that_never_ends_is_given_up(shared_edge: Edge) -> None:
    answer = await raw(shared_edge.port, request_head(shared_edge, "content-length: 100") + b'\r\n{"model"')
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in answer.lower()


async def test_a_header_that_never_ends_is_cut(shared_edge: Edge) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", shared_edge.port)
    writer.write(request_head(shared_edge))

    async def trickle() -> None:
        while True:
            writer.write(b"x-more: y\r\n")
            await asyncio.sleep(0.1)

    task = asyncio.create_task(trickle())
    assert b"200" not in await asyncio.wait_for(reader.read(), 20)
    task.cancel()
    writer.close()


async def test_headers_of_a_megabyte_are_refused(shared_edge: Edge) -> None:
    answer = await raw(shared_edge.port, request_head(shared_edge, "x-large: " + "y" * 2**20) + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 431 ")


async def test_what_is_no_http_is_refused(shared_edge: Edge) -> None:
    assert (await raw(shared_edge.port, b"\x16\x03\x01 hello\r\n\r\n")).startswith(b"HTTP/1.1 400 ")


async def test_200_connections_that_send_nothing_stop_nobody(shared_edge: Edge) -> None:
    silent = [await asyncio.open_connection("127.0.0.1", shared_edge.port) for _ in range(200)]
    async with httpx.AsyncClient(base_url=shared_edge.url) as newcomer:
        answer = await newcomer.get("/v1/models", headers={"authorization": f"Bearer {shared_edge.key}"})
        assert answer.status_code == 200
    ends = await asyncio.wait_for(asyncio.gather(*(reader.read() for reader, _ in silent)), 20)
    assert not any(b"200" in end for end in ends)  # and after a while each was closed
    for _, writer in silent:
        writer.close()


async def test_a_client_that_leaves_within_its_body_is_forgotten(shared_edge: Edge) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", shared_edge.port)
    writer.write(request_head(shared_edge, "content-length: 100") + b"\r\n{")
    await writer.drain()
    writer.transport.abort()


@pytest.mark.parametrize("timeout", ["soon", "-1", "0", "nan", "inf"])
async def test_a_deadline_that_is_none(shared_edge: Edge, timeout: str) -> None:
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "a"}]}).encode()
    response = await shared_edge.client.post(
        "/v1/chat/completions", content=body, headers={"x-springtide-timeout": timeout}
    )
    assert response.status_code == 400
    assert "x-springtide-timeout" in response.json()["error"]["message"]
