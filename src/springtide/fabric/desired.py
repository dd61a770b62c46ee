"""What should be: desired state per node, and small typed registries. Level-triggered: whole values, read again
after each reconnect and now and then, so that a lost message costs seconds at most."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import msgspec
import nats.errors
from nats.aio.msg import Msg

from springtide.core import wire
from springtide.core.cluster import DesiredState
from springtide.core.errors import SetupError
from springtide.fabric import subjects
from springtide.fabric.connection import Fabric, Subscription
from springtide.fabric.kv import Bucket, Unavailable
from springtide.fabric.tasks import call_all, end, sleep_until

log = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_LOOK_S = 0.25  # until a controller answers
_LOOK_EVERY_S = 2.0
_ATTEMPTS = 5


class NodeIntent(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator wants of a node, whatever the controller thinks."""

    node: str
    drain: bool = False


class DesiredWriter:
    """The controller's side. From its first use on it also answers nodes that ask for their state."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self._bucket = Bucket(fabric, subjects.DESIRED)
        self._answering = False

    async def put(self, state: DesiredState) -> None:
        """
        Raises:
            SetupError: the fabric's store can't be reached.
        """
        await self._answer_nodes()
        await _retry(lambda: self._bucket.put(subjects.check_token("node", state.node), wire.pack(state)))

    async def get(self, node: str) -> DesiredState | None:
        """
        Raises:
            SetupError: the fabric's store can't be reached.
        """
        await self._answer_nodes()
        entry = await _retry(lambda: self._bucket.get(subjects.check_token("node", node)))
        return None if entry is None or entry.value is None else _decode_state(node, entry.value)

    async def _answer_nodes(self) -> None:
        if not self._answering:
            self._answering = True
            await self._fabric.subscribe(subjects.desired_subject("*"), self._on_question, queue="desired")

    async def _on_question(self, message: Msg) -> None:
        """Answer to the node's own inbox only: our permissions are wider than its. Empty: nothing is desired."""
        node = message.subject.split(".")[2]
        if not message.reply.startswith(f"{subjects.node_inbox(node)}."):
            return
        with contextlib.suppress(Unavailable):  # it asks again
            entry = await self._bucket.get(node)
            await self._fabric.publish(message.reply, entry.value or b"" if entry is not None else b"")


class DesiredReader:
    """The agent's side: calls `on_state` with the first state and with each that differs from the last.

    Needs a node's permissions only. Garbage and states for others are refused and counted in `refused`.
    """

    def __init__(self, fabric: Fabric, node: str, on_state: Callable[[DesiredState], None]) -> None:
        self._fabric = fabric
        self._node = subjects.check_token("node", node)
        self._on_state = on_state
        self._subscription: Subscription | None = None
        self._task: asyncio.Task[None] | None = None
        self._look = asyncio.Event()
        self._last: DesiredState | None = None
        self._older: DesiredState | None = None
        self.refused = 0

    async def start(self) -> None:
        subject = subjects.bucket_subject(subjects.DESIRED, self._node)
        self._subscription = await self._fabric.subscribe(subject, self._on_message)
        self._fabric.on_reconnect(self._on_reconnect)
        self._task = asyncio.create_task(self._run(), name=f"desired state of {self._node}")

    async def stop(self) -> None:
        self._fabric.remove_on_reconnect(self._on_reconnect)
        if self._subscription is not None:
            await self._subscription.unsubscribe()
        await end(self._task)

    async def _on_reconnect(self) -> None:
        self._look.set()

    async def _on_message(self, message: Msg) -> None:
        state = self._accept(message.data)
        if state is not None and (self._last is None or state.revision > self._last.revision):
            self._apply(state)

    async def _run(self) -> None:
        wait = _FIRST_LOOK_S
        while True:
            with contextlib.suppress(nats.errors.Error):  # no controller yet, or no connection
                answer = await self._fabric.request(subjects.desired_subject(self._node))
                wait = _LOOK_EVERY_S
                if answer.data:
                    self._compare(answer.data)
            await sleep_until(self._look, wait)

    def _compare(self, stored: bytes) -> None:
        """Take what the store holds. An older revision may just be an answer that was overtaken; seen twice it
        is what the store says (it was restored from a backup, say)."""
        state = self._accept(stored)
        if state is None or state == self._last:
            self._older = None
        elif self._last is None or state.revision > self._last.revision or state == self._older:
            self._apply(state)
        else:
            self._older = state

    def _accept(self, data: bytes) -> DesiredState | None:
        state = _decode_state(self._node, data)
        if state is None:
            self.refused += 1
        return state

    def _apply(self, state: DesiredState) -> None:
        self._last, self._older = state, None
        call_all([lambda: self._on_state(state)])


class Registry(Generic[T]):
    """A small typed table for platform processes. Keys are free text."""

    def __init__(self, fabric: Fabric, bucket: str, type: type[T]) -> None:
        self._fabric = fabric
        self._bucket = Bucket(fabric, bucket)
        self._type = type
        self._pokes: list[Callable[[], None]] = []
        self._subscription: Subscription | None = None
        self._poking: asyncio.TimerHandle | None = None
        self.counters: Counter[str] = Counter()

    async def put(self, key: str, value: T) -> None:
        """
        Raises:
            SetupError: the fabric's store can't be reached.
        """
        await _retry(lambda: self._bucket.put(_encode_key(key), wire.pack(value)))

    async def get(self, key: str) -> T | None:
        """
        Raises:
            SetupError: the fabric's store can't be reached.
        """
        entry = await _retry(lambda: self._bucket.get(_encode_key(key)))
        return None if entry is None or entry.value is None else self._decode(key, entry.value)

    async def delete(self, key: str) -> None:
        """
        Raises:
            SetupError: the fabric's store can't be reached.
        """
        await _retry(lambda: self._bucket.delete(_encode_key(key)))

    async def items(self) -> dict[str, T]:
        """
        Raises:
            SetupError: the fabric's store can't be reached.
        """
        entries = await _retry(self._bucket.entries)
        values = {_decode_key(e.key): self._decode(e.key, e.value) for e in entries if e.value is not None}
        return {key: value for key, value in values.items() if value is not None}

    async def watch(self, callback: Callable[[], None]) -> None:
        """Call back soon after anything changed, and after each reconnect: read again then. Changes that come
        together may be told once."""
        self._pokes.append(callback)
        if self._subscription is None:
            subject = subjects.bucket_subject(self._bucket.name, ">")
            self._subscription = await self._fabric.subscribe(subject, self._on_change)
            self._fabric.on_reconnect(self._on_reconnect)

    async def unwatch(self) -> None:
        """End all watching. Harmless when repeated."""
        self._pokes.clear()
        self._fabric.remove_on_reconnect(self._on_reconnect)
        if self._poking is not None:
            self._poking.cancel()
            self._poking = None
        if self._subscription is not None:
            subscription, self._subscription = self._subscription, None
            await subscription.unsubscribe()

    async def _on_change(self, message: Msg) -> None:
        """The message may overtake its own storage: wait a little, which also gathers a burst."""
        if self._poking is None:
            self._poking = asyncio.get_running_loop().call_later(0.02, self._poke)

    async def _on_reconnect(self) -> None:
        self._poke()

    def _poke(self) -> None:
        self._poking = None
        call_all(self._pokes)

    def _decode(self, key: str, data: bytes) -> T | None:
        try:
            return wire.unpack(data, self._type)
        except msgspec.MsgspecError as error:
            self.counters["unreadable"] += 1
            log.warning("%s of bucket %s is unreadable: %s", key, self._bucket.name, error)
            return None


def _decode_state(node: str, data: bytes) -> DesiredState | None:
    try:
        state = wire.unpack(data, DesiredState)
    except msgspec.MsgspecError as error:
        log.warning("unreadable desired state for %s: %s", node, error)
        return None
    if state.node != node:
        log.warning("a desired state for %s lies where that of %s should", state.node, node)
        return None
    return state


async def _retry(operation: Callable[[], Awaitable[T]]) -> T:
    """JetStream is silent while its server restarts: be patient for some seconds."""
    for attempt in range(_ATTEMPTS):
        try:
            return await operation()
        except Unavailable as error:
            reason = error
            await asyncio.sleep(0.1 * 2**attempt)
    raise SetupError(f"the fabric's store can't be reached: {reason}", hint="does the NATS server run?")


# A key may hold what a subject's token may not; "=" escapes it as two hexadecimal digits a byte.


def _encode_key(key: str) -> str:
    if not key:
        raise SetupError("a registry's key must not be empty")
    return re.sub(
        r"[^A-Za-z0-9_-]", lambda match: "".join(f"={byte:02x}" for byte in match[0].encode("utf-8", "replace")), key
    )


def _decode_key(key: str) -> str:
    raw = re.sub(rb"=([0-9a-f]{2})", lambda match: bytes.fromhex(match[1].decode()), key.encode())
    return raw.decode("utf-8", "replace")
