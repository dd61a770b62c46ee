"""A request that one gateway had and another looks for: who was asked, and the best that was found. No sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import msgspec

from springtide.core.request import ChoiceOutput
from springtide.fabric.stream_wire import Finding


class Found(msgspec.Struct, frozen=True):
    """An attempt that can be taken over. `outputs` is what earlier attempts at this request had sent: the attempt
    itself begins after that."""

    node: str
    replica: str
    request_id: str
    attempt: int
    fingerprint: str
    outputs: tuple[ChoiceOutput, ...] = ()


class Search:
    """Goes on until all have answered."""

    def __init__(self, replicas: Iterable[tuple[str, str]]) -> None:
        self.missing = set(replicas)  # (node, replica) that have not answered
        self.best: Found | None = None
        self.complete = asyncio.Event()

    def answered(self, node: str, replica: str, finding: Finding) -> None:
        """A latest attempt wins: earlier ones were given up for it."""
        if (node, replica) not in self.missing:
            return
        self.missing.discard((node, replica))
        if finding.attempt is not None and (self.best is None or finding.attempt > self.best.attempt):
            self.best = Found(node, replica, finding.request_id, finding.attempt, finding.fingerprint, finding.outputs)
        if not self.missing:
            self.complete.set()
