"""When somebody who says nothing is given up, and when not."""

from __future__ import annotations

from springtide.fabric.awake import AwakeClock
from springtide.fabric.patience import ANSWER_S, SILENCE_S, SUSPECT_ANSWER_S, Patience


def lost_after(patience: Patience, *, step: float = 0.1, leaves: bool = True) -> float:
    """Seconds until it is given up, looking at it every `step`."""
    for look in range(1, 100):
        now = look * step
        verdict = patience.verdict(now)
        if verdict == "lost":
            return now
        if verdict == "ask":
            patience.asked()
            if leaves:
                patience.left(now)
    return float("inf")


def test_two_questions_without_answer_end_it_within_two_seconds() -> None:
    assert SILENCE_S + 2 * ANSWER_S < lost_after(Patience(0.0)) <= 2.1


def test_one_who_is_said_to_be_gone_is_asked_at_once_and_given_up_sooner() -> None:
    patience = Patience(0.0)
    patience.suspect()
    assert 2 * SUSPECT_ANSWER_S < lost_after(patience) <= 0.9


def test_an_answer_ends_all_doubt() -> None:
    patience = Patience(0.0)
    patience.suspect()
    patience.asked()
    patience.left(0.0)
    patience.heard(0.2)
    assert patience.verdict(0.2 + SILENCE_S) == "wait" and not patience.asking


def test_a_question_that_does_not_leave_us_counts_against_nobody() -> None:
    patience = Patience(0.0)
    assert lost_after(patience, leaves=False) == float("inf")
    patience.stuck()
    assert patience.verdict(20.0) == "ask"


def test_one_with_good_reasons_may_be_silent_for_longer() -> None:
    patience = Patience(0.0)
    patience.excuse(5.0)
    patience.heard(1.0)
    assert patience.verdict(5.0 + SILENCE_S) == "wait"
    assert patience.verdict(5.1 + SILENCE_S) == "ask"


def test_the_clock_stands_still_while_we_sleep() -> None:
    times = iter([0.0, 0.1, 0.3, 60.3, 60.4])
    clock = AwakeClock(0.1, lambda: next(times))
    readings = [clock() for _ in range(4)]
    assert [round(reading, 6) for reading in readings] == [0.1, 0.3, 0.4, 0.5]
