"""Who is asking: API keys as the fabric's registry has them, in memory. Knows no database, and of keys only hashes."""

from __future__ import annotations

import asyncio
import logging

from springtide.core.cluster import KeyRecord
from springtide.core.errors import Overloaded, Unauthorized
from springtide.fabric.desired import Registry
from springtide.fabric.tasks import sleep_until
from springtide.ledger.keys import hash_key

log = logging.getLogger(__name__)

_HINT = "send the header `Authorization: Bearer sk-...`"
_MIN_SHOWN = 20  # of a key shorter than this, its ends would be too much of it
_READ_EVERY_S = 10.0  # should the word of a change be lost
_AGAIN_S = 0.5


class KeyView:
    """Looks keys up for one gateway, in memory. A change reaches it as soon as the registry tells.

    `registry` is `Registry(fabric, "keys", KeyRecord)`, by hash. `ready` is whether it could be read yet.
    """

    def __init__(self, registry: Registry[KeyRecord]) -> None:
        self._registry = registry
        self._by_hash: dict[str, KeyRecord] = {}
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.ready = False

    async def start(self) -> None:
        """Knows the keys when this returns, if the registry could be read; else as soon as it can be."""
        await self._registry.watch(self._changed.set)
        await self._read()
        self._task = asyncio.create_task(self._follow(), name="keys")

    async def stop(self) -> None:
        await self._registry.unwatch()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def lookup(self, authorization: bytes | str | None) -> KeyRecord:
        """The key that an Authorization header's value names.

        Raises:
            Unauthorized: there is none, it is malformed, unknown, or revoked.
            Overloaded: this gateway has not heard of any key yet.
        """
        if authorization is None:
            raise Unauthorized("this needs an API key", hint=_HINT)
        value = authorization.encode(errors="replace") if isinstance(authorization, str) else authorization
        scheme, _, key = value.strip().partition(b" ")
        key = key.strip()
        if scheme.lower() != b"bearer" or not key or b" " in key:
            raise Unauthorized("the Authorization header is malformed", hint=_HINT)
        if not self.ready:
            raise Overloaded("this gateway is still starting", retry_after=1)
        # A look-up by hash takes as long for a key that is nearly right as for any other.
        record = self._by_hash.get(hash_key(key))
        if record is None:
            raise Unauthorized(f"the API key {_shown(key)} is not known here", hint="check it, or make a new one")
        if record.revoked:
            raise Unauthorized(f"the API key {_shown(key)} was revoked", hint="use another, or make a new one")
        return record

    async def _follow(self) -> None:
        while True:
            await sleep_until(self._changed, _READ_EVERY_S)
            if not await self._read():
                self._changed.set()
                await asyncio.sleep(_AGAIN_S)

    async def _read(self) -> bool:
        try:
            self._by_hash = await self._registry.items()
        except Exception as error:  # what we know stays good meanwhile, and is read again whatever this was
            log.warning("the keys can't be read: %s", error)
            return False
        self.ready = True
        return True


def _shown(key: bytes) -> str:
    """A key as it may stand in an error or a log: its first three and last four characters."""
    if len(key) < _MIN_SHOWN or not key.isascii():
        return "that was sent"
    text = key.decode()
    return f"{text[:3]}…{text[-4:]}" if text.isprintable() else "that was sent"
