"""What a client gets over real HTTP, through a real fabric, from a replica of a few lines."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.gateway.conftest import MODEL, Edge
from tests.gateway.replica import PROMPT_TOKENS, text

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELLO = [{"role": "user", "content": "hi"}]


async def stream(edge: Edge, path: str, **fields: Any) -> tuple[Any, list[str]]:
    """The response's head, and its events."""
    body = {"model": MODEL, "stream": True, **fields}
    async with edge.client.stream("POST", path, json=body) as response:
        whole = "".join([part async for part in response.aiter_text()])
    return response, [event for event in whole.split("\n\n") if event]


async def test_a_chat_in_one_piece(shared_edge: Edge) -> None:
    response = await shared_edge.chat(max_tokens=3)
    answer = response.json()
    assert response.status_code == 200
    assert response.headers["x-request-id"] == answer["id"]
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": text(3), "refusal": None}
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": 3,
        "total_tokens": PROMPT_TOKENS + 3,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


async def test_a_streamed_chat(shared_edge: Edge) -> None:
    response, events = await stream(
        shared_edge, "/v1/chat/completions", messages=HELLO, max_tokens=4, stream_options={"include_usage": True}
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert {chunk["id"] for chunk in chunks} == {response.headers["x-request-id"]}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]) == text(4)
    assert chunks[-1]["usage"]["completion_tokens"] == 4


async def test_many_prompts_and_choices(shared_edge: Edge) -> None:
    answer = (await shared_edge.complete(prompt=[[1, 2], [3]], n=2, max_tokens=2)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert {choice["text"] for choice in answer["choices"]} == {text(2)}
    (_, request), *_ = shared_edge.replica.opened
    assert request.prompts == ((1, 2), (3,))


async def test_a_streamed_completion(shared_edge: Edge) -> None:
    _, events = await stream(shared_edge, "/v1/completions", prompt="x", max_tokens=3)
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text(3)
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


async def test_each_request_leaves_one_usage_record(shared_edge: Edge) -> None:
    answer = (await shared_edge.chat(max_tokens=3)).json()
    usage = await shared_edge.cloud.usage(answer["id"])
    assert (usage.outcome, usage.model) == ("finished", MODEL)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (PROMPT_TOKENS, 3, 3)
    (attempt,) = usage.attempts
    assert (attempt.number, attempt.node, attempt.replica) == (1, "node-of-r1", "r1")
    assert (attempt.outcome, attempt.completion_tokens) == ("finished", 3)


async def test_fields_without_effect_are_named_in_a_header(shared_edge: Edge) -> None:
    response = await shared_edge.chat(wobble=1, user="me")
    assert response.headers["x-springtide-ignored"] == "wobble"
    head, _ = await stream(shared_edge, "/v1/chat/completions", messages=HELLO, wobble=1)
    assert head.headers["x-springtide-ignored"] == "wobble"


async def test_the_seed_of_a_request_is_drawn_once_or_the_clients(shared_edge: Edge) -> None:
    for seed in (None, None, 7):
        await shared_edge.chat(seed=seed)
    drawn = [request.sampling.seed for _, request in shared_edge.replica.opened]
    assert None not in drawn
    assert drawn[0] != drawn[1]
    assert drawn[2] == 7


async def test_models(shared_edge: Edge) -> None:
    listed = (await shared_edge.client.get("/v1/models")).json()
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == (MODEL, "model", 512)
    assert (await shared_edge.client.get(f"/v1/models/{MODEL}")).json() == model
    assert (await shared_edge.client.get("/v1/models/none")).status_code == 404


async def test_probes(shared_edge: Edge) -> None:
    health = await shared_edge.client.get("/health", headers={"authorization": ""})
    assert (health.status_code, health.json()) == (200, {"status": "ok"})
    ready = await shared_edge.client.get("/ready")
    assert ready.json() == {"status": "ready", "ready_replicas": 1}
    head = await shared_edge.client.head("/health")
    assert (head.status_code, head.content) == (200, b"")


async def test_metrics_count_requests_and_show_replicas(shared_edge: Edge) -> None:
    before = await shared_edge.metric("springtide_requests_total", model=MODEL, outcome="finished")
    await shared_edge.chat()
    assert await shared_edge.metric("springtide_requests_total", model=MODEL, outcome="finished") == before + 1
    assert await shared_edge.metric("springtide_ttft_seconds_count", model=MODEL) > 0
    assert await shared_edge.metric("springtide_replica_blocks_free", replica="r1") == 90
    assert await shared_edge.metric("springtide_replica_blocks_total", replica="r1") == 100
    assert await shared_edge.metric("springtide_requests_in_flight") == 0
    assert await shared_edge.metric("springtide_body_bytes_held") == 0


async def test_nothing_there(shared_edge: Edge) -> None:
    response = await shared_edge.client.get("/v1/unicorns")
    assert response.status_code == 404
    error = response.json()["error"]
    assert error["code"] == "unknown_url"
    assert error["request_id"] == response.headers["x-request-id"]


async def test_the_wrong_method(shared_edge: Edge) -> None:
    response = await shared_edge.client.get("/v1/chat/completions")
    assert response.status_code == 405
    assert "takes POST" in response.json()["error"]["message"]
    assert response.headers["allow"] == "POST"


async def test_a_web_page_may_call_us(shared_edge: Edge) -> None:
    preflight = await shared_edge.client.options(
        "/v1/chat/completions",
        headers={
            "origin": "https://page.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type,x-stainless-os",
        },
    )
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == "*"
    assert "x-stainless-os" in preflight.headers["access-control-allow-headers"]
    answer = await shared_edge.client.get("/v1/models", headers={"origin": "https://page.example"})
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "x-request-id" in answer.headers["access-control-expose-headers"]


async def test_a_connection_serves_many_requests(shared_edge: Edge) -> None:
    for _ in range(20):
        assert (await shared_edge.chat(max_tokens=1)).status_code == 200
    assert len(shared_edge.replica.opened) == 20
