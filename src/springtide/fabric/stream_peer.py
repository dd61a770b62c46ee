"""One replica, as a gateway's stream hub sees it: what it must be told next, and whether it lives. No sockets."""

from __future__ import annotations

from springtide.fabric.patience import Patience
from springtide.fabric.stream_client import ClientStream
from springtide.fabric.stream_wire import (
    FRAME_VERSION,
    OLDEST_VERSION,
    Backlog,
    Control,
    StreamKey,
    common_version,
)

TICK_S = 0.1  # acknowledgements are gathered this long
LIFE_SIGN_S = 1.0
_CANCEL_AGAIN_S = 1.0
_MAX_CANCELLING = 4096
_EMPTY_REPEATS = 3  # of a backlog that is empty now: one message may be lost


class Peer:
    """What goes to one replica with the next message. The hub fills it in, `next_control` empties it."""

    def __init__(self, node: str, replica: str, now: float) -> None:
        self.node = node
        self.replica = replica
        self.speaks = OLDEST_VERSION  # until it has told
        self.patience = Patience(now)
        self.streams: dict[StreamKey, ClientStream] = {}
        self.ended: list[tuple[str, int, int]] = []  # their last acknowledgement
        self.asks: set[StreamKey] = set()
        self.takes: set[StreamKey] = set()
        self.releases: set[StreamKey] = set()
        self.cancels: dict[StreamKey, tuple[int, float]] = {}  # tries left, when to try (again)
        self.finds: set[str] = set()
        self.declined: list[int] = []
        self.ping = False
        self.urgent = False
        self._backlogs: list[Backlog] = []
        self._repeats = 0  # how often an empty backlog must still be told
        self._backlog_is_new = False
        self._sent_at = 0.0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to say, and nothing to wait for."""
        return not (self.streams or self.cancels or self._says_something or self._backlogs or self._repeats)

    @property
    def _says_something(self) -> bool:
        """Apart from what can be read off its streams, and what is told again and again."""
        once = self.ended or self.asks or self.takes or self.releases or self.finds or self.declined
        return bool(once or self.ping or self._backlog_is_new)

    def advertise(self, backlogs: list[Backlog]) -> None:
        if backlogs != self._backlogs:
            self._backlogs = backlogs
            self._repeats = 0 if backlogs else _EMPTY_REPEATS
            self._backlog_is_new = self.urgent = True

    def cancel(self, key: StreamKey, *, tries: int) -> None:
        """With the next message; again each second until the replica confirms it."""
        if key not in self.cancels and len(self.cancels) < _MAX_CANCELLING:
            self.cancels[key] = (tries, 0.0)

    def begin_anew(self, now: float, until: float) -> None:
        """Our connection was gone, and with it perhaps what we said last. So may be the replica's: it has time."""
        self.patience.begin(now)
        self.patience.excuse(until)
        self.cancels = {key: (max(tries, 1), 0.0) for key, (tries, _) in self.cancels.items()}
        self._backlog_is_new = bool(self._backlogs or self._repeats)
        self.urgent = True

    def next_control(self, gateway: str, now: float) -> Control | None:
        """Everything that the replica must hear, in one message; None if there is nothing to say, or not yet."""
        moved = [stream for stream in self.streams.values() if stream._next != stream._acked]
        cancels = [key for key, (_, due) in self.cancels.items() if due <= now]
        advertises = bool(self._backlogs or self._repeats)
        lifeless = now - self._sent_at >= LIFE_SIGN_S and (bool(self.streams) or advertises)
        if not (moved or cancels or self._says_something or lifeless):
            return None
        if not (self.urgent or lifeless) and now - self._sent_at < TICK_S:
            return None  # woken for another replica's sake
        control = Control(
            common_version(self.speaks),
            gateway,
            acks=[(*stream.key, stream._next) for stream in moved] + self.ended,
            asks=[(*key, self.streams[key]._next) for key in self.asks if key in self.streams],
            cancels=cancels,
            speaks=FRAME_VERSION,
            ping=self.ping,
            finds=list(self.finds),
            takes=list(self.takes),
            releases=list(self.releases),
            backlogs=self._backlogs if advertises and (self._backlog_is_new or lifeless) else None,
            declined=self.declined,
        )
        self._said(control, moved, now)
        return control

    def _said(self, control: Control, moved: list[ClientStream], now: float) -> None:
        for stream in moved:
            stream._acked = stream._next
        for key in control.cancels:
            self.cancels[key] = (self.cancels[key][0] - 1, now + _CANCEL_AGAIN_S)
        self.cancels = {key: left for key, left in self.cancels.items() if left[0] > 0}
        if control.backlogs is not None and not control.backlogs:
            self._repeats -= 1
        self.ended, self.declined = [], []
        for told in (self.asks, self.takes, self.releases, self.finds):
            told.clear()
        self.ping = self.urgent = self._backlog_is_new = False
        self._sent_at = now
