"""When somebody who says nothing is given up, and when not."""

from __future__ import annotations

from springtide.fabric.awake import AwakeClock
from springtide.fabric.patience import LEAST_ANSWER_S, MOST_ANSWER_S, SILENCE_S, SUSPECT_ANSWER_S, Patience


def lost_after(patience: Patience, *, since: float = 0.0, step: float = 0.1, leaves: bool = True) -> float:
    """Seconds until it is given up, looking at it every `step`."""
    for look in range(1, 100):
        now = since + look * step
        verdict = patience.verdict(now)
        if verdict == "lost":
            return now - since
        if verdict == "ask":
            patience.asked()
            if leaves:
                patience.left(now)
    return float("inf")


def speaking(patience: Patience, *, every: float, times: int, since: float = 0.0) -> float:
    """Let it be heard so often; when it was last."""
    for number in range(1, times + 1):
        patience.heard(since + number * every)
    return since + times * every


def test_two_questions_without_answer_end_it_in_about_a_second() -> None:
    assert SILENCE_S + 2 * LEAST_ANSWER_S < lost_after(Patience(0.0)) <= 1.5


def test_one_who_speaks_often_is_given_up_sooner_and_one_who_is_slow_later() -> None:
    quick, slow = Patience(0.0), Patience(0.0)
    at = speaking(quick, every=0.05, times=400)
    assert quick.answer_s == LEAST_ANSWER_S
    assert lost_after(quick, since=at, step=0.01) < 0.75
    speaking(slow, every=0.2, times=100)
    assert 0.39 < slow.answer_s <= MOST_ANSWER_S


def test_a_slow_answer_earns_more_time_and_a_prompt_life_takes_it_back() -> None:
    patience = Patience(0.0)
    at = speaking(patience, every=0.05, times=400)
    given_up = at + lost_after(patience, since=at)
    patience.heard(given_up + 0.1)  # it lived: we were hasty
    assert patience.answer_s == MOST_ANSWER_S
    speaking(patience, every=0.05, times=600, since=given_up + 0.1)
    assert patience.answer_s == LEAST_ANSWER_S


def test_a_pause_that_no_patience_would_have_outlasted_teaches_nothing() -> None:
    patience = Patience(0.0)
    at = speaking(patience, every=0.05, times=400)
    patience.heard(at + lost_after(patience, since=at) + 5.0)
    assert patience.answer_s == LEAST_ANSWER_S


def test_what_was_excused_or_before_it_had_reason_to_speak_teaches_nothing() -> None:
    patience = Patience(0.0)
    at = speaking(patience, every=0.05, times=400)
    patience.begin(at + 1.0)
    patience.excuse(at + 2.0)
    patience.heard(at + 1.9)
    assert patience.answer_s == LEAST_ANSWER_S


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
