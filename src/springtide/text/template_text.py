"""Strings that remember which of their characters a chat template wrote itself.

Only there may control tokens be read: whatever else is in a prompt came from a user. An operation that is not
written here gives a plain string, and so forgets: that makes a control token plain text, never the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, SupportsIndex, TypeAlias

Spans: TypeAlias = tuple[tuple[int, int], ...]
"""[start, end) of the template's own characters: in order, not touching."""


class TemplateText(str):
    """A string with the spans of it that are the template's own."""

    __slots__ = ("spans",)
    spans: Spans

    def __new__(cls, text: str, spans: Spans) -> TemplateText:
        self = super().__new__(cls, text)
        self.spans = spans
        return self

    @classmethod
    def whole(cls, text: str) -> TemplateText:
        """Text that is all the template's own."""
        return cls(text, ((0, len(text)),) if text else ())

    def __str__(self) -> str:
        return self  # so that str(x), which compiled templates are full of, keeps the spans

    def __add__(self, other: str) -> str:
        return join_texts((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return join_texts((other, self)) if isinstance(other, str) else NotImplemented

    def __getitem__(self, index: SupportsIndex | slice) -> str:
        if not isinstance(index, slice):
            at = range(len(self))[index]
            return self._part(at, at + 1)
        start, stop, step = index.indices(len(self))
        return self._part(start, max(start, stop)) if step == 1 else super().__getitem__(index)

    def strip(self, chars: str | None = None, /) -> str:
        return self._part(self._first_kept(chars), len(super().rstrip(chars)))

    def lstrip(self, chars: str | None = None, /) -> str:
        return self._part(self._first_kept(chars), len(self))

    def rstrip(self, chars: str | None = None, /) -> str:
        return self._part(0, len(super().rstrip(chars)))

    def removeprefix(self, prefix: str, /) -> str:
        return self._part(len(prefix), len(self)) if self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> str:
        return self._part(0, len(self) - len(suffix)) if self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._locate(super().split(sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._locate(super().rsplit(sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        return self._locate(super().splitlines(keepends))

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        if not old:
            return super().replace(old, new, count)
        return join_texts(self.split(old, count), new)

    def join(self, parts: Iterable[str], /) -> str:
        return join_texts(parts, self)

    def _first_kept(self, chars: str | None) -> int:
        return len(self) - len(super().lstrip(chars))

    def _part(self, start: int, end: int) -> str:
        """Characters [start, end)."""
        clipped = ((max(a, start) - start, min(b, end) - start) for a, b in self.spans)
        return _with_spans(
            str.__getitem__(self, slice(start, max(start, end))), (span for span in clipped if span[0] < span[1])
        )

    def _locate(self, parts: Sequence[str], separator: str | None = None) -> list[str]:
        """Pieces of this text, which follow one another with only separators between, with their spans. A piece may
        look like the separator before it ("aa" split once at "a"), so it is not searched for, where that is known;
        white space and line ends no piece begins with, but for the first one, which is where it is found."""
        located, at = [], 0
        for part in parts:
            start = self.find(part, at) if separator is None else at
            located.append(self._part(start, start + len(part)))
            at = start + len(part) + len(separator or "")
        return located


def join_texts(parts: Iterable[str], separator: str = "") -> str:
    """The parts as one text, with the spans of each."""
    parts = list(parts)
    if separator:
        parts = [text for part in parts for text in (separator, part)][1:]
    spans: list[tuple[int, int]] = []
    at = 0
    for part in parts:
        for start, end in part.spans if isinstance(part, TemplateText) else ():
            if spans and spans[-1][1] == at + start:
                spans[-1] = (spans[-1][0], at + end)
            else:
                spans.append((at + start, at + end))
        at += len(part)
    return _with_spans("".join(parts), spans)


def format_percent(text: str, arguments: Any) -> str:
    """`text % arguments`, for %s, %d and %%; spans of the text and of string arguments stay.

    Raises:
        ValueError: any other conversion, or not as many arguments as places.
    """
    values = iter(arguments if isinstance(arguments, tuple) else (arguments,))
    return _format(text, _PERCENT, lambda field: "%" if field == "%" else _as_text(next(values)))


def format_braces(text: str, arguments: Sequence[Any], named: dict[str, Any]) -> str:
    """`text.format(...)`, for {}, {0} and {name} alone; spans of the text and of string arguments stay.

    Raises:
        ValueError, LookupError: any other field, or no such argument.
    """
    values = iter(arguments)

    def value(field: str) -> str:
        if field in ("{{", "}}"):
            return field[0]
        name = field[1:-1]
        return _as_text(next(values) if not name else arguments[int(name)] if name.isdigit() else named[name])

    return _format(text, _BRACES, value)


_PERCENT = re.compile(r"%(?P<field>[sd%])|%")
_BRACES = re.compile(r"(?P<field>\{\{|\}\}|\{\w*\})|[{}]")


def _format(text: str, places: re.Pattern[str], value: Callable[[str], str]) -> str:
    parts, at = [], 0
    for place in places.finditer(text):
        field = place["field"]
        if field is None:
            raise ValueError(f"a place in a format string that is not supported, at character {place.start()}")
        try:
            parts += [text[at : place.start()], value(field)]
        except StopIteration:
            raise ValueError("not enough arguments for a format string") from None
        at = place.end()
    return join_texts([*parts, text[at:]])


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def _with_spans(text: str, spans: Iterable[tuple[int, int]]) -> str:
    kept = tuple(spans)
    return TemplateText(text, kept) if kept else text
