"""What travels between gateway and replica, as bytes. No sockets, no state.

All messages are msgpack arrays. The first item is the version, the second names the sender; those two places never
change. The structures only grow at their ends, and whoever reads one skips what he does not know: so an end reads any
version from OLDEST_VERSION on, newer ones too. It marks what it sends with the lower of its own version and the
other's, which the other tells in `speaks` (version 1 had no such field); before it has heard him, with the oldest.

Version 2 brought: finding and taking over of streams, turns, backlogs, questions to a replica as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from springtide.core.request import ChoiceOutput, Delta, End, PriorityClass

FRAME_VERSION = 2
OLDEST_VERSION = 1
MAX_PART_BYTES = 512 * 1024  # of a request, in one message
MAX_PARTS = 128
MAX_BATCH_BYTES = 4 * 2**20  # of frames, in one message

AnswerState = Literal["alive", "unknown", "taken"]


class StreamKey(NamedTuple):
    """One attempt at one request."""

    request_id: str
    attempt: int


class Flow(NamedTuple):
    """What shares of a replica are given to: one tenant's requests of one class."""

    tenant: str
    priority_class: PriorityClass


class Frame(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one step gave one request. Number 0 says "accepted" (no deltas; `prompt_tokens` is what the prompt has,
    for the account of an attempt that never comes to its end) or carries the refusal as `end`."""

    number: int
    deltas: list[Delta]
    end: End | None = None
    prompt_tokens: int = 0


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """To a gateway that asked: "alive" (nothing new yet), "unknown" (never heard of, cancelled, forgotten), or "taken"
    (another gateway has it now; not told to version 1, which hears "unknown")."""

    request_id: str
    attempt: int
    state: AnswerState


class Turn(msgspec.Struct, frozen=True, array_like=True):
    """Leave to send one request of this flow. `serial` is the replica's own count."""

    serial: int
    tenant: str
    priority_class: PriorityClass

    @property
    def flow(self) -> Flow:
        return Flow(self.tenant, self.priority_class)


class Backlog(msgspec.Struct, frozen=True, array_like=True):
    """What waits at a gateway for one flow: `waiting` sequences, of `weight`; and the tokens that the gateway saw
    served to that flow by other replicas of the model, all in all."""

    tenant: str
    priority_class: PriorityClass
    weight: float
    waiting: int
    served_elsewhere: float

    @property
    def flow(self) -> Flow:
        return Flow(self.tenant, self.priority_class)


class Finding(msgspec.Struct, frozen=True, array_like=True):
    """To a gateway that looks for a request: the attempt that can be taken over here, whole; None if there is none.
    `outputs` is what earlier attempts had sent."""

    request_id: str
    attempt: int | None = None
    fingerprint: str = ""
    outputs: tuple[ChoiceOutput, ...] = ()


class FrameBatch(msgspec.Struct, frozen=True, array_like=True):
    """Replica to gateway: the frames of one engine step, or of a replay, as (request id, attempt, frame). Being sent
    at all says that the replica lives."""

    version: int
    replica: str
    frames: list[tuple[str, int, Frame]]
    answers: list[Answer]
    speaks: int = 1
    turns: list[Turn] = []
    findings: list[Finding] = []


class OpenPart(msgspec.Struct, frozen=True, array_like=True):
    """Gateway to replica: part `part` of `parts` of a packed Request. `turn` is the serial of the turn it comes on."""

    version: int
    gateway: str
    request_id: str
    attempt: int
    part: int
    parts: int
    data: bytes
    speaks: int = 1
    turn: int | None = None


class Control(msgspec.Struct, frozen=True, array_like=True):
    """Gateway to replica: next wanted number of streams that moved (everything before is acknowledged), streams
    to replay from a number, streams to cancel. Being sent at all says that the gateway lives.

    `ping` wants any answer. `finds` are requests that the gateway looks for, `takes` streams that it takes over,
    `releases` such as it no longer reads and others may have. `backlogs` replaces what it said before; None: that
    still holds. `declined` are serials of unneeded turns.
    """

    version: int
    gateway: str
    acks: list[tuple[str, int, int]]
    asks: list[tuple[str, int, int]]
    cancels: list[StreamKey]
    speaks: int = 1
    ping: bool = False
    finds: list[str] = []
    takes: list[StreamKey] = []
    releases: list[StreamKey] = []
    backlogs: list[Backlog] | None = None
    declined: list[int] = []


_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
decode_batch = msgspec.msgpack.Decoder(FrameBatch).decode
decode_open = msgspec.msgpack.Decoder(OpenPart).decode
decode_control = msgspec.msgpack.Decoder(Control).decode


def common_version(speaks: int) -> int:
    """What to mark a message with for one who speaks up to `speaks`."""
    return min(FRAME_VERSION, speaks)


def encode_frame(key: StreamKey, frame: Frame) -> bytes:
    """One item of a batch. It is kept in this form, so that a replay costs no work."""
    return _encoder.encode((key.request_id, key.attempt, frame))


class Outgoing:
    """What goes to one gateway next. Frames and findings are encoded."""

    __slots__ = ("answers", "findings", "frames", "turns")

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.answers: list[Answer] = []
        self.turns: list[Turn] = []
        self.findings: list[bytes] = []


def encode_batches(version: int, replica: str, outgoing: Outgoing, limit: int = MAX_BATCH_BYTES) -> Iterator[bytes]:
    """As messages with at most about `limit` bytes of frames, or of findings: usually one, even if it says nothing."""
    answers, turns = outgoing.answers, outgoing.turns
    for frames in _groups(outgoing.frames, limit) or [[]]:
        yield _encoder.encode((version, replica, _raw(frames), answers, FRAME_VERSION, turns, ()))
        answers, turns = [], []
    for findings in _groups(outgoing.findings, limit):
        yield _encoder.encode((version, replica, (), (), FRAME_VERSION, (), _raw(findings)))


def _groups(items: Sequence[bytes], limit: int) -> list[Sequence[bytes]]:
    """Cut where a group would grow beyond `limit` bytes; a larger item stands alone."""
    if sum(map(len, items)) <= limit:
        return [items] if items else []
    groups: list[Sequence[bytes]] = []
    start = size = 0
    for index, item in enumerate(items):
        if size and size + len(item) > limit:
            groups.append(items[start:index])
            start, size = index, 0
        size += len(item)
    return [*groups, items[start:]]


def _raw(items: Sequence[bytes]) -> list[msgspec.Raw]:
    return [msgspec.Raw(item) for item in items]


def split_request(version: int, gateway: str, key: StreamKey, packed: bytes, turn: int | None = None) -> list[bytes]:
    """A packed request as OpenPart messages."""
    pieces = [packed[at : at + MAX_PART_BYTES] for at in range(0, len(packed), MAX_PART_BYTES)] or [b""]
    return [
        encode(OpenPart(version, gateway, *key, part, len(pieces), piece, FRAME_VERSION, turn))
        for part, piece in enumerate(pieces)
    ]


def peek(data: bytes) -> tuple[Any, Any]:
    """Version and sender of any message, (None, None) if it is none of ours."""
    try:
        value = msgspec.msgpack.decode(data)
    except msgspec.MsgspecError:
        return None, None
    if isinstance(value, list) and len(value) >= 2 and isinstance(value[0], int) and isinstance(value[1], str):
        return value[0], value[1]
    return None, None


def is_ours(version: int) -> bool:
    """Whether a message that can't be read is a broken one of a version that we know, and not one of another."""
    return OLDEST_VERSION <= version <= FRAME_VERSION
