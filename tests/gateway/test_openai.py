"""OpenAI's request bodies, understood or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from springtide.core.errors import InvalidRequest
from springtide.core.request import Message
from springtide.gateway.fields import MAX_NAMED_FIELDS, REFUSED, WITHOUT_EFFECT, name_ignored
from springtide.gateway.openai import Admission, Call, parse_chat, parse_completion

ADMISSION = Admission(id="chatcmpl-1", tenant="acme", created=100.0, deadline=160.0)
HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> Call:
    return parse_chat(json.dumps({"model": "m", "messages": HELLO, **fields}).encode(), ADMISSION)


def completion(**fields: Any) -> Call:
    return parse_completion(json.dumps({"model": "m", "prompt": "hello", **fields}).encode(), ADMISSION)


def with_fields(fields: bytes) -> bytes:
    return b'{"model":"m","messages":[{"role":"user","content":"a"}],' + fields + b"}"


def refusal(parse: Any, body: bytes) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(body, ADMISSION)
    return caught.value


def test_a_small_chat_becomes_a_request_with_a_seed_of_ours() -> None:
    call = chat()
    request = call.request
    assert (request.id, request.tenant, request.created, request.deadline) == ("chatcmpl-1", "acme", 100.0, 160.0)
    assert request.messages == (Message(role="user", content="hello"),)
    assert request.sampling.seed is not None
    assert request.sampling.max_tokens is None
    assert request.cache_salt == "acme"
    assert not call.stream


def test_every_sampling_field_arrives() -> None:
    sampling = chat(
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=-0.3,
        logit_bias={"5": -100, "7": 2.5},
        seed=-3,
        n=2,
        max_tokens=9,
        min_tokens=2,
        ignore_eos=True,
        stop="\n",
        stop_token_ids=[1, 2],
        logprobs=True,
        top_logprobs=4,
    ).request.sampling
    assert sampling.logit_bias == {5: -100.0, 7: 2.5}
    assert (sampling.seed, sampling.n, sampling.max_tokens, sampling.min_tokens) == (-3, 2, 9, 2)
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (40, 0.1, 1.1)
    assert (sampling.stop, sampling.stop_token_ids, sampling.logprobs) == (("\n",), (1, 2), 4)
    assert sampling.ignore_eos


def test_nulls_are_as_good_as_absent() -> None:
    nulls = dict.fromkeys(["temperature", "max_tokens", "stop", "seed", "n", "logprobs", "tools", "response_format"])
    call = chat(**nulls, stream=None, stream_options=None)
    assert call.request.sampling.temperature == 1.0
    assert call.ignored == []


def test_the_newer_name_of_max_tokens_wins() -> None:
    assert chat(max_tokens=5, max_completion_tokens=7).request.sampling.max_tokens == 7


def test_minus_one_turns_top_k_off_as_elsewhere() -> None:
    assert chat(top_k=-1).request.sampling.top_k == 0


def test_logprobs_of_zero_alternatives_are_still_logprobs() -> None:
    assert chat(logprobs=True).request.sampling.logprobs == 0
    assert completion(logprobs=0).request.sampling.logprobs == 0
    assert chat(logprobs=False).request.sampling.logprobs is None


def test_text_parts_are_joined_and_the_developer_is_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = chat(messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}])
    assert call.request.messages == (Message(role="system", content="be brief"), Message(role="user", content="a\nb"))


def test_tool_messages_travel_as_they_are() -> None:
    calls = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    call = chat(
        messages=[
            *HELLO,
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "content": "4", "tool_call_id": "c1"},
        ]
    )
    assert call.request.messages is not None
    assert call.request.messages[1].tool_calls == calls
    assert call.request.messages[2].tool_call_id == "c1"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_prompts_come_in_four_shapes(prompt: Any, prompts: Any) -> None:
    assert completion(prompt=prompt).request.prompts == prompts


def test_the_older_endpoint_says_sixteen_tokens_and_may_echo() -> None:
    call = completion(echo=True)
    assert call.request.sampling.max_tokens == 16
    assert call.request.echo


@pytest.mark.parametrize(
    ("prompt", "words"),
    [([], "empty"), (["a", 1], "mixes"), ([[]], "empty list"), ([-1], "range"), ([[1], [2**31]], "range")],
)
def test_prompts_that_are_none(prompt: Any, words: str) -> None:
    error = refusal(parse_completion, json.dumps({"model": "m", "prompt": prompt}).encode())
    assert words in error.message
    assert error.param == "prompt"


def test_echo_with_logprobs_is_refused() -> None:
    assert refusal(parse_completion, b'{"model":"m","prompt":"a","echo":true,"logprobs":1}').param == "echo"


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_what_we_cannot_do_is_refused_by_name(field: str) -> None:
    asks = {"tool_choice": "required", "function_call": {"name": "f"}, "best_of": 2, "modalities": ["text", "audio"]}
    body = {"model": "m", "messages": HELLO, field: asks.get(field, {"type": "json_object"})}
    error = refusal(parse_chat, json.dumps(body).encode())
    assert (error.param, error.code) == (field, "unsupported_parameter")


def test_values_that_ask_for_nothing_are_not_refused() -> None:
    call = chat(
        tools=[], tool_choice="none", response_format={"type": "text"}, modalities=["text"], best_of=1, suffix=""
    )
    assert call.ignored == []


def test_bookkeeping_is_accepted_and_the_unknown_is_named() -> None:
    known = dict.fromkeys(WITHOUT_EFFECT, "x")
    call = chat(
        **known,
        wobble=1,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        messages=[{"role": "user", "content": "a", "weight": 1, "refusal": None}],
    )
    assert call.ignored == ["wobble", "stream_options.continuous_usage_stats", "messages[].weight"]
    assert call.include_usage


def test_names_that_go_into_a_header_are_plain_and_bounded() -> None:
    assert name_ignored(["a", "b", "a"]) == "a, b"
    nasty = name_ignored(["x\r\nset-cookie: a=b", "ü", "k" * 1000])
    assert "\r" not in nasty and "\n" not in nasty and ":" not in nasty and nasty.isascii()
    assert len(nasty) < 200
    many = name_ignored(f"f{i}" for i in range(1000))
    assert many.endswith(f"and {1000 - MAX_NAMED_FIELDS} more")


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b"", None, "not JSON"),
        (b"{", None, "not JSON"),
        (b"[]", None, "Expected `object`"),
        (b"{}", "model", "missing required field"),
        (b'{"model":"m"}', "messages", "missing required field"),
        (b'{"model":3,"messages":[]}', "model", "Expected `str`"),
        (b'{"model":"m","messages":[]}', "messages", "empty"),
        (b'{"model":"m","messages":"hi"}', "messages", "Expected `array`"),
        (b'{"model":"m","messages":[{"role":"user"}]}', "messages[0].content", "missing"),
        (b'{"model":"m","messages":[{"role":"elf","content":"a"}]}', "messages[0].role", "known roles"),
        (b'{"model":"m","messages":[{"role":"user","content":[{"type":"text"}]}]}', "messages[0].content[0].text", ""),
        (b'{"model":"m","messages":[{"role":"user","content":[7]}]}', "messages[0].content[0]", "Expected `object`"),
        (with_fields(b'"temperature":"hot"'), "temperature", "Expected"),
        (with_fields(b'"temperature":2.1'), "temperature", "[0.0, 2.0]"),
        (with_fields(b'"temperature":NaN'), None, "not JSON"),
        (with_fields(b'"max_tokens":0'), "max_tokens", "[1,"),
        (with_fields(b'"max_tokens":1.5'), "max_tokens", "Expected `int"),
        (with_fields(b'"n":0'), "n", "[1,"),
        (with_fields(b'"n":1000'), "n", "[1,"),
        (with_fields(b'"seed":99999999999999999999'), "seed", "seed is"),
        (with_fields(b'"logit_bias":{"x":1}'), "logit_bias", "Expected `int`"),
        (with_fields(b'"logit_bias":{"99999999999999999999":1}'), "logit_bias", "no model has"),
        (with_fields(b'"stop_token_ids":[99999999999999999999]'), "stop_token_ids", "no model has"),
        (
            b'{"model":"m","messages":[{"role":"assistant","tool_calls":[{"x":99999999999999999999}]}]}',
            "messages[0].tool_calls",
            "64 bits",
        ),
        (with_fields(b'"top_logprobs":2'), "top_logprobs", "needs logprobs"),
        (with_fields(b'"stream_options":{}'), "stream_options", "stream is"),
        (b'{"model":"m","messages":[{"role":"user","content":"\xff"}]}', None, "not UTF-8"),
        (with_fields(b'"x":"\xff"'), None, "not UTF-8"),
        (b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}]}', None, "needs its other half"),
        (b'{"model":"m","messages":[{"role":"user","content":"\\udc00 x"}]}', None, "needs its other half"),
        (b'{"model":"m","messages":[],"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, "nested too deeply"),
    ],
)
def test_bodies_that_are_wrong_say_where(body: bytes, param: str | None, words: str) -> None:
    error = refusal(parse_chat, body)
    assert words in str(error)
    assert error.param == param


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url"])
def test_parts_other_than_text_are_refused_by_their_type(kind: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": kind}]}]}
    error = refusal(parse_chat, json.dumps(body).encode())
    assert kind in error.message
    assert error.param == "messages[0].content[1].type"


def test_a_paired_surrogate_is_a_character() -> None:
    call = parse_chat(b'{"model":"m","messages":[{"role":"user","content":"\\ud83c\\udf0a"}]}', ADMISSION)
    assert call.request.messages == (Message(role="user", content="🌊"),)


def test_prompts_times_n_is_bounded() -> None:
    with pytest.raises(InvalidRequest, match="at most 128"):
        completion(prompt=["a"] * 65, n=2)


def test_a_client_can_split_the_cache_further_but_not_leave_its_tenant() -> None:
    assert chat(cache_salt="x").request.cache_salt == "acme/x"
    assert chat(cache_salt="x", cache_scope="tenant").request.cache_salt == "acme/x"
    assert chat(cache_salt=None, cache_scope=None).request.cache_salt == "acme"


def test_a_client_can_share_what_is_cached_with_all_who_want_it_or_with_nobody() -> None:
    assert chat(cache_scope="shared").request.cache_salt == ""
    assert chat(cache_scope="none").request.cache_salt is None
    assert completion(cache_scope="shared").request.cache_salt == ""


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"cache_scope": "planet"}, "cache_scope", "known ones are tenant, shared, none"),
        ({"cache_scope": "shared", "cache_salt": "x"}, "cache_salt", "with cache_scope shared"),
        ({"cache_scope": "none", "cache_salt": "x"}, "cache_salt", "with cache_scope none"),
        ({"cache_scope": 3}, "cache_scope", "str"),
    ],
)
def test_a_cache_scope_that_makes_no_sense_is_refused(fields: dict[str, Any], param: str, words: str) -> None:
    refused = refusal(parse_chat, json.dumps({"model": "m", "messages": HELLO, **fields}).encode())
    assert refused.param == param and words in str(refused)
