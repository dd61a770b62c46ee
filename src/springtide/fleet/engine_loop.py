"""The thread that owns an engine. Knows steps and the order of commands; nothing of text, requests or sockets.

The event loop submits and cancels; between two steps the thread applies all that was asked. What a step gave comes
back to the event loop as one `StepReport`. The thread is never more than a few reports ahead of the event loop, so
that a cancelled sequence does not run on while nobody listens.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from springtide.core.engine_api import Engine, EngineLoad, SequenceOutput, SequenceRequest
from springtide.core.errors import RequestError

logger = logging.getLogger(__name__)

_MAX_UNREAD_REPORTS = 4
_MAX_FAILED_STEPS = 3  # in a row; then the engine is broken, not a sequence
_CLOSE_TIMEOUT = 5.0


@dataclass(slots=True)
class StepReport:
    """What became of the commands and the step since the last report.

    `refused` holds what the engine said to sequences that it did not take.
    """

    outputs: list[SequenceOutput] = field(default_factory=list)
    refused: list[tuple[str, RequestError]] = field(default_factory=list)
    load: EngineLoad = field(default_factory=EngineLoad)


class EngineLoop:
    """Runs an engine in a thread. All methods and both callbacks belong to the event loop in which `start` was
    called.

    Args:
        on_report: gets what each step gave.
        on_death: gets the error that ended the thread, at most once; nothing follows it.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        on_report: Callable[[StepReport], None],
        on_death: Callable[[BaseException], None],
    ) -> None:
        self._engine = engine
        self._on_report = on_report
        self._on_death = on_death
        self._commands: SimpleQueue[SequenceRequest | str | None] = SimpleQueue()  # add, cancel, close
        self._unread = threading.Semaphore(_MAX_UNREAD_REPORTS)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._phase = 0  # a new number for each step and each pause between two; odd ones are steps
        self._seen_phase = 0
        self._seen_at = 0.0
        # Of the thread alone:
        self._ids: set[str] = set()
        self._failed_steps = 0

    def start(self) -> None:
        """Start the thread."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, sequences: Sequence[SequenceRequest]) -> None:
        """Queue sequences; they join the next step if there is room."""
        for sequence in sequences:
            self._commands.put(sequence)

    def cancel(self, sequence_id: str) -> None:
        """Take a sequence out before the next step. Outputs of steps already run may still be reported."""
        self._commands.put(sequence_id)

    def step_age(self, now: float) -> float:
        """Seconds that the present step has taken, as far as somebody can tell who asks now and then; 0 between two.
        `now` is in seconds of any clock that only goes forward."""
        phase = self._phase
        if phase != self._seen_phase:
            self._seen_phase, self._seen_at = phase, now
        return now - self._seen_at if phase % 2 else 0.0

    async def close(self) -> None:
        """End the thread after the step that runs now, and close the engine."""
        self._closing = True
        self._commands.put(None)
        self._unread.release()
        await asyncio.to_thread(self._thread.join, _CLOSE_TIMEOUT)
        if self._thread.is_alive():
            logger.warning("the engine is still in a step after %.0f s; leaving it behind", _CLOSE_TIMEOUT)

    def _run(self) -> None:
        try:
            while not self._closing:
                report = StepReport()
                self._apply_commands(report)
                if not self._closing:
                    self._step(report)
                    self._deliver(report)
        except BaseException as error:
            logger.exception("the engine's thread died")
            self._call(self._on_death, error)
        finally:
            self._engine.close()

    def _apply_commands(self, report: StepReport) -> None:
        """All commands that are there; waits for one if there is nothing else to do."""
        try:
            command = self._commands.get(block=not self._engine.has_work())
            while command is not None:
                if isinstance(command, str):
                    self._ids.discard(command)
                    self._engine.cancel(command)
                else:
                    self._add(command, report)
                command = self._commands.get_nowait()
        except Empty:
            pass

    def _add(self, sequence: SequenceRequest, report: StepReport) -> None:
        try:
            self._engine.add(sequence)
            self._ids.add(sequence.id)
        except RequestError as error:
            report.refused.append((sequence.id, error))
        except Exception as error:
            logger.exception("the engine could not take a sequence")
            report.refused.append((sequence.id, RequestError(f"the engine failed: {_describe(error)}")))

    def _step(self, report: StepReport) -> None:
        """One step, if there is something to do; if it raises, all sequences end with that error."""
        try:
            if self._engine.has_work():
                self._phase += 1
                try:
                    report.outputs = self._engine.step()
                finally:
                    self._phase += 1
                self._failed_steps = 0
        except Exception as error:
            self._failed_steps += 1
            if self._failed_steps >= _MAX_FAILED_STEPS:
                raise
            logger.exception("an engine step failed; its sequences end here")
            report.outputs = self._fail_all(error)
        self._ids.difference_update(output.id for output in report.outputs if output.finish_reason)
        report.load = self._engine.load()

    def _fail_all(self, error: Exception) -> list[SequenceOutput]:
        """Nobody knows how far the step got: none of its sequences can be trusted any more."""
        for sequence_id in self._ids:
            self._engine.cancel(sequence_id)
        message = f"the engine failed: {_describe(error)}"
        return [SequenceOutput(id=id, token_ids=[], finish_reason="error", error=message) for id in self._ids]

    def _deliver(self, report: StepReport) -> None:
        self._unread.acquire()
        self._call(self._read, report)

    def _read(self, report: StepReport) -> None:
        self._unread.release()
        if not self._closing:
            self._on_report(report)

    def _call(self, function: Callable[..., None], argument: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, argument)
        except RuntimeError:  # the event loop is closed: nobody is left to tell
            self._closing = True


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
