"""The clients that people use, unchanged, against a real gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

import openai
import pytest
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

from tests.gateway.conftest import MODEL, Edge
from tests.gateway.replica import PROMPT_TOKENS, say_two_and_wait, text

pytestmark = pytest.mark.asyncio(loop_scope="module")

T = TypeVar("T")


def async_client(edge: Edge) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{edge.url}/v1", api_key=edge.key, max_retries=0)


async def with_sync_client(edge: Edge, use: Callable[[openai.OpenAI], T]) -> T:
    """Run blocking code beside the gateway, which lives in this loop."""

    def run() -> T:
        with openai.OpenAI(base_url=f"{edge.url}/v1", api_key=edge.key, max_retries=0) as client:
            return use(client)

    return await asyncio.to_thread(run)


async def test_openai_async(shared_edge: Edge) -> None:
    async with async_client(shared_edge) as client:
        answer = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            max_completion_tokens=4,
            logprobs=True,
            top_logprobs=2,
            n=2,
            extra_body={"top_k": 5, "ignore_eos": True},
        )
    assert [choice.message.content for choice in answer.choices] == [text(4)] * 2
    assert answer.usage is not None and answer.usage.prompt_tokens == PROMPT_TOKENS
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 4


async def test_openai_async_streaming(shared_edge: Edge) -> None:
    said, usage = "", None
    async with async_client(shared_edge) as client:
        chunks = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=4,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in chunks:
            usage = chunk.usage or usage
            said += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert said == text(4)
    assert usage is not None and usage.completion_tokens == 4


async def test_openai_sync(shared_edge: Edge) -> None:
    def use(client: openai.OpenAI) -> tuple[str, str, list[str]]:
        messages = [{"role": "user", "content": "hi"}]
        whole = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=3)  # type: ignore[call-overload]
        parts = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=3, stream=True)  # type: ignore[call-overload]
        said = "".join(part.choices[0].delta.content or "" for part in parts)
        return whole.choices[0].message.content, said, [model.id for model in client.models.list()]

    assert await with_sync_client(shared_edge, use) == (text(3), text(3), [MODEL])


async def test_openai_completions(shared_edge: Edge) -> None:
    async with async_client(shared_edge) as client:
        answer = await client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=2, logprobs=1)
        assert [choice.text for choice in answer.choices] == [text(2)] * 2
        parts = await client.completions.create(model=MODEL, prompt="a", max_tokens=2, stream=True)
        assert "".join([part.choices[0].text async for part in parts]) == text(2)


async def test_openai_raises_its_own_errors(shared_edge: Edge) -> None:
    async with async_client(shared_edge) as client:
        messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="none", messages=messages)
        assert missing.value.code == "model_not_found"
        assert missing.value.request_id
        with pytest.raises(openai.BadRequestError, match="temperature"):
            await client.chat.completions.create(model=MODEL, messages=messages, temperature=3)
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="sk-wrong").models.list()


async def test_openai_raises_on_an_error_within_a_stream(shared_edge: Edge) -> None:
    shared_edge.replica.behaviour = say_two_and_wait
    async with async_client(shared_edge) as client:
        chunks = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            extra_headers={"x-springtide-timeout": "0.4"},
        )
        said = ""
        with pytest.raises(openai.APIError, match="deadline"):
            async for chunk in chunks:
                said += chunk.choices[0].delta.content or ""
    assert said == text(2)


async def test_langchain(shared_edge: Edge) -> None:
    chat = ChatOpenAI(base_url=f"{shared_edge.url}/v1", api_key=shared_edge.key, model=MODEL, max_tokens=3)  # type: ignore[arg-type,call-arg]
    answer = await chat.ainvoke([HumanMessage("hi")])
    assert answer.content == text(3)
    assert answer.usage_metadata is not None and answer.usage_metadata["output_tokens"] == 3
    assert "".join([str(part.content) async for part in chat.astream("hi")]) == text(3)
    assert (await asyncio.to_thread(chat.invoke, "hi")).content == text(3)
