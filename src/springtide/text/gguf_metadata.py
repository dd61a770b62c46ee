"""The key-value head of a GGUF file, read straight from a memory map. Knows nothing of tensors.

The format: magic, version, two counts, then (key, type, value) for each entry; all little-endian.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, TypeAlias

from springtide.core.errors import SetupError

Metadata: TypeAlias = dict[str, Any]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_u64 = struct.Struct("<Q")


class _Broken(Exception):
    """The bytes can't be a GGUF file; says why."""


def read_metadata(path: Path) -> Metadata:
    """Every entry of the head: strings as str, arrays as lists.

    Raises:
        SetupError: the file can't be read, is no GGUF file, or is damaged.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Head(data).read()
    except OSError as error:
        raise SetupError(f"the model file {path} can't be read: {error.strerror}") from None
    except (_Broken, ValueError, struct.error, OverflowError, MemoryError) as error:  # ValueError: an empty file
        raise SetupError(
            f"the model file {path} is not a whole GGUF file ({error})", hint="remove it and fetch it again"
        ) from None


class _Head:
    """A cursor over the head's bytes."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def read(self) -> Metadata:
        if self._data[:4] != b"GGUF":
            raise _Broken("it does not begin with GGUF")
        self._at = 4
        version = self._scalar("I")
        if version not in _VERSIONS:
            raise _Broken(f"version {version}; known: {', '.join(map(str, _VERSIONS))}, little-endian")
        self._at += 8  # the number of tensors
        entries: Metadata = {}
        for _ in range(self._scalar("Q")):
            key = self._string()
            entries[key] = self._value(self._scalar("I"))
        return entries

    def _value(self, type: int) -> Any:
        if type == _STRING:
            return self._string()
        if type == _ARRAY:
            return self._array(self._scalar("I"), self._scalar("Q"))
        return self._scalar(_scalar_code(type))

    def _array(self, type: int, count: int) -> list[Any]:
        if count > len(self._data):  # every element takes a byte or more
            raise _Broken("an array is longer than the file")
        if type == _STRING:
            return self._strings(count)
        if type == _ARRAY:
            return [self._value(_ARRAY) for _ in range(count)]
        layout = struct.Struct(f"<{count}{_scalar_code(type)}")
        values = layout.unpack_from(self._data, self._at)
        self._at += layout.size
        return list(values)

    def _strings(self, count: int) -> list[str]:
        # A vocabulary is tens of thousands of strings: this loop is the time that a tokenizer takes to load.
        data, at, unpack = self._data, self._at, _u64.unpack_from
        values = []
        for _ in range(count):
            start = at + 8
            at = start + unpack(data, at)[0]
            values.append(data[start:at].decode())
        self._at = at
        if at > len(data):
            raise _Broken("it is cut short")
        return values

    def _string(self) -> str:
        return self._strings(1)[0]

    def _scalar(self, code: str) -> Any:
        layout = struct.Struct("<" + code)
        (value,) = layout.unpack_from(self._data, self._at)
        self._at += layout.size
        return value


def _scalar_code(type: int) -> str:
    code = _SCALARS.get(type)
    if code is None:
        raise _Broken(f"an entry has the unknown type {type}")
    return code
