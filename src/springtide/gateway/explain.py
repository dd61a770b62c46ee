"""What happened to a request, asked of every gateway: each knows only what passed through itself.

Gateways trust each other, and a node can't publish under these subjects. Knows no HTTP and no database.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

import msgspec
import nats.errors
from nats.aio.msg import Msg

from springtide.core import wire
from springtide.fabric import subjects
from springtide.fabric.connection import Fabric, Subscription
from springtide.fabric.presence import PresenceView
from springtide.gateway.trace import Event, TraceBook

log = logging.getLogger(__name__)

_PATIENCE_S = 1.0  # for another gateway


class Story(msgspec.Struct, frozen=True):
    """What one gateway knows of a request. `left_out` events of its middle are not among `events`."""

    gateway: str
    events: list[Event]
    left_out: int = 0


class Explainer:
    """Tells the other gateways what this one knows, and asks them."""

    def __init__(self, fabric: Fabric, gateway: str, presence: PresenceView, book: TraceBook) -> None:
        self._fabric = fabric
        self._gateway = gateway
        self._presence = presence
        self._book = book
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        subject = subjects.explain_subject(self._gateway)
        self._subscription = await self._fabric.subscribe(subject, self._on_question)

    async def stop(self) -> None:
        if self._subscription is not None:
            await self._subscription.unsubscribe()

    async def ask_all(self, request_id: str) -> tuple[list[Story], list[str]]:
        """Each gateway's story, if it has one, and the gateways that did not answer."""
        others = [gateway.id for gateway in self._presence.gateways() if gateway.id != self._gateway]
        answers = await asyncio.gather(*(self._ask(gateway, request_id) for gateway in others))
        stories = [self._tell(request_id), *(story for story in answers if story is not None)]
        silent = [gateway for gateway, story in zip(others, answers, strict=True) if story is None]
        return [story for story in stories if story.events], silent

    def _tell(self, request_id: str) -> Story:
        return Story(self._gateway, *self._book.events(request_id))

    async def _ask(self, gateway: str, request_id: str) -> Story | None:
        try:
            subject = subjects.explain_subject(gateway)
            answer = await self._fabric.request(subject, request_id.encode(), timeout=_PATIENCE_S)
            return wire.unpack(answer.data, Story)
        except (nats.errors.Error, msgspec.MsgspecError) as error:
            log.info("gateway %s does not say what it knows of a request: %r", gateway, error)
            return None

    async def _on_question(self, message: Msg) -> None:
        with contextlib.suppress(UnicodeDecodeError):
            await self._fabric.publish(message.reply, wire.pack(self._tell(message.data.decode())))
