"""What travels between gateway and replica, as bytes. No sockets, no state.

All messages are msgpack arrays whose first item is the version and whose second names the sender; those two
places never change, so that any version can tell any other what is wrong. The rest is free to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from springtide.core.request import Delta, End

FRAME_VERSION = 1
MAX_PART_BYTES = 512 * 1024  # of a request, in one message
MAX_PARTS = 128
MAX_BATCH_BYTES = 4 * 2**20  # of frames, in one message

AnswerState = Literal["alive", "unknown"]


class StreamKey(NamedTuple):
    """One attempt at one request."""

    request_id: str
    attempt: int


class Frame(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one step gave one request. Number 0 says "accepted" (no deltas; `prompt_tokens` is what the prompt has,
    for the account of an attempt that never comes to its end) or carries the refusal as `end`."""

    number: int
    deltas: list[Delta]
    end: End | None = None
    prompt_tokens: int = 0


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """To a gateway that asked: "alive" (nothing new yet), or "unknown" (never heard of, cancelled, forgotten)."""

    request_id: str
    attempt: int
    state: AnswerState


class FrameBatch(msgspec.Struct, frozen=True, array_like=True):
    """Replica to gateway: the frames of one engine step, or of a replay, as (request id, attempt, frame)."""

    version: int
    replica: str
    frames: list[tuple[str, int, Frame]]
    answers: list[Answer]


class OpenPart(msgspec.Struct, frozen=True, array_like=True):
    """Gateway to replica: part `part` of `parts` of a packed Request."""

    version: int
    gateway: str
    request_id: str
    attempt: int
    part: int
    parts: int
    data: bytes


class Control(msgspec.Struct, frozen=True, array_like=True):
    """Gateway to replica: next wanted number of streams that moved (everything before is acknowledged), streams
    to replay from a number, streams to cancel. Being sent at all says that the gateway lives."""

    version: int
    gateway: str
    acks: list[tuple[str, int, int]]
    asks: list[tuple[str, int, int]]
    cancels: list[StreamKey]


_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
decode_batch = msgspec.msgpack.Decoder(FrameBatch).decode
decode_open = msgspec.msgpack.Decoder(OpenPart).decode
decode_control = msgspec.msgpack.Decoder(Control).decode


def encode_frame(key: StreamKey, frame: Frame) -> bytes:
    """One item of a batch. It is kept in this form, so that a replay costs no work."""
    return _encoder.encode((key.request_id, key.attempt, frame))


def encode_batches(
    replica: str, frames: Sequence[bytes], answers: Sequence[Answer], limit: int = MAX_BATCH_BYTES
) -> Iterator[bytes]:
    """Encoded frames as messages of at most about `limit` bytes; the answers go with the last one."""
    start = size = 0
    for index, frame in enumerate(frames):
        if size and size + len(frame) > limit:
            yield _encode_batch(replica, frames[start:index], ())
            start, size = index, 0
        size += len(frame)
    yield _encode_batch(replica, frames[start:], answers)


def _encode_batch(replica: str, frames: Sequence[bytes], answers: Sequence[Answer]) -> bytes:
    return _encoder.encode((FRAME_VERSION, replica, [msgspec.Raw(frame) for frame in frames], answers))


def split_request(gateway: str, key: StreamKey, packed: bytes) -> list[bytes]:
    """A packed request as OpenPart messages."""
    pieces = [packed[at : at + MAX_PART_BYTES] for at in range(0, len(packed), MAX_PART_BYTES)] or [b""]
    return [
        encode(OpenPart(FRAME_VERSION, gateway, key.request_id, key.attempt, part, len(pieces), piece))
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
