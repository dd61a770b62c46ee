"""Requests that may come twice: what `Idempotency-Key` and `Last-Event-ID` mean.

Every gateway derives the same from the same header, without asking anybody: the request's id, its seed where the
client named none, and the fingerprint of what was asked. Key and content themselves are kept nowhere; both stand only
behind hashes with a key of their own, so that neither can be guessed from what is stored.
"""

from __future__ import annotations

import hmac
import re
from typing import NamedTuple

from springtide.core import wire
from springtide.core.errors import InvalidRequest
from springtide.gateway.openai import Call

_MAX_KEY = 255
_ID_DIGITS = 32
_ENTRY = re.compile(r"(-)|(\d{1,12})(?:\+(\d{1,9}))?(!)?")


class IdempotencyKey:
    """The word of a tenant's client that all requests with this key are one and the same."""

    def __init__(self, tenant: str, key: str) -> None:
        self._key = key.encode()
        self._digest = hmac.digest(tenant.encode(), self._key, "sha256")

    def request_id(self, prefix: str) -> str:
        """The same for the same key of the same tenant, at any gateway."""
        return f"{prefix}-{self._digest.hex()[:_ID_DIGITS]}"

    @property
    def seed(self) -> int:
        """63 bits that have nothing to do with those of the id."""
        return int.from_bytes(self._digest[16:24]) >> 1

    def fingerprint(self, call: Call) -> str:
        """Of all that decides what the answer says. Neither of how it is delivered, nor of what the tenant is worth."""
        request = call.request
        asked = (call.dialect, request.model, request.sampling, request.messages, request.prompts, request.echo)
        return hmac.digest(self._key, wire.pack(asked), "sha256").hex()[:_ID_DIGITS]


def read_key(value: str | None, tenant: str) -> IdempotencyKey | None:
    """The header `Idempotency-Key`.

    Raises:
        InvalidRequest: it is empty, too long, or holds what is not printable ASCII.
    """
    if value is None:
        return None
    key = value.strip()
    if not (0 < len(key) <= _MAX_KEY and key.isascii() and key.isprintable()):
        raise InvalidRequest(
            f"the header Idempotency-Key takes 1 to {_MAX_KEY} printable ASCII characters",
            hint="a new UUID for each request will do",
            code="invalid_idempotency_key",
        )
    return IdempotencyKey(tenant, key)


class ChoicePosition(NamedTuple):
    """How much of a choice a client has: whether its beginning (the role), the bytes of its text, the tokens of which
    it has scores, whether its end."""

    begun: bool = False
    offset: int = 0
    scored: int = 0
    finished: bool = False

    def __str__(self) -> str:
        if not self.begun:
            return "-"
        scored = f"+{self.scored}" if self.scored else ""
        return f"{self.offset}{scored}{'!' if self.finished else ''}"


class Position(NamedTuple):
    """How much of a stream a client has; `usage`: also the event after all choices. As text: an entry for each choice,
    `-`, or `<bytes>[+<scored tokens>][!]` (`!`: ended), with commas; then `;` if the usage was sent."""

    choices: list[ChoicePosition]
    usage: bool = False

    def __str__(self) -> str:
        return ",".join(map(str, self.choices)) + (";" if self.usage else "")


def read_last_event(value: str | None, key: IdempotencyKey | None, call: Call) -> Position | None:
    """The header `Last-Event-ID`: where a client that lost its connection left off.

    Raises:
        InvalidRequest: it does not belong to this request, or makes no sense.
    """
    if value is None:
        return None
    if key is None:
        raise _bad_position("Last-Event-ID needs the Idempotency-Key with which the stream was begun")
    if not call.stream:
        raise _bad_position("Last-Event-ID is for streams; this request has no `stream: true`")
    request_id, _, text = value.strip().rpartition(":")
    if request_id != call.request.id:
        raise _bad_position("Last-Event-ID is not of this request", "send the body and the key that it was begun with")
    entries = text.removesuffix(";").split(",")
    matches = [_ENTRY.fullmatch(entry) for entry in entries]
    if None in matches or len(entries) != call.request.num_choices:
        raise _bad_position("Last-Event-ID is not one that this platform sent", "send it as it came")
    return Position([_entry(match) for match in matches if match is not None], usage=text.endswith(";"))


def _entry(match: re.Match[str]) -> ChoicePosition:
    nothing, offset, scored, finished = match.groups()
    if nothing:
        return ChoicePosition()
    return ChoicePosition(True, int(offset), int(scored or 0), bool(finished))


def _bad_position(message: str, hint: str | None = None) -> InvalidRequest:
    return InvalidRequest(message, hint=hint, code="invalid_last_event_id")
