"""An engine without a model. Batches, blocks, preemptions and what is found cached are those of the real scheduler;
tokens are a hash chain, step times a law. For tests and load: whoever holds a prompt and its answer can tell whether a
token was lost, doubled, or belongs to another request (`verify_chain`).
"""

from __future__ import annotations

import difflib
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import msgspec

from springtide.core.engine_api import EngineInfo, EngineLoad, SequenceOutput, SequenceRequest, TokenScore
from springtide.core.errors import ContextTooLong, InvalidRequest, SetupError
from springtide.core.request import FinishReason
from springtide.fleet.mock_text import END_ID, FIRST_WORD_ID, NUM_WORDS, MockTokenizer
from springtide.policy.prefix import extend_hashes
from springtide.policy.scheduler import Scheduled, Scheduler

BLOCK_SIZE = 16


class MockConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The options of a mock deployment.

    A step takes `step_base_ms`, plus `step_per_seq_ms` for each sequence in it, plus its prompt tokens at
    `prefill_tok_s` (0: no time). A sequence gains `tokens_per_step` tokens a step. `stop_after` ends an answer
    by itself, as a model would, after that many tokens; by default only `max_tokens` does. `num_blocks` defaults
    to what `max_num_seqs` full contexts need.
    """

    step_base_ms: float = 0.0
    step_per_seq_ms: float = 0.0
    prefill_tok_s: float = 0.0
    tokens_per_step: int = 1
    stop_after: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 8192
    context_length: int = 8192
    num_blocks: int | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> MockConfig:
        """The options of a deployment, checked.

        Raises:
            SetupError: an unknown option (naming the nearest known one) or a wrong value.
        """
        for key in options:
            if key not in cls.__struct_fields__:
                near = difflib.get_close_matches(key, cls.__struct_fields__, n=1, cutoff=0.0)
                raise SetupError(f"unknown option {key} of the mock engine", hint=f"did you mean {near[0]}?")
        try:
            config = msgspec.convert(dict(options), cls, strict=False)
        except msgspec.ValidationError as error:
            raise SetupError(f"an option of the mock engine has a wrong value: {error}") from None
        config._check()
        return config

    def _check(self) -> None:
        for name in ("tokens_per_step", "stop_after", "max_num_seqs", "max_num_batched_tokens", "context_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SetupError(f"the option {name} of the mock engine is {value}; it must be at least 1")

    def step_time(self, items: Sequence[Scheduled]) -> float:
        """Seconds that a step with these items takes. More tokens of a sequence than a step can yield are prompt."""
        seconds = (self.step_base_ms + self.step_per_seq_ms * len(items)) / 1000
        if self.prefill_tok_s:
            seconds += sum(item.count for item in items if item.count > self.tokens_per_step) / self.prefill_tok_s
        return seconds


class Chain:
    """The tokens that follow a prompt, one by one; each depends on the prompt, the seed, the choice and on all
    tokens before it."""

    def __init__(self, prompt: Sequence[int], seed: int | None, choice: int, output: Sequence[int] = ()) -> None:
        start = blake2b(array("q", prompt).tobytes(), digest_size=16)
        start.update(f"|{seed or 0}|{choice}".encode())
        self._state = start.digest()
        for token in output:
            self.take(token)

    @property
    def token(self) -> int:
        """The token that comes next."""
        return FIRST_WORD_ID + int.from_bytes(self._state[:4], "little") % NUM_WORDS

    def take(self, token: int) -> None:
        """Go on after `token`."""
        self._state = blake2b(self._state + token.to_bytes(8, "little"), digest_size=16).digest()

    def score(self, token: int, num_top: int) -> TokenScore:
        """Log-probabilities as a model would give them: of the right order, and the same each time."""
        top = [(self.token, -0.1)] + [
            (FIRST_WORD_ID + (self.token - FIRST_WORD_ID + rank) % NUM_WORDS, -2.5 - rank) for rank in range(1, num_top)
        ]
        return TokenScore(token, -0.1, top[:num_top])


def chain(prompt: Sequence[int], seed: int | None, choice: int = 0) -> Iterator[int]:
    """All tokens that follow a prompt."""
    link = Chain(prompt, seed, choice)
    while True:
        token = link.token
        yield token
        link.take(token)


def verify_chain(token_ids: Sequence[int], prompt: Sequence[int], seed: int | None, choice: int = 0) -> None:
    """Check an answer (without the token that ended it, if there was one).

    Raises:
        ValueError: naming the first position that holds another token than it should.
    """
    for position, (found, expected) in enumerate(zip(token_ids, chain(prompt, seed, choice), strict=False)):
        if found != expected:
            raise ValueError(f"position {position} of choice {choice} holds token {found} instead of {expected}")


@dataclass(slots=True)
class _Sequence:
    request: SequenceRequest
    chain: Chain
    tokens: list[int]  # prompt and output so far, that from before a resume included
    max_output: int
    ending: frozenset[int]
    block_hashes: list[bytes] | None = None  # of its full blocks; None: not cached
    cached_tokens: int | None = None  # of its prompt, when it first ran

    def __post_init__(self) -> None:
        if self.request.cache_salt is not None:
            self.block_hashes = []
            self._hash_full_blocks()

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    def take(self, token: int) -> None:
        """Go on after `token`."""
        self.chain.take(token)
        self.tokens.append(token)
        self._hash_full_blocks()

    def _hash_full_blocks(self) -> None:
        if self.block_hashes is not None:
            extend_hashes(self.block_hashes, self.request.cache_salt or "", self.tokens, BLOCK_SIZE)


class MockEngine:
    """Implements `core.engine_api.Engine`. `sleep` is how a step takes its time."""

    def __init__(
        self, model: str = "mock", config: MockConfig | None = None, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._sleep = sleep
        self.config = config = config or MockConfig()
        blocks_per_context = -(-config.context_length // BLOCK_SIZE)
        num_blocks = config.num_blocks or config.max_num_seqs * blocks_per_context
        self.info = EngineInfo(
            model=model,
            engine="mock",
            context_length=config.context_length,
            vocab_size=MockTokenizer.vocab_size,
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks,
            max_num_seqs=config.max_num_seqs,
            dtype="none",
            device="none",
            numerics="mock",
        )
        self._scheduler = Scheduler(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
        )
        self._sequences: dict[str, _Sequence] = {}

    def add(self, sequence: SequenceRequest) -> None:
        """See `Engine.add`."""
        prompt, sampling = sequence.prompt, sequence.sampling
        bad = next((id for id in prompt if not 0 <= id < self.info.vocab_size), None)
        if bad is not None:
            raise InvalidRequest(f"token id {bad} is outside the vocabulary of {self.info.vocab_size}")
        room = self.info.context_length - len(prompt)
        max_output = room if sampling.max_tokens is None else sampling.max_tokens
        if max_output > room or room < 1:
            raise ContextTooLong(
                f"prompt has {len(prompt)} tokens, max_tokens {max_output}, context is {self.info.context_length}"
            )
        ends = () if sampling.ignore_eos else sequence.stop_ids
        added = _Sequence(
            sequence,
            Chain(prompt, sampling.seed, sequence.choice, sequence.output),
            [*prompt, *sequence.output],
            max_output,
            frozenset(ends).union(sampling.stop_token_ids),
        )
        self._scheduler.add(
            sequence.id,
            num_tokens=len(added.tokens),
            max_num_tokens=len(prompt) + max_output,
            priority=sequence.priority,
            block_hashes=added.block_hashes,
        )
        self._sequences[sequence.id] = added

    def cancel(self, sequence_id: str) -> None:
        """See `Engine.cancel`."""
        if self._sequences.pop(sequence_id, None):
            self._scheduler.cancel(sequence_id)

    def has_work(self) -> bool:
        """See `Engine.has_work`."""
        return self._scheduler.has_work()

    def step(self) -> list[SequenceOutput]:
        """See `Engine.step`."""
        batch = self._scheduler.schedule()
        seconds = self.config.step_time(batch.items)
        if seconds > 0:
            self._sleep(seconds)
        for item in batch.items:
            sequence = self._sequences[item.id]
            if sequence.cached_tokens is None:
                sequence.cached_tokens = min(item.start, len(sequence.request.prompt))
        outputs = [self._extend(self._sequences[item.id]) for item in batch.items if item.samples]
        finished = [output.id for output in outputs if output.finish_reason]
        self._scheduler.update(batch, {output.id: len(output.token_ids) for output in outputs}, finished)
        for sequence_id in finished:
            del self._sequences[sequence_id]
        return outputs

    def load(self) -> EngineLoad:
        """See `Engine.load`."""
        return self._scheduler.load()

    def close(self) -> None:
        """See `Engine.close`."""

    def _extend(self, sequence: _Sequence) -> SequenceOutput:
        """The next tokens of one sequence."""
        sampling = sequence.request.sampling
        output = SequenceOutput(id=sequence.request.id, token_ids=[])
        if sequence.num_output == len(sequence.request.output):  # its first
            output.cached_tokens = sequence.cached_tokens or 0
        scores: list[TokenScore] = []
        while len(output.token_ids) < self.config.tokens_per_step and output.finish_reason is None:
            token = self._next_token(sequence)
            if sampling.logprobs is not None:
                scores.append(sequence.chain.score(token, sampling.logprobs))
            sequence.take(token)
            output.token_ids.append(token)
            output.finish_reason = _finish_reason(sequence, token)
        output.scores = scores if sampling.logprobs is not None else None
        return output

    def _next_token(self, sequence: _Sequence) -> int:
        ends = self.config.stop_after is not None and sequence.num_output >= self.config.stop_after
        return END_ID if ends and END_ID in sequence.ending else sequence.chain.token


def _finish_reason(sequence: _Sequence, token: int) -> FinishReason | None:
    if token in sequence.ending and sequence.num_output >= sequence.request.sampling.min_tokens:
        return "stop"
    return "length" if sequence.num_output >= sequence.max_output else None
