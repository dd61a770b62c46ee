"""OpenAI's response bodies: what chunks and whole answers share (usage, logprobs), and whole answers.

Text arrives escaped and is copied, never parsed. Everything here is bytes that go out as they are.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import msgspec

from springtide.core.request import Delta, TokenCounts, TokenLogprob
from springtide.fabric.streams import Frame
from springtide.gateway.openai import Call, Dialect

_LOWEST_LOGPROB = -9999.0  # JSON has no infinities

encode = msgspec.json.encode


@lru_cache(maxsize=1024)
def fingerprint(numerics: str) -> str | None:
    """OpenAI's `system_fingerprint`: within one, the same seed gives the same text."""
    return "fp_" + hashlib.sha256(numerics.encode()).hexdigest()[:12] if numerics else None


def usage_object(counts: TokenCounts) -> dict[str, Any]:
    return {
        "prompt_tokens": counts.prompt,
        "completion_tokens": counts.completion,
        "total_tokens": counts.prompt + counts.completion,
        "prompt_tokens_details": {"cached_tokens": counts.cached},
    }


class LogprobsWriter:
    """The `logprobs` of a choice, delta by delta. The older dialect counts characters, so this remembers."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._characters: dict[int, int] = {}

    def write(self, choice: int, scores: list[TokenLogprob]) -> dict[str, Any]:
        """The `logprobs` object for the tokens that a choice goes on with."""
        if self._dialect == "chat":
            return {"content": [_chat_score(score) for score in scores], "refusal": None}
        offsets = []
        position = self._characters.get(choice, 0)
        for score in scores:
            offsets.append(position)
            position += len(score.token.decode("utf-8", "ignore"))
        self._characters[choice] = position
        return {
            "tokens": [_token_key(score.token) for score in scores],
            "token_logprobs": [_finite(score.logprob) for score in scores],
            "top_logprobs": [_top_by_token(score) for score in scores],
            "text_offset": offsets,
        }


def _chat_score(score: TokenLogprob) -> dict[str, Any]:
    return {
        **_chat_token(score.token, score.logprob),
        "top_logprobs": [_chat_token(top.token, top.logprob) for top in score.top],
    }


def _chat_token(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(token)}


def _top_by_token(score: TokenLogprob) -> dict[str, float]:
    tops = {_token_key(top.token): _finite(top.logprob) for top in score.top}
    tops.setdefault(_token_key(score.token), _finite(score.logprob))
    return tops


def _token_key(token: bytes) -> str:
    """A token as text; one that is part of a character as OpenAI writes it: `bytes:\\xe2\\x82`."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)


class WholeAnswer:
    """An answer that goes out in one piece."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._logprobs = LogprobsWriter(call.dialect)
        count = call.request.num_choices
        self._texts: list[list[bytes]] = [[] for _ in range(count)]
        self._scores: list[list[TokenLogprob]] = [[] for _ in range(count)]
        self._reasons: list[str | None] = [None] * count

    def add(self, frames: list[Frame]) -> None:
        for frame in frames:
            for delta in frame.deltas:
                self._add(delta)

    def _add(self, delta: Delta) -> None:
        self._texts[delta.choice].append(delta.text)
        if delta.logprobs is not None:
            self._scores[delta.choice] += delta.logprobs
        if delta.finish_reason is not None:
            self._reasons[delta.choice] = delta.finish_reason

    def body(self, numerics: str, counts: TokenCounts) -> bytes:
        request = self._call.request
        whole = {
            "id": request.id,
            "object": "chat.completion" if self._call.dialect == "chat" else "text_completion",
            "created": int(request.created),
            "model": request.model,
            "system_fingerprint": fingerprint(numerics),
            "choices": [self._choice(i) for i in range(request.num_choices)],
            "usage": usage_object(counts),
        }
        return encode(whole)

    def _choice(self, i: int) -> dict[str, Any]:
        text = msgspec.Raw(b'"' + b"".join(self._texts[i]) + b'"')
        content: dict[str, Any] = {"text": text}
        if self._call.dialect == "chat":
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        scored = self._call.request.sampling.logprobs is not None
        logprobs = self._logprobs.write(i, self._scores[i]) if scored else None
        return {"index": i, **content, "logprobs": logprobs, "finish_reason": self._reasons[i]}
