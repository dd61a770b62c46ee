"""Keeps the process of one replica up. Knows when to start it again; nothing of why it should run."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from springtide.core.cluster import Replica
from springtide.fabric.connection import Fabric
from springtide.fleet.announcer import Announcer
from springtide.fleet.children import Child

logger = logging.getLogger(__name__)

_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 10.0
_LONG_UP = 30.0  # seconds after which a process counts as healthy: the next pause is the first again
_POLL = 0.05
_LEAVE_TIME = 2.0  # seconds for an orderly end that waits for no request


class Supervisor:
    """Starts a replica's process, and again whenever it has ended, with a pause that doubles.

    While no process is up, the agent speaks in its place: it is announced as failed, with its last words.
    """

    def __init__(self, fabric: Fabric, replica: Replica, start_process: Callable[[], Child]) -> None:
        self.replica = replica
        self._fabric = fabric
        self._start_process = start_process
        self._child: Child | None = None
        self._obituary: Announcer | None = None
        self._task = asyncio.get_running_loop().create_task(self._keep_up())

    @property
    def pid(self) -> int | None:
        """Of the process that is up, if one is."""
        return self._child.pid if self._child is not None else None

    async def stop(self, grace: float) -> None:
        """End the process: it gets `grace` seconds to finish its requests, then two to leave, then it is killed."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._retract(goodbye=True)
        if self._child is not None:
            await _end(self._child, grace)

    async def _keep_up(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            started = time.monotonic()
            error = await self._run_once()
            if time.monotonic() - started > _LONG_UP:
                pause = _FIRST_PAUSE
            logger.warning("replica %s ended, again in %.1f s: %s", self.replica.id, pause, error)
            await self._mourn(error)
            await asyncio.sleep(pause)
            await self._retract(goodbye=False)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _run_once(self) -> str:
        """Run the process to its end; why it ended."""
        try:
            self._child = child = self._start_process()
        except OSError as error:
            return f"its process can't be started: {error}"
        while not await _ended(child, _LONG_UP):
            pass
        self._child = None
        child.kill_group()
        return child.last_words()

    async def _mourn(self, error: str) -> None:
        replica = msgspec.structs.replace(self.replica, state="failed", error=error)
        self._obituary = Announcer(self._fabric, replica)
        await self._obituary.start()

    async def _retract(self, *, goodbye: bool) -> None:
        if self._obituary is not None:
            await self._obituary.stop(goodbye=goodbye)
            self._obituary = None


async def _end(child: Child, grace: float) -> None:
    child.terminate()
    if not await _ended(child, grace):
        child.abandon()
        if not await _ended(child, _LEAVE_TIME):
            logger.warning("process %d did not end when asked to; killing it", child.pid)
    child.kill_group()
    await _ended(child, _LEAVE_TIME)


async def _ended(child: Child, timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while child.poll() is None:
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(_POLL)
    return True
