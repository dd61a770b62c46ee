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
from springtide.fabric.connection import Fabric
from springtide.fabric.streams import StreamKey, StreamServer
from springtide.fleet.announcer import Announcer
from springtide.fleet.answer import Answer, Choice
from springtide.fleet.engine_loop import EngineLoop, StepReport
from springtide.fleet.prompts import Prompt, prepare, size
from springtide.text.tokenizer import TokenizerLike

logger = logging.getLogger(__name__)

_MAX_WAITING_PER_SEAT = 8  # sequences that may wait, for each that may run; then others should have them
_ACCEPT_WITHIN_S = 0.2  # a gateway that hears nothing for a second sends the opening again
_MAX_INLINE_BYTES = 2048  # shorter texts are not worth the way to another thread and back
_SLOW_INLINE_S = 0.05  # a template that once took longer is never again rendered in the event loop


class ReplicaHost:
    """Serves one engine under the name that `announcer` announces.

    `died` is set, and every open request has ended, when the engine's thread is no more; the process should end,
    with `epitaph` for a reason.
    """

    def __init__(self, fabric: Fabric, announcer: Announcer, engine: Engine, tokenizer: TokenizerLike) -> None:
        replica = announcer.replica
        self.died = asyncio.Event()
        self.epitaph = ""
        self._announcer = announcer
        self._info = engine.info
        self._tokenizer = tokenizer
        self._engine = EngineLoop(engine, on_report=self._on_report, on_death=self._on_death)
        self._server = StreamServer(fabric, replica.node, replica.id, on_open=self._on_open, on_cancel=self._on_cancel)
        self._answers: dict[StreamKey, Answer] = {}
        self._by_sequence: dict[str, tuple[Answer, Choice]] = {}
        self._num_open = 0  # choices of all open answers
        self._max_open = self._info.max_num_seqs * (1 + _MAX_WAITING_PER_SEAT)
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
        await self._server.start()
        info = self._info
        self._announcer.update(
            state="ready",
            context_length=info.context_length,
            max_num_seqs=info.max_num_seqs,
            numerics=info.numerics,
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

    def _on_open(self, key: StreamKey, request: Request) -> None:
        answer = Answer(key, request)
        self._answers[key] = answer
        self._num_open += request.num_choices
        self._idle.clear()
        try:
            self._admit(request)
        except RequestError as error:
            self._end(answer, "failed", error)
        else:
            self._spawn(self._open(answer))

    def _admit(self, request: Request) -> None:
        """
        Raises:
            Overloaded: not here, or not now.
            InvalidRequest: nowhere and never.
        """
        if self._refusal is not None:
            raise Overloaded(self._refusal)
        if request.num_choices > self._max_open:
            raise InvalidRequest(f"{request.num_choices} choices at once; at most {self._max_open} fit", param="n")
        if self._num_open > self._max_open:
            raise Overloaded(f"{self._num_open} sequences run or wait here; {self._max_open} is the most")

    async def _open(self, answer: Answer) -> None:
        """Tokenise, accept, and hand over to the engine; or refuse."""
        try:
            answer.begin(await self._prepare(answer.request), self._tokenizer)
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
        self._announce_load(report.load)

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
        self._num_open -= answer.request.num_choices
        if not self._answers:
            self._idle.set()

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
