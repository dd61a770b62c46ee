"""Streams picked up at any position: exactly the rest comes, however the answer is cut the second time."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from springtide.core.errors import InvalidRequest
from springtide.core.request import Delta, TokenCounts, TokenLogprob
from springtide.core.wire import escape_json
from springtide.fabric.streams import Frame
from springtide.gateway.idempotency import IdempotencyKey, read_key, read_last_event
from springtide.gateway.openai import Admission, Call, parse_chat, parse_completion
from springtide.gateway.resumable import ResumableWriter
from springtide.gateway.sse import StreamWriter
from tests.gateway.hearing import Heard

KEY = IdempotencyKey("acme", "k")
COUNTS = TokenCounts(prompt=3, completion=2)
PIECES = ["Grüße", ' "quoted"\n', "\\", "日本", "", "end"]


def call(dialect: str, **fields: Any) -> Call:
    admission = Admission(id=KEY.request_id("r"), tenant="acme", created=1.0, seed=KEY.seed)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    if dialect == "chat":
        body = {"model": "m", "messages": [{"role": "user", "content": "a"}], **options, **fields}
        return parse_chat(json.dumps(body).encode(), admission)
    return parse_completion(json.dumps({"model": "m", "prompt": "a", **options, **fields}).encode(), admission)


def answer(choices: int, *, scored: bool, together: int = 1) -> list[Frame]:
    """All choices say the same; `together` of the pieces come as one."""
    frames, offset = [], 0
    for start in range(0, len(PIECES), together):
        pieces = PIECES[start : start + together]
        text = "".join(pieces)
        scores = [TokenLogprob(i, piece.encode(), -1.0, []) for i, piece in enumerate(pieces)] if scored else None
        finish: Any = "stop" if start + together >= len(PIECES) else None
        escaped = escape_json(text)
        frames.append(Frame(0, [Delta(c, "text", escaped, [1], offset, scores, finish) for c in range(choices)]))
        offset += len(text.encode())
    return frames


def written(writer: StreamWriter, frames: list[Frame]) -> list[str]:
    data = b"".join([*(writer.write([frame]) for frame in frames), writer.usage(COUNTS)])
    return data.decode().split("\n\n")[:-1]


def event_id(event: str) -> str:
    first, _, _ = event.partition("\n")
    assert first.startswith("id: ")
    return first.removeprefix("id: ")


def heard(events: list[str]) -> Heard:
    what = Heard()
    for event in events:
        what.take(event)
    return what


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.parametrize("dialect", ["chat", "completions"])
def test_from_every_position_on_comes_exactly_the_rest(dialect: str, choices: int, scored: bool) -> None:
    asked = call(dialect, n=choices, logprobs=(True if dialect == "chat" else 1) if scored else None)
    frames = answer(choices, scored=scored)
    whole = written(ResumableWriter(asked, "", None), frames)
    assert len(whole) > len(PIECES)
    for seen, event in enumerate(whole, 1):
        after = read_last_event(event_id(event), KEY, asked)
        assert written(ResumableWriter(asked, "", after), frames) == whole[seen:]


@pytest.mark.parametrize("dialect", ["chat", "completions"])
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 20))
def test_the_second_time_the_answer_may_be_cut_into_other_pieces(dialect: str, once: int, again: int, at: int) -> None:
    asked = call(dialect, n=2, logprobs=True if dialect == "chat" else 1)
    whole = written(ResumableWriter(asked, "", None), answer(2, scored=True, together=once))
    first = whole[: at % len(whole) + 1]
    after = read_last_event(event_id(first[-1]), KEY, asked)
    rest = written(ResumableWriter(asked, "", after), answer(2, scored=True, together=again))
    both, alone = heard(first + rest), heard(whole)
    for part in ("text", "roles", "ends", "tokens", "text_offsets", "usage"):
        assert getattr(both, part) == getattr(alone, part)


def test_without_ids_the_events_are_those_of_any_other_stream() -> None:
    asked = call("chat", n=2)
    frames = answer(2, scored=False)
    with_ids = written(ResumableWriter(asked, "x", None), frames)
    assert [event.partition("\n")[2] for event in with_ids] == written(StreamWriter(asked, "x"), frames)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "not of this request"),
        ("other:0,0", "not of this request"),
        ("{id}", "not of this request"),
        ("{id}:", "not one that this platform sent"),
        ("{id}:0", "not one that this platform sent"),
        ("{id}:0,0,0", "not one that this platform sent"),
        ("{id}:0,-1", "not one that this platform sent"),
        ("{id}:0,0x1", "not one that this platform sent"),
        ("{id}:0,1+", "not one that this platform sent"),
        ("{id}:0,9999999999999999999", "not one that this platform sent"),
    ],
)
def test_a_position_that_makes_no_sense(value: str, words: str) -> None:
    asked = call("chat", n=2)
    with pytest.raises(InvalidRequest, match=words) as error:
        read_last_event(value.replace("{id}", asked.request.id), KEY, asked)
    assert error.value.code == "invalid_last_event_id"


def test_a_position_needs_a_stream_and_a_key() -> None:
    asked = call("chat")
    with pytest.raises(InvalidRequest, match="needs the Idempotency-Key"):
        read_last_event(f"{asked.request.id}:0", None, asked)
    with pytest.raises(InvalidRequest, match="for streams"):
        read_last_event(f"{asked.request.id}:0", KEY, call("chat", stream=False, stream_options=None))


@pytest.mark.parametrize("key", ["", "  ", "x" * 256, "ключ", "a\x01b"])
def test_a_key_that_can_not_be_one(key: str) -> None:
    with pytest.raises(InvalidRequest, match="1 to 255 printable") as error:
        read_key(key, "acme")
    assert error.value.code == "invalid_idempotency_key"


def test_a_key_means_the_same_everywhere_but_only_to_its_tenant() -> None:
    one, again, other = IdempotencyKey("acme", "k"), IdempotencyKey("acme", "k"), IdempotencyKey("umbrella", "k")
    assert (one.request_id("r"), one.seed) == (again.request_id("r"), again.seed)
    assert one.request_id("r") != other.request_id("r") and one.seed != other.seed
    assert 0 <= one.seed < 2**63


def test_a_fingerprint_is_of_what_the_answer_says_not_of_how_it_is_delivered() -> None:
    asked = KEY.fingerprint(call("chat"))
    assert KEY.fingerprint(call("chat", stream=False, stream_options=None)) == asked
    for changed in (call("chat", temperature=0.5), call("chat", n=2), call("chat", seed=1), call("completions")):
        assert KEY.fingerprint(changed) != asked
    assert IdempotencyKey("acme", "k2").fingerprint(call("chat")) != asked
