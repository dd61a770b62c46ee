"""A clock that stands still while this process does. Patience that is measured with it blames nobody for our own sleep:
a stopped process, a paused machine, an event loop that was busy."""

from __future__ import annotations

import time
from collections.abc import Callable

_LATE_BEATS = 3  # as late as any busy process is now and then


class AwakeClock:
    """Seconds that this process was awake, since some moment. Its owner reads it at least every `beat` seconds from
    the loop that also hears the others; a longer gap between two readings counts as one beat, so that what waits
    in our sockets is heard before anybody's silence is judged."""

    def __init__(self, beat: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._beat = beat
        self._clock = clock
        self._read_at = clock()
        self._awake = self._read_at

    def __call__(self) -> float:
        now = self._clock()
        passed, self._read_at = now - self._read_at, now
        self._awake += passed if passed <= _LATE_BEATS * self._beat else self._beat
        return self._awake
