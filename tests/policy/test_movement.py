"""How long one more would wait, from how fast those before it moved."""

from __future__ import annotations

import pytest

from springtide.policy.movement import Movement, Queue

ACME = Queue("acme", "m")


def moving(movement: Movement, *, every: float, count: int = 20) -> float:
    for i in range(count):
        movement.started(ACME, i * every)
    return count * every


def test_nobody_before_it_is_no_wait_at_all() -> None:
    movement = Movement()
    assert movement.wait(ACME, 0.0) == 0.0
    movement.joined(ACME)
    movement.left(ACME)
    assert movement.wait(ACME, 0.0) == 0.0


def test_where_nothing_moved_nothing_is_known() -> None:
    movement = Movement()
    movement.joined(ACME)
    movement.started(ACME, 0.0)
    assert movement.wait(ACME, 1.0) is None


def test_the_wait_is_the_queue_over_its_speed() -> None:
    movement = Movement()
    for _ in range(30):
        movement.joined(ACME)
    now = moving(movement, every=0.5)
    assert movement.wait(ACME, now) == pytest.approx(15.0)
    assert movement.wait(Queue("other", "m"), now) == 0.0
    assert movement.wait(ACME, now + 100) is None, "that is long ago"
