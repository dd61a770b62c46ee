"""One sequence as the scheduler sees it: how many tokens there are and how many are computed, not which; and the
blocks that hold them."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field


@dataclass(slots=True)
class Sequence:
    """A completion in progress. Owned by the Scheduler; everybody else only reads it.

    Tokens [0, num_computed_tokens) have their K/V in memory; [num_computed_tokens, num_tokens) are known, but
    still to run. A new prompt, a chunk of it, one new token and a resumed or preempted sequence differ in
    these two numbers alone; and a cached prefix is tokens that were computed before it came.
    """

    id: str
    priority: int
    arrival: int  # counts up over all sequences: who came first
    num_tokens: int  # prompt and output so far
    max_num_tokens: int  # what num_tokens may grow to
    block_hashes: abc.Sequence[bytes] = ()  # of its blocks in order, as far as known; the caller extends it
    num_computed_tokens: int = 0
    blocks: list[int] = field(default_factory=list)  # its block table; empty while it waits
    num_released_blocks: int = 0  # so many of the first it has let go
    num_registered_blocks: int = 0  # so many of the first have been offered to, or come from, the prefix cache
    num_reported_blocks: int = 0  # so many of the first have been named in a batch

    @property
    def num_pending_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def held_blocks(self) -> list[int]:
        return self.blocks[self.num_released_blocks :]

    @property
    def rank(self) -> tuple[int, int]:
        """Sorts the most important first: higher priority, then earlier arrival."""
        return (-self.priority, self.arrival)

    def lose_memory(self) -> None:
        """Nothing of it is in memory any more."""
        self.blocks = []
        self.num_computed_tokens = self.num_released_blocks = 0
        self.num_registered_blocks = self.num_reported_blocks = 0
