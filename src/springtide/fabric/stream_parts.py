"""Requests that arrive in parts, until they are whole. Knows no sockets and no clock."""

from __future__ import annotations

from collections import Counter

from springtide.fabric.stream_wire import MAX_PARTS, OpenPart, StreamKey

PATIENCE_S = 10.0
_MAX_BYTES = 128 * 2**20


class _Parts:
    """A request that is not whole yet."""

    __slots__ = ("pieces", "since", "total")

    def __init__(self, total: int, since: float) -> None:
        self.pieces: dict[int, bytes] = {}
        self.total = total
        self.since = since

    @property
    def size(self) -> int:
        return sum(map(len, self.pieces.values()))


class Assembler:
    """Puts parts together. Counts "parts_expired" and "garbage"."""

    def __init__(self, counters: Counter[str]) -> None:
        self._counters = counters
        self._waiting: dict[StreamKey, _Parts] = {}  # oldest first
        self._bytes = 0

    def add(self, key: StreamKey, part: OpenPart, now: float) -> bytes | None:
        """The whole packed request, once its last part is here."""
        if not (0 <= part.part < part.parts <= MAX_PARTS):
            self._counters["garbage"] += 1
            return None
        if part.parts == 1:
            return part.data
        parts = self._waiting.setdefault(key, _Parts(part.parts, now))
        if part.part not in parts.pieces and part.part < parts.total:
            parts.pieces[part.part] = part.data
            self._bytes += len(part.data)
        if len(parts.pieces) < parts.total:
            while self._bytes > _MAX_BYTES:
                self.drop(next(iter(self._waiting)))
            return None
        packed = b"".join(parts.pieces[number] for number in range(parts.total))
        self._bytes -= len(packed)
        del self._waiting[key]
        return packed

    def drop(self, key: StreamKey) -> None:
        """What came of a request, if some did, is not wanted."""
        parts = self._waiting.pop(key, None)
        if parts is not None:
            self._bytes -= parts.size
            self._counters["parts_expired"] += 1

    def expire(self, now: float) -> None:
        for key in [key for key, parts in self._waiting.items() if now - parts.since > PATIENCE_S]:
            self.drop(key)
