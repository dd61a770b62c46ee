"""How fast the waiting move, and so how long one more would wait. Knows neither replicas nor HTTP; has no clock.

Under load each queue (the requests of one tenant for one model) moves at a rate of its own, its share, so a queue's own
recent past says best what comes: `waiting / (starts in the last minute / seconds they took)`. Where nothing has
moved, nothing is known, and None says so.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import NamedTuple

WINDOW_S = 60.0
_MOST_STARTS = 256  # remembered of a queue
_FEWEST_STARTS = 8  # fewer are chance
_MOST_QUEUES = 4096


class Queue(NamedTuple):
    tenant: str
    model: str


class Movement:
    """Who waits, and when those before him started, per queue. All times in the seconds of one clock."""

    def __init__(self) -> None:
        self._waiting: defaultdict[Queue, int] = defaultdict(int)
        self._starts: dict[Queue, deque[float]] = {}  # of those who had to wait; longest unchanged first

    def joined(self, queue: Queue) -> None:
        self._waiting[queue] += 1

    def left(self, queue: Queue) -> None:
        """It waits no more, whatever became of it."""
        self._waiting[queue] -= 1
        if not self._waiting[queue]:
            del self._waiting[queue]

    def started(self, queue: Queue, now: float) -> None:
        """One that had waited has found a place."""
        starts = self._starts.pop(queue, None) or deque(maxlen=_MOST_STARTS)
        starts.append(now)
        self._starts[queue] = starts
        if len(self._starts) > _MOST_QUEUES:
            del self._starts[next(iter(self._starts))]

    def wait(self, queue: Queue, now: float) -> float | None:
        """Seconds that one more in this queue would wait; None if nobody can say."""
        waiting = self._waiting.get(queue, 0)
        if not waiting:
            return 0.0
        recent = [at for at in self._starts.get(queue, ()) if now - at <= WINDOW_S]
        if len(recent) < _FEWEST_STARTS:
            return None
        return waiting * max(now - recent[0], 0.001) / len(recent)
