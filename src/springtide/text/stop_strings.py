"""Stop strings found in a text that comes in pieces: an Aho-Corasick automaton. Knows nothing of tokens."""

from __future__ import annotations

from collections import deque
from functools import lru_cache
from typing import NamedTuple


class StopMatch(NamedTuple):
    """A stop string that is complete, `end` characters into the piece that completed it."""

    stop: str
    end: int


class StopAutomaton:
    """All stop strings of a request at once. States are numbers; 0 is the beginning. Never changes once made."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        # How many of the characters read last may yet become a stop string: all that has to be held back.
        self.depth = [0]
        self._complete: list[str | None] = [None]
        for stop in stops:
            self._add(stop)
        self._link()

    def scan(self, state: int, piece: str) -> tuple[int, StopMatch | None]:
        """The state after `piece`, or after the first stop string that is complete in it; of several that are
        complete at the same character, the longest."""
        if not state and self._next[0].keys().isdisjoint(piece):
            return 0, None
        for at, character in enumerate(piece):
            state = self._step(state, character)
            if stop := self._complete[state]:
                return state, StopMatch(stop, at + 1)
        return state, None

    def _step(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            following = self._next[state].get(character)
            if following is None:
                following = self._next[state][character] = len(self._next)
                self._next.append({})
                self._fallback.append(0)
                self.depth.append(self.depth[state] + 1)
                self._complete.append(None)
            state = following
        self._complete[state] = stop

    def _link(self) -> None:
        """Fall back from each state to the longest proper suffix that is a state too: breadth first, so that
        shorter ones are done."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for character, following in self._next[state].items():
                queue.append(following)
                self._fallback[following] = self._step(self._fallback[state], character)
                self._complete[following] = self._complete[following] or self._complete[self._fallback[following]]


@lru_cache(maxsize=64)
def stop_automaton(stops: tuple[str, ...]) -> StopAutomaton:
    """The automaton of these stop strings; the choices of a request share one."""
    return StopAutomaton(stops)
