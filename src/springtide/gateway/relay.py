"""One admitted request, from its first attempt to its last byte: frames to client, and exactly one Usage.

Whatever ends it (the engine, a lost replica, the client that leaves, a deadline, the end of this process), it
ends once, here: the attempt is closed, the usage is written down, and only then do the last bytes go out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

import msgspec

from springtide.core.cluster import KeyRecord
from springtide.core.errors import DeadlineExceeded, Overloaded, ReplicaLost, RequestError
from springtide.core.request import End, Outcome, TokenCounts, Usage
from springtide.gateway import sse
from springtide.gateway.answer import WholeAnswer
from springtide.gateway.dispatch import Dispatcher
from springtide.gateway.fields import name_ignored
from springtide.gateway.http import Exchange, Header, error_object
from springtide.gateway.metrics import Metrics
from springtide.gateway.openai import Call

log = logging.getLogger(__name__)

_LEFT_EARLY = 499  # in the log only, as nginx has it: the client did not wait for a status


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
    """See the module. `run` is the task; `tick` and `interrupt` are how others reach into it."""

    def __init__(self, context: RelayContext, exchange: Exchange, call: Call, key: KeyRecord) -> None:
        self._context = context
        self._exchange = exchange
        self._call = call
        self._key = key
        self._dispatch = context.dispatcher.dispatch(call.request, self._start_over)
        self._task: asyncio.Task[None] | None = None
        self._begun = time.monotonic()  # to wait for a first token
        self._first_token: float | None = None  # seconds after `created`
        self._settling = False  # the outcome is known; what is left is accounting and the last bytes
        self._interrupted = False
        self._interruption: RequestError | None = None
        self._closing = False  # all is accounted for; the last bytes are going out
        self._gave_up = False  # the client does not read them, and is not waited for
        self._pulse: asyncio.Task[None] | None = None
        self._pulsed = 0.0
        self._counts = TokenCounts()
        self._writer: sse.StreamWriter | None = None  # of a streamed answer
        self._whole: WholeAnswer | None = None  # of one in one piece

    async def run(self) -> None:
        """Answer the client and account for it. Raises nothing but cancellation from outside."""
        self._task = asyncio.current_task()
        outcome, error = await self._answer()
        self._settling = True
        self._dispatch.cancel()
        await self._finish_pulse()
        usage = self._usage(outcome)
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
            self.interrupt(DeadlineExceeded("the deadline that the request itself named has passed"))
        elif self._first_token is None:
            self._tick_waiting(now - self._begun, now)

    def _tick_waiting(self, waited: float, now: float) -> None:
        context = self._context
        if waited >= context.queue_timeout:
            why = context.dispatcher.room.why_waiting(self._call.request)
            self.interrupt(Overloaded(f"nobody could take it within {waited:.0f} seconds: {why}", retry_after=10.0))
        elif self._call.stream and waited >= context.silent_wait and self._may_pulse(now):
            self._pulsed = now
            self._pulse = asyncio.create_task(self._heartbeat())

    def _may_pulse(self, now: float) -> bool:
        return self._pulse is None or (self._pulse.done() and now - self._pulsed >= self._context.heartbeat_every)

    async def _heartbeat(self) -> None:
        await self._start_stream()
        await self._exchange.write(sse.HEARTBEAT)
        self._context.metrics.heartbeats.inc()

    async def _finish_pulse(self) -> None:
        """Two may not write to the client at once."""
        if self._pulse is not None:
            await asyncio.gather(self._pulse, return_exceptions=True)

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
        dispatch, exchange = self._dispatch, self._exchange
        while True:
            frames = await dispatch.frames()
            writer = self._writer or self._new_writer()
            data = writer.write(frames)
            if data:
                if self._first_token is None:
                    await self._first_delta()
                    await self._start_stream()
                dispatch.sent = True
                await exchange.write(data)
            if self._is_over(frames[-1].end):
                return

    async def _collect(self) -> None:
        dispatch = self._dispatch
        while True:
            frames = await dispatch.frames()
            if self._whole is None:
                self._whole = WholeAnswer(self._call)
            if self._first_token is None and any(frame.deltas for frame in frames):
                await self._first_delta()
            self._whole.add(frames)
            if self._is_over(frames[-1].end):
                return

    def _start_over(self) -> None:
        """The attempt was lost before the client had anything of it: its words are void, the wait begins anew."""
        if self._first_token is not None:
            self._begun, self._first_token = time.monotonic(), None
        self._writer = self._whole = None

    def _is_over(self, end: End | None) -> bool:
        """Raises the error that an attempt ended with."""
        if end is None:
            return False
        self._counts = end.counts
        if end.outcome == "finished":
            return True
        if end.error is None:
            raise ReplicaLost("the replica ended the request without an answer")
        raise RequestError.from_wire(end.error)

    def _new_writer(self) -> sse.StreamWriter:
        self._writer = sse.StreamWriter(self._call, self._numerics)
        return self._writer

    async def _first_delta(self) -> None:
        self._first_token = time.time() - self._call.request.created
        await self._finish_pulse()

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
            await exchange.respond(200, self._whole.body(self._numerics, self._counts), headers=self._headers())
        elif self._writer is not None:
            usage = self._writer.usage(self._counts) if call.include_usage else b""
            await exchange.end(usage + sse.DONE)

    def _headers(self) -> list[Header]:
        ignored = self._call.ignored
        return [(b"x-springtide-ignored", name_ignored(ignored).encode())] if ignored else []

    @property
    def _numerics(self) -> str:
        replica = self._dispatch.replica
        return replica.numerics if replica is not None else ""

    # ------------------------------------------------------------------------------------------------------
    # Accounting.

    def _usage(self, outcome: Outcome) -> Usage:
        """The client pays for what the last attempt did; each node is paid by its own attempt."""
        request, attempts = self._call.request, self._dispatch.attempts
        return Usage(
            request_id=request.id,
            tenant=request.tenant,
            key_id=self._key.id,
            model=request.model,
            gateway=self._context.gateway,
            created=request.created,
            finished=time.time(),
            outcome=outcome,
            prompt_tokens=attempts[-1].prompt_tokens if attempts else 0,
            completion_tokens=attempts[-1].completion_tokens if attempts else 0,
            cached_tokens=attempts[-1].cached_tokens if attempts else 0,
            first_token_s=self._first_token,
            attempts=attempts,
        )

    async def _record(self, usage: Usage) -> None:
        self._context.metrics.model(usage.model).observe(usage)
        if self._writer is not None:
            self._context.metrics.chunks.inc(self._writer.chunks)
        try:
            await self._context.usage.record(usage)
        except Exception:
            # The record holds no content, and the log is the last place where it can still be found.
            log.exception("usage could not be recorded: %s", msgspec.json.encode(usage).decode())

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
