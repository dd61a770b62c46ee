"""What a client asks, what comes back, and what it used. Plain frozen data that also travels the wire.

A Request becomes one or more Sequences: one for each prompt and each of `n` choices. Choice numbers are
`prompt_index * n + j`, as in OpenAI's completions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from springtide.core.errors import InvalidRequest, WireError

FinishReason = Literal["stop", "length", "cancelled", "error"]
Outcome = Literal["finished", "failed", "cancelled"]
PriorityClass = Literal["interactive", "standard", "batch"]

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
MAX_TOP_LOGPROBS = 20


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are chosen. Field names are the field's (OpenAI's and vLLM's).

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 and `min_p` 0 are off. `max_tokens` None means as many
    as the context holds. `seed` None means that the platform draws one. `logprobs` None means none; k means
    the chosen token's and those of the k likeliest.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None

    def check(self) -> SamplingParams:
        """Self, if every field is in its range.

        Raises:
            InvalidRequest: naming the first field that is not.
        """
        self._check_range("temperature", 0.0, 2.0)
        self._check_range("top_p", 0.0, 1.0, open_low=True)
        self._check_range("min_p", 0.0, 1.0)
        self._check_range("repetition_penalty", 0.01, 10.0)  # it divides: by less, scores leave their number type
        self._check_range("presence_penalty", -2.0, 2.0)
        self._check_range("frequency_penalty", -2.0, 2.0)
        self._check_range("top_k", 0, 2**31 - 1)
        self._check_range("n", 1, MAX_CHOICES)
        self._check_range("min_tokens", 0, 2**31 - 1)
        if self.max_tokens is not None:
            self._check_range("max_tokens", 1, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise InvalidRequest(
                    f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})",
                    param="min_tokens",
                )
        if self.logprobs is not None:
            self._check_range("logprobs", 0, MAX_TOP_LOGPROBS)
        if self.seed is not None:
            self._check_range("seed", -(2**63), 2**63 - 1)
        if len(self.stop) > MAX_STOP_STRINGS or any(not 0 < len(s) <= MAX_STOP_LENGTH for s in self.stop):
            raise InvalidRequest(
                f"stop takes up to {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_LENGTH} characters", param="stop"
            )
        self._check_token_ids("logit_bias", self.logit_bias)
        self._check_token_ids("stop_token_ids", self.stop_token_ids)
        for token, bias in self.logit_bias.items():
            if not -100.0 <= bias <= 100.0:
                raise InvalidRequest(f"logit_bias of token {token} is outside [-100, 100]", param="logit_bias")
        return self

    def _check_token_ids(self, name: str, token_ids: Iterable[int]) -> None:
        for token in token_ids:
            if not 0 <= token < 2**31:
                raise InvalidRequest(f"{name} has the token id {token}, which no model has", param=name)

    def _check_range(self, name: str, low: float, high: float, *, open_low: bool = False) -> None:
        value = getattr(self, name)
        if not (low < value if open_low else low <= value) or not value <= high:  # also false for NaN
            bracket = "(" if open_low else "["
            raise InvalidRequest(f"{name} is {value}; it must lie in {bracket}{low}, {high}]", param=name)


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One chat message, text only. Other parts are refused at the gateway, by name."""

    role: str
    content: str | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChoiceOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one choice has already sent: a new replica goes on after it (resume), or leaves it alone if it has a
    `finish_reason`."""

    choice: int
    token_ids: list[int]
    text: str
    finish_reason: FinishReason | None = None


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a client asks, after admission. Either `messages` or `prompts`, never both.

    `deadline` and `created` are unix seconds. `seed` in `sampling` is always set: the gateway draws one where
    the client named none, so that a retry elsewhere gives the same text. `outputs` is empty but on resume.
    Requests of equal `cache_salt` share what is cached of their prompts; None: this one is not cached.
    """

    id: str
    model: str
    tenant: str
    sampling: SamplingParams
    messages: tuple[Message, ...] | None = None
    prompts: tuple[str | tuple[int, ...], ...] | None = None
    echo: bool = False
    priority: int = 0
    priority_class: PriorityClass = "standard"
    weight: float = 1.0
    fingerprint: str = ""
    created: float = 0.0
    deadline: float | None = None
    cache_salt: str | None = None
    outputs: tuple[ChoiceOutput, ...] = ()

    @property
    def num_choices(self) -> int:
        return self.sampling.n * (len(self.prompts) if self.prompts is not None else 1)


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One alternative: token, its text as bytes, log-probability (natural log, before temperature)."""

    token_id: int
    token: bytes
    logprob: float


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """The chosen token with its likeliest alternatives, best first."""

    token_id: int
    token: bytes
    logprob: float
    top: list[TopLogprob]


DeltaKind = Literal["text", "reasoning", "tool"]


class Delta(msgspec.Struct, array_like=True, frozen=True):
    """What one step adds to one choice.

    `text` is the inside of a JSON string, already escaped, as UTF-8: the gateway copies it. `offset` counts
    the unescaped UTF-8 bytes that this choice had sent before. `token_ids` may be empty for text that was
    held back (a stop string that did not complete) and text may be empty while a character is incomplete.
    """

    choice: int
    kind: DeltaKind
    text: bytes
    token_ids: list[int]
    offset: int
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None


class TokenCounts(msgspec.Struct, frozen=True, array_like=True):
    """Tokens of a whole request over all its choices; a prompt counts once, whatever `n` is."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0


class End(msgspec.Struct, frozen=True, array_like=True):
    """The last word of an attempt. `error` is set just when `outcome` is "failed"."""

    outcome: Outcome
    counts: TokenCounts
    error: WireError | None = None


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One dispatch of a request to one replica; its node is paid for what it did. Times are unix seconds."""

    number: int
    node: str
    replica: str
    started: float
    ended: float
    outcome: Outcome
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What one request used: exactly one record each. Holds no content."""

    request_id: str
    tenant: str
    key_id: str
    model: str
    gateway: str
    created: float
    finished: float
    outcome: Outcome
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    first_token_s: float | None = None
    attempts: list[Attempt] = []
