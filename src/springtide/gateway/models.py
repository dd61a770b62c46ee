"""Which models exist: those that run somewhere, and those that should. A model whose only replica is just
restarting exists, and its requests wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from springtide.core.cluster import Deployment, Replica
from springtide.core.errors import ModelNotFound
from springtide.fabric.desired import Registry
from springtide.fabric.tasks import sleep_until

log = logging.getLogger(__name__)

_READ_EVERY_S = 10.0  # should the word of a change be lost
_NAMED = 20  # models listed in an error


class Models:
    """The names that clients may ask for. `running` gives the models that have a living replica."""

    def __init__(self, deployments: Registry[Deployment], running: Callable[[], set[str]]) -> None:
        self._registry = deployments
        self._running = running
        self._deployed: set[str] = set()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Knows the deployments when this returns, if the registry could be read; else as soon as it can be."""
        await self._registry.watch(self._changed.set)
        await self._read()
        self._task = asyncio.create_task(self._follow(), name="models")

    async def stop(self) -> None:
        await self._registry.unwatch()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def names(self) -> list[str]:
        return sorted(self._deployed | self._running())

    def check(self, name: str) -> None:
        """Raises ModelNotFound, which names those that exist."""
        if name in self._deployed or name in self._running():
            return
        names = self.names()
        known = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
        raise ModelNotFound(
            f"the model {name[:100]!r} does not exist",
            hint=f"this platform has: {known}" if names else "no model is deployed here yet",
            param="model",
        )

    async def _follow(self) -> None:
        while True:
            await sleep_until(self._changed, _READ_EVERY_S)
            await self._read()

    async def _read(self) -> None:
        try:
            self._deployed = {deployment.name for deployment in (await self._registry.items()).values()}
        except Exception as error:
            log.warning("the deployments can't be read, going on with those known: %s", error)


def model_object(name: str, replicas: list[Replica]) -> dict[str, Any]:
    """A model as OpenAI's list shows it, with vLLM's `max_model_len`."""
    lengths = [replica.context_length for replica in replicas if replica.context_length]
    return {
        "id": name,
        "object": "model",
        "created": int(min((replica.started for replica in replicas), default=0)),
        "owned_by": "springtide",
        "max_model_len": min(lengths, default=None),
    }
