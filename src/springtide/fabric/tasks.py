"""What background tasks need. `asyncio.wait_for` before Python 3.12 loses a cancel that comes in the moment of its
success, and nats-py is built on it: so sleeping and ending are not done in the obvious way."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any

log = logging.getLogger(__name__)


async def sleep_until(event: asyncio.Event, seconds: float) -> None:
    """Sleep until the event is set, `seconds` at most, and clear it."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
    event.clear()


async def end(task: asyncio.Task[Any] | None) -> None:
    """Cancel a task that runs for ever, again if need be, and wait until it is over."""
    while task is not None and not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=0.5)


def call_all(callbacks: Iterable[Callable[[], None]]) -> None:
    """Call each; one that fails is logged, and keeps neither the others nor the caller from going on."""
    for callback in list(callbacks):
        try:
            callback()
        except Exception:
            log.exception("a callback of the fabric failed")
