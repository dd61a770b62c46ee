"""What happened to a request is remembered, and bounded; who would wait in vain hears it at once."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from springtide.core.errors import Overloaded
from springtide.core.request import End, Request, TokenCounts
from springtide.fabric.streams import StreamKey
from springtide.gateway.trace import KEEP_S, MAX_EVENTS, TraceBook
from tests.gateway.conftest import Cloud, Edge, running_edge, until
from tests.gateway.hearing import Heard, ask
from tests.gateway.replica import TinyReplica, speak, speak_only, text


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_story_is_kept_for_an_hour() -> None:
    clock = Clock()
    book = TraceBook(clock=clock)
    book.begin("a").note("admitted", "m")
    clock.now = KEEP_S - 1
    book.begin("b")
    assert [event.what for event in book.events("a")[0]] == ["admitted"]
    clock.now = KEEP_S + 1
    book.begin("c")
    assert book.events("a") == ([], 0) and len(book) == 2


def test_a_request_that_comes_again_goes_on_with_its_story() -> None:
    book = TraceBook()
    book.begin("a").note("admitted")
    book.begin("a").note("admitted")
    assert len(book.events("a")[0]) == 2 and len(book) == 1


def test_of_a_very_long_story_the_middle_is_left_out() -> None:
    trace = TraceBook().begin("a")
    for i in range(MAX_EVENTS + 100):
        trace.note("refused", str(i))
    assert len(trace.events) == MAX_EVENTS and trace.left_out == 100
    assert (trace.events[0].why, trace.events[-1].why) == ("0", str(MAX_EVENTS + 99))


@pytest.mark.parametrize("bound", [{"max_traces": 10}, {"max_bytes": 10_000}])
def test_the_oldest_go_when_there_are_too_many(bound: dict[str, int]) -> None:
    book = TraceBook(**bound)  # type: ignore[arg-type]
    first = book.begin("0")
    for i in range(1, 100):
        book.begin(str(i)).note("admitted", "x" * 300)
    assert 0 < len(book) <= 10
    assert book.events("99")[0] and not book.events("0")[0]
    first.note("ended")  # its request still ran
    assert not book.events("0")[0]


def test_what_is_forgotten_leaves_nothing_behind() -> None:
    book = TraceBook(max_traces=3)
    for i in range(50):
        trace = book.begin(str(i))
        trace.note("admitted", "x" * i)
    expected = sum(trace.size for trace in book._traces.values())
    assert book._bytes == expected


# How long one more would wait.


async def test_who_would_wait_beyond_his_deadline_hears_it_at_once(cloud: Cloud) -> None:
    """A tenant's own backlog moves at ten a second: the one whose second is shorter than it takes is told when to
    come back, and one with more time waits."""

    async def one_at_a_time(replica: TinyReplica, key: StreamKey, request: Request) -> None:
        await asyncio.sleep(0.1)
        await speak(replica, key, request)

    async with running_edge(cloud) as edge:
        edge.replica.behaviour = one_at_a_time
        waiting = [asyncio.create_task(edge.chat(max_tokens=1)) for _ in range(150)]
        await until(lambda: len(edge.replica.opened) > 40, "some have waited and started")
        refused = await edge.chat_with({"x-springtide-timeout": "0.01"})
        answers = await asyncio.gather(*waiting)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "backlog_too_long")
    assert int(refused.headers["retry-after"]) >= 1
    assert {answer.status_code for answer in answers} == {200}


# Explaining.


async def explain(edge: Edge, request_id: str, *, status: int = 200) -> dict[str, object]:
    directory = edge.cloud.directory
    url, token = (directory / "admin.url").read_text(), (directory / "admin.token").read_text().strip()
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {token}"}) as client:
        response = await client.get(f"{url}/requests/{request_id}/explain")
    assert response.status_code == status, response.text
    return response.json()  # type: ignore[no-any-return]


async def test_the_story_of_a_request_over_two_gateways(edge: Edge) -> None:
    """It was refused, then lost, then taken over by another gateway; asked of either, all of it is told."""
    key = {"idempotency-key": "k"}

    async def refuse_once(replica: TinyReplica, key: StreamKey, request: Request) -> None:
        if len(replica.opened) == 1:
            await replica.emit(key, [], End("failed", TokenCounts(), Overloaded("not now").to_wire()))
        else:
            await speak_only(2)(replica, key, request)

    edge.replica.behaviour = refuse_once
    heard = Heard()
    asking = asyncio.create_task(ask(edge, heard=heard, headers=key, max_tokens=4))
    await until(lambda: heard.text[0] == text(2), "two words are there")
    second = await edge.cloud.add_replica("r2")
    second.behaviour = speak_only(1)
    await edge.cloud.remove_replica(edge.replica)
    await until(lambda: heard.text[0] == text(3), "it goes on")
    async with edge.cloud.gateway() as url:
        other = Edge(edge.cloud, second, url, edge.key)
        async with other.client:
            await until(lambda: _is_ready(other), "the other gateway is ready")
            again = Heard()
            after = asyncio.create_task(ask(other, heard=again, headers=key, max_tokens=4))
            await until(lambda: again.text[0] == text(3), "it was taken over")
            await asking
            (request_id,) = heard.ids
            story = await explain(edge, request_id)
            after.cancel()
            await asyncio.gather(after, return_exceptions=True)
    events = story["events"]
    assert isinstance(events, list)
    whats = [event["what"] for event in events]
    for what in ("admitted", "routed", "refused", "accepted", "first token", "lost", "resumed", "taken over"):
        assert what in whats, what
    assert len({event["gateway"] for event in events}) == 2
    assert [event["at"] for event in events] == sorted(event["at"] for event in events)
    (refused,) = [event for event in events if event["what"] == "refused"]
    assert (refused["attempt"], refused["replica"], refused["why"]) == (1, "r1", "not now")
    (resumed,) = [event for event in events if event["what"] == "resumed"]
    assert (resumed["attempt"], resumed["replica"]) == (3, "r2") and "2 tokens" in resumed["why"]
    assert "least loaded" in next(event for event in events if event["what"] == "routed")["why"]
    assert story["silent_gateways"] == [] and story["usage"] is None


async def test_a_finished_request_is_explained_with_its_usage(edge: Edge) -> None:
    answer = (await edge.chat(max_tokens=3)).json()
    await edge.cloud.usage(answer["id"])
    story = await explain(edge, answer["id"])
    usage = story["usage"]
    assert isinstance(usage, dict) and usage["completion_tokens"] == 3 and len(usage["attempts"]) == 1
    assert "hi" not in json.dumps(story).split(), "no content"


async def test_nothing_is_known_of_what_never_was(edge: Edge) -> None:
    answer = await explain(edge, "chatcmpl-none", status=404)
    assert "kept for an hour" in json.dumps(answer)


async def _is_ready(edge: Edge) -> bool:
    return (await edge.client.get("/ready")).status_code == 200
