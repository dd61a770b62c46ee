"""Names for things, short and sortable by time."""

from __future__ import annotations

import secrets
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u


def _base32(value: int, length: int) -> str:
    return "".join(_ALPHABET[(value >> (5 * i)) & 31] for i in reversed(range(length)))


def new_id(prefix: str) -> str:
    """`prefix-` and 20 characters: 45 bits of milliseconds, 55 of chance."""
    milliseconds = int(time.time() * 1000)
    return f"{prefix}-{_base32(milliseconds, 9)}{_base32(secrets.randbits(55), 11)}"


def new_api_key() -> str:
    """A key as shown once to its owner: 160 random bits."""
    return "sk-" + _base32(secrets.randbits(160), 32)
