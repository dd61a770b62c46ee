"""The bounds of one gateway process that hardly anybody changes; the others are settings."""

from __future__ import annotations

import msgspec


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds, sizes in bytes.

    `header_timeout` is also how long a connection may idle between requests. `send_timeout` is how long a
    client may leave what we send it unread. `grace` is what running answers have to end by themselves when
    the gateway stops.
    """

    header_timeout: float = 20.0
    header_bytes: int = 64 * 1024
    connections: int = 65_536
    body_timeout: float = 60.0
    send_timeout: float = 60.0
    heartbeat_every: float = 5.0
    held_bytes: int = 512 * 1024 * 1024
    grace: float = 10.0


DEFAULT_LIMITS = Limits()
