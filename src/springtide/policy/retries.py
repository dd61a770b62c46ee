"""When a request may be tried again, which replicas are left alone for a while, and when a second one is asked. Knows
counts and seconds; nothing of replicas, sockets or clocks. `now` is in seconds, of any clock that only goes forward.
"""

from __future__ import annotations

from collections import deque
from typing import Literal, NamedTuple, TypeAlias

BreakerState = Literal["closed", "open", "half-open"]
Ticket: TypeAlias = int


class RetryBudget:
    """How many retries one gateway may send: a share of its requests, and a few a second whatever comes.

    When a fleet is in trouble every request wants to be tried again, and the retries keep it in trouble (Google's "Site
    Reliability Engineering", chapter 21). A share bounds what they add; the floor lets a quiet gateway retry at all.
    Who finds the budget empty should wait `seconds_until` rather than fail: nothing need be lost for it.

    Args:
        share: retries that each request adds.
        floor_per_s: retries that each second adds.
        most: retries that can be saved up; so many are there at the start.
    """

    def __init__(self, now: float, *, share: float = 0.2, floor_per_s: float = 2.0, most: float = 50.0) -> None:
        assert share >= 0 and floor_per_s > 0 and most >= 1
        self._share = share
        self._floor_per_s = floor_per_s
        self._most = most
        self._saved = most
        self._filled_at = now

    def requested(self) -> None:
        """A request came in: a first attempt, not a retry."""
        self._saved = min(self._most, self._saved + self._share)

    def take(self, now: float) -> bool:
        """Whether one retry may be sent now; if so, it is spent."""
        self._fill(now)
        if self._saved < 1:
            return False
        self._saved -= 1
        return True

    def seconds_until(self, now: float) -> float:
        """How long until a retry may be sent, at the latest."""
        self._fill(now)
        return max(0.0, 1 - self._saved) / self._floor_per_s

    def _fill(self, now: float) -> None:
        self._saved = min(self._most, self._saved + self._floor_per_s * max(0.0, now - self._filled_at))
        self._filled_at = max(self._filled_at, now)


class _Failure(NamedTuple):
    at: float
    successes: int  # so many came before it, ever


class Breaker:
    """Whether one replica is trusted with requests.

    *Closed*: it is. After `failures` of them within `window_s`, with no more successes than failures among them, it is
    *open*: left alone for `cool_down_s`. Then *half-open*: one attempt at a time probes it. The first success closes
    it; a failure opens it again, for twice as long, up to `longest_s`.

    Each attempt has a ticket, and says once what came of it. What came of attempts from before the state changed says
    nothing about now, and is ignored. A probe that says nothing for `probe_s` gives way to the next.
    """

    def __init__(
        self,
        *,
        failures: int = 5,
        window_s: float = 10.0,
        cool_down_s: float = 2.0,
        longest_s: float = 60.0,
        probe_s: float = 30.0,
    ) -> None:
        assert failures >= 1
        self._window_s = window_s
        self._shortest_s = cool_down_s
        self._longest_s = longest_s
        self._probe_s = probe_s
        self._failures: deque[_Failure] = deque(maxlen=failures)
        self._successes = 0
        self._current: Ticket = 0  # the only one whose outcome counts
        self._cool_down_s = cool_down_s  # of the next time
        self._open_until: float | None = None
        self._probe_until: float | None = None

    def state(self, now: float) -> BreakerState:
        if self._open_until is None:
            return "closed"
        return "open" if now < self._open_until else "half-open"

    def admits(self, now: float) -> bool:
        """Whether an attempt may be sent now."""
        return self._open_until is None or (now >= self._open_until and not self._probing(now))

    def attempt(self, now: float) -> Ticket | None:
        """An attempt is sent: its ticket. None if it may not be."""
        if not self.admits(now):
            return None
        if self._open_until is not None:
            self._current += 1
            self._probe_until = now + self._probe_s
        return self._current

    def succeeded(self, ticket: Ticket) -> None:
        """The replica has answered."""
        if ticket != self._current:
            return
        self._successes += 1
        if self._open_until is not None:
            self._close()

    def failed(self, ticket: Ticket, now: float) -> None:
        """It died, kept silent or talked nonsense."""
        if ticket != self._current:
            return
        self._failures.append(_Failure(now, self._successes))
        if self._open_until is not None or self._too_many():
            self._open(now)

    def dropped(self, ticket: Ticket) -> None:
        """It says nothing about the replica: it was refused because there was no room, or the client left."""
        if ticket == self._current:
            self._probe_until = None

    def _probing(self, now: float) -> bool:
        return self._probe_until is not None and now < self._probe_until

    def _too_many(self) -> bool:
        failures = self._failures
        if len(failures) < (failures.maxlen or 0) or failures[-1].at - failures[0].at > self._window_s:
            return False
        return failures[-1].successes - failures[0].successes <= len(failures)

    def _open(self, now: float) -> None:
        self._current += 1
        self._open_until, self._probe_until = now + self._cool_down_s, None
        self._cool_down_s = min(2 * self._cool_down_s, self._longest_s)

    def _close(self) -> None:
        self._current += 1
        self._open_until = self._probe_until = None
        self._cool_down_s = self._shortest_s
        self._failures.clear()


def hedge(waited_s: float, budget: RetryBudget, now: float, *, after_s: float | None = None) -> bool:
    """Whether to ask a second replica too, and take whichever speaks first; a retry is spent on it.

    Off by default: it answers a few slow ones sooner at the price of doing work twice (Dean and Barroso 2013, "The Tail
    at Scale", who advise to wait for as long as 95 % take). The first attempt goes on; the loser is cancelled.

    Args:
        waited_s: since the first attempt was sent, without a token.
        after_s: how long is too long; None: never ask twice.
    """
    return after_s is not None and waited_s >= after_s and budget.take(now)
