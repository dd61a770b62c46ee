"""The tokenizer of the mock engine: prompts are their bytes, answers are short words that can be read back.

A token below 256 is that byte. Two tokens mark the turns of a chat. Every other token is a word of four visible
characters such as " k7f", so that whoever reads an answer as text knows which tokens it was made of.
"""

from __future__ import annotations

from collections.abc import Sequence

from springtide.core.request import Message

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_DIGITS = {letter: value for value, letter in enumerate(_ALPHABET)}

TURN_ID = 256
END_ID = 257
FIRST_WORD_ID = 258
NUM_WORDS = len(_ALPHABET) ** 3
WORD_LENGTH = 4
_SPECIAL = {"<|turn|>": TURN_ID, "<|end|>": END_ID}
_SPECIAL_BYTES = {id: text.encode() for text, id in _SPECIAL.items()}


class MockTokenizer:
    """What `text.Tokenizer` is to a real model."""

    vocab_size = FIRST_WORD_ID + NUM_WORDS
    bos_id: int | None = None
    stop_ids: tuple[int, ...] = (END_ID,)
    special_tokens = _SPECIAL
    chat_template: str | None = None

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """The bytes of the text; what can't be UTF-8 becomes a question mark."""
        return list(text.encode("utf-8", "replace"))

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of the tokens, without turn marks unless they are asked for."""
        kept = (id for id in ids if not (skip_special and id in _SPECIAL_BYTES))
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes that one token stands for."""
        if id < TURN_ID:
            return bytes((id,))
        return _SPECIAL_BYTES.get(id) or word(id).encode()

    def render_chat(self, messages: Sequence[Message], *, now: float | None = None) -> list[int]:
        """Every message as a turn, then the beginning of the answer's. Content is bytes, so it can't hold marks."""
        ids: list[int] = []
        for message in messages:
            ids += [TURN_ID, *self.encode(f"{message.role}\n{message.content or ''}"), END_ID]
        return [*ids, TURN_ID, *self.encode("assistant\n")]


def word(token_id: int) -> str:
    """The word of a token that is one."""
    number = token_id - FIRST_WORD_ID
    return " " + _ALPHABET[number >> 10] + _ALPHABET[number >> 5 & 31] + _ALPHABET[number & 31]


def read_words(text: str) -> list[int]:
    """The tokens of an answer, from its text.

    Raises:
        ValueError: it is not a row of whole words.
    """
    if len(text) % WORD_LENGTH:
        raise ValueError(f"{text[-WORD_LENGTH:]!r} is no whole word")
    return [_read_word(text[at : at + WORD_LENGTH]) for at in range(0, len(text), WORD_LENGTH)]


def _read_word(text: str) -> int:
    if text[0] != " " or any(letter not in _DIGITS for letter in text[1:]):
        raise ValueError(f"{text!r} is no word")
    high, middle, low = (_DIGITS[letter] for letter in text[1:])
    return FIRST_WORD_ID + (high << 10 | middle << 5 | low)
