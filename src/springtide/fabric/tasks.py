"""Two small things that background tasks need. `asyncio.wait_for` before Python 3.12 loses a cancel that comes in
the moment of its success, and nats-py is built on it: so neither is done in the obvious way."""

from __future__ import annotations

import asyncio
from typing import Any


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
