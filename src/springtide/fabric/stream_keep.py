"""What a replica keeps of its streams: the frames of each attempt, until nobody can want them any more, and never more
than so many bytes of all. Knows no sockets and no clock."""

from __future__ import annotations

from collections.abc import Iterator

from springtide.core.request import Request
from springtide.fabric.stream_wire import Finding, StreamKey, encode

_SHRINK_TO = 0.9  # of the bound: shrinking looks at every stream, so it must not come with each frame


class Kept:
    """One attempt: its frames from `first` on, encoded."""

    __slots__ = ("acked", "ended_at", "finding", "first", "frames", "gateway", "key", "orphaned_at", "size")

    def __init__(self, key: StreamKey, gateway: str, finding: bytes | None = None) -> None:
        self.key = key
        self.gateway = gateway  # who reads it; "" is nobody
        self.finding = finding  # what one hears who looks for it; None: it ends with its gateway
        self.frames: list[bytes] = []
        self.first = 0
        self.acked = 0  # all before this number were received
        self.size = len(finding or b"")
        self.ended_at: float | None = None
        self.orphaned_at: float | None = None  # since when its gateway is dead, or does not read it any more

    @property
    def next(self) -> int:
        return self.first + len(self.frames)

    @property
    def survives(self) -> bool:
        """Whether it goes on when its gateway dies."""
        return self.finding is not None

    @property
    def whole(self) -> bool:
        """Whether another gateway can have all of it."""
        return self.survives and self.first == 0

    def since(self, number: int) -> list[bytes] | None:
        """The frames from `number` on; None if some of them are gone."""
        return self.frames[number - self.first :] if number >= self.first else None

    def free_acked(self) -> int:
        """Let go of what was received; the bytes freed."""
        count = min(max(self.acked - self.first, 0), len(self.frames))
        freed = sum(map(len, self.frames[:count]))
        del self.frames[:count]
        self.first += count
        self.size -= freed
        return freed


class Keep:
    """All attempts that a replica knows."""

    def __init__(self, max_bytes: int) -> None:
        self.bytes = 0
        self.streams: dict[StreamKey, Kept] = {}  # oldest first
        self._max_bytes = max_bytes
        self._ended: dict[StreamKey, Kept] = {}  # those of them that ended, oldest end first
        self._latest: dict[str, StreamKey] = {}  # a request's last attempt

    def open(self, key: StreamKey, gateway: str) -> Kept:
        """A new attempt, which is its request's latest from now on."""
        stream = self.streams[key] = Kept(key, gateway)
        self._latest[key.request_id] = key
        return stream

    def make_findable(self, stream: Kept, request: Request) -> None:
        """It outlives its gateway from now on."""
        stream.finding = encode(Finding(*stream.key, request.fingerprint, request.outputs))
        stream.size += len(stream.finding)
        self.bytes += len(stream.finding)

    def latest(self, request_id: str) -> Kept | None:
        key = self._latest.get(request_id)
        return None if key is None else self.streams.get(key)

    def of(self, gateway: str) -> list[Kept]:
        return [stream for stream in self.streams.values() if stream.gateway == gateway]

    def append(self, stream: Kept, frame: bytes) -> None:
        stream.frames.append(frame)
        stream.size += len(frame)
        self.bytes += len(frame)

    def end(self, stream: Kept, now: float) -> None:
        """Its last frame has been appended."""
        stream.ended_at = now
        self._ended[stream.key] = stream

    def acknowledge(self, stream: Kept, number: int) -> None:
        """All before `number` was received. Of one that ended nobody can want it again, unless it can be found."""
        if stream.acked < number <= stream.next:
            stream.acked = number
            if stream.ended_at is not None and number == stream.next and not stream.survives:
                self.bytes -= stream.free_acked()

    def forget(self, stream: Kept) -> None:
        del self.streams[stream.key]
        self._ended.pop(stream.key, None)
        if self._latest.get(stream.key.request_id) == stream.key:
            del self._latest[stream.key.request_id]
        self.bytes -= stream.size

    def ended_before(self, moment: float) -> list[Kept]:
        return [stream for stream in self._ended.values() if stream.ended_at is not None and stream.ended_at <= moment]

    def orphaned_before(self, moment: float) -> list[Kept]:
        orphans = [stream for stream in self.streams.values() if stream.orphaned_at is not None]
        return [stream for stream in orphans if stream.orphaned_at is not None and stream.orphaned_at <= moment]

    @property
    def over(self) -> bool:
        return self.bytes > self._max_bytes

    def shrink(self) -> Iterator[Kept]:
        """Back within the bound. First goes what was received: of streams that nobody will look for, then of others,
        which then can't be found any more. That failing, whole streams are named that the caller must let go of:
        those that ended, then the oldest."""
        bound = self._max_bytes * _SHRINK_TO
        for stream in sorted(self.streams.values(), key=lambda stream: stream.survives):
            if self.bytes <= bound:
                return
            self.bytes -= stream.free_acked()
        for stream in [*self._ended.values(), *self.streams.values()]:
            if self.bytes <= bound:
                return
            if stream.key in self.streams:
                yield stream
