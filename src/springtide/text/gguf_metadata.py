"""The head of a GGUF file, read straight from a memory map: its entries, and where which tensor lies. Knows nothing
of what is in a tensor.

The format: magic, version, two counts, then (key, type, value) for each entry, then a table of tensors; all
little-endian. (The `gguf` package's own reader spends seconds on the vocabulary's arrays.)
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from springtide.core.errors import SetupError

Metadata: TypeAlias = dict[str, Any]
T = TypeVar("T")

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
_u64 = struct.Struct("<Q")


class _Broken(Exception):
    """The bytes can't be a GGUF file; says why."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One line of the table of tensors. `shape` is row-major, the reverse of the file's order. `type` is the file's
    number for how values are packed. `offset` is in bytes from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


def read_metadata(path: Path) -> Metadata:
    """Every entry of the head: strings as str, arrays as lists.

    Raises:
        SetupError: the file can't be read, is no GGUF file, or is damaged.
    """
    return _read(path, lambda head: head.entries())


def read_head(path: Path) -> tuple[Metadata, list[TensorEntry]]:
    """The entries, as `read_metadata`, and the table of tensors. Raises as it does."""

    def read(head: _Head) -> tuple[Metadata, list[TensorEntry]]:
        entries = head.entries()
        return entries, head.tensors(entries.get("general.alignment", _DEFAULT_ALIGNMENT))

    return _read(path, read)


def _read(path: Path, read: Callable[[_Head], T]) -> T:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return read(_Head(data))
    except OSError as error:
        raise SetupError(f"the model file {path} can't be read: {error.strerror}") from None
    except (_Broken, ValueError, struct.error, OverflowError, MemoryError, RecursionError) as error:
        # ValueError: an empty file; RecursionError: arrays in arrays in arrays
        raise SetupError(
            f"the model file {path} is not a whole GGUF file ({error})", hint="remove it and fetch it again"
        ) from None


class _Head:
    """A cursor over the head's bytes: `entries` once, then `tensors`."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0
        self._num_tensors = 0

    def entries(self) -> Metadata:
        if self._data[:4] != b"GGUF":
            raise _Broken("it does not begin with GGUF")
        self._at = 4
        version = self._scalar("I")
        if version not in _VERSIONS:
            raise _Broken(f"version {version}; known: {', '.join(map(str, _VERSIONS))}, little-endian")
        self._num_tensors = self._scalar("Q")
        entries: Metadata = {}
        for _ in range(self._scalar("Q")):
            key = self._string()
            entries[key] = self._value(self._scalar("I"))
        return entries

    def tensors(self, alignment: Any) -> list[TensorEntry]:
        if not isinstance(alignment, int) or alignment < 1:
            raise _Broken(f"its tensors are aligned to {alignment!r} bytes")
        lines = [self._tensor() for _ in range(self._num_tensors)]
        base = -(-self._at // alignment) * alignment
        return [TensorEntry(name, shape, type, base + offset) for name, shape, type, offset in lines]

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """A line of the table; here the offset counts from where the tensors begin."""
        name = self._string()
        num_dimensions = self._scalar("I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise _Broken(f"the tensor {name} has {num_dimensions} dimensions")
        shape = tuple(reversed([self._scalar("Q") for _ in range(num_dimensions)]))
        return name, shape, self._scalar("I"), self._scalar("Q")

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
