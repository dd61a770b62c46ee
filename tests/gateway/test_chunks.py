"""Frames become chunks and whole answers: nothing lost, nothing twice, valid JSON throughout."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from springtide.core.request import Delta, FinishReason, TokenCounts, TokenLogprob, TopLogprob
from springtide.core.wire import escape_json
from springtide.fabric.streams import Frame
from springtide.gateway.answer import WholeAnswer
from springtide.gateway.openai import Admission, Call, parse_chat, parse_completion
from springtide.gateway.sse import DONE, StreamWriter

ADMISSION = Admission(id="chatcmpl-1", tenant="t", created=1700000000.5)
COUNTS = TokenCounts(prompt=3, completion=2, cached=1)


def chat(**fields: Any) -> Call:
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], "stream": True, **fields}
    return parse_chat(json.dumps(body).encode(), ADMISSION)


def completion(**fields: Any) -> Call:
    return parse_completion(json.dumps({"model": "m", "prompt": "a", "stream": True, **fields}).encode(), ADMISSION)


def say(text: str, choice: int = 0, finish: FinishReason | None = None, scores: Any = None) -> Delta:
    return Delta(choice, "text", escape_json(text), [1], 0, scores, finish)


def events(data: bytes) -> list[dict[str, Any]]:
    """The chunks, each of which must be one whole event."""
    assert data == b"" or data.endswith(b"\n\n")
    lines = [line for line in data.split(b"\n\n") if line]
    assert all(line.startswith(b"data: ") for line in lines)
    return [json.loads(line.removeprefix(b"data: ")) for line in lines]


def test_a_choice_has_its_role_once_then_text_then_its_end() -> None:
    writer = StreamWriter(chat(), "cpu/fp32")
    chunks = events(writer.write([Frame(0, []), Frame(1, [say("Hel")])]))
    chunks += events(writer.write([Frame(2, [say('lo "you"\n\u2028', finish="stop")])]))
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": 'lo "you"\n\u2028'},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert {(c["id"], c["created"], c["object"], c["model"]) for c in chunks} == {
        ("chatcmpl-1", 1700000000, "chat.completion.chunk", "m")
    }
    assert all(chunk["system_fingerprint"].startswith("fp_") for chunk in chunks)
    assert all("usage" not in chunk for chunk in chunks)
    assert writer.chunks == 4


def test_text_that_is_held_back_makes_no_chunk() -> None:
    writer = StreamWriter(completion(), "")
    assert writer.write([Frame(1, [say("")])]) == b""
    (chunk,) = events(writer.write([Frame(2, [say("a")])]))
    assert chunk["choices"][0]["text"] == "a"
    assert chunk["system_fingerprint"] is None


def test_with_include_usage_every_chunk_has_it_and_the_last_has_nothing_else() -> None:
    writer = StreamWriter(chat(stream_options={"include_usage": True}), "")
    chunks = events(writer.write([Frame(1, [say("a", finish="length")])]))
    assert [chunk["usage"] for chunk in chunks] == [None, None, None]
    (last,) = events(writer.usage(COUNTS))
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert DONE == b"data: [DONE]\n\n"


def test_a_choice_that_failed_has_no_finish_reason() -> None:
    writer = StreamWriter(chat(), "")
    chunks = events(writer.write([Frame(1, [say("a", finish="error")])]))
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None]


HALF = b"\xe2\x82"  # of a euro sign
SCORES = [
    TokenLogprob(5, "é".encode(), -0.25, [TopLogprob(5, "é".encode(), -0.25), TopLogprob(6, HALF, float("-inf"))]),
    TokenLogprob(7, b"b", -1.5, []),
]


def test_logprobs_in_the_chat_dialect() -> None:
    writer = StreamWriter(chat(logprobs=True, top_logprobs=2), "")
    _, chunk = events(writer.write([Frame(1, [say("éb", scores=SCORES)])]))
    first, second = chunk["choices"][0]["logprobs"]["content"]
    assert first == {
        "token": "é",
        "logprob": -0.25,
        "bytes": [0xC3, 0xA9],
        "top_logprobs": [
            {"token": "é", "logprob": -0.25, "bytes": [0xC3, 0xA9]},
            {"token": "\ufffd", "logprob": -9999.0, "bytes": [0xE2, 0x82]},
        ],
    }
    assert second["top_logprobs"] == []


def test_logprobs_of_a_token_whose_text_is_held_back_still_go_out() -> None:
    writer = StreamWriter(chat(logprobs=True), "")
    _, chunk = events(writer.write([Frame(1, [say("", scores=SCORES)])]))
    assert chunk["choices"][0]["delta"] == {"content": ""}
    assert len(chunk["choices"][0]["logprobs"]["content"]) == 2


def test_logprobs_in_the_older_dialect_count_characters() -> None:
    writer = StreamWriter(completion(logprobs=2), "")
    frames = [Frame(1, [say("éb", scores=SCORES)]), Frame(2, [say("éb", scores=SCORES)])]
    first, second = (chunk["choices"][0]["logprobs"] for chunk in events(writer.write(frames)))
    assert first["tokens"] == ["é", "b"]
    assert first["token_logprobs"] == [-0.25, -1.5]
    assert first["top_logprobs"] == [{"é": -0.25, "bytes:\\xe2\\x82": -9999.0}, {"b": -1.5}]
    assert first["text_offset"] == [0, 1]
    assert second["text_offset"] == [2, 3]


@pytest.mark.parametrize("dialect", [chat, completion])
def test_a_whole_answer_holds_each_choice(dialect: Any) -> None:
    whole = WholeAnswer(dialect(n=2))
    whole.add([Frame(1, [say("a", 0), say("x", 1)]), Frame(2, [say("\t", 0, "stop"), say("", 1, "length")])])
    body = json.loads(whole.body("cpu", COUNTS))
    texts = [c["message"]["content"] if "message" in c else c["text"] for c in body["choices"]]
    assert texts == ["a\t", "x"]
    assert [c["finish_reason"] for c in body["choices"]] == ["stop", "length"]
    assert body["usage"]["total_tokens"] == 5


pieces = st.lists(st.tuples(st.integers(0, 2), st.text(max_size=6)), max_size=20)


@given(pieces, st.lists(st.integers(1, 4), max_size=20), st.booleans())
def test_however_frames_arrive_the_client_reads_the_same(
    said: list[tuple[int, str]], cuts: list[int], as_chat: bool
) -> None:
    call = chat(n=3) if as_chat else completion(n=3)
    deltas = [say(text, choice) for choice, text in said] + [say("", choice, "stop") for choice in range(3)]
    frames = []
    for cut in [*cuts, len(deltas)]:
        frames.append(Frame(len(frames), deltas[:cut]))
        deltas = deltas[cut:]
    streamed, whole = StreamWriter(call, "x"), WholeAnswer(call)
    whole.add(frames)
    chunks = events(b"".join(streamed.write([frame]) for frame in frames))
    at_once = events(StreamWriter(call, "x").write(frames))
    assert chunks == at_once
    texts = ["", "", ""]
    ends: list[Any] = [[], [], []]
    roles = [0, 0, 0]
    for choice in (chunk["choices"][0] for chunk in chunks):
        delta = choice.get("delta", {"content": choice.get("text")})
        texts[choice["index"]] += delta.get("content", "")
        roles[choice["index"]] += "role" in delta
        if choice["finish_reason"] is not None:
            ends[choice["index"]].append(choice["finish_reason"])
    expected = ["".join(text for at, text in said if at == choice) for choice in range(3)]
    body = json.loads(whole.body("x", COUNTS))
    assert texts == expected
    assert [c["message"]["content"] if as_chat else c["text"] for c in body["choices"]] == expected
    assert ends == [["stop"]] * 3
    assert roles == ([1, 1, 1] if as_chat else [0, 0, 0])
