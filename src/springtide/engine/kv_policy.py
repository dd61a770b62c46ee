"""The seam between the step loop and whoever decides which keys and values a sequence may do without.

Asked after every step. What a policy gives up is really free: the scheduler hands the blocks to others, or keeps them
in the prefix cache until somebody needs the room.
"""

from __future__ import annotations

from typing import Protocol

from springtide.engine.kv import PAGE_SIZE
from springtide.engine.models.config import ModelConfig


class KVPolicy(Protocol):
    """Which blocks of a running sequence no later row will read."""

    def blocks_to_release(self, next_position: int) -> int:
        """How many of a sequence's first blocks are done with, once the row at `next_position` is the next to run."""


class KeepAll:
    """Some layer sees everything: nothing can go."""

    def blocks_to_release(self, next_position: int) -> int:
        return 0


class KeepWindow:
    """No layer looks back over more than `window` positions, the row's own included: exact."""

    def __init__(self, window: int) -> None:
        self._window = window

    def blocks_to_release(self, next_position: int) -> int:
        return max(0, next_position + 1 - self._window) // PAGE_SIZE


def choose_kv_policy(config: ModelConfig) -> KVPolicy:
    """The policy that changes no result of this model."""
    windows = [layer.window for layer in config.layers]
    return KeepAll() if None in windows else KeepWindow(max(window for window in windows if window is not None))
