"""What happened to each request, and when: kept in memory for an hour, bounded in number and bytes.

Holds no content: ids, names, counts, reasons. Of the very long stories the middle is left out, and counted.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

import msgspec

KEEP_S = 3600.0
MAX_TRACES = 50_000
MAX_BYTES = 64 * 2**20
MAX_EVENTS = 200  # of one request
_FIRST_EVENTS = 50  # of which so many are its beginning
_EVENT_BYTES = 200  # what one takes, beside its words: roughly
_TRACE_BYTES = 600


class Event(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One thing that happened, at `at` (unix seconds); `attempt` 0 and empty names: not of one attempt.

    `what`: admitted, waiting, routed, opened, accepted, first token, hedged, lost, resumed, taken over, handed
    over, given up, ended. `why` is for people.
    """

    at: float
    what: str
    why: str = ""
    attempt: int = 0
    node: str = ""
    replica: str = ""


class Trace:
    """The story of one request, in order. `left_out` counts events of its middle that there was no room for."""

    __slots__ = ("_book", "begun", "events", "forgotten", "left_out", "size")

    def __init__(self, book: TraceBook) -> None:
        self.events: list[Event] = []
        self.left_out = 0
        self.begun = 0.0  # the last time, by the book's clock
        self.size = _TRACE_BYTES  # bytes, roughly
        self.forgotten = False  # the book has no room for it: its request may go on, but nobody can read of it
        self._book = book

    def note(self, what: str, why: str = "", *, attempt: int = 0, node: str = "", replica: str = "") -> None:
        if self.forgotten:
            return
        event = Event(time.time(), what, why, attempt, node, replica)
        added = _EVENT_BYTES + len(why)
        if len(self.events) >= MAX_EVENTS:
            added -= _EVENT_BYTES + len(self.events.pop(_FIRST_EVENTS).why)
            self.left_out += 1
        self.events.append(event)
        self.size += added
        self._book._grow(added)


class TraceBook:
    """The traces of one gateway. `clock` in seconds, monotonic."""

    def __init__(
        self,
        *,
        max_traces: int = MAX_TRACES,
        max_bytes: int = MAX_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_traces = max_traces
        self._max_bytes = max_bytes
        self._clock = clock
        self._traces: OrderedDict[str, Trace] = OrderedDict()  # the one that was begun longest ago first
        self._bytes = 0

    def begin(self, request_id: str) -> Trace:
        """The trace of a request. One that comes again under the same id goes on with the story that there is."""
        trace = self._traces.pop(request_id, None)
        if trace is None:
            trace = Trace(self)
            self._bytes += trace.size
        trace.begun = self._clock()
        self._traces[request_id] = trace
        self._forget_old()
        return trace

    def events(self, request_id: str) -> tuple[list[Event], int]:
        """What is known of a request, and how many events of its middle are not."""
        trace = self._traces.get(request_id)
        return (list(trace.events), trace.left_out) if trace is not None else ([], 0)

    def __len__(self) -> int:
        return len(self._traces)

    def _grow(self, added: int) -> None:
        self._bytes += added
        if self._bytes > self._max_bytes:
            self._forget_old()

    def _forget_old(self) -> None:
        oldest = self._clock() - KEEP_S
        while self._traces:
            request_id, trace = next(iter(self._traces.items()))
            fits = len(self._traces) <= self._max_traces and self._bytes <= self._max_bytes
            if fits and trace.begun >= oldest:
                return
            del self._traces[request_id]
            self._bytes -= trace.size
            trace.forgotten = True
