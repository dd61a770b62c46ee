"""The seam between the engine and whoever guesses further tokens (speculative decoding).

A guess can't change what a sequence becomes: the engine samples every position as if there were no drafts, and keeps
those that came out as guessed. Sampling is keyed, so what is drawn at a position doesn't hang on how it was reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Drafter(Protocol):
    """Guesses how sequences go on. One thread at a time."""

    def propose(self, sequence_id: str, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `tokens`, which are all of the sequence so far, its prompt included;
        none where it has no idea. `tokens` only ever grow while the sequence lives."""

    def forget(self, sequence_id: str) -> None:
        """The sequence is over. One that was never asked about may be named too."""
