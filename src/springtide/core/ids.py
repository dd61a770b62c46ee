"""Names for things, short and sortable by time."""

from __future__ import annotations

import secrets
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u


_PAIRS = [a + b for a in _ALPHABET for b in _ALPHABET]


def _base32(value: int, length: int) -> str:
    """The lowest 5 * `length` bits, `length` being even."""
    return "".join([_PAIRS[(value >> shift) & 1023] for shift in range(5 * length - 10, -1, -10)])


def new_id(prefix: str) -> str:
    """`prefix-` and 20 characters: 45 bits of milliseconds, 55 of chance."""
    return f"{prefix}-{_base32(int(time.time() * 1000) << 55 | secrets.randbits(55), 20)}"


def new_api_key() -> str:
    """A key as shown once to its owner: 160 random bits."""
    return "sk-" + _base32(secrets.randbits(160), 32)
