"""One sequence as the scheduler sees it: how many tokens there are and how many are computed, not which."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Sequence:
    """A completion in progress. Owned by the Scheduler; everybody else only reads it.

    Tokens [0, num_computed_tokens) have their K/V in memory; [num_computed_tokens, num_tokens) are known, but
    still to run. A new prompt, a chunk of it, one new token and a resumed or preempted sequence differ in
    these two numbers alone.
    """

    id: str
    priority: int
    arrival: int  # counts up over all sequences: who came first
    num_tokens: int  # prompt and output so far
    max_num_tokens: int  # what num_tokens may grow to
    num_computed_tokens: int = 0
    num_blocks: int = 0  # blocks that it holds

    @property
    def num_pending_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def rank(self) -> tuple[int, int]:
        """Sorts the most important first: higher priority, then earlier arrival."""
        return (-self.priority, self.arrival)
