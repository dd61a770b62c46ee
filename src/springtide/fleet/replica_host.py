"""The host of one engine: requests from the fabric become sequences, what the engine gives becomes frames.

Every request that is opened here ends here exactly once: finished, failed or cancelled, whatever happens to its
engine. All state belongs to the event loop; the engine runs in a thread of its own, long texts are tokenised in
another.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from springtide.core.engine_api import Engine, EngineLoad, SequenceOutput
from springtide.core.errors import InvalidRequest, Overloaded, ReplicaLost, RequestError
from springtide.core.request import End, Outcome, Request
from springtide.fabric.awake import AwakeClock
from springtide.fabric.connection import Fabric
from springtide.fabric.streams import FRAME_VERSION, Backlog, Flow, StreamKey, StreamServer, Turn
from springtide.fleet.announcer import Announcer
from springtide.fleet.answer import Answer, Choice
from springtide.fleet.engine_loop import EngineLoop, StepReport
from springtide.fleet.prompts import Prompt, prepare, size
from springtide.policy.fairness import TurnKeeper, cost
from springtide.policy.routing import NO_ROOM
from springtide.text.tokenizer import TokenizerLike

logger = logging.getLogger(__name__)

STEP_TIMEOUT = 30.0  # seconds
_MAX_CHOICES_PER_SEAT = 9  # of one request: beyond one it comes to an empty replica, and part of it waits inside
_LOOK_S = 0.25  # how often is looked at what changes by itself: the age of a step, of turns, what was served
_ACCEPT_WITHIN_S = 0.2  # a gateway that hears nothing for a second sends the opening again
_MAX_INLINE_BYTES = 2048  # shorter texts are not worth the way to another thread and back
_SLOW_INLINE_S = 0.05  # a template that once took longer is never again rendered in the event loop


class ReplicaHost:
    """Serves one engine under the name that `announcer` announces.

    `died` is set, and every open request has ended, when the engine's thread is no more; the process should end,
    with `epitaph` for a reason. That is so as well when a step takes longer than `step_timeout` seconds (0: it may).
    """

    def __init__(
        self,
        fabric: Fabric,
        announcer: Announcer,
        engine: Engine,
        tokenizer: TokenizerLike,
        *,
        step_timeout: float = STEP_TIMEOUT,
    ) -> None:
        replica = announcer.replica
        self.died = asyncio.Event()
        self.epitaph = ""
        self._announcer = announcer
        self._info = engine.info
        self._tokenizer = tokenizer
        self._engine = EngineLoop(engine, on_report=self._on_report, on_death=self._on_death)
        self._server = StreamServer(
            fabric,
            replica.node,
            replica.id,
            on_open=self._on_open,
            on_cancel=self._on_cancel,
            on_backlog=self._on_backlog,
            on_declined=self._on_declined,
            on_gateway_lost=self._on_gateway_lost,
        )
        self._keeper = TurnKeeper(self._info.max_num_seqs)
        self._load = EngineLoad()  # after the last step
        self._granting = False  # soon
        self._step_timeout = step_timeout
        self._awake = AwakeClock(_LOOK_S)
        self._answers: dict[StreamKey, Answer] = {}
        self._by_sequence: dict[str, tuple[Answer, Choice]] = {}
        self._max_choices = self._info.max_num_seqs * _MAX_CHOICES_PER_SEAT
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._inline = True
        self._refusal: str | None = None  # why nothing new is taken
        self._idle = asyncio.Event()
        self._idle.set()
        self._unsent = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Take requests, and say so."""
        self._engine.start()
        self._spawn(self._flush())
        self._spawn(self._look())
        await self._server.start()
        info = self._info
        self._announcer.update(
            state="ready",
            context_length=info.context_length,
            max_num_seqs=info.max_num_seqs,
            numerics=info.numerics,
            frame_version=FRAME_VERSION,
            load=EngineLoad(blocks_free=info.num_blocks, blocks_total=info.num_blocks),
        )

    async def drain(self, grace: float) -> None:
        """Take nothing new and let what is open finish, at most `grace` seconds; then end the rest."""
        self._refuse_from_now("this replica is stopping")
        self._announcer.update(state="draining")
        try:
            await asyncio.wait_for(self._idle.wait(), grace)
        except TimeoutError:
            logger.warning("%d requests did not finish within %.0f s; ending them", len(self._answers), grace)
        self._fail_all("the replica was stopped")

    async def close(self) -> None:
        """Stop at once. What is still open fails."""
        self._refuse_from_now("this replica is stopping")
        self._fail_all("the replica was stopped")
        await self._engine.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
        await self._server.flush()
        await self._server.close()

    # -- opening -------------------------------------------------------------------------------------------

    def _on_open(self, key: StreamKey, request: Request, gateway: str, turn: int | None) -> None:
        answer = Answer(key, request)
        self._answers[key] = answer
        self._idle.clear()
        try:
            self._admit(key, request, turn)
        except RequestError as error:
            self._end(answer, "failed", error)
        else:
            self._spawn(self._open(answer))

    def _admit(self, key: StreamKey, request: Request, turn: int | None) -> None:
        """
        Raises:
            Overloaded: not here; or not now, since others are before it (NO_ROOM).
            InvalidRequest: nowhere and never.
        """
        if self._refusal is not None:
            raise Overloaded(self._refusal)
        choices = request.num_choices
        if choices > self._max_choices:
            raise InvalidRequest(f"{choices} choices at once; at most {self._max_choices} fit", param="n")
        flow = Flow(request.tenant, request.priority_class)
        stays = self._keeper.arrived(key, flow, request.weight, choices, self._now(), turn)
        self._grant_soon()
        if not stays:
            raise Overloaded("others are before it", code=NO_ROOM)

    async def _open(self, answer: Answer) -> None:
        """Tokenise, accept, and hand over to the engine; or refuse."""
        try:
            await self._make_choices(answer, await self._prepare(answer.request))
            if answer.key in self._answers:  # not cancelled while it was tokenised
                self._begin(answer)
        except RequestError as error:
            self._end(answer, "failed", error)
        except Exception as error:
            self._end_by_fault(answer, error)

    async def _prepare(self, request: Request) -> list[Prompt]:
        loop = asyncio.get_running_loop()
        if not self._inline or size(request) > _MAX_INLINE_BYTES:
            return await loop.run_in_executor(self._tokenizing, prepare, request, self._tokenizer, self._info)
        started = loop.time()
        try:
            return prepare(request, self._tokenizer, self._info)
        finally:
            self._inline = loop.time() - started < _SLOW_INLINE_S

    async def _make_choices(self, answer: Answer, prompts: list[Prompt]) -> None:
        if not answer.request.outputs:
            answer.begin(prompts, self._tokenizer)
            return
        # All that was said before is read once more: with a long answer that takes time.
        await asyncio.get_running_loop().run_in_executor(self._tokenizing, answer.begin, prompts, self._tokenizer)

    def _begin(self, answer: Answer) -> None:
        """Accept: frame 0, then what stands before the first token, then the engine's."""
        self._server.emit(answer.key, [], prompt_tokens=answer.num_prompt_tokens)
        for choice in answer.running:
            self._by_sequence[choice.sequence.id] = answer, choice
        self._engine.submit([choice.sequence for choice in answer.running])
        self._send(answer)
        # The acceptance rides with the first token; if that takes long (a long prompt), it goes ahead.
        asyncio.get_running_loop().call_later(_ACCEPT_WITHIN_S, self._unsent.set)

    # -- what the engine gives -----------------------------------------------------------------------------

    def _on_report(self, report: StepReport) -> None:
        for sequence_id, error in report.refused:
            if sequence_id in self._by_sequence:
                self._end(self._by_sequence[sequence_id][0], "failed", error)
        touched: dict[StreamKey, Answer] = {}
        for output in report.outputs:
            answer = self._take(output)
            if answer is not None:
                touched[answer.key] = answer
        for answer in touched.values():
            self._send(answer)
        self._load = report.load
        self._announce_load(report.load)
        self._grant_soon()

    def _take(self, output: SequenceOutput) -> Answer | None:
        """Add what a step gave one sequence; the answer that has something to send, if one has."""
        if output.id not in self._by_sequence:  # its request has ended meanwhile
            return None
        answer, choice = self._by_sequence[output.id]
        if output.finish_reason == "error":
            self._end(answer, "failed", RequestError(output.error or "the engine failed"))
            return None
        try:
            answer.deltas.append(choice.take(output))
        except Exception as error:
            self._end_by_fault(answer, error)
            return None
        if choice.finished:
            del self._by_sequence[output.id]
            if output.finish_reason is None:  # a stop string, of which the engine knows nothing
                self._engine.cancel(output.id)
        return answer

    def _send(self, answer: Answer) -> None:
        """One frame with all that waits; the last one if all choices are finished."""
        if answer.key not in self._answers:
            return
        if not answer.running:
            self._end(answer, "finished")
        elif answer.deltas:
            self._server.emit(answer.key, answer.take_deltas())
            self._unsent.set()

    def _announce_load(self, load: EngineLoad) -> None:
        known = self._announcer.replica.load
        if (load.running, load.waiting, load.blocks_free) != (known.running, known.waiting, known.blocks_free):
            self._announcer.update(load=load)

    def _on_death(self, error: BaseException) -> None:
        self._refuse_from_now("the engine of this replica has failed")
        self.epitaph = f"the engine has failed: {type(error).__name__}: {error}"
        self._fail_all(self.epitaph)
        self._announcer.update(state="failed", error=self.epitaph)
        self.died.set()

    # -- ending --------------------------------------------------------------------------------------------

    def _on_cancel(self, key: StreamKey) -> None:
        if key in self._answers:
            self._end(self._answers[key], "cancelled")

    def _refuse_from_now(self, reason: str) -> None:
        self._refusal = self._refusal or reason

    def _fail_all(self, reason: str) -> None:
        """End all that is open: what has shown nothing yet may begin again elsewhere."""
        for answer in tuple(self._answers.values()):
            self._end(answer, "failed", ReplicaLost(reason) if answer.told else Overloaded(reason))

    def _end_by_fault(self, answer: Answer, error: Exception) -> None:
        """A fault of ours ends one request, not the replica."""
        logger.error("request %s failed", answer.key.request_id, exc_info=error)
        self._end(answer, "failed", RequestError(f"the replica failed: {type(error).__name__}"))

    def _end(self, answer: Answer, outcome: Outcome, error: RequestError | None = None) -> None:
        """The only way out for a request: its last frame, and no trace of it left."""
        if self._answers.pop(answer.key, None) is None:
            return
        for choice in answer.running:
            if self._by_sequence.pop(choice.sequence.id, None):
                self._engine.cancel(choice.sequence.id)
        if outcome != "cancelled":  # of a cancelled one nobody wants to hear
            end = End(outcome, answer.counts, error.to_wire() if error else None)
            self._server.emit(answer.key, answer.take_deltas(), end)
            self._unsent.set()
        self._keeper.left(answer.key, cost(answer.counts))
        self._grant_soon()
        if not self._answers:
            self._idle.set()

    # -- turns ---------------------------------------------------------------------------------------------

    def _on_backlog(self, gateway: str, backlogs: list[Backlog]) -> None:
        self._keeper.backlog(gateway, backlogs, self._now())
        self._grant_soon()

    def _on_declined(self, gateway: str, serials: list[int]) -> None:
        for serial in serials:
            self._keeper.declined(gateway, serial, self._now())
        self._grant_soon()

    def _on_gateway_lost(self, gateway: str) -> None:
        self._keeper.gateway_lost(gateway)
        self._grant_soon()

    def _grant_soon(self) -> None:
        """After all that came in at once, and not while a step's tokens wait to be sent."""
        if not self._granting:
            self._granting = True
            asyncio.get_running_loop().call_soon(self._grant)

    def _grant(self) -> None:
        self._granting = False
        open_to_all = self._refusal is None
        if open_to_all:
            for gateway, turn in self._keeper.grants(self._load.running, self._load.waiting, self._now()):
                self._server.grant(gateway, [Turn(*turn)])
                self._unsent.set()
        by_turn = open_to_all and self._keeper.by_turn
        if by_turn != self._announcer.replica.by_turn:
            self._announcer.update(by_turn=by_turn)

    async def _look(self) -> None:
        """What changes though nothing comes in."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for answer in self._answers.values():
                self._keeper.served(answer.key, cost(answer.counts))
            if self._keeper.by_turn:
                self._grant_soon()  # turns that nobody took
            age = self._engine.step_age(self._awake())
            if 0 < self._step_timeout < age and not self.died.is_set():
                self._on_death(TimeoutError(f"a step takes longer than {self._step_timeout:g} s"))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    # -- sending -------------------------------------------------------------------------------------------

    async def _flush(self) -> None:
        """Everything that a step gave, to all gateways, in as few messages as possible."""
        while True:
            await self._unsent.wait()
            self._unsent.clear()
            try:
                await self._server.flush()
            except Exception:  # the frames are kept: a gateway that misses one asks for it
                logger.exception("frames could not be sent")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
