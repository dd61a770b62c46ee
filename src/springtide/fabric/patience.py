"""Whether somebody who says nothing still lives, as a small state machine. Knows no clock and no message: whoever asks
it tells the time and does the asking."""

from __future__ import annotations

from typing import Literal

SILENCE_S = 0.75
ANSWER_S = 0.5
QUESTIONS = 2
SUSPECT_ANSWER_S = 0.3  # for one whose connection is known to be gone: it is back soon, or never


class Patience:
    """After a silence it wants a question asked; when the second has found no answer it is at its end. Time for an
    answer runs from when the question is known to have left us: as long as our own connection is stuck, nobody else
    is to blame."""

    __slots__ = ("_answer_by", "_answer_s", "_excused_until", "_heard_at", "_questions")

    def __init__(self, now: float) -> None:
        self._excused_until = now
        self.heard(now)

    def heard(self, now: float) -> None:
        """It lives."""
        self._heard_at = now
        self._questions = 0
        self._answer_by: float | None = None
        self._answer_s = ANSWER_S

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

    def verdict(self, now: float) -> Literal["wait", "ask", "lost"]:
        if not self._questions:
            silent_since = max(self._heard_at, self._excused_until)
            return "ask" if now - silent_since > SILENCE_S else "wait"
        if self._answer_by is None or now < self._answer_by:
            return "wait"
        return "ask" if self._questions < QUESTIONS else "lost"

    def asked(self) -> None:
        self._questions += 1
        self._answer_by = None

    def left(self, now: float) -> None:
        """The question has left us."""
        if self._questions and self._answer_by is None:
            self._answer_by = now + self._answer_s

    def stuck(self) -> None:
        """It has not: that question does not count."""
        if self._questions and self._answer_by is None:
            self._questions -= 1
