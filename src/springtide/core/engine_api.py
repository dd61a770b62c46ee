"""The seam between a replica and whatever runs its model: ours, the mock, later a foreign engine.

Token ids only; text is somebody else's business. All calls come from one thread.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from springtide.core.request import FinishReason, SamplingParams


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine is and how much it holds. `numerics` names the class within which a seed gives the same
    text everywhere (device kind, kernel, dtype, model digest)."""

    model: str
    engine: str
    context_length: int
    vocab_size: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    dtype: str
    device: str
    numerics: str


class SequenceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to run. `output` is what it had already produced elsewhere (resume): it is prefilled like
    the prompt, but positions, penalties and `max_tokens` count it as output. `choice` and `sampling.seed` key
    the noise. `stop_ids` end it unless `sampling.ignore_eos`; `sampling.stop_token_ids` always. Sequences of equal
    `cache_salt` share what is cached of their prefixes; None: its own is neither looked up nor kept."""

    id: str
    prompt: list[int]
    sampling: SamplingParams
    choice: int = 0
    output: list[int] = []
    stop_ids: tuple[int, ...] = ()
    priority: int = 0
    cache_salt: str | None = ""


class TokenScore(msgspec.Struct, frozen=True, array_like=True):
    """A sampled token's log-probability and the likeliest alternatives as (token id, logprob), best first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class SequenceOutput(msgspec.Struct, kw_only=True):
    """What one step gave one sequence. `finish_reason` is set on its last output, and just there. A token
    that ended the sequence (end-of-text, a stop token) is in `token_ids`. `error` explains "error"."""

    id: str
    token_ids: list[int]
    scores: list[TokenScore] | None = None
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    error: str | None = None


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """How full an engine is, now."""

    running: int = 0
    waiting: int = 0
    blocks_free: int = 0
    blocks_total: int = 0
    steps: int = 0
    preemptions: int = 0


class Engine(Protocol):
    """add, cancel, step: `step` runs one batch and says what came of it."""

    info: EngineInfo

    def add(self, sequence: SequenceRequest) -> None:
        """Queue a sequence.

        Raises:
            ContextTooLong: it can't fit the context.
            InvalidRequest: it can never fit the pool, or an id is out of the vocabulary.
        """

    def cancel(self, sequence_id: str) -> None:
        """Forget a sequence and free its pages at once. Unknown ids are ignored; no output follows."""

    def has_work(self) -> bool:
        """Whether a step would do anything."""

    def step(self) -> list[SequenceOutput]:
        """Run one batch. Never raises for one sequence's sake: that sequence ends with "error"."""

    def load(self) -> EngineLoad: ...

    def close(self) -> None: ...
