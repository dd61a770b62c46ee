"""The lab judges others, so it is judged itself: it sees what is lost, doubled or foreign, and its faults repeat."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import replace

import pytest

from springtide.cli.lab.cable import Cable, Weather
from springtide.cli.lab.chaos import Asked, check_bills
from springtide.cli.lab.client import Client, Heard, Used
from springtide.cli.lab.questions import Question, Questions, Verdict, compare, judge
from springtide.core.request import Attempt, Usage

QUESTION = Question(dialect="chat", prompt="why", stream=True, max_tokens=20, seed=7, n=2)


def answer(question: Question, **changes: object) -> Heard:
    """The right one, heard word by word."""
    heard = Heard(sent=time.time(), ids={"chatcmpl-1"}, done=True)
    owed = 0
    for choice in range(question.n):
        expected = question.expected(choice)
        heard.texts[choice] = [expected.text[:10], expected.text[10:]]
        heard.roles[choice] = 1
        heard.finishes[choice] = [expected.reason]
        heard.scored[choice] = list(expected.scored)
        owed += expected.tokens
    heard.usages = [Used(len(question.prompt_ids), owed)]
    for name, value in changes.items():
        setattr(heard, name, value)
    return heard


def test_the_right_answer_is_right() -> None:
    questions = Questions(3, (10, 40))
    for question in (QUESTION, *(questions.next() for _ in range(50))):
        if question.dialect == "chat":
            assert judge(question, answer(question)).right


def test_a_stop_string_ends_the_text_where_it_begins() -> None:
    words = QUESTION.words(0)
    stopped = replace(QUESTION, stop=words[5][2:] + words[6][:2]).expected(0)
    assert stopped == ("".join(words[:5]) + words[5][:2], 7, "stop", [])
    assert stopped.text + words[5][2:] + words[6][:2] in "".join(words)


def test_a_lost_a_doubled_and_a_foreign_word_are_told_apart() -> None:
    words = QUESTION.words(0)
    right = "".join(words)

    def without(at: int) -> str:
        return "".join(words[:at] + words[at + 1 :])

    assert compare(without(4), right) == (1, 0, 0)
    assert compare("".join([*words[:5], words[4], *words[5:]]), right) == (0, 1, 0)
    assert compare("".join([*words[:5], " zzz", *words[5:]]), right) == (0, 0, 1)
    assert compare(right[:-2], right) == (1, 0, 1)
    assert compare("".join([words[1], words[0], *words[2:]]), right) == (0, 0, 1)  # none is missing, but it is wrong


@pytest.mark.parametrize(
    "wrong",
    [
        {"ids": {"a", "b"}},
        {"usages": []},
        {"usages": [Used(1, 40), Used(1, 40)]},
        {"done": False, "error": "replica_lost"},
    ],
)
def test_what_is_wrong_with_the_rest_of_an_answer_is_seen(wrong: dict[str, object]) -> None:
    verdict = judge(QUESTION, answer(QUESTION, **wrong))
    assert verdict.faults and not verdict.lost


def test_a_second_role_and_a_second_finish_are_seen() -> None:
    twice = answer(QUESTION)
    twice.roles[0] += 1
    twice.finishes[1] *= 2
    assert len(judge(QUESTION, twice).faults) == 2


def record(request_id: str, completion: int, *attempts: int, outcome: str = "finished") -> Usage:
    did = [
        Attempt(number=n, node="a", replica="r", started=0, ended=1, outcome="failed", completion_tokens=tokens)
        for n, tokens in enumerate(attempts, 1)
    ]
    prompt = len(QUESTION.prompt_ids)
    return Usage(
        request_id=request_id, tenant="t", key_id="k", model="lab", gateway="g", created=0, finished=1,
        outcome=outcome, prompt_tokens=prompt, completion_tokens=completion, attempts=did,
    )  # fmt: skip


def test_bills_are_held_against_what_was_received() -> None:
    asked = [Asked(QUESTION, answer(QUESTION), Verdict())]
    right = check_bills(asked, [record("chatcmpl-1", 40, 15, 25)])
    assert not (right.missing or right.double or right.wrong or right.unknown)
    assert check_bills(asked, []).missing == ["chatcmpl-1"]
    assert check_bills(asked, [record("chatcmpl-1", 39, 39)]).wrong
    assert check_bills(asked, [record("chatcmpl-1", 40, 15, 24)]).wrong  # somebody is not paid for what he did
    left_behind = record("chatcmpl-1.0f", 12, 12, outcome="cancelled")
    assert check_bills(asked, [record("chatcmpl-1", 40, 40), left_behind]).double == ["chatcmpl-1"]
    assert check_bills([], [record("chatcmpl-9", 3, 3)]).unknown == ["chatcmpl-9"]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(100):
        writer.write(data)
    writer.close()


async def test_a_cable_slows_stops_and_breaks_what_passes_through_it() -> None:
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    cable = Cable(server.sockets[0].getsockname()[1], random.Random(1))
    await cable.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", cable.port)
    cable.weather = Weather(delay=0.1, jitter=0.01)
    sent = time.monotonic()
    writer.write(b"one")
    assert await reader.readexactly(3) == b"one" and time.monotonic() - sent > 0.15
    cable.freeze(new_ones_too=False)
    writer.write(b"two")
    heard = asyncio.ensure_future(reader.readexactly(3))
    await asyncio.sleep(0.3)
    assert not heard.done()
    other_reader, other_writer = await asyncio.open_connection("127.0.0.1", cable.port)
    other_writer.write(b"new")
    assert await other_reader.readexactly(3) == b"new"
    other_writer.transport.abort()
    cable.thaw()
    assert await heard == b"two"  # nothing of it was lost
    cable.cut()
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await reader.readexactly(1)
    writer.transport.abort()
    await cable.stop()
    server.close()


async def test_a_client_goes_on_after_the_last_event_that_it_heard() -> None:
    """The first connection breaks in the middle of an event; the second is asked for what comes after the last whole
    one."""
    heads: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
        await reader.readexactly(2)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        events = [b'id: x:%d\ndata: {"id":"x","choices":[{"index":0,"text":" %d"}]}\n\n' % (n, n) for n in range(3)]
        first = len(heads) == 1
        data = events[0] + events[1][:20] if first else b"".join(events[1:]) + b"data: [DONE]\n\n"
        writer.write(b"%x\r\n%b\r\n" % (len(data), data) + (b"" if first else b"0\r\n\r\n"))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    heard = await Client("key").ask_until_done([port, port], "/", b"{}", "mine", patience=10)
    assert heard.done and heard.texts[0] == [" 0", " 1", " 2"] and heard.connections == 2
    assert all("idempotency-key: mine" in head for head in heads)
    assert "last-event-id" not in heads[0] and "last-event-id: x:0\r\n" in heads[1]
    server.close()
