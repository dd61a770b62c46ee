"""A join token: what a newcomer is given, by hand, to become a node. Knows its text form only."""

from __future__ import annotations

import base64
import binascii
import zlib

import msgspec

from springtide.core import wire
from springtide.core.errors import SetupError

_PREFIX = "stj1-"


class JoinToken(msgspec.Struct, frozen=True, kw_only=True):
    """Bootstrap credentials that reach nothing but the join server, and the CA to check the server against
    before anything is said to it."""

    id: str
    urls: list[str]
    jwt: str
    seed: str
    ca_pem: str

    def encode(self) -> str:
        return _PREFIX + base64.urlsafe_b64encode(zlib.compress(wire.pack(self), 9)).rstrip(b"=").decode()

    @classmethod
    def decode(cls, text: str) -> JoinToken:
        """
        Raises:
            SetupError: it is no join token, or a broken one.
        """
        body = text.strip().removeprefix(_PREFIX)
        try:
            packed = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
            inflater = zlib.decompressobj()
            return wire.unpack(inflater.decompress(packed, 64 * 1024), cls)
        except (ValueError, binascii.Error, zlib.error, msgspec.MsgspecError):
            raise SetupError("this is not a join token", hint="copy it whole, from stj1- to its end") from None
