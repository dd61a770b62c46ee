"""Text to tokens and back, and messages to the tokens of a prompt. Knows nothing of what is done with them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import Metaspace

from springtide.core.errors import InvalidRequest, SetupError
from springtide.core.request import Message
from springtide.core.store import ModelFiles
from springtide.text.chat_template import ChatTemplate
from springtide.text.control_tokens import ControlTokens
from springtide.text.token_bytes import TokenBytes
from springtide.text.tokenizer_files import TokenizerParts, load_parts

log = logging.getLogger(__name__)


class TokenizerLike(Protocol):
    """What replica and engine ask of any tokenizer, a model's or the mock engine's."""

    vocab_size: int
    bos_id: int | None
    stop_ids: tuple[int, ...]
    special_tokens: dict[str, int]

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str: ...

    def token_bytes(self, id: int) -> bytes: ...

    def render_chat(self, messages: Sequence[Message], *, now: float | None = None) -> list[int]: ...


class Tokenizer:
    """A model's tokenizer. Safe to use from several threads at once."""

    def __init__(self, parts: TokenizerParts) -> None:
        self.vocab_size = parts.vocab_size
        self.bos_id = parts.bos_id
        self.stop_ids = parts.stop_ids
        self.chat_template = parts.chat_template
        added: dict[int, AddedToken] = parts.backend.get_added_tokens_decoder()
        control = {id: token for id, token in added.items() if token.special}
        self.special_tokens = {token.content: id for id, token in control.items()}
        self._special_ids = frozenset(control)
        self._control = ControlTokens(control)
        self._add_bos = parts.add_bos
        self._backend = parts.backend
        self._backend.encode_special_tokens = True  # that is: as the text they are
        self._continuing = _without_prefix(parts.backend)
        self._bytes = TokenBytes(parts.backend, added)
        self._template, self._template_error = _compile(parts)

    @classmethod
    def load(cls, files: ModelFiles) -> Tokenizer:
        """The tokenizer of a model's files.

        Raises:
            SetupError: there is none (the engine can do without), or it is broken or not supported.
        """
        return cls(load_parts(files))

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """The tokens of a text. Control tokens typed in it stay the text they are. `add_bos` puts the beginning
        token before it, if the model wants one there.

        Raises:
            InvalidRequest: the text holds half of a surrogate pair, which no encoding can carry.
        """
        ids = self._encode(self._backend, text) if text else []
        return [self.bos_id, *ids] if add_bos and self._add_bos and self.bos_id is not None else ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of tokens; bytes that are no UTF-8 become U+FFFD. Ids that no token has give nothing."""
        return self._bytes.decode([id for id in ids if id not in self._special_ids] if skip_special else ids)

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token: of a control token those of its name, of an id without a token none."""
        return self._bytes[id]

    def render_chat(self, messages: Sequence[Message], *, now: float | None = None) -> list[int]:
        """The tokens of a conversation, up to where the assistant begins to speak. Control tokens come from the
        template alone. `now` (unix seconds) is the date for templates that print it; the same `now` gives the
        same prompt.

        Raises:
            InvalidRequest: the model has no usable chat template, or it can't render these messages.
        """
        if self._template is None:
            raise InvalidRequest(self._template_error, hint="use /v1/completions", param="messages")
        ids: list[int] = []
        backend = self._backend
        for piece in self._control.split(self._template.render(messages, now=now)):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self._encode(backend, piece)
            backend = self._continuing
        return ids

    @staticmethod
    def _encode(backend: Backend, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequest("the text holds a lone surrogate, which is no character") from None
        # Of the library's ways to encode, this one lets other threads run meanwhile.
        return list(backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)


def _without_prefix(backend: Backend) -> Backend:
    """The tokenizer for text that goes on after a control token: some put their space before the first text only."""
    splitter = backend.pre_tokenizer
    if not isinstance(splitter, Metaspace) or splitter.prepend_scheme != "first":
        return backend
    continuing = Backend.from_str(backend.to_str())
    continuing.pre_tokenizer = Metaspace(splitter.replacement, "never", splitter.split)
    continuing.encode_special_tokens = True
    return continuing


def _compile(parts: TokenizerParts) -> tuple[ChatTemplate | None, str]:
    """The chat template, or why there is none. A model whose template is broken can still complete text."""
    if parts.chat_template is None:
        return None, "the model has no chat template"
    try:
        return ChatTemplate(parts.chat_template, parts.template_tokens), ""
    except SetupError as error:
        log.warning("chat is off: %s", error)
        return None, str(error)
