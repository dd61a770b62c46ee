"""A replica host over the real fabric: every request ends once, and every token is the right one."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import tokenizers
from tokenizers import decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from springtide.core.cluster import Replica
from springtide.core.engine_api import SequenceOutput
from springtide.core.errors import ReplicaLost
from springtide.core.ids import new_id
from springtide.core.request import ChoiceOutput, Delta, End, Message, Request, SamplingParams
from springtide.core.store import ModelFiles
from springtide.core.wire import unescape_json
from springtide.fabric.connection import Fabric
from springtide.fabric.presence import PresenceView
from springtide.fabric.streams import Backlog, ClientStream, StreamHub, Turn
from springtide.fleet.announcer import Announcer
from springtide.fleet.mock_engine import MockConfig, MockEngine, chain, verify_chain
from springtide.fleet.mock_text import END_ID, MockTokenizer, read_words, word
from springtide.fleet.replica_host import STEP_TIMEOUT, ReplicaHost
from springtide.policy.routing import NO_ROOM
from springtide.text.tokenizer import Tokenizer, TokenizerLike
from tests.fleet.conftest import World, until

NODE, REPLICA = "n1", "r1"
QUESTION = "What is a spring tide?"
tokenizer = MockTokenizer()


@dataclass
class Heard:
    """All that a stream brought."""

    deltas: dict[int, list[Delta]] = field(default_factory=lambda: defaultdict(list))
    end: End | None = None

    def text(self, choice: int = 0) -> str:
        return "".join(unescape_json(delta.text) for delta in self.deltas[choice])

    def tokens(self, choice: int = 0) -> list[int]:
        return [token for delta in self.deltas[choice] for token in delta.token_ids]

    def finish_reason(self, choice: int = 0) -> str | None:
        reasons = [delta.finish_reason for delta in self.deltas[choice] if delta.finish_reason]
        assert len(reasons) <= 1
        return reasons[0] if reasons else None


class Stage:
    """A host with its engine, and a hub that opens requests at it."""

    def __init__(self, platform: Fabric, node_fabric: Fabric, hub: StreamHub) -> None:
        self.platform = platform
        self.hub = hub
        self._node_fabric = node_fabric
        self._closing: list[ReplicaHost] = []

    async def host(
        self,
        engine: MockEngine | None = None,
        *,
        text: TokenizerLike = tokenizer,
        step_timeout: float = STEP_TIMEOUT,
        **config: object,
    ) -> ReplicaHost:
        engine = engine or MockEngine(config=MockConfig.from_options(config))
        replica = Replica(id=REPLICA, node=NODE, model="mock", engine="mock", state="starting")
        self.announcer = Announcer(self._node_fabric, replica)
        await self.announcer.start()
        host = ReplicaHost(self._node_fabric, self.announcer, engine, text, step_timeout=step_timeout)
        await host.start()
        await self._node_fabric.flush()  # its ear is at the server now
        self._closing.append(host)
        return host

    async def open(self, request: Request, attempt: int = 1) -> ClientStream:
        return await self.hub.open(request, attempt, NODE, REPLICA)

    async def ask(self, request: Request) -> Heard:
        return await listen(await self.open(request))

    async def close(self) -> None:
        for host in self._closing:
            await host.close()
        if self._closing:
            await self.announcer.stop()


async def listen(stream: ClientStream) -> Heard:
    heard = Heard()
    async with asyncio.timeout(30):
        while heard.end is None:
            for frame in await stream.frames():
                assert heard.end is None, "a frame after the end"
                for delta in frame.deltas:
                    heard.deltas[delta.choice].append(delta)
                heard.end = frame.end
    return heard


@pytest.fixture
async def stage(world: World, platform: Fabric) -> AsyncIterator[Stage]:
    node_fabric = await Fabric.connect(world.node_credentials(NODE), name="replica")
    hub = StreamHub(platform, "g1")
    await hub.start()
    stage = Stage(platform, node_fabric, hub)
    yield stage
    await stage.close()
    await hub.close()
    await node_fabric.close()


def chat(question: str = QUESTION, **sampling: object) -> Request:
    return Request(
        id=new_id("req"),
        model="mock",
        tenant="t",
        sampling=SamplingParams(**{"seed": 7, "max_tokens": 12, **sampling}),  # type: ignore[arg-type]
        messages=(Message("user", question),),
    )


def completion(*prompts: str | tuple[int, ...], echo: bool = False, **sampling: object) -> Request:
    return Request(
        id=new_id("req"),
        model="mock",
        tenant="t",
        sampling=SamplingParams(**{"seed": 7, "max_tokens": 12, **sampling}),  # type: ignore[arg-type]
        prompts=prompts,
        echo=echo,
    )


def rendered(question: str = QUESTION) -> list[int]:
    return tokenizer.render_chat([Message("user", question)])


async def test_an_answer_arrives_whole_and_in_order(stage: Stage):
    await stage.host()
    heard = await stage.ask(chat())
    verify_chain(heard.tokens(), rendered(), seed=7)
    assert read_words(heard.text()) == heard.tokens()
    assert len(heard.tokens()) == 12 and heard.finish_reason() == "length"
    assert heard.end is not None and heard.end.outcome == "finished"
    assert heard.end.counts.prompt == len(rendered()) and heard.end.counts.completion == 12
    sent = 0
    for delta in heard.deltas[0]:
        assert delta.offset == sent
        sent += len(unescape_json(delta.text).encode())


async def test_many_answers_at_once_do_not_mix(stage: Stage):
    await stage.host(num_blocks=60, max_num_seqs=24, context_length=512)  # so few that some are preempted
    questions = [f"question {number}" for number in range(24)]
    answers = await asyncio.gather(*(stage.ask(chat(question, max_tokens=40)) for question in questions))
    for question, heard in zip(questions, answers, strict=True):
        assert len(heard.tokens()) == 40
        verify_chain(heard.tokens(), rendered(question), seed=7)


async def test_choices_are_numbered_over_prompts_and_a_prompt_counts_once(stage: Stage):
    await stage.host()
    heard = await stage.ask(completion("one", tuple(b"two!"), n=3))
    for number in range(6):
        prompt = list(b"one") if number < 3 else list(b"two!")
        assert len(heard.tokens(number)) == 12
        verify_chain(heard.tokens(number), prompt, seed=7, choice=number)
    assert heard.end is not None
    assert (heard.end.counts.prompt, heard.end.counts.completion) == (3 + 4, 6 * 12)


async def test_a_stop_string_across_tokens_ends_the_answer_before_it(stage: Stage):
    await stage.host(tokens_per_step=4)
    links = chain(rendered(), 7)
    expected = [next(links) for _ in range(8)]
    stop = word(expected[4])[-1] + word(expected[5])[:3]  # begins in one token and ends in the next
    heard = await stage.ask(chat(stop=(stop,), logprobs=1))
    assert heard.text() == tokenizer.decode(expected[:5])[:-1]
    assert heard.tokens() == expected[:6]  # the token that completed it is the last that counts
    scored = [score.token_id for delta in heard.deltas[0] for score in delta.logprobs or []]
    assert scored == expected[:6]
    assert heard.finish_reason() == "stop"
    assert heard.end is not None and heard.end.counts.completion == 6


async def test_a_stop_string_before_min_tokens_does_not_count(stage: Stage):
    await stage.host(tokens_per_step=4)
    links = chain(rendered(), 7)
    expected = [next(links) for _ in range(12)]
    heard = await stage.ask(chat(stop=(word(expected[2]),), min_tokens=5))
    assert heard.tokens() == expected and heard.finish_reason() == "length"
    heard = await stage.ask(chat(stop=(word(expected[5]),), min_tokens=5))
    assert heard.tokens() == expected[:6] and heard.finish_reason() == "stop"


async def test_the_token_that_ends_an_answer_gives_no_text(stage: Stage):
    await stage.host(stop_after=3)
    heard = await stage.ask(chat())
    assert heard.tokens()[-1] == END_ID and heard.finish_reason() == "stop"
    assert read_words(heard.text()) == heard.tokens()[:3]
    heard = await stage.ask(chat(ignore_eos=True))
    assert len(heard.tokens()) == 12 and heard.finish_reason() == "length"


async def test_without_max_tokens_an_answer_fills_the_context(stage: Stage):
    await stage.host(context_length=64)
    heard = await stage.ask(chat(max_tokens=None))
    assert len(heard.tokens()) == 64 - len(rendered())
    assert heard.finish_reason() == "length"


async def test_the_prompt_comes_first_when_it_is_to_be_repeated(stage: Stage):
    await stage.host()
    heard = await stage.ask(completion('say "hé"', echo=True))
    assert heard.text().startswith('say "hé"')
    assert read_words(heard.text().removeprefix('say "hé"')) == heard.tokens()


async def test_logprobs_come_with_the_bytes_of_their_tokens(stage: Stage):
    await stage.host()
    heard = await stage.ask(chat(logprobs=2, max_tokens=3))
    scores = [score for delta in heard.deltas[0] for score in delta.logprobs or ()]
    assert [score.token_id for score in scores] == heard.tokens()
    assert all(score.token == word(score.token_id).encode() and len(score.top) == 2 for score in scores)


@pytest.mark.parametrize(
    ("request_", "status", "code", "says"),
    [
        (chat("x" * 300), 400, "context_length_exceeded", "prompt has 318 tokens, max_tokens 12, context is 256"),
        (chat(max_tokens=250), 400, "context_length_exceeded", "prompt has 40 tokens, max_tokens 250, context is 256"),
        (chat("y" * 5000, max_tokens=None), 400, "context_length_exceeded", "prompt has 5018 tokens"),
        (completion((1, 10**6)), 400, None, "token id 1000000"),
        (completion(""), 400, None, "the prompt is empty"),
        (completion("hi", temperature=3.0), 400, None, "temperature is 3.0"),
        (completion("hi", logit_bias={10**6: 1.0}), 400, None, "outside the model's vocabulary"),
        (completion(*["hi"] * 10, n=128), 400, None, "1280 choices at once"),
    ],
)
async def test_a_request_that_can_not_be_done_is_refused_before_any_token(
    stage: Stage, request_: Request, status: int, code: str | None, says: str
):
    await stage.host(context_length=256)
    heard = await stage.ask(request_)
    assert heard.end is not None and heard.end.error is not None and heard.end.outcome == "failed"
    assert (heard.end.error.status, heard.end.error.code) == (status, code)
    assert says in heard.end.error.message
    assert not heard.deltas
    assert len((await stage.ask(chat())).tokens()) == 12  # and nothing has suffered


def looping_tokenizer(folder: Path) -> Tokenizer:
    """A model's tokenizer from files, one token for each byte, with a chat template that never comes to its end."""
    names = sorted(ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(BPE(vocab={name: id for id, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{{ messages[0].content }}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": loop}))
    return Tokenizer.load(ModelFiles("loop", str(folder), folder, "safetensors", "sha256:"))


async def test_a_chat_template_that_never_ends_costs_its_own_request_and_no_other(stage: Stage, tmp_path: Path):
    await stage.host(text=looping_tokenizer(tmp_path))
    for _ in range(2):  # the first is rendered in the event loop; from then on it is known to be slow
        heard = await stage.ask(chat())
        assert heard.end is not None and heard.end.error is not None and heard.end.outcome == "failed"
        assert (heard.end.error.status, heard.end.error.param) == (400, "messages")
        assert "chat template was stopped" in heard.end.error.message
        assert not heard.deltas
        load = stage.announcer.replica.load
        assert load.blocks_free == load.blocks_total > 0 and load.running == load.waiting == 0
        served = await stage.ask(completion("hi"))
        assert len(served.tokens()) == 12 and served.end is not None and served.end.outcome == "finished"
        await until(lambda: not stage.announcer.replica.load.running)


async def test_cancelling_frees_the_blocks(stage: Stage):
    await stage.host(step_base_ms=5)
    view = PresenceView(stage.platform)
    await view.start()
    stream = await stage.open(chat(max_tokens=4000, n=3))
    assert (await stream.frames())[0].prompt_tokens == len(rendered())
    while not any(frame.deltas for frame in await stream.frames()):
        pass
    await until(lambda: view.replicas() and view.replicas()[0].load.running == 3)
    stream.cancel()
    await until(lambda: view.replicas()[0].load.running == 0)
    load = view.replicas()[0].load
    assert load.blocks_free == load.blocks_total > 0
    await view.stop()


async def test_an_answer_resumes_where_another_replica_left_it(stage: Stage):
    await stage.host()
    whole = await stage.ask(chat())
    tokens = whole.tokens()
    text = tokenizer.decode(tokens[:5])
    request = chat()
    resumed = Request(
        id=request.id,
        model="mock",
        tenant="t",
        sampling=request.sampling,
        messages=request.messages,
        outputs=(ChoiceOutput(0, tokens[:5], text),),
    )
    heard = await listen(await stage.open(resumed, attempt=2))
    assert heard.tokens() == tokens[5:]
    assert text + heard.text() == whole.text()
    assert heard.deltas[0][0].offset == len(text)
    assert heard.end is not None and heard.end.counts.completion == 7


async def test_a_choice_that_was_complete_is_not_run_again(stage: Stage):
    await stage.host()
    first = await stage.ask(chat(n=2))
    request = chat(n=2)
    resumed = Request(
        id=request.id,
        model="mock",
        tenant="t",
        sampling=request.sampling,
        messages=request.messages,
        outputs=(ChoiceOutput(0, first.tokens(0), first.text(0)), ChoiceOutput(1, [], "")),
    )
    heard = await listen(await stage.open(resumed, attempt=2))
    assert heard.tokens(0) == [] and heard.text(0) == "" and heard.finish_reason(0) == "length"
    assert heard.tokens(1) == first.tokens(1)


async def test_a_full_replica_refuses_who_was_not_called_and_says_so_to_all(stage: Stage):
    await stage.host(max_num_seqs=1, step_base_ms=5)
    streams = [await stage.open(chat(max_tokens=500)) for _ in range(2)]  # one runs, its successor is there
    heard = await stage.ask(chat())
    assert heard.end is not None and heard.end.error is not None
    assert (heard.end.error.status, heard.end.error.code) == (503, NO_ROOM)
    await until(lambda: stage.announcer.replica.by_turn)
    for stream in streams:
        stream.cancel()
    await until(lambda: not stage.announcer.replica.by_turn)
    assert len((await stage.ask(chat())).tokens()) == 12


async def test_who_waits_at_a_gateway_is_called_when_there_is_room(stage: Stage):
    await stage.host(max_num_seqs=1, step_base_ms=5)
    calls: asyncio.Queue[Turn] = asyncio.Queue()
    stage.hub.on_turns(lambda node, replica, turns: [calls.put_nowait(turn) for turn in turns] and None)
    streams = [await stage.open(chat(max_tokens=500)) for _ in range(2)]
    await until(lambda: stage.announcer.replica.by_turn)
    stage.hub.advertise(NODE, REPLICA, [Backlog("t", "standard", 1.0, 1, 0.0)])
    await asyncio.sleep(0.1)
    assert calls.empty(), "there is no room yet"
    for stream in streams:
        stream.cancel()
    turn = await asyncio.wait_for(calls.get(), 30)
    assert turn.flow == ("t", "standard")
    heard = await listen(await stage.hub.open(chat(), 1, NODE, REPLICA, turn=turn.serial))
    assert len(heard.tokens()) == 12


async def test_a_turn_that_is_declined_goes_to_the_next(stage: Stage):
    await stage.host(max_num_seqs=1)
    calls: asyncio.Queue[Turn] = asyncio.Queue()
    stage.hub.on_turns(lambda node, replica, turns: [calls.put_nowait(turn) for turn in turns] and None)
    waiting = [Backlog("a", "standard", 1.0, 9, 0.0), Backlog("b", "standard", 1.0, 9, 0.0)]
    stage.hub.advertise(NODE, REPLICA, waiting)
    first, second = await asyncio.wait_for(calls.get(), 30), await asyncio.wait_for(calls.get(), 30)
    assert {first.tenant, second.tenant} == {"a", "b"}
    stage.hub.advertise(NODE, REPLICA, [backlog for backlog in waiting if backlog.tenant != first.tenant])
    stage.hub.decline(NODE, REPLICA, [first.serial])
    third = await asyncio.wait_for(calls.get(), 30)
    assert third.tenant == second.tenant


async def test_a_step_that_never_ends_ends_the_replica(stage: Stage):
    release = threading.Event()
    engine = MockEngine(config=MockConfig(step_base_ms=1), sleep=lambda _: release.wait(30) and None)
    host = await stage.host(engine, step_timeout=0.5)
    try:
        heard = await stage.ask(chat())
        assert heard.end is not None and heard.end.error is not None and heard.end.error.status == 503
        await until(host.died.is_set)
        assert "step takes longer" in host.epitaph and stage.announcer.replica.state == "failed"
    finally:
        release.set()


async def test_steps_that_take_long_together_end_nothing(stage: Stage):
    await stage.host(step_base_ms=50, step_timeout=0.5)
    assert len((await stage.ask(chat(max_tokens=24))).tokens()) == 24


async def test_draining_finishes_what_runs_and_takes_nothing_new(stage: Stage):
    host = await stage.host(step_base_ms=5)
    running = asyncio.ensure_future(stage.ask(chat(max_tokens=40)))
    await until(lambda: stage.announcer.replica.load.running)
    draining = asyncio.ensure_future(host.drain(30))
    await until(lambda: stage.announcer.replica.state == "draining")
    late = await stage.ask(chat())
    assert late.end is not None and late.end.error is not None and late.end.error.status == 503
    verify_chain((await running).tokens(), rendered(), seed=7)
    await draining


async def test_what_outlives_the_grace_fails_with_a_reason(stage: Stage):
    host = await stage.host(step_base_ms=20)
    running = asyncio.ensure_future(stage.ask(chat(max_tokens=4000)))
    await until(lambda: stage.announcer.replica.load.running)
    await host.drain(0.2)
    heard = await running
    assert heard.end is not None and heard.end.error is not None
    assert heard.end.outcome == "failed" and "stopped" in heard.end.error.message
    assert heard.end.error.code == ReplicaLost.code, "another replica goes on with it"
    verify_chain(heard.tokens(), rendered(), seed=7)
    assert heard.end.counts.completion == len(heard.tokens()) > 0


async def test_tenants_share_what_is_cached_just_where_all_of_them_ask_for_it(stage: Stage):
    await stage.host()

    async def cached(salt: str | None, **sampling: object) -> int:
        request = msgspec.structs.replace(chat(**sampling), cache_salt=salt)
        heard = await stage.ask(request)
        assert heard.end is not None
        verify_chain(heard.tokens(), rendered(), seed=7)
        return heard.end.counts.cached

    block = (len(rendered()) - 1) // 16 * 16
    assert block > 0
    assert [await cached(salt) for salt in ("acme", "other", "acme", "other")] == [0, 0, block, block]
    assert [await cached("") for _ in ("acme", "other")] == [0, block]
    assert [await cached(None) for _ in ("acme", "acme")] == [0, 0]
    assert await cached("acme", n=3) == block  # a prompt counts once


class FragileEngine(MockEngine):
    """Breaks at steps of its choice."""

    def __init__(self, *, failing: set[int] | None = None, deadly: int | None = None) -> None:
        super().__init__()
        self._failing = failing or set()
        self._deadly = deadly
        self._step = 0

    def step(self) -> list[SequenceOutput]:
        self._step += 1
        if self._step == self._deadly:
            raise SystemExit("pulled the plug")
        if self._step in self._failing:
            raise RuntimeError("a kernel tripped")
        return super().step()


async def test_a_failed_step_ends_its_requests_and_no_more(stage: Stage):
    await stage.host(FragileEngine(failing={5}))
    heard = await stage.ask(chat())
    assert heard.end is not None and heard.end.error is not None and heard.end.outcome == "failed"
    assert "RuntimeError: a kernel tripped" in heard.end.error.message
    assert len((await stage.ask(chat())).tokens()) == 12
    assert stage.announcer.replica.load.blocks_free == stage.announcer.replica.load.blocks_total


@pytest.mark.parametrize("engine", [FragileEngine(deadly=4), FragileEngine(failing={4, 5, 6})])
async def test_when_the_engine_dies_every_request_ends(stage: Stage, engine: FragileEngine):
    host = await stage.host(engine)
    answers = await asyncio.gather(*(stage.ask(chat(f"q{number}")) for number in range(3)))
    for _ in range(2):  # a step that fails may fail alone; the third in a row is the end
        if not host.died.is_set():
            answers.append(await stage.ask(chat()))
    assert host.died.is_set()
    assert all(heard.end and heard.end.error and "engine" in heard.end.error.message for heard in answers)
    late = await stage.ask(chat())
    assert late.end is not None and late.end.error is not None and late.end.error.status == 503
    assert stage.announcer.replica.state == "failed"


async def test_closing_ends_what_is_open(stage: Stage, tmp_path: Path):
    host = await stage.host(step_base_ms=20)
    running = asyncio.ensure_future(stage.ask(chat(max_tokens=4000)))
    await until(lambda: stage.announcer.replica.load.running)
    await host.close()
    heard = await running
    assert heard.end is not None and heard.end.outcome == "failed"


async def test_a_long_prompt_is_accepted_before_its_first_token(stage: Stage) -> None:
    entered = asyncio.Event()
    loop, release = asyncio.get_running_loop(), threading.Event()

    def long_step(_: float) -> None:
        loop.call_soon_threadsafe(entered.set)
        release.wait(30)

    await stage.host(MockEngine(config=MockConfig(step_base_ms=1), sleep=long_step))
    stream = await stage.open(chat())
    try:
        await entered.wait()
        (frame,) = await stream.frames()  # while the step still runs
        assert (frame.number, frame.deltas, frame.end) == (0, [], None)
    finally:
        release.set()
    assert (await listen(stream)).finish_reason() == "length"
