"""A gateway dies, and another one has the rest of its answers; and what gateways and replicas say about whose turn it
is."""

from __future__ import annotations

import asyncio

import pytest

from springtide.core.request import ChoiceOutput
from springtide.fabric import stream_peer, stream_server
from springtide.fabric.streams import Backlog, Flow, Found, StreamHub, StreamKey, StreamLost, Turn
from tests.fabric.conftest import make_request, until
from tests.fabric.stage import DONE, Stage, read, tokens

HERE = [("A", "r")]
SAID = (ChoiceOutput(0, [7, 8], "so far"),)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that gives up gateways early."""
    monkeypatch.setattr(stream_server, "_TICK_S", 0.05)
    monkeypatch.setattr(stream_server, "GATEWAY_PATIENCE_S", 0.5)
    monkeypatch.setattr(stream_peer, "LIFE_SIGN_S", 0.1)


def kill(hub: StreamHub) -> None:
    """As dead as SIGKILL, for those who listen."""
    assert hub._task is not None
    hub._task.cancel()


async def test_another_gateway_has_the_whole_answer_from_its_first_frame(stage: Stage) -> None:
    replica = await stage.replica()
    mine = await stage.hub.open(make_request(fingerprint="hash", outputs=SAID), 3, "A", "r")
    await until(lambda: replica.opened)
    await replica.tell(mine.key, range(20))
    await until(lambda: replica.server._kept.streams[mine.key].acked == 21)
    other = await stage.another_hub("other")
    found = await other.find("request", [*HERE, ("A", "elsewhere")])
    assert found == Found("A", "r", "request", 3, "hash", SAID)
    theirs = await other.take_over(found)
    await until(lambda: mine._done)
    assert len(tokens(await mine.frames())) == 20  # what had come is there
    with pytest.raises(StreamLost) as lost:
        await mine.frames()
    assert lost.value.taken_over
    mine.cancel()  # too late to harm
    await replica.tell(mine.key, range(20, 30), DONE)
    assert tokens(await read(theirs)) == list(range(30))
    assert replica.cancelled == [] and replica.server.counters["taken_over"] == 1
    assert stage.hub.counters["taken_away"] == other.counters["taken_over"] == 1


async def test_frames_under_way_to_the_former_gateway_do_not_cancel_the_stream(stage: Stage) -> None:
    replica = await stage.replica()
    mine = await stage.hub.open(make_request(fingerprint="hash"), 1, "A", "r")
    await mine.frames()
    other = await stage.another_hub("other")
    found = await other.find("request", HERE)
    assert found is not None
    theirs = await other.take_over(found)
    await until(lambda: mine._done)
    replica.server._outgoing("g").frames.extend(replica.server._kept.streams[mine.key].frames)
    await replica.server.flush()
    await until(lambda: stage.hub.counters["stale"])
    await until(lambda: not stage.hub._peers)  # it said that nobody listens there, and was told that this is known
    await replica.tell(mine.key, range(5), DONE)
    assert tokens(await read(theirs)) == list(range(5))


async def test_an_answer_that_has_ended_can_be_had_again(stage: Stage) -> None:
    replica = await stage.replica()
    mine = await stage.hub.open(make_request(fingerprint="hash"), 1, "A", "r")
    await until(lambda: replica.opened)
    await replica.tell(mine.key, range(9), DONE)
    await read(mine)
    await until(lambda: replica.server._kept.streams[mine.key].acked == 11)
    for hub in (stage.hub, await stage.another_hub("other")):  # the same one may ask for it as well
        found = await hub.find("request", HERE)
        assert found is not None
        assert tokens(await read(await hub.take_over(found))) == list(range(9))


async def test_the_latest_attempt_is_the_one_that_is_found(stage: Stage) -> None:
    old, new = await stage.replica("old"), await stage.replica("new")
    for attempt, name in ((1, "old"), (2, "new")):
        await (await stage.hub.open(make_request(fingerprint="hash"), attempt, "A", name)).frames()
    other = await stage.another_hub("other")
    found = await other.find("request", [("A", "old"), ("A", "new")])
    assert found is not None and (found.replica, found.attempt) == ("new", 2)
    assert old.opened and new.opened


async def test_what_nobody_knows_is_not_found_and_that_is_known_at_once(stage: Stage) -> None:
    replica = await stage.replica()
    stream = await stage.hub.open(make_request("plain"), 1, "A", "r")
    await stream.frames()
    async with asyncio.timeout(20):  # both long before their own time is up
        assert await stage.hub.find("never", HERE, timeout=3600) is None
        assert (
            await stage.hub.find("plain", HERE, timeout=3600) is None
        )  # without a fingerprint nobody else may have it
    assert await stage.hub.find("never", [("A", "nobody")], timeout=0.05) is None
    assert await stage.hub.find("never", []) is None
    assert not stage.hub._searches
    nothing = await stage.hub.take_over(Found("A", "r", "never", 1, ""))
    with pytest.raises(StreamLost, match="does not know") as lost:
        await nothing.frames()
    assert not lost.value.taken_over
    assert replica.cancelled == []


async def test_what_is_no_longer_whole_is_not_found(stage: Stage) -> None:
    replica = await stage.replica(max_bytes=4000)
    stream = await stage.hub.open(make_request(fingerprint="hash"), 1, "A", "r")
    await until(lambda: replica.opened)
    await replica.tell(stream.key, range(30))
    await until(lambda: replica.server._kept.streams[stream.key].acked == 31)
    await replica.tell(stream.key, range(30, 200), pause=0.001)
    assert replica.server._kept.streams[stream.key].first > 0
    assert await stage.hub.find("request", HERE) is None
    await replica.tell(stream.key, range(0), DONE)
    assert tokens(await read(stream)) == list(range(200))  # who read it all along misses nothing


async def test_streams_with_a_fingerprint_outlive_their_gateway_and_others_do_not(
    stage: Stage, impatient: None
) -> None:
    replica = await stage.replica()
    doomed = await stage.another_hub("doomed")
    for id, fingerprint in (("kept", "hash"), ("plain", "")):
        await (await doomed.open(make_request(id, fingerprint=fingerprint), 1, "A", "r")).frames()
    kill(doomed)
    await until(lambda: replica.gateways_lost == ["doomed"])
    assert replica.cancelled == [StreamKey("plain", 1)]
    await replica.tell(StreamKey("kept", 1), range(5), DONE)
    found = await stage.hub.find("kept", HERE)
    assert found is not None
    assert tokens(await read(await stage.hub.take_over(found))) == list(range(5))


async def test_an_orphan_that_nobody_takes_is_ended(
    stage: Stage, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_server, "ORPHAN_S", 0.3)
    replica = await stage.replica()
    doomed = await stage.another_hub("doomed")
    await (await doomed.open(make_request(fingerprint="hash"), 1, "A", "r")).frames()
    kill(doomed)
    await until(lambda: replica.cancelled)
    assert replica.gateways_lost == ["doomed"]
    assert replica.server._kept.bytes == 0


async def test_a_gateway_that_was_only_silent_goes_on(stage: Stage, impatient: None) -> None:
    replica = await stage.replica()
    stream = await stage.hub.open(make_request(fingerprint="hash"), 1, "A", "r")
    await stream.frames()
    replica.server._lose_gateway("g", replica.server._now())
    await replica.tell(stream.key, range(3))  # told to nobody
    await until(lambda: replica.server._kept.streams[stream.key].orphaned_at is None)
    await replica.tell(stream.key, range(3, 5), DONE)
    frames = await stream.frames()
    while frames[-1].end is None:
        frames += await stream.frames()
    assert tokens(frames) == list(range(5))


async def test_a_stream_that_is_let_go_runs_on_until_somebody_wants_it(stage: Stage) -> None:
    replica = await stage.replica()
    stream = await stage.hub.open(make_request(fingerprint="hash"), 1, "A", "r")
    await stream.frames()
    stream.let_go()
    with pytest.raises(StreamLost, match="let go"):
        await stream.frames()
    await replica.tell(stream.key, range(3))  # some of it before the replica hears
    await until(lambda: replica.server._kept.streams[stream.key].orphaned_at is not None)
    await replica.tell(stream.key, range(3, 6), DONE)
    await until(lambda: not stage.hub._peers)
    found = await stage.hub.find("request", HERE)
    assert found is not None
    assert tokens(await read(await stage.hub.take_over(found))) == list(range(6))
    assert replica.cancelled == []


async def test_letting_go_of_what_nobody_can_have_is_a_cancel(stage: Stage) -> None:
    replica = await stage.replica()
    stream = await stage.hub.open(make_request(), 1, "A", "r")
    await stream.frames()
    stream.let_go()
    await until(lambda: replica.cancelled == [stream.key])


async def test_a_gateway_that_stops_in_order_leaves_its_answers_to_others(stage: Stage) -> None:
    replica = await stage.replica()
    leaving = await stage.another_hub("leaving")
    stream = await leaving.open(make_request(fingerprint="hash"), 1, "A", "r")
    await stream.frames()
    await leaving.close()
    await until(lambda: replica.server._kept.streams[stream.key].orphaned_at is not None)
    found = await stage.hub.find("request", HERE)
    assert found is not None
    taken = await stage.hub.take_over(found)
    await replica.tell(stream.key, range(4), DONE)
    assert tokens(await read(taken)) == list(range(4))
    assert replica.cancelled == []


async def test_what_is_taken_over_only_to_be_ended_is_ended(stage: Stage) -> None:
    replica = await stage.replica()
    await (await stage.hub.open(make_request(fingerprint="hash"), 1, "A", "r")).frames()
    other = await stage.another_hub("other")
    found = await other.find("request", HERE)
    assert found is not None
    (await other.take_over(found)).cancel()
    await until(lambda: replica.cancelled)


async def test_a_take_over_survives_a_restart_of_the_server(stage: Stage) -> None:
    replica = await stage.replica()
    stream = await stage.hub.open(make_request(fingerprint="hash"), 1, "A", "r")
    await stream.frames()
    other = await stage.another_hub("other")
    found = await other.find("request", HERE)
    assert found is not None
    stage.world.server.kill()
    taken = await other.take_over(found)
    stage.world.server.start()
    await replica.tell(stream.key, range(4), DONE)
    assert tokens(await read(taken)) == list(range(4))


# Turns.


def backlog(waiting: int, served: float = 0.0) -> Backlog:
    return Backlog("t", "standard", 2.0, waiting, served)


async def test_a_backlog_is_told_at_once_and_again_until_it_is_empty(stage: Stage, impatient: None) -> None:
    replica = await stage.replica()
    stage.hub.advertise("A", "r", [backlog(3)])
    await until(lambda: replica.backlogs.get("g") == [backlog(3)])
    replica.backlogs.clear()
    await until(lambda: replica.backlogs.get("g") == [backlog(3)])
    stage.hub.advertise("A", "r", [backlog(1, served=7.5)])
    await until(lambda: replica.backlogs.get("g") == [backlog(1, served=7.5)])
    stage.hub.advertise("A", "r", [])
    await until(lambda: replica.backlogs.get("g") == [])
    await until(lambda: not stage.hub._peers)
    assert backlog(1).flow == Flow("t", "standard")


async def test_a_turn_comes_and_the_request_goes_on_it(stage: Stage) -> None:
    replica = await stage.replica()
    turns: list[tuple[str, str, list[Turn]]] = []
    stage.hub.on_turns(lambda *news: turns.append(news))
    stage.hub.advertise("A", "r", [backlog(1)])
    await until(lambda: replica.backlogs)
    granted = [Turn(41, "t", "standard"), Turn(42, "t", "batch")]
    replica.server.grant("g", granted)
    await replica.server.flush()
    await until(lambda: turns)
    assert turns == [("A", "r", granted)]
    await (await stage.hub.open(make_request(), 1, "A", "r", turn=41)).frames()
    assert replica.turns == {StreamKey("request", 1): ("g", 41)}
    stage.hub.decline("A", "r", [42])
    await until(lambda: replica.declined == [("g", [42])])
    assert granted[1].flow == Flow("t", "batch")


async def test_a_gateway_that_only_waits_is_missed_when_it_dies(stage: Stage, impatient: None) -> None:
    replica = await stage.replica()
    doomed = await stage.another_hub("doomed")
    doomed.advertise("A", "r", [backlog(3)])
    await until(lambda: replica.backlogs)
    kill(doomed)
    await until(lambda: replica.gateways_lost == ["doomed"])


async def test_a_gateway_that_stops_in_order_has_no_backlog(stage: Stage) -> None:
    replica = await stage.replica()
    leaving = await stage.another_hub("leaving")
    leaving.advertise("A", "r", [backlog(3)])
    await until(lambda: replica.backlogs.get("leaving"))
    await leaving.close()
    await until(lambda: replica.backlogs["leaving"] == [])


async def test_news_that_can_not_be_used_harm_nobody(stage: Stage) -> None:
    replica = await stage.replica()

    def fail(*news: object) -> None:
        raise ZeroDivisionError

    stage.hub.on_turns(fail)
    replica.server._on_backlog = fail
    stage.hub.advertise("A", "r", [backlog(1)])
    stream = await stage.hub.open(make_request(), 1, "A", "r")
    await stream.frames()
    replica.server.grant("g", [Turn(1, "t", "standard")])
    await replica.tell(stream.key, range(3), DONE)
    frames = await stream.frames()
    while frames[-1].end is None:
        frames += await stream.frames()
    assert tokens(frames) == list(range(3))
