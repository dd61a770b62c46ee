"""Prompt lookup: a text often repeats itself, so what followed the last tokens before may follow them again.

Knows token ids and nothing of models. The method is Saxena's (Prompt Lookup Decoding, 2023,
https://github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

from collections.abc import Sequence

_LENGTHS = (4, 3, 2)  # of the runs of tokens that are looked for: the longest found says most about what follows


class NgramDrafter:
    """Copies what followed the latest place where the sequence had its last tokens before."""

    def __init__(self) -> None:
        self._indexes: dict[str, _Index] = {}

    def propose(self, sequence_id: str, tokens: Sequence[int], most: int) -> list[int]:
        """See `Drafter.propose`. A copy that reaches the end of `tokens` goes on with what it has copied, so that a
        short loop fills any length."""
        index = self._indexes.setdefault(sequence_id, _Index())
        index.extend(tokens)
        start = index.find(tokens)
        if start is None:
            return []
        period = len(tokens) - start
        return [tokens[start + i % period] for i in range(most)]

    def forget(self, sequence_id: str) -> None:
        """See `Drafter.forget`."""
        self._indexes.pop(sequence_id, None)


class _Index:
    """Where in one sequence each short run of tokens last ended. A new token costs the same however many there are."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in all runs but those that end with the newest token: nothing follows them yet."""
        for end in range(self._num_indexed + 1, len(tokens)):
            for length in _LENGTHS:
                if length <= end:
                    self._ends[tuple(tokens[end - length : end])] = end
        self._num_indexed = max(self._num_indexed, len(tokens) - 1)

    def find(self, tokens: Sequence[int]) -> int | None:
        """Where an earlier run equal to the last tokens ended, the longest that there is."""
        for length in _LENGTHS:
            end = self._ends.get(tuple(tokens[-length:]))
            if end is not None:
                return end
        return None
