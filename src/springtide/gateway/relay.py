"""One admitted request, from its first attempt to its last byte: frames to client, and exactly one Usage.

Whatever ends it (the engine, a lost replica, the client that leaves, a deadline, the end of this process), it
ends once, here: the attempt is closed, the usage is written down, and only then do the last bytes go out. Just what
another connection goes on with is accounted for there, not here.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from typing import Protocol

import msgspec

from springtide.core.cluster import KeyRecord
from springtide.core.errors import (
    DeadlineExceeded,
    GatewayStopping,
    Overloaded,
    ReplicaLost,
    RequestError,
    TakenOver,
)
from springtide.core.request import End, Outcome, Usage
from springtide.fabric.streams import Frame
from springtide.gateway import sse
from springtide.gateway.answer import WholeAnswer
from springtide.gateway.dispatch import Dispatch, Dispatcher
from springtide.gateway.fields import name_ignored
from springtide.gateway.http import Exchange, Header, error_object
from springtide.gateway.idempotency import Position
from springtide.gateway.metrics import Metrics
from springtide.gateway.openai import Call
from springtide.gateway.resumable import ResumableWriter
from springtide.gateway.trace import Trace

log = logging.getLogger(__name__)

_LEFT_EARLY = 499  # in the log only, as nginx has it: the client did not wait for a status
_NO_CAPACITY_RETRY_S = 10.0  # where nothing moves, and so nobody can say when something will


class UsageSink(Protocol):
    async def record(self, usage: Usage) -> None:
        """Returns once the record can't be lost any more."""


class RelayContext(msgspec.Struct, frozen=True, kw_only=True):
    """What the relays of one gateway share. Times in seconds."""

    gateway: str
    dispatcher: Dispatcher
    usage: UsageSink
    metrics: Metrics
    queue_timeout: float
    silent_wait: float
    heartbeat_every: float
    send_timeout: float


class Relay:
    """See the module. `run` is the task; `tick` and `interrupt` are how others reach into it.

    `after` is what the client has already of the stream; `before` the dispatch of an earlier connection of the same
    request. `released` is set once another connection may go on with the answer, if it is to.
    """

    def __init__(
        self,
        context: RelayContext,
        exchange: Exchange,
        call: Call,
        key: KeyRecord,
        trace: Trace,
        *,
        after: Position | None = None,
        before: Dispatch | None = None,
    ) -> None:
        self.dispatch = context.dispatcher.dispatch(call.request, trace, before)
        self.released = asyncio.Event()
        self._context = context
        self._exchange = exchange
        self._call = call
        self._key = key
        self._trace = trace
        self._after = after
        self._task: asyncio.Task[None] | None = None
        self._begun = time.monotonic()  # to wait for a word
        self._told_waiting = False
        self._first_token: float | None = None  # seconds after `created`
        self._settling = False  # the outcome is known; what is left is accounting and the last bytes
        self._interrupted = False
        self._interruption: RequestError | None = None
        self._closing = False  # all is accounted for; the last bytes are going out
        self._gave_up = False  # the client does not read them, and is not waited for
        self._pulse: asyncio.Task[None] | None = None
        self._pulsed = 0.0
        self._writer: sse.StreamWriter | None = None  # of a streamed answer
        self._whole: WholeAnswer | None = None  # of one in one piece

    @property
    def fingerprint(self) -> str:
        """Of what was asked; "" if it is not to be found again."""
        return self._call.request.fingerprint

    async def run(self) -> None:
        """Answer the client and account for it. Raises nothing but cancellation from outside."""
        self._task = asyncio.current_task()
        outcome, error = await self._answer()
        self._settling = True
        handed_over = self._hand_over(error)
        self.dispatch.cancel()
        self.released.set()
        await self._finish_pulse()
        usage = self._usage(outcome)
        self._trace.note("handed over" if handed_over else "ended", self._in_short(usage, error))
        if not handed_over:
            await self._record(usage)
        self._closing = True
        try:
            await self._last_bytes(outcome, error)
        except asyncio.CancelledError:
            if not self._gave_up:
                raise
        self._log(usage, error)

    def interrupt(self, error: RequestError | None) -> None:
        """End it now: with an error for the client, or, with None, because the client has gone."""
        if not self._settling and not self._interrupted:
            self._interrupted, self._interruption = True, error
            if self._task is not None:  # else it has yet to begin, and will find the note
                self._task.cancel()

    def tick(self, now: float) -> None:
        """Look at the clock (monotonic): deadlines, clients that don't read, heartbeats."""
        if self._is_stuck(now):
            self._give_up()
        elif not self._settling:
            self._tick_answering(now)

    def _is_stuck(self, now: float) -> bool:
        """Whether the client has left unread what we send it."""
        since = self._exchange.blocked_since
        return since is not None and now - since > self._context.send_timeout

    def _give_up(self) -> None:
        """Treat a client that does not read as one that has gone."""
        if self._pulse is not None:
            self._pulse.cancel()
        if not self._settling:
            self.interrupt(None)
        elif self._closing and not self._gave_up and self._task is not None:
            self._gave_up = True
            self._task.cancel()

    def _tick_answering(self, now: float) -> None:
        deadline = self._call.request.deadline
        if deadline is not None and time.time() >= deadline:
            self.interrupt(DeadlineExceeded("the deadline of this request has passed"))
            return
        self.dispatch.tick(now)
        if not self.dispatch.speaking:
            self._tick_waiting(now - self._begun, now)

    def _tick_waiting(self, waited: float, now: float) -> None:
        context = self._context
        if self.dispatch.waiting and not self._told_waiting:
            self._told_waiting = True
            self._trace.note("waiting", context.dispatcher.room.why_waiting(self._call.request))
        if waited >= context.queue_timeout:
            self.interrupt(self._nobody_could(waited))
        elif self._call.stream and waited >= context.silent_wait and self._may_pulse(now):
            self._pulsed = now
            self._pulse = asyncio.create_task(self._heartbeat())

    def _may_pulse(self, now: float) -> bool:
        if self._exchange.blocked_since is not None:
            return False
        return self._pulse is None or (self._pulse.done() and now - self._pulsed >= self._context.heartbeat_every)

    def _nobody_could(self, waited: float) -> RequestError:
        dispatcher, request = self._context.dispatcher, self._call.request
        message = f"nobody could take it within {waited:.0f} seconds: {dispatcher.room.why_waiting(request)}"
        retry_after = dispatcher.expected_wait(request) or _NO_CAPACITY_RETRY_S
        if self._first_token is not None:
            return ReplicaLost(f"{message}; {self.dispatch.counts.completion} tokens of the answer had been said")
        return Overloaded(message, retry_after=retry_after)

    async def _heartbeat(self) -> None:
        await self._start_stream()
        await self._exchange.write(sse.HEARTBEAT)
        self._context.metrics.heartbeats.inc()

    async def _finish_pulse(self) -> None:
        """Two may not write to the client at once."""
        if self._pulse is not None:
            await asyncio.gather(self._pulse, return_exceptions=True)
            self._pulse = None

    # ------------------------------------------------------------------------------------------------------
    # Answering.

    async def _answer(self) -> tuple[Outcome, RequestError | None]:
        """All of the answer but its last bytes."""
        if self._interrupted:
            return self._interrupted_outcome()
        try:
            await (self._stream() if self._call.stream else self._collect())
            return "finished", None
        except asyncio.CancelledError:
            if not self._interrupted or self._task is None:
                raise
            self._task.uncancel()
            return self._interrupted_outcome()
        except RequestError as error:
            return "failed", error
        except Exception:
            log.exception("request %s failed inside the gateway", self._call.request.id)
            return "failed", RequestError("the gateway failed on this request", code="internal_error")

    def _interrupted_outcome(self) -> tuple[Outcome, RequestError | None]:
        return ("cancelled" if self._interruption is None else "failed"), self._interruption

    async def _stream(self) -> None:
        while True:
            frames = await self._next_frames()
            data = self._written(frames)
            if data:
                if self._pulse is not None:
                    await self._finish_pulse()
                if not self._exchange.started:
                    await self._start_stream()
                await self._exchange.write(data)
            if self._is_over(frames[-1].end):
                return

    async def _collect(self) -> None:
        self._whole = WholeAnswer(self._call)
        while True:
            frames = await self._next_frames()
            self._whole.add(frames)
            if self._is_over(frames[-1].end):
                return

    async def _next_frames(self) -> list[Frame]:
        frames = await self.dispatch.frames()
        self._begun, self._told_waiting = time.monotonic(), False
        if self._first_token is None and any(frame.deltas for frame in frames):
            self._first_token = time.time() - self._call.request.created
        return frames

    def _written(self, frames: list[Frame]) -> bytes:
        """The frames as events."""
        writer, numerics = self._writer, self.dispatch.numerics
        if writer is None:
            writer = self._writer = self._new_writer(numerics)
        elif writer.numerics != numerics:
            writer.speak_as(numerics)
        return writer.write(frames)

    def _is_over(self, end: End | None) -> bool:
        """Raises the error that an attempt ended with."""
        if end is None:
            return False
        if end.outcome == "finished":
            return True
        if end.error is None:
            raise ReplicaLost("the replica ended the request without an answer")
        raise RequestError.from_wire(end.error)

    def _new_writer(self, numerics: str) -> sse.StreamWriter:
        if self.fingerprint:
            return ResumableWriter(self._call, numerics, self._after)
        return sse.StreamWriter(self._call, numerics)

    async def _start_stream(self) -> None:
        if not self._exchange.started:
            await self._exchange.start_stream(self._headers())

    async def _last_bytes(self, outcome: Outcome, error: RequestError | None) -> None:
        exchange, call = self._exchange, self._call
        if outcome == "cancelled":
            return
        if error is not None:
            if exchange.started:
                await exchange.end(sse.error_event(error_object(error, exchange.id)))
            else:
                await exchange.respond_error(error)
        elif self._whole is not None:
            body = self._whole.body(self.dispatch.numerics, self.dispatch.counts)
            await exchange.respond(200, body, headers=self._headers())
        elif self._writer is not None:
            usage = self._writer.usage(self.dispatch.counts) if call.include_usage else b""
            await self._start_stream()  # a client may have had all of it already
            await exchange.end(usage + sse.DONE)

    def _headers(self) -> list[Header]:
        ignored = self._call.ignored
        return [(b"x-springtide-ignored", name_ignored(ignored).encode())] if ignored else []

    # ------------------------------------------------------------------------------------------------------
    # Accounting.

    def _hand_over(self, error: RequestError | None) -> bool:
        """Whether another connection goes on with the answer, so that it is accounted for there: one that took it, or
        one that may come to another gateway when this one stops."""
        if isinstance(error, TakenOver):
            self.dispatch.let_go()
            return True
        return isinstance(error, GatewayStopping) and bool(self.fingerprint) and self.dispatch.let_go()

    def _usage(self, outcome: Outcome) -> Usage:
        """The client pays the prompt once and each token of the answer once; each node is paid by its own attempt."""
        request, counts = self._call.request, self.dispatch.counts
        return Usage(
            request_id=self._usage_id(outcome),
            tenant=request.tenant,
            key_id=self._key.id,
            model=request.model,
            gateway=self._context.gateway,
            created=request.created,
            finished=time.time(),
            outcome=outcome,
            prompt_tokens=counts.prompt,
            completion_tokens=counts.completion,
            cached_tokens=counts.cached,
            first_token_s=self._first_token,
            attempts=self.dispatch.attempts,
        )

    def _usage_id(self, outcome: Outcome) -> str:
        """Under which the ledger knows it. A request that may come again leaves its id to the run that comes to the
        end of the answer, else that one would be taken for a repetition of this; but what was taken over may have
        come to its end before."""
        request = self._call.request
        if self.fingerprint and outcome != "finished" and not self.dispatch.took_over:
            return f"{request.id}.{secrets.token_hex(4)}"
        return request.id

    async def _record(self, usage: Usage) -> None:
        self._context.metrics.model(usage.model).observe(usage)
        if self._writer is not None:
            self._context.metrics.chunks.inc(self._writer.chunks)
        try:
            await self._context.usage.record(usage)
        except Exception:
            # The record holds no content, and the log is the last place where it can still be found.
            log.exception("usage could not be recorded: %s", msgspec.json.encode(usage).decode())

    def _in_short(self, usage: Usage, error: RequestError | None) -> str:
        known_as = f", in the ledger as {usage.request_id}" if usage.request_id != self._call.request.id else ""
        code = f" ({error.code or error.type}: {error.message})" if error is not None else ""
        return f"{usage.outcome}{code}; tokens: {usage.completion_tokens}, attempts: {len(usage.attempts)}{known_as}"

    def _log(self, usage: Usage, error: RequestError | None) -> None:
        ttft = f"{usage.first_token_s * 1000:.1f}" if usage.first_token_s is not None else "-"
        log.info(
            "request id=%s model=%s tenant=%s status=%d outcome=%s code=%s prompt=%d completion=%d cached=%d "
            "attempts=%d ttft_ms=%s total_ms=%.1f",
            usage.request_id,
            usage.model,
            usage.tenant,
            self._exchange.status or _LEFT_EARLY,
            usage.outcome,
            error.code or error.type if error is not None else "-",
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.cached_tokens,
            len(usage.attempts),
            ttft,
            (usage.finished - usage.created) * 1000,
        )
