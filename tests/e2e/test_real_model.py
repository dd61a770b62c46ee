"""The default model through the real path: client, gateway, fabric, replica, engine, and back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError, OpenAI

from tests.e2e.conftest import Platform, events, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.model]
MODEL = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    one = Platform(tmp_path_factory.mktemp("real") / "data", "-o", "max_num_seqs=16", "-o", "num_blocks=600")
    try:
        yield one.ready(300)
    finally:
        one.stop()


@pytest.fixture
def openai(real: Platform) -> Iterator[OpenAI]:
    with OpenAI(base_url=real.url + "/v1", api_key=real.key, timeout=120, max_retries=0) as client:
        yield client


def test_english_text_streams(openai: OpenAI) -> None:
    stream = openai.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_completion_tokens=40, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert "Paris" in text
    assert [c.choices[0].delta.role for c in chunks if c.choices and c.choices[0].delta.role] == ["assistant"]
    assert chunks[-1].usage is not None and chunks[-1].usage.prompt_tokens > 10
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]


async def test_the_async_client_gets_the_same_text(real: Platform, openai: OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": QUESTION, "seed": 5, "max_completion_tokens": 30}
    whole = openai.chat.completions.create(**options).choices[0].message.content
    async with AsyncOpenAI(base_url=real.url + "/v1", api_key=real.key, timeout=120) as client:
        pieces = [
            chunk.choices[0].delta.content or ""
            async for chunk in await client.chat.completions.create(**options, stream=True)
            if chunk.choices
        ]
    assert "".join(pieces) == whole


def test_what_is_cached_of_a_chat_is_told_and_billed_and_stays_within_the_tenant(real: Platform) -> None:
    ours, other = (real.run("keys", "create", "--tenant", name).strip() for name in ("ours", "other"))
    chat: list[Any] = [{"role": "user", "content": "Tell me something about the tides. Two sentences are enough."}]

    def ask(key: str, **options: Any) -> Any:
        with OpenAI(base_url=real.url + "/v1", api_key=key, timeout=120, max_retries=0) as client:
            return client.chat.completions.create(
                model=MODEL, messages=chat, temperature=0, max_completion_tokens=40, extra_body=options
            )

    def cached(answer: Any) -> int:
        return answer.usage.prompt_tokens_details.cached_tokens

    first = ask(ours)
    again, foreign = ask(ours), ask(other)
    assert cached(first) == 0 and cached(again) >= first.usage.prompt_tokens - 16 and cached(foreign) == 0
    assert first.choices[0].message == again.choices[0].message == foreign.choices[0].message
    chat += [first.choices[0].message, {"role": "user", "content": "And of the moon?"}]
    turn = ask(ours)
    assert cached(turn) > first.usage.prompt_tokens  # some of the answer, too
    assert cached(ask(ours, cache_scope="none")) == 0
    mine, theirs = (cached(ask(key, cache_scope="shared")) for key in (ours, other))
    assert mine == 0 and theirs >= turn.usage.prompt_tokens - 16

    def record() -> Any:
        rows = json.loads(real.run("usage", "--json", "--by", "request"))["rows"]
        return next((row for row in rows if row["request_id"] == turn.id), None)

    usage = wait_until(record, "the usage record", 10)
    assert usage["cached_tokens"] == cached(turn)
    assert [attempt["cached_tokens"] for attempt in usage["attempts"]] == [cached(turn)]


def test_langchain(real: Platform) -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model=MODEL, base_url=real.url + "/v1", api_key=real.key, temperature=0, max_tokens=30)
    assert "Paris" in model.invoke("What is the capital of France?").content
    assert "Paris" in "".join(str(piece.content) for piece in model.stream("What is the capital of France?"))


def test_choices_differ_and_logprobs_add_up(openai: OpenAI) -> None:
    answer = openai.chat.completions.create(
        model=MODEL, messages=QUESTION, n=3, seed=11, max_completion_tokens=12, logprobs=True, top_logprobs=3
    )
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2] and len(set(texts)) > 1
    for choice in answer.choices:
        assert choice.logprobs is not None and choice.logprobs.content
        tokens = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
        assert tokens.decode(errors="replace").startswith(choice.message.content or "")
        assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 3 for entry in choice.logprobs.content)


def test_a_stop_string_ends_the_text_before_it(openai: OpenAI) -> None:
    prompt = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,"
    free = openai.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=20).choices[0]
    assert "15" in free.text
    stopped = openai.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=20, stop=["15"]).choices[
        0
    ]
    assert stopped.text == free.text[: free.text.index("15")] and stopped.finish_reason == "stop"


def test_control_tokens_typed_as_text_stay_text(openai: OpenAI) -> None:
    plain = openai.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "x"}], max_completion_tokens=1
    )
    typed = openai.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "<|im_end|><|im_start|>"}], max_completion_tokens=1
    )
    assert plain.usage is not None and typed.usage is not None
    # As control tokens they would be two; as text they are many.
    assert typed.usage.prompt_tokens >= plain.usage.prompt_tokens + 6


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(openai: OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(BadRequestError) as caught:
            openai.completions.create(model=MODEL, prompt="tide " * 9000, stream=stream)
        assert caught.value.code == "context_length_exceeded"
        assert "8192" in str(caught.value) and re.search(r"\b90\d\d\b|\b\d{5}\b", str(caught.value))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(real: Platform, stream: bool) -> None:
    free, total = "springtide_replica_blocks_free", real.metric("springtide_replica_blocks_total")
    wait_until(lambda: real.metric(free) == total, "every page is free", 30)
    request = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 4000, "ignore_eos": True, "stream": stream}
    with real.client() as client:
        if stream:
            with client.stream("POST", "/v1/completions", json=request) as response:
                next(events(response))
                wait_until(lambda: real.metric(free) < total, "pages are taken", 10)
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=request, timeout=3)
    wait_until(lambda: real.metric(free) == total, "the pages are free again", 10)
    assert real.metric("springtide_replica_running") == 0


def test_sixteen_at_once_give_what_each_gives_alone(real: Platform) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def one(seed: int) -> str:
        request = {"model": MODEL, "prompt": "The sea", "max_tokens": 24, "seed": seed, "temperature": 0.9}
        with real.client() as client:
            return client.post("/v1/completions", json=request).json()["choices"][0]["text"]

    alone = [one(seed) for seed in range(4)]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(one, [*range(4), *range(100, 112)]))
    assert together[:4] == alone
