"""Whether somebody who says nothing still lives, as a small state machine. Knows no clock and no message: whoever asks
it tells the time and does the asking.

How long to wait for an answer is learnt from how quickly this one has been heard of late, as failure detectors do that
adapt to what is usual (Chen, Toueg and Aguilera 2002; Hayashibara et al. 2004): who speaks every 60 ms is given up in
less than a second, who is slow, or was given up too early before, gets more time.
"""

from __future__ import annotations

from typing import Literal

SILENCE_S = 0.25
LEAST_ANSWER_S = 0.2
MOST_ANSWER_S = 0.5
QUESTIONS = 2
SUSPECT_ANSWER_S = 0.3  # for one whose connection is known to be gone: it is back soon, or never

_MARGIN = 2.0  # times the slowest sign of life of late
_AT_FIRST_S = 0.15  # what we take that to be before we know
_FORGET_S = 3.0  # what it did so long ago counts for a third


class Patience:
    """After a silence it wants a question asked; when the second has found no answer it is at its end. Time for an
    answer runs from when the question is known to have left us: as long as our own connection is stuck, nobody else
    is to blame."""

    __slots__ = ("_answer_by", "_answer_s", "_excused_until", "_heard_at", "_left_at", "_questions", "_slowest")

    def __init__(self, now: float) -> None:
        self._excused_until = now
        self._slowest = _AT_FIRST_S
        self.begin(now)

    def begin(self, now: float) -> None:
        """From now on it has reason to speak. That it was silent until now says nothing."""
        self._heard_at = now
        self._questions = 0
        self._answer_by: float | None = None
        self._left_at: float | None = None
        self._answer_s: float | None = None  # None: as learnt

    def heard(self, now: float) -> None:
        """It lives."""
        self._learn(now)
        self.begin(now)

    def excuse(self, until: float) -> None:
        """It has good reasons for a silence until then."""
        self._excused_until = max(self._excused_until, until)

    def suspect(self) -> None:
        """Somebody says that it is gone: ask now, and wait less."""
        if not self._questions:
            self._heard_at = self._excused_until = float("-inf")
            self._answer_s = SUSPECT_ANSWER_S

    @property
    def asking(self) -> bool:
        return self._questions > 0

    @property
    def doubtful(self) -> bool:
        """Whether it has let a question pass."""
        return self._questions == QUESTIONS

    @property
    def answer_s(self) -> float:
        """Seconds that it has for an answer."""
        if self._answer_s is not None:
            return self._answer_s
        return min(MOST_ANSWER_S, max(LEAST_ANSWER_S, _MARGIN * self._slowest))

    def verdict(self, now: float) -> Literal["wait", "ask", "lost"]:
        if not self._questions:
            return "ask" if now - max(self._heard_at, self._excused_until) > SILENCE_S else "wait"
        if self._answer_by is None or now < self._answer_by:
            return "wait"
        return "ask" if self._questions < QUESTIONS else "lost"

    def asked(self) -> None:
        self._questions += 1
        self._answer_by = None

    def left(self, now: float) -> None:
        """The question has left us."""
        if self._questions and self._answer_by is None:
            self._answer_by = now + self.answer_s
            self._left_at = now if self._left_at is None else self._left_at

    def stuck(self) -> None:
        """It has not: that question does not count."""
        if self._questions and self._answer_by is None:
            self._questions -= 1

    def _learn(self, now: float) -> None:
        """A silence in which nothing was asked, or the time for an answer, is what is usual for it. A pause that no
        patience would have outlasted says nothing."""
        since = self._heard_at if self._left_at is None else self._left_at
        if since < self._excused_until or (took := now - since) > 2 * QUESTIONS * MOST_ANSWER_S:
            return
        if took >= self._slowest:
            self._slowest = took
        else:
            self._slowest += (took - self._slowest) * min(1.0, took / _FORGET_S)
