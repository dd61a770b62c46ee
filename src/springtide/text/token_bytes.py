"""The bytes that each token of a vocabulary stands for. Bytes, not text: a character may be spread over tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from springtide.core.errors import SetupError

PieceBytes: TypeAlias = Callable[[str], bytes]


class TokenBytes:
    """Bytes by token id, worked out when first asked for.

    `strips_space`: every text was given a leading space that is not its own, and loses it again when decoded.

    Raises:
        SetupError: the tokenizer's decoder is of a kind that has no bytes for each token.
    """

    def __init__(self, backend: Backend, added: Mapping[int, AddedToken]) -> None:
        self._backend = backend
        self._known = {id: token.content.encode() for id, token in added.items()}
        steps = _flatten(json.loads(backend.decoder.__getstate__())) if backend.decoder else []
        self._piece_bytes = _piece_bytes(steps)
        self.strips_space = any(map(_strips_space, steps))

    def __getitem__(self, id: int) -> bytes:
        """b"" for an id that no token has: some models have more rows than tokens."""
        known = self._known.get(id)
        if known is None:
            piece = self._backend.id_to_token(id) if id >= 0 else None
            known = self._known[id] = b"" if piece is None else self._piece_bytes(piece)
        return known

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the tokens; bytes that are no UTF-8 become U+FFFD."""
        text = b"".join(map(self.__getitem__, ids)).decode("utf-8", "replace")
        return text[1:] if self.strips_space and text.startswith(" ") else text


def _flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _flatten(inner)]


def _strips_space(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return bool(step.get("prepend_scheme", "always") != "never")
    return bool(step["type"] == "Strip" and step["content"] == " " and step["start"] == 1)


def _piece_bytes(steps: list[dict[str, Any]]) -> PieceBytes:
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        return _byte_level
    if kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        replacements = [_replacement(step) for step in steps if step["type"] in ("Replace", "Metaspace")]
        return _sentencepiece(replacements, "ByteFallback" in kinds)
    raise SetupError(
        f"the tokenizer's decoder is not supported: {' + '.join(sorted(kinds)) or 'none'}",
        hint="byte-level and SentencePiece tokenizers are",
    )


def _replacement(step: dict[str, Any]) -> tuple[str, str]:
    if step["type"] == "Metaspace":
        return step["replacement"], " "
    if "String" not in step["pattern"]:
        raise SetupError("the tokenizer's decoder replaces by a regular expression, which is not supported")
    return step["pattern"]["String"], step["content"]


def _sentencepiece(replacements: list[tuple[str, str]], byte_fallback: bool) -> PieceBytes:
    def piece_bytes(piece: str) -> bytes:
        if byte_fallback and (byte := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        for old, new in replacements:
            piece = piece.replace(old, new)
        return piece.encode()

    return piece_bytes


_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level(piece: str) -> bytes:
    try:
        return piece.translate(_BYTE_OF_CHARACTER).encode("latin-1")
    except UnicodeEncodeError:  # not written in the alphabet of bytes
        return piece.encode()


def _byte_alphabet() -> dict[int, int]:
    """GPT-2's alphabet: each byte is a visible character. Printable ones are themselves, the others follow U+0100."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(0x100) if byte not in visible)
    return {byte: byte for byte in visible} | {0x100 + number: byte for number, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()
