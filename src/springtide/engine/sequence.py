"""One running completion as the engine keeps it: its token ids as they grow, the names of its full blocks, what it is
sampled with, and the rules by which it ends. Knows nothing of memory or of other sequences.
"""

from __future__ import annotations

import secrets
from collections import abc

from springtide.core.engine_api import SequenceRequest
from springtide.core.errors import ContextTooLong
from springtide.core.request import FinishReason
from springtide.engine.kv import PAGE_SIZE
from springtide.engine.sampler import SampleRow, penalises
from springtide.policy.prefix import extend_hashes


class Sequence:
    """A request's tokens, prompt and output, and all that follows from them.

    Raises:
        ContextTooLong: prompt and `max_tokens` do not fit the context.
    """

    def __init__(self, request: SequenceRequest, context_length: int, vocab_size: int) -> None:
        sampling = request.sampling
        self.request = request
        self.tokens = [*request.prompt, *request.output]
        self.max_tokens = _max_tokens(request, context_length)
        self.block_hashes: list[bytes] | None = None if request.cache_salt is None else []
        """Of the blocks that are full, in order, for the prefix cache; grows with the tokens. None: not cached."""
        self.cached_tokens: int | None = None
        """How many tokens of its prompt were found cached when it first ran; None before."""
        self._seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self._ends = frozenset(sampling.stop_token_ids) | (
            # Of a tokenizer that has more tokens than the model, some never come.
            frozenset() if sampling.ignore_eos else {id for id in request.stop_ids if id < vocab_size}
        )
        self._counts: dict[int, int] | None = None  # as `SampleRow.counts`; None where nobody looks at them
        if penalises(sampling):
            self._counts = dict.fromkeys(request.prompt, 0)
            for token in request.output:
                _count(self._counts, token)
        self._hash_full_blocks()

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_gained(self) -> int:
        """Output tokens beyond those that it came with."""
        return self.num_output - len(self.request.output)

    def append(self, token: int) -> None:
        self.tokens.append(token)
        if self._counts is not None:
            _count(self._counts, token)
        self._hash_full_blocks()

    def runs_from(self, position: int) -> None:
        """Told whenever a part of it runs. Only where it first starts tells what was cached before it came."""
        if self.cached_tokens is None:
            self.cached_tokens = min(position, len(self.request.prompt))

    def finish_reason(self) -> FinishReason | None:
        """Why it is over, if it is."""
        if self.num_output and self.tokens[-1] in self._ends:
            return "stop"
        return "length" if self.num_output >= self.max_tokens else None

    def sample_rows(self, drafts: abc.Sequence[int]) -> list[SampleRow]:
        """What the sampler must know to choose the next token, and the one after each of `drafts`, were these the
        next ones: all as it would be if they really were."""
        counts = self._counts
        rows = [self._sample_row(0, counts)]
        for ahead, draft in enumerate(drafts, start=1):
            if counts is not None:
                counts = counts.copy()  # the row before keeps its own
                _count(counts, draft)
            rows.append(self._sample_row(ahead, counts))
        return rows

    def _sample_row(self, ahead: int, counts: dict[int, int] | None) -> SampleRow:
        sampling = self.request.sampling
        position = self.num_output + ahead
        return SampleRow(
            sampling=sampling,
            seed=self._seed,
            choice=self.request.choice,
            position=position,
            counts=counts or {},
            banned=self._ends if position < sampling.min_tokens else frozenset(),
        )

    def _hash_full_blocks(self) -> None:
        if self.block_hashes is not None:
            extend_hashes(self.block_hashes, self.request.cache_salt or "", self.tokens, PAGE_SIZE)


def _count(counts: dict[int, int], token: int) -> None:
    counts[token] = counts.get(token, 0) + 1


def _max_tokens(request: SequenceRequest, context_length: int) -> int:
    """How many tokens the output may have: as asked for, else as many as the context holds."""
    prompt, asked = len(request.prompt), request.sampling.max_tokens
    if prompt + (asked or 1) > context_length:
        wanted = f"{asked} for the answer" if asked else "none left for the answer"
        raise ContextTooLong(
            f"the context here holds {context_length} tokens, but {prompt + (asked or 0)} are asked for: "
            f"{prompt} in the prompt and {wanted}",
            hint="shorten the prompt or lower max_tokens",
        )
    return asked or context_length - prompt
