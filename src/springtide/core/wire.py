"""Plain data to bytes and back: msgpack between processes, JSON towards people. No sockets."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
_decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}


def pack(value: Any) -> bytes:
    """`value` as msgpack."""
    return _encoder.encode(value)


def unpack(data: bytes, type: type[T]) -> T:
    """msgpack as `type`, validated.

    Raises:
        msgspec.ValidationError, msgspec.DecodeError: the bytes are not that.
    """
    decoder = _decoders.get(type)
    if decoder is None:
        decoder = _decoders[type] = msgspec.msgpack.Decoder(type)
    result: T = decoder.decode(data)
    return result


def escape_json(text: str) -> bytes:
    """`text` as the inside of a JSON string, UTF-8. Lone surrogates become question marks: JSON can't carry them."""
    try:
        return msgspec.json.encode(text)[1:-1]
    except UnicodeEncodeError:
        return msgspec.json.encode(text.encode("utf-8", "replace").decode())[1:-1]


def unescape_json(escaped: bytes) -> str:
    """The inverse of `escape_json`."""
    return msgspec.json.decode(b'"' + escaped + b'"', type=str)
