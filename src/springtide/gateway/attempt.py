"""One attempt at a request while it is under way: where it runs, since when, and what it has done. Knows nothing of
the attempts before it or beside it, nor of clients."""

from __future__ import annotations

import asyncio
import time

import msgspec

from springtide.core.cluster import Replica
from springtide.core.request import Attempt, Outcome, TokenCounts
from springtide.fabric.streams import ClientStream, Frame, StreamLost

Heard = list[Frame] | StreamLost


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """How long one attempt may be silent, in seconds; 0: as long as it likes. (For it to be accepted the hub waits.)"""

    first_token: float = 0.0
    inter_token: float = 0.0


class OpenAttempt:
    """Ends with `close`, which says what becomes of it in the account."""

    def __init__(self, number: int, replica: Replica, stream: ClientStream) -> None:
        self.number = number
        self.replica = replica
        self.stream = stream
        self.accepted = False
        self.prompt_tokens = 0  # as its replica counts them
        self.tokens = 0  # that it has said
        self.spoken = False  # whether it has said anything
        self._started = time.time()
        self._silent_since = time.monotonic()
        self._listening = False
        self._unread: Heard | None = None

    async def listen(self) -> Heard:
        """The next frames, or the loss of the stream."""
        if self._unread is not None:
            heard, self._unread = self._unread, None
            return heard
        if self.spoken:
            self._silent_since = time.monotonic()  # a client that read slowly until now is no silence of the replica
        self._listening = True
        try:
            return await self.stream.frames()
        except StreamLost as lost:
            return lost
        finally:
            self._listening = False

    def unhear(self, heard: Heard) -> None:
        """It was said while somebody else was listened to: the next `listen` returns it."""
        self._unread = heard

    def take_in(self, frames: list[Frame]) -> bool:
        """Note what the frames say of the attempt itself; whether they accepted it."""
        self.prompt_tokens = frames[0].prompt_tokens or self.prompt_tokens
        if self.accepted or frames[0].end is not None:  # an end without anything before it is a refusal
            return False
        self.accepted = True
        return True

    def has_spoken(self, tokens: int) -> None:
        """`tokens` more of its words are part of the answer."""
        self.tokens += tokens
        self.spoken = True

    def overdue(self, timeouts: Timeouts, now: float) -> str | None:
        """For what it has been waited too long, if so. `now` is monotonic."""
        if not self._listening or not self.accepted:
            return None
        silent = now - self._silent_since
        if not self.spoken:
            return _overdue("said no first word", silent, timeouts.first_token)
        return _overdue("said nothing more", silent, timeouts.inter_token)

    def silent_for(self, now: float) -> float:
        """Seconds since it was opened, or since it was last heard. `now` is monotonic."""
        return now - self._silent_since

    @property
    def counts_so_far(self) -> TokenCounts:
        """What it has done if it never comes to its end: a token says that the prompt was computed, too."""
        return TokenCounts(prompt=self.prompt_tokens if self.tokens else 0, completion=self.tokens)

    def close(self, outcome: Outcome, counts: TokenCounts) -> Attempt:
        """It is over, and its replica need not go on. What its node is paid for."""
        self.stream.cancel()
        return Attempt(
            number=self.number,
            node=self.replica.node,
            replica=self.replica.id,
            started=self._started,
            ended=time.time(),
            outcome=outcome,
            prompt_tokens=counts.prompt,
            completion_tokens=counts.completion,
            cached_tokens=counts.cached,
        )


async def first_to_be_heard(
    attempts: list[OpenAttempt], patience: float | None = None
) -> tuple[OpenAttempt, Heard] | None:
    """Whichever of them is heard first, within `patience` seconds. Nothing that the others say is lost."""
    listening = {asyncio.ensure_future(attempt.listen()): attempt for attempt in attempts}
    try:
        done, _ = await asyncio.wait(listening, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in listening:
            task.cancel()
    if not done:
        return None
    first, *others = [task for task in listening if task in done]
    for task in others:
        listening[task].unhear(task.result())
    return listening[first], first.result()


def _overdue(what: str, silent: float, allowed: float) -> str | None:
    return f"it {what} within {allowed:g} s" if 0 < allowed < silent else None
