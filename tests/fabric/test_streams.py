"""Request streams between a gateway and replicas over a real server, which is killed where it hurts most."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from springtide.core.errors import Overloaded, RequestError
from springtide.core.request import Delta, Request
from springtide.fabric import patience, stream_client, stream_hub, stream_peer, stream_server, subjects
from springtide.fabric.stream_keep import Kept
from springtide.fabric.streams import ClientStream, Frame, StreamHub, StreamKey, StreamLost
from tests.fabric.conftest import make_request, until
from tests.fabric.stage import DONE, Replica, Stage, read, token, tokens


async def test_a_request_goes_there_and_its_frames_come_back(stage: Stage) -> None:
    replica = await stage.replica()
    request = make_request(prompt="héllo", priority=3)
    stream = await stage.hub.open(request, 1, "A", "r")
    assert await stream.frames() == [Frame(0, [], None)]
    assert replica.requests == {StreamKey("request", 1): request}
    await replica.tell(stream.key, range(50), DONE)
    frames: list[Frame] = []
    while not frames or frames[-1].end is None:
        frames += await stream.frames()
    assert tokens(frames) == list(range(50))
    assert frames[-1].end == DONE
    with pytest.raises(StreamLost, match="has ended"):
        await stream.frames()
    stream.cancel()  # after the end: nothing to tell
    assert replica.cancelled == []
    assert stage.hub.counters["gaps"] == replica.server.counters["replays"] == 0


async def test_a_long_prompt_travels_in_parts(stage: Stage) -> None:
    replica = await stage.replica()
    request = make_request(prompt="x" * 3_000_000)
    stream = await stage.hub.open(request, 1, "A", "r")
    await stream.frames()
    assert replica.requests[stream.key] == request
    stream.cancel()


async def test_a_refusal_comes_as_the_first_frame(stage: Stage) -> None:
    replica = await stage.replica()

    def refuse(key: StreamKey, request: Request) -> None:
        raise Overloaded("no room", retry_after=2.0)

    replica.on_open = refuse
    stream = await stage.hub.open(make_request(), 1, "A", "r")
    [frame] = await stream.frames()
    assert frame.number == 0 and frame.end is not None and frame.end.outcome == "failed"
    assert frame.end.error is not None
    error = RequestError.from_wire(frame.end.error)
    assert (error.status, error.message, error.retry_after) == (503, "no room", 2.0)


async def test_a_replica_that_fails_to_start_a_request_says_so(stage: Stage) -> None:
    replica = await stage.replica()

    def fail(key: StreamKey, request: Request) -> None:
        raise ZeroDivisionError("oops")

    replica.on_open = fail
    [frame] = await (await stage.hub.open(make_request(), 1, "A", "r")).frames()
    assert frame.end is not None and frame.end.error is not None
    assert frame.end.error.status == 500 and "oops" in frame.end.error.message


async def test_cancel_reaches_the_replica_and_frees_everything(stage: Stage) -> None:
    replica = await stage.replica()
    stream = await stage.hub.open(make_request(), 1, "A", "r")
    await stream.frames()
    stream.cancel()
    stream.cancel()
    await until(lambda: replica.cancelled)
    assert replica.cancelled == [stream.key]
    with pytest.raises(StreamLost, match="cancelled"):
        await stream.frames()
    replica.server.emit(stream.key, [token(0)])  # the engine's last step before it heard
    await replica.server.flush()
    await until(lambda: not stage.hub._peers)  # confirmed, so it is not repeated
    assert replica.server.counters["after_end"] == 1
    assert not replica.server._kept.streams and replica.server._kept.bytes == 0


async def test_a_reader_that_waits_is_woken_by_cancel_and_by_loss(stage: Stage) -> None:
    await stage.replica()
    for end, reason in ((ClientStream.cancel, "cancelled"), (lambda s: s.lose("it is gone"), "it is gone")):
        stream = await stage.hub.open(make_request(reason.replace(" ", "")), 1, "A", "r")
        await stream.frames()
        reader = asyncio.ensure_future(stream.frames())
        await asyncio.sleep(0)
        end(stream)
        with pytest.raises(StreamLost, match=reason):
            await reader


async def test_frames_that_came_before_a_loss_are_still_delivered(stage: Stage) -> None:
    replica = await stage.replica()
    stream = await stage.hub.open(make_request(), 1, "A", "r")
    await replica.tell(stream.key, range(0))
    await until(lambda: replica.opened)
    await replica.tell(stream.key, range(3))
    await until(lambda: stage.hub.counters["frames"] == 4)
    stream.lose("gone")
    assert tokens(await stream.frames()) == [0, 1, 2]
    with pytest.raises(StreamLost, match="gone"):
        await stream.frames()


async def test_an_attempt_is_open_once(stage: Stage) -> None:
    await stage.replica()
    await stage.hub.open(make_request(), 1, "A", "r")
    with pytest.raises(ValueError, match="open already"):
        await stage.hub.open(make_request(), 1, "A", "r")


# Where messages are lost.


async def test_the_server_is_killed_in_mid_stream_and_no_frame_is_lost(stage: Stage) -> None:
    replica = await stage.replica()
    replica.on_open = lambda key, request: tasks.append(asyncio.ensure_future(speak(key)))
    tasks: list[asyncio.Future[None]] = []

    async def speak(key: StreamKey) -> None:
        replica.server.emit(key, [])
        await replica.tell(key, range(150), DONE, pause=0.005)

    streams = [await stage.hub.open(make_request(f"r{index}"), 1, "A", "r") for index in range(8)]
    readers = [asyncio.ensure_future(read(stream)) for stream in streams]
    await asyncio.sleep(0.2)
    stage.world.server.kill()
    await asyncio.sleep(0.2)
    stage.world.server.start()
    for frames in await asyncio.gather(*readers):
        assert tokens(frames) == list(range(150))
    await asyncio.gather(*tasks)
    assert replica.server.counters["replays"] > 0
    assert stage.gateway.counters["reconnects"] == stage.node.counters["reconnects"] == 1


async def test_a_request_opened_while_the_server_is_down_is_answered_when_it_is_back(stage: Stage) -> None:
    replica = await stage.replica()
    stage.world.server.kill()
    await until(lambda: not stage.gateway.connected)
    stream = await stage.hub.open(make_request(), 1, "A", "r")
    stage.world.server.start()
    assert (await stream.frames())[0] == Frame(0, [], None)
    assert replica.opened == [stream.key]
    stream.cancel()


async def test_a_lost_frame_is_replayed_and_a_repeated_one_dropped(stage: Stage) -> None:
    replica = await stage.replica()
    stream = await stage.hub.open(make_request(), 1, "A", "r")
    await stream.frames()
    replica.server.emit(stream.key, [token(0)])
    replica.server._outbox.clear()  # as if the network had dropped it
    await replica.tell(stream.key, range(1, 5))
    await until(lambda: replica.server.counters["replays"])
    await until(lambda: stream._next == 6)
    replica.server._replay(stream.key, "g", 2)
    await replica.tell(stream.key, range(5, 8), DONE)
    frames = [Frame(0, [], None)]
    while frames[-1].end is None:
        frames += await stream.frames()
    assert [frame.number for frame in frames] == list(range(len(frames)))
    assert tokens(frames) == list(range(8))
    assert stage.hub.counters["gaps"] >= 1 and stage.hub.counters["duplicates"] >= 1


async def test_silence_is_asked_about_and_a_busy_replica_answers_that_it_lives(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "SILENCE_S", 0.1)
    replica = await stage.replica()
    stream = await stage.hub.open(make_request(), 1, "A", "r")
    await stream.frames()
    await until(lambda: stage.hub.counters["probes"] >= 4)  # alive all the time, or it were lost after two
    await until(lambda: stage.hub.counters["replays_asked"])
    replica.server.emit(stream.key, [token(0)], DONE)
    replica.server._outbox.clear()  # the last frame is lost: no later one can show the gap
    assert (await stream.frames())[0].end == DONE


async def test_a_replica_that_answers_nothing_is_given_up(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "SILENCE_S", 0.1)
    replica = await stage.replica()
    stream = await stage.hub.open(make_request(), 1, "A", "r")
    await stream.frames()
    await replica.server.close()
    with pytest.raises(StreamLost, match="is silent"):
        await stream.frames()
    assert stage.hub.counters["probes"] == 2


async def test_a_replica_that_was_restarted_does_not_know_the_request(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_client, "SILENCE_S", 0.1)
    first = await stage.replica()
    stream = await stage.hub.open(make_request(), 1, "A", "r")
    await stream.frames()
    await first.server.close()
    await stage.replica()
    with pytest.raises(StreamLost, match="does not know this request"):
        await stream.frames()


async def test_an_opening_without_answer_is_sent_again_and_given_up_at_last(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_hub, "OPEN_AGAIN_S", 0.1)
    monkeypatch.setattr(stream_hub, "OPEN_PATIENCE_S", 0.6)
    monkeypatch.setattr(patience, "SILENCE_S", 5.0)
    stream = await stage.hub.open(make_request("nobody"), 1, "A", "r")
    with pytest.raises(StreamLost, match="not accepted"):
        await stream.frames()
    assert stage.hub.counters["opened_again"] >= 2


async def test_an_opening_that_arrives_twice_starts_one_request(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_hub, "OPEN_AGAIN_S", 0.1)
    replica = await stage.replica()
    replica.on_open = lambda key, request: None  # it does not answer yet
    stream = await stage.hub.open(make_request(), 1, "A", "r")
    await until(lambda: replica.server.counters["duplicates"])
    replica.server.emit(stream.key, [])
    await replica.tell(stream.key, range(3), DONE)
    assert tokens(await read(stream)) == [0, 1, 2]
    assert replica.opened == [stream.key]


async def test_a_copy_of_the_opening_does_not_revive_a_cancelled_request(stage: Stage) -> None:
    replica = await stage.replica()
    stream = await stage.hub.open(make_request(), 1, "A", "r")
    parts = stream._parts
    assert parts is not None
    await stream.frames()
    stream.cancel()
    await until(lambda: replica.cancelled)
    for part in parts:
        await stage.gateway.publish(subjects.open_subject("A", "r"), part)
    await stage.gateway.flush()
    await asyncio.sleep(0.1)
    assert replica.opened == [stream.key]


# Who may speak.


async def test_a_superseded_attempt_can_not_speak_and_is_told_to_stop(stage: Stage) -> None:
    old, new = await stage.replica("old"), await stage.replica("new")
    first = await stage.hub.open(make_request(), 1, "A", "old")
    await first.frames()
    first.lose("presence says it is gone")
    second = await stage.hub.open(make_request(), 2, "A", "new")
    await second.frames()
    old.server._kept.streams.clear()
    old.server._kept.streams[first.key] = Kept(first.key, "g")  # it slept through the cancel
    await old.tell(first.key, range(100, 105))
    await new.tell(second.key, range(5), DONE)
    frames = await second.frames()
    while frames[-1].end is None:
        frames += await second.frames()
    assert tokens(frames) == list(range(5))
    assert stage.hub.counters["stale"] == 5
    await until(lambda: not old.server._kept.streams)


async def test_another_node_or_replica_can_not_speak_into_a_stream(stage: Stage) -> None:
    """A node that guesses a request's id gets nowhere: the subject says who speaks, and only it may use it."""
    replica = await stage.replica()
    stream = await stage.hub.open(make_request(), 1, "A", "r")
    await stream.frames()
    node_b = await stage.world.node("B")
    for node, name in (("B", "r"), ("A", "other")):
        liar = Replica(node_b if node == "B" else stage.node, node, name)
        kept = liar.server._kept.streams[stream.key] = Kept(stream.key, "g")
        kept.first = 1  # numbers that would fit
        await liar.tell(stream.key, range(66, 67), DONE)
    await until(lambda: stage.hub.counters["stale"] == 4)
    await replica.tell(stream.key, range(1), DONE)
    frames = await stream.frames()
    while frames[-1].end is None:
        frames += await stream.frames()
    assert tokens(frames) == [0]


async def test_a_new_attempt_at_the_same_replica_ends_the_old_one(stage: Stage) -> None:
    replica = await stage.replica()
    first = await stage.hub.open(make_request(), 1, "A", "r")
    await first.frames()
    second = await stage.hub.open(make_request(), 2, "A", "r")
    await second.frames()
    assert replica.cancelled == [first.key]
    assert replica.server.counters["superseded"] == 1
    second.cancel()
    first.cancel()


# Who goes away.


async def test_the_streams_of_a_dead_gateway_are_cancelled(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_server, "GATEWAY_PATIENCE_S", 0.3)
    monkeypatch.setattr(stream_server, "_TICK_S", 0.05)
    monkeypatch.setattr(stream_peer, "LIFE_SIGN_S", 0.1)
    replica = await stage.replica()
    doomed = StreamHub(await stage.world.platform("doomed", prepare=False), "doomed")
    await doomed.start()
    await (lives := await stage.hub.open(make_request("lives"), 1, "A", "r")).frames()
    await (dies := await doomed.open(make_request("dies"), 1, "A", "r")).frames()
    assert doomed._task is not None
    doomed._task.cancel()  # as dead as SIGKILL, for those who listen
    await until(lambda: replica.cancelled)
    await asyncio.sleep(0.3)
    assert replica.cancelled == [dies.key]
    assert replica.server.counters["gateways_lost"] == replica.server.counters["streams_orphaned"] == 1
    lives.cancel()


async def test_a_hub_that_closes_cancels_what_is_open(stage: Stage) -> None:
    replica = await stage.replica()
    hub = StreamHub(stage.gateway, "other")
    await hub.start()
    await (stream := await hub.open(make_request(), 1, "A", "r")).frames()
    await hub.close()
    await until(lambda: replica.cancelled)
    with pytest.raises(StreamLost, match="the gateway stops"):
        await stream.frames()


# Memory.


async def test_what_was_received_is_freed_first_when_memory_is_short(stage: Stage) -> None:
    replica = await stage.replica(max_bytes=20_000)
    stream = await stage.hub.open(make_request(), 1, "A", "r")
    reader = asyncio.ensure_future(read(stream))
    await until(lambda: replica.opened)
    for start in range(0, 400, 50):
        for number in range(start, start + 50):
            replica.server.emit(stream.key, [Delta(0, "text", b"x" * 150, [number], 0)])
        await replica.server.flush()
        expected = start + 51
        await until(lambda: replica.server._kept.streams[stream.key].acked == expected)  # noqa: B023
    await replica.tell(stream.key, range(0), DONE)
    assert tokens(await reader) == list(range(400))
    assert replica.server._kept.bytes <= 20_000
    assert replica.server.counters["evicted"] == 0


async def test_the_frames_of_an_answer_that_was_received_whole_are_freed_at_once(stage: Stage) -> None:
    replica = await stage.replica()
    stream = await stage.hub.open(make_request(), 1, "A", "r")
    await until(lambda: replica.opened)
    await replica.tell(stream.key, range(3))
    frames = await stream.frames()
    assert replica.server._kept.bytes > 0
    await replica.tell(stream.key, range(0), DONE)
    while frames[-1].end is None:
        frames += await stream.frames()
    await until(lambda: replica.server._kept.bytes == 0)
    assert stream.key in replica.server._kept.streams  # a late copy of its opening must not start it again
    assert replica.server.counters["evicted"] == 0


async def test_a_stream_nobody_acknowledges_is_dropped_before_memory_runs_out(stage: Stage) -> None:
    replica = await stage.replica(max_bytes=10_000)
    stream = await stage.hub.open(make_request(), 1, "A", "r")
    await stream.frames()
    assert stage.hub._task is not None
    for number in range(200):  # within one turn of the loop: no acknowledgement can come
        replica.server.emit(stream.key, [Delta(0, "text", b"x" * 150, [number], 0)])
    assert replica.server._kept.bytes <= 10_000
    assert replica.server.counters["evicted"] == 1
    assert replica.cancelled == [stream.key]
    await replica.server.flush()
    stream.cancel()


async def test_an_ended_stream_is_kept_for_a_while_and_then_forgotten(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_server, "_TICK_S", 0.05)
    replica = await stage.replica(keep_s=0.3)
    stream = await stage.hub.open(make_request(), 1, "A", "r")
    await until(lambda: replica.opened)
    await replica.tell(stream.key, range(3), DONE)
    await read(stream)
    assert stream.key in replica.server._kept.streams
    await until(lambda: not replica.server._kept.streams)
    assert replica.server._kept.bytes == 0 and not replica.server._kept._latest and not replica.server._kept._ended


async def test_a_step_larger_than_a_message_is_split(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_server, "MAX_BATCH_BYTES", 2000)
    replica = await stage.replica()
    streams = [await stage.hub.open(make_request(f"r{index}"), 1, "A", "r") for index in range(20)]
    await until(lambda: len(replica.opened) == 20)
    for key in replica.opened:
        replica.server.emit(key, [token(number) for number in range(150)], DONE)  # one frame alone is too large
    await replica.server.flush()
    for stream in streams:
        assert tokens(await read(stream)) == list(range(150))
    assert stage.hub.counters["gaps"] == 0


# Strangers.


async def test_another_frame_version_ends_in_a_clear_loss(stage: Stage) -> None:
    await stage.replica()
    stream = await stage.hub.open(make_request(), 1, "A", "r")
    await stream.frames()
    future = msgspec.msgpack.encode([3, "r", {"shape": "of tomorrow"}])
    await stage.node.publish(subjects.frames_subject("g", "A"), future)
    with pytest.raises(StreamLost, match="speaks frame version 3, this gateway 2"):
        await stream.frames()
    assert stage.hub.counters["wrong_version"] == 1


async def test_a_gateway_of_another_version_is_told(stage: Stage) -> None:
    replica = await stage.replica()
    heard: list[bytes] = []

    async def listen(message: object) -> None:
        heard.append(message.data)  # type: ignore[attr-defined]

    await stage.gateway.subscribe(subjects.frames_subject("tomorrow", "A"), listen)
    await stage.gateway.publish(
        subjects.open_subject("A", "r"), msgspec.msgpack.encode([3, "tomorrow", "something", "else"])
    )
    await until(lambda: heard)
    assert msgspec.msgpack.decode(heard[0])[:2] == [2, "r"]
    assert replica.server.counters["wrong_version"] == 1


async def test_garbage_is_counted_and_harms_nobody(stage: Stage) -> None:
    replica = await stage.replica()
    stream = await stage.hub.open(make_request(), 1, "A", "r")
    for garbage in (b"", b"\xc1", b"hello", msgspec.msgpack.encode([1, "r"]), msgspec.msgpack.encode({"a": 1})):
        await stage.node.publish(subjects.frames_subject("g", "A"), garbage)
        await stage.gateway.publish(subjects.open_subject("A", "r"), garbage)
        await stage.gateway.publish(subjects.control_subject("A", "r"), garbage)
    await until(lambda: stage.hub.counters["garbage"] == 5 and replica.server.counters["garbage"] == 10)
    await replica.tell(stream.key, range(2), DONE)
    assert tokens(await read(stream)) == [0, 1]


async def test_an_unreadable_request_is_refused(stage: Stage) -> None:
    await stage.replica()
    stream = await stage.hub.open(make_request("never"), 1, "A", "elsewhere")
    part = msgspec.msgpack.encode([1, "g", "broken", 1, 0, 1, b"not a request"])
    now = stage.hub._now()
    broken = ClientStream(stage.hub, StreamKey("broken", 1), "A", "r", now, parts=[part])
    stage.hub._add(broken, stage.hub._peer("A", "r"), now)
    await stage.gateway.publish(subjects.open_subject("A", "r"), part)
    [frame] = await broken.frames()
    assert frame.end is not None and frame.end.error is not None and frame.end.error.status == 400
    stream.cancel()
