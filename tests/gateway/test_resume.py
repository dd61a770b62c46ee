"""Answers outlive the replicas that give them: what one had begun another goes on with, and nobody can tell."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from springtide.core.errors import ContextTooLong, ReplicaLost
from springtide.core.request import Delta, End, Request, TokenCounts, Usage
from springtide.core.wire import escape_json
from springtide.fabric.streams import StreamKey
from springtide.gateway.dispatch import MAX_LOST, PROGRESS
from tests.gateway.conftest import MODEL, Cloud, Edge, running_edge, until
from tests.gateway.hearing import CHAT, Heard, ask
from tests.gateway.replica import (
    PROMPT_TOKENS,
    Behaviour,
    TinyReplica,
    counts,
    delta,
    said,
    speak,
    speak_only,
    text,
    word,
)


async def cut(edge: Edge, behaviour: Behaviour, after: Behaviour = speak, **second: Any) -> TinyReplica:
    """When the first replica has fallen silent a second one comes, and the first goes. Returns the second."""
    first = edge.replica
    await until(lambda: first.opened, "the first has it")
    await asyncio.sleep(0.2)
    other = await edge.cloud.add_replica("r2", **second)
    other.behaviour = after
    await edge.cloud.remove_replica(first)
    return other


async def ask_and_cut(
    edge: Edge, behaviour: Behaviour, after: Behaviour = speak, **fields: Any
) -> tuple[Heard, TinyReplica]:
    edge.replica.behaviour = behaviour
    asking = asyncio.create_task(ask(edge, **fields))
    other = await cut(edge, behaviour, after)
    return await asking, other


async def usage_of(edge: Edge) -> Usage:
    """Of the first request."""
    return await edge.cloud.usage(edge.replica.opened[0][0].request_id)


def did(usage: Usage) -> list[tuple[int, str, str, int, int]]:
    return [(a.number, a.replica, a.outcome, a.prompt_tokens, a.completion_tokens) for a in usage.attempts]


async def test_a_stream_goes_on_elsewhere_as_if_nothing_had_happened(edge: Edge) -> None:
    heard, other = await ask_and_cut(edge, speak_only(2), max_tokens=6, stream_options={"include_usage": True})
    assert (heard.text, heard.roles, heard.ends) == ({0: text(6)}, {0: 1}, {0: ["length"]})
    assert heard.done and len(heard.ids) == 1 and len(set(heard.fingerprints)) == 1
    ((key, request),) = other.opened
    assert key.attempt == 2
    (output,) = request.outputs
    assert (output.choice, output.token_ids, output.text, output.finish_reason) == (0, [0, 1], text(2), None)
    assert heard.usage is not None
    assert (heard.usage["prompt_tokens"], heard.usage["completion_tokens"]) == (PROMPT_TOKENS, 6)
    usage = await usage_of(edge)
    assert (usage.outcome, usage.prompt_tokens, usage.completion_tokens) == ("finished", PROMPT_TOKENS, 6)
    assert did(usage) == [(1, "r1", "failed", PROMPT_TOKENS, 2), (2, "r2", "finished", PROMPT_TOKENS, 4)]


async def test_a_choice_that_has_ended_is_not_run_again(edge: Edge) -> None:
    async def end_the_first(replica: TinyReplica, key: StreamKey, request: Request) -> None:
        await replica.accept(key)
        await replica.emit(key, [delta(0, 0), delta(1, 0)])
        await replica.emit(key, [delta(0, 1, finish="stop")])
        await asyncio.Event().wait()

    async def go_on_with_the_second(replica: TinyReplica, key: StreamKey, request: Request) -> None:
        await replica.accept(key)
        await replica.emit(key, [delta(1, 1)])
        await replica.emit(key, [delta(1, 2, finish="length")], End("finished", counts(request, 2)))

    heard, other = await ask_and_cut(edge, end_the_first, go_on_with_the_second, n=2)
    assert heard.text == {0: text(2), 1: text(3)}
    assert (heard.roles, heard.ends) == ({0: 1, 1: 1}, {0: ["stop"], 1: ["length"]})
    outputs = other.opened[0][1].outputs
    assert [(o.choice, o.token_ids, o.finish_reason) for o in outputs] == [(0, [0, 1], "stop"), (1, [0], None)]
    assert (await usage_of(edge)).completion_tokens == 5


async def test_what_was_held_back_and_scored_is_neither_lost_nor_doubled(edge: Edge) -> None:
    """The second token's text was held back (it may yet be a stop string) when the replica died: its score went out,
    its text did not. The next replica knows both tokens, and sends the text with the third."""

    def held_back() -> Delta:
        whole = delta(0, 1, scored=True)
        return Delta(0, "text", b"", whole.token_ids, whole.offset, whole.logprobs)

    async def hold_back(replica: TinyReplica, key: StreamKey, request: Request) -> None:
        await replica.accept(key)
        await replica.emit(key, [delta(0, 0, scored=True)])
        await replica.emit(key, [held_back()])
        await asyncio.Event().wait()

    async def let_go(replica: TinyReplica, key: StreamKey, request: Request) -> None:
        await replica.accept(key)
        third = delta(0, 2, scored=True, finish="stop")
        released = escape_json(word(1) + word(2))
        deltas = [Delta(0, "text", released, third.token_ids, len(text(1)), third.logprobs, "stop")]
        await replica.emit(key, deltas, End("finished", counts(request, 1)))

    heard, other = await ask_and_cut(edge, hold_back, let_go, path="/v1/completions", logprobs=1, stop=["w1 x"])
    assert heard.text == {0: text(3)}
    assert heard.tokens == {0: [word(0), word(1), word(2)]}
    assert heard.text_offsets == {0: [0, len(text(1)), len(text(2))]}
    (output,) = other.opened[0][1].outputs
    assert (output.token_ids, output.text) == ([0, 1], text(1))
    assert (await usage_of(edge)).completion_tokens == 3


async def test_an_echo_that_was_cut_in_the_middle(edge: Edge) -> None:
    prompt = "Grüße, \n"

    def echo(start: int, stop: int) -> Delta:
        piece = prompt[start:stop]
        return Delta(0, "text", escape_json(piece), [], len(prompt[:start].encode()))

    async def echo_half(replica: TinyReplica, key: StreamKey, request: Request) -> None:
        await replica.accept(key)
        await replica.emit(key, [echo(0, 4)])
        await asyncio.Event().wait()

    async def echo_the_rest(replica: TinyReplica, key: StreamKey, request: Request) -> None:
        await replica.accept(key)
        end = Delta(0, "text", b"w", [7], len(prompt.encode()), None, "stop")
        await replica.emit(key, [echo(4, 8), end], End("finished", counts(request, 1)))

    heard, other = await ask_and_cut(edge, echo_half, echo_the_rest, path="/v1/completions", prompt=prompt, echo=True)
    assert heard.text == {0: prompt + "w"}
    (output,) = other.opened[0][1].outputs
    assert (output.token_ids, output.text) == ([], prompt[:4])


@pytest.mark.parametrize("says_so", [True, False])
async def test_an_answer_in_one_piece_goes_on_too(edge: Edge, says_so: bool) -> None:
    """Whether the replica just goes, or its host still says that it failed."""
    wanted = {"seed": 5, "n": 2, "logprobs": True, "top_logprobs": 2}
    undisturbed = (await edge.chat(**wanted)).json()
    edge.replica.behaviour = speak_only(2)
    asking = asyncio.create_task(edge.chat(**wanted))
    await until(lambda: len(edge.replica.opened) == 2, "the replica has it")
    await asyncio.sleep(0.2)
    await edge.cloud.add_replica("r2")
    key = edge.replica.opened[1][0]
    if says_so:
        edge.replica.state = "draining"
        await until(lambda: _ready_replicas(edge, 1), "only the other is taken")
        end = End("failed", TokenCounts(PROMPT_TOKENS, 4), ReplicaLost("the engine failed").to_wire())
        await edge.replica.emit(key, [], end)
    else:
        await edge.cloud.remove_replica(edge.replica)
    answer = (await asking).json()
    assert answer == {**undisturbed, "id": key.request_id, "created": answer["created"]}
    usage = await edge.cloud.usage(key.request_id)
    assert did(usage) == [(1, "r1", "failed", PROMPT_TOKENS, 4), (2, "r2", "finished", PROMPT_TOKENS, 6)]
    assert (usage.outcome, usage.completion_tokens) == ("finished", 10)


async def _ready_replicas(edge: Edge, count: int) -> bool:
    return bool((await edge.client.get("/ready")).json()["ready_replicas"] == count)


async def test_only_the_word_that_it_has_ended_was_lost(edge: Edge) -> None:
    """All was said: nobody has to be asked for more."""

    async def forget_the_end(replica: TinyReplica, key: StreamKey, request: Request) -> None:
        await replica.accept(key)
        await replica.emit(key, [delta(0, 0)])
        await replica.emit(key, [delta(0, 1, finish="stop")])
        await asyncio.Event().wait()

    heard, other = await ask_and_cut(edge, forget_the_end)
    assert (heard.text, heard.ends, heard.done) == ({0: text(2)}, {0: ["stop"]}, True)
    assert not other.opened
    usage = await usage_of(edge)
    assert (usage.outcome, usage.prompt_tokens, usage.completion_tokens) == ("finished", PROMPT_TOKENS, 2)


async def gives_up(replica: TinyReplica, key: StreamKey, request: Request, *, words: int) -> None:
    """So many words more, and then it fails."""
    await replica.accept(key)
    first = said(request, 0)
    for i in range(first, first + words):
        await replica.emit(key, [delta(0, i)])
    lost = ReplicaLost("the engine failed").to_wire()
    await replica.emit(key, [], End("failed", TokenCounts(PROMPT_TOKENS, words), lost))


def failing(words: int, times: int) -> Behaviour:
    async def behave(replica: TinyReplica, key: StreamKey, request: Request) -> None:
        fails = len(replica.opened) <= times
        await (gives_up(replica, key, request, words=words) if fails else speak(replica, key, request))

    return behave


async def test_losses_in_a_row_are_survived_as_long_as_each_brought_the_answer_on(edge: Edge) -> None:
    losses = 2 * MAX_LOST
    edge.replica.behaviour = failing(PROGRESS, losses)
    length = PROGRESS * losses + 2
    heard = await ask(edge, max_tokens=length)
    assert (heard.text, heard.roles, heard.done) == ({0: text(length)}, {0: 1}, True)
    usage = await usage_of(edge)
    assert [a.completion_tokens for a in usage.attempts] == [PROGRESS] * losses + [2]
    assert usage.completion_tokens == length


async def test_losses_in_a_row_that_bring_nothing_end_it_with_what_was_said(edge: Edge) -> None:
    edge.replica.behaviour = failing(1, 10)
    heard = await ask(edge)
    assert heard.text == {0: text(MAX_LOST)}
    assert heard.error is not None and heard.error["code"] == "replica_lost"
    assert f"{MAX_LOST} tokens of the answer" in heard.error["message"]
    assert len(edge.replica.opened) == MAX_LOST
    usage = await usage_of(edge)
    assert (usage.outcome, usage.completion_tokens) == ("failed", MAX_LOST)
    assert (usage.prompt_tokens, len(usage.attempts)) == (PROMPT_TOKENS, MAX_LOST)


async def test_a_replica_that_can_not_go_on_is_an_honest_error(edge: Edge) -> None:
    async def refuse_more(replica: TinyReplica, key: StreamKey, request: Request) -> None:
        if request.outputs:
            await replica.emit(key, [], End("failed", TokenCounts(), ContextTooLong("too long for me").to_wire()))
        else:
            await gives_up(replica, key, request, words=2)

    edge.replica.behaviour = refuse_more
    heard = await ask(edge)
    assert heard.text == {0: text(2)}
    assert heard.error is not None
    assert heard.error["code"] == "replica_lost" and "too long for me" in heard.error["message"]


async def test_who_does_not_go_on_where_the_other_stopped_is_not_believed(edge: Edge) -> None:
    async def skip_one(replica: TinyReplica, key: StreamKey, request: Request) -> None:
        await replica.accept(key)
        await replica.emit(key, [delta(0, 3)])
        await asyncio.Event().wait()

    edge.replica.behaviour = speak_only(2)
    asking = asyncio.create_task(ask(edge, max_tokens=6))
    await until(lambda: edge.replica.opened, "the first has it")
    await asyncio.sleep(0.2)
    wrong = await edge.cloud.add_replica("wrong")
    wrong.behaviour = skip_one
    await edge.cloud.remove_replica(edge.replica)
    await until(lambda: wrong.cancelled, "the wrong one is stopped")
    await edge.cloud.add_replica("right")
    assert (await asking).text == {0: text(6)}
    usage = await usage_of(edge)
    assert usage.attempts[1].replica == "wrong" and usage.attempts[1].completion_tokens == 0


async def test_nobody_is_there_to_go_on_until_somebody_comes(edge: Edge) -> None:
    """The client hears that it is not forgotten; and the one that then goes on is lost before its first word, too."""
    edge.replica.behaviour = speak_only(2)
    heard = Heard()
    asking = asyncio.create_task(ask(edge, heard=heard, max_tokens=6))
    await until(lambda: heard.text[0] == text(2), "two words are there")
    await edge.cloud.remove_replica(edge.replica)
    await until(lambda: heard.comments, "a heartbeat while nobody is there")
    second = await edge.cloud.add_replica("r2")
    second.behaviour = speak_only(0)
    await until(lambda: second.opened, "the second has it")
    await edge.cloud.remove_replica(second)
    await edge.cloud.add_replica("r3")
    await asking
    assert (heard.text, heard.done) == ({0: text(6)}, True)
    assert did(await usage_of(edge)) == [
        (1, "r1", "failed", PROMPT_TOKENS, 2),
        (2, "r2", "failed", 0, 0),
        (3, "r3", "finished", PROMPT_TOKENS, 4),
    ]


async def test_nobody_comes_to_go_on(cloud: Cloud) -> None:
    async with running_edge(cloud, queue_timeout=1.5) as edge:
        edge.replica.behaviour = speak_only(2)
        heard = Heard()
        asking = asyncio.create_task(ask(edge, heard=heard))
        await until(lambda: heard.text[0] == text(2), "two words are there")
        await cloud.remove_replica(edge.replica)
        await asking
        assert heard.error is not None and heard.error["code"] == "replica_lost"
        assert "2 tokens of the answer" in heard.error["message"]
        assert (await usage_of(edge)).completion_tokens == 2


@pytest.mark.parametrize("found", [False, True])
async def test_a_client_that_leaves_while_its_answer_is_resumed(edge: Edge, found: bool) -> None:
    """Whether nobody is there yet to go on, or somebody has just accepted."""
    edge.replica.behaviour = speak_only(2)
    heard = Heard()
    async with httpx.AsyncClient(base_url=edge.url, headers={"authorization": f"Bearer {edge.key}"}) as client:
        asking = asyncio.create_task(ask(edge, heard=heard, client=client))
        await until(lambda: heard.text[0] == text(2), "two words are there")
        await edge.cloud.remove_replica(edge.replica)
        await until(lambda: _queued(edge, 1), "it waits for another replica")
        second = await edge.cloud.add_replica("r2", max_num_seqs=8) if found else None
        if second is not None:
            second.behaviour = speak_only(0)
            await until(lambda: second.opened, "the second has it")
        asking.cancel()
    usage = await edge.cloud.ledger_usage()
    assert (usage.outcome, usage.prompt_tokens, usage.completion_tokens) == ("cancelled", PROMPT_TOKENS, 2)
    assert [a.outcome for a in usage.attempts] == ["failed"] + ["cancelled"] * found
    if second is not None:
        await until(lambda: second.cancelled, "the second is told")
    await until(lambda: _queued(edge, 0), "nobody waits")


async def _queued(edge: Edge, count: int) -> bool:
    return await edge.metric("springtide_requests_queued", model=MODEL) == count


async def test_another_numerics_class_goes_on_with_the_text_and_says_so(edge: Edge) -> None:
    edge.replica.behaviour = speak_only(2)
    asking = asyncio.create_task(ask(edge, max_tokens=6))
    await cut(edge, speak, numerics="other/fp32")
    heard = await asking
    assert heard.text == {0: text(6)}
    assert heard.fingerprints[0] is not None and heard.fingerprints[-1] is None


# How long a replica may be silent.


async def _deaf(replica: TinyReplica, key: StreamKey, request: Request) -> None:
    """Neither accepts nor refuses."""
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("setting", "behaviour", "words"),
    [
        ("connect_timeout", _deaf, "not accepted by replica r1"),
        ("first_token_timeout", speak_only(0), "said no first word"),
        ("inter_token_timeout", speak_only(2), "said nothing more"),
    ],
)
async def test_one_that_is_silent_too_long_is_left_for_another(
    cloud: Cloud, caplog: pytest.LogCaptureFixture, setting: str, behaviour: Behaviour, words: str
) -> None:
    async with running_edge(cloud, **{setting: 0.2}) as edge:  # before it is asked whether it lives
        edge.replica.behaviour = behaviour
        asking = asyncio.create_task(ask(edge, max_tokens=6))
        await until(lambda: edge.replica.opened, "the first has it")
        await cloud.add_replica("r2")
        heard = await asking
        assert (heard.text, heard.done) == ({0: text(6)}, True)
        assert words in caplog.text
        assert [a.outcome for a in (await usage_of(edge)).attempts][-2:] == ["failed", "finished"]
        await until(lambda: edge.replica.cancelled, "the silent one is told")


async def test_a_request_may_take_so_long_and_no_longer(cloud: Cloud) -> None:
    async with running_edge(cloud, total_timeout=0.7) as edge:
        edge.replica.behaviour = speak_only(2)
        heard = await ask(edge)
    assert heard.text == {0: text(2)}
    assert heard.error is not None and heard.error["code"] == "deadline_exceeded"


# Asking a second one as well.


async def _hedged(cloud: Cloud, first: Behaviour, then: Callable[[Edge, TinyReplica, TinyReplica], Any]) -> None:
    """Two replicas; whichever gets it first behaves like `first`, and the other speaks."""
    async with running_edge(cloud, hedge_after=0.3) as edge:
        other = await cloud.add_replica("r2")
        await until(lambda: _ready_replicas(edge, 2), "both are known")

        async def behave(replica: TinyReplica, key: StreamKey, request: Request) -> None:
            await (first if key.attempt == 1 else speak)(replica, key, request)

        edge.replica.behaviour = other.behaviour = behave
        await then(edge, edge.replica, other)


async def test_the_first_to_speak_is_heard_and_the_other_is_stopped(cloud: Cloud) -> None:
    async def then(edge: Edge, one: TinyReplica, other: TinyReplica) -> None:
        heard = await ask(edge, max_tokens=4)
        assert (heard.text, heard.roles, heard.done) == ({0: text(4)}, {0: 1}, True)
        slow = one if one.opened[0][0].attempt == 1 else other
        await until(lambda: slow.cancelled, "the slow one is told")
        usage = await cloud.usage(slow.opened[0][0].request_id)
        assert [(a.number, a.outcome, a.completion_tokens) for a in usage.attempts] == [
            (1, "cancelled", 0),
            (2, "finished", 4),
        ]
        assert (usage.prompt_tokens, usage.completion_tokens) == (PROMPT_TOKENS, 4)

    await _hedged(cloud, speak_only(0), then)


async def test_the_slow_one_may_still_be_the_first_to_speak(cloud: Cloud) -> None:
    second_asked = asyncio.Event()

    async def late(replica: TinyReplica, key: StreamKey, request: Request) -> None:
        await replica.accept(key)
        await second_asked.wait()
        for i in range(4):
            finish = "stop" if i == 3 else None
            await replica.emit(
                key, [delta(0, i, finish=finish)], End("finished", counts(request, 4)) if finish else None
            )

    async def then(edge: Edge, one: TinyReplica, other: TinyReplica) -> None:
        async def wait(replica: TinyReplica, key: StreamKey, request: Request) -> None:
            second_asked.set()
            await asyncio.Event().wait()

        async def behave(replica: TinyReplica, key: StreamKey, request: Request) -> None:
            await (late if key.attempt == 1 else wait)(replica, key, request)

        one.behaviour = other.behaviour = behave
        heard = await ask(edge)
        assert (heard.text, heard.done) == ({0: text(4)}, True)
        usage = await cloud.usage(one.opened[0][0].request_id)
        assert {(a.number, a.outcome) for a in usage.attempts} == {(1, "finished"), (2, "cancelled")}
        assert usage.completion_tokens == 4

    await _hedged(cloud, late, then)


async def test_a_client_that_leaves_while_two_are_asked(cloud: Cloud) -> None:
    async def then(edge: Edge, one: TinyReplica, other: TinyReplica) -> None:
        one.behaviour = other.behaviour = speak_only(0)
        async with httpx.AsyncClient(base_url=edge.url, headers={"authorization": f"Bearer {edge.key}"}) as client:
            asking = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
            await until(lambda: one.opened and other.opened, "both are asked")
            asking.cancel()
        await until(lambda: one.cancelled and other.cancelled, "both are told")
        usage = await cloud.ledger_usage()
        assert (usage.outcome, [a.outcome for a in usage.attempts]) == ("cancelled", ["cancelled"] * 2)

    await _hedged(cloud, speak_only(0), then)
