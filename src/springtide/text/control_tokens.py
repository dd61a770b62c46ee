"""Control tokens: the tokens that no text becomes, unless a chat template wrote it. Knows nothing of templates."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TypeAlias

from tokenizers import AddedToken

from springtide.text.template_text import TemplateText

Piece: TypeAlias = int | str
"""A control token's id, or text that stands between two of them."""


class ControlTokens:
    """The control tokens of one vocabulary, by id."""

    def __init__(self, tokens: Mapping[int, AddedToken]) -> None:
        self._ids = {token.content: id for id, token in tokens.items()}
        # A token may take the white space beside it with it.
        self._eats_left = {id for id, token in tokens.items() if token.lstrip}
        self._eats_right = {id for id, token in tokens.items() if token.rstrip}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def split(self, text: str) -> Iterator[Piece]:
        """A rendered prompt in pieces: control tokens where the template wrote them, and the text between."""
        eaten_on_the_left, at = False, 0
        for start, end, id in self._find(text):
            yield from self._between(text[at:start], eaten_on_the_left, id in self._eats_left)
            yield id
            eaten_on_the_left, at = id in self._eats_right, end
        yield from self._between(text[at:], eaten_on_the_left, False)

    def _find(self, text: str) -> Iterator[tuple[int, int, int]]:
        for start, end in text.spans if isinstance(text, TemplateText) else ():
            for match in self._pattern.finditer(text, start, end):
                yield match.start(), match.end(), self._ids[match[0]]

    @staticmethod
    def _between(text: str, eaten_on_the_left: bool, eaten_on_the_right: bool) -> Iterator[str]:
        text = text.lstrip() if eaten_on_the_left else text
        text = text.rstrip() if eaten_on_the_right else text
        if text:
            yield text
