"""The text of one choice as its tokens come: whole characters only, and nothing that may yet be a stop string.

Knows nothing of engines or of how the text travels.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from springtide.core.errors import InvalidRequest
from springtide.text.stop_strings import StopAutomaton, StopMatch, stop_automaton
from springtide.text.tokenizer import TokenizerLike

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class OutputText:
    """Incremental detokenising with stop strings. Each token costs what it is long, whatever came before.

    All that `push` and `finish` return, put together, is `tokenizer.decode` of all tokens, cut before the stop
    string that is complete first (of those complete at the same character, before the longest).

    Args:
        stop: Stop strings, none empty.
        min_tokens: A stop string counts only if a token after the first `min_tokens` completes it.
        prior_ids, prior_text: What a replica before this one had made and sent: the text goes on after
            `prior_text`, exactly as it would have gone on there. `prior_stop_ids`: those of them give no text, as
            with `push`.
        continues: The tokens go on in the middle of a text (a completion's prompt) and do not begin one: a
            leading space is then a real one also for tokenizers that put a space before every text.

    Raises:
        InvalidRequest: `prior_text` is not the text of `prior_ids`.
    """

    def __init__(
        self,
        tokenizer: TokenizerLike,
        *,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        prior_ids: Sequence[int] = (),
        prior_text: str = "",
        prior_stop_ids: frozenset[int] = frozenset(),
        continues: bool = False,
    ) -> None:
        self.matched: str | None = None
        """The stop string that was found, if one was: the text has ended before it."""
        self.consumed = 0
        """How many of the pushed tokens were used: after a match, up to and with the one that completed it."""
        self._tokenizer = tokenizer
        self._special_ids = frozenset(tokenizer.special_tokens.values())
        self._utf8 = _Utf8Decoder(errors="replace")
        self._at_start = not continues
        self._stops = stop_automaton(tuple(stop)) if stop else None
        self._state = 0
        self._num_tokens = 0
        self._min_tokens = min_tokens
        self._held = ""
        self._unsent = ""
        self._already_sent = 0
        if prior_ids or prior_text:
            self._resume(prior_ids, prior_text, prior_stop_ids)

    def push(self, token_ids: Iterable[int], *, stop_ids: frozenset[int] = frozenset()) -> str:
        """Text that is now certain. Tokens in `stop_ids`, which end the sequence, and special tokens give none."""
        text, self._unsent = self._unsent, ""
        for id in token_ids:
            if self.matched is not None:
                break
            self.consumed += 1
            self._num_tokens += 1
            if id not in stop_ids and id not in self._special_ids:
                text += self._take(self._decode(id))
        return self._drop_sent(text)

    def finish(self) -> str:
        """What was held back, when no more tokens come; an unfinished character becomes U+FFFD."""
        text, self._unsent = self._unsent, ""
        if self.matched is None:
            text += self._take(self._utf8.decode(b"", final=True)) + self._held
            self._held = ""
        return self._drop_sent(text)

    def _decode(self, id: int) -> str:
        data = self._tokenizer.token_bytes(id)
        if self._at_start and data:
            self._at_start = False
            # Some tokenizers put a space before every text, and take it away again where they decode one.
            if data[:1] == b" " and not self._tokenizer.decode([id]).startswith(" "):
                data = data[1:]
        return self._utf8.decode(data)

    def _take(self, text: str) -> str:
        """Add decoded text and return what can't be part of a stop string any more."""
        if self._stops is None or not text:
            return text
        match = self._scan(self._stops, text)
        if match is not None:
            self.matched = match.stop
            known = self._held + text[: match.end]
            self._held = ""
            return known[: len(known) - len(match.stop)]
        known = self._held + text
        certain = len(known) - self._stops.depth[self._state]
        self._held = known[certain:]
        return known[:certain]

    def _scan(self, stops: StopAutomaton, text: str) -> StopMatch | None:
        """The first stop string that is complete in `text`, and counts."""
        at = 0
        while True:
            self._state, match = stops.scan(self._state, text[at:])
            if match is None:
                return None
            at += match.end
            if self._num_tokens > self._min_tokens:
                return StopMatch(match.stop, at)

    def _resume(self, prior_ids: Sequence[int], prior_text: str, stop_ids: frozenset[int]) -> None:
        text = self.push(prior_ids, stop_ids=stop_ids)
        self.consumed = 0
        if not (text + self._held).startswith(prior_text):
            raise InvalidRequest("the text to go on after is not the text of its tokens")
        # The replica before may have sent less than is certain, or (when it ended) also what it had held back.
        self._unsent = text[len(prior_text) :]
        self._already_sent = max(0, len(prior_text) - len(text))

    def _drop_sent(self, text: str) -> str:
        skipped = min(self._already_sent, len(text))
        self._already_sent -= skipped
        return text[skipped:]
