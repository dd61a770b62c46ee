"""What has been said of an answer so far, whoever said it: enough for another replica to go on without a gap.

Knows frames and choices; nothing of attempts, sockets or clients.
"""

from __future__ import annotations

from collections.abc import Iterable

from springtide.core.request import ChoiceOutput, Delta, FinishReason
from springtide.core.wire import escape_json, unescape_json
from springtide.fabric.streams import Frame


class Garbled(Exception):
    """A replica said what can't be the continuation of this answer."""


class Transcript:
    """Per choice: escaped text, token ids, and why it ended, if it did. `tokens` counts all of them.

    Each speaker must begin each choice exactly where the one before it stopped: `new_speaker` says that another
    one goes on.
    """

    def __init__(self, choices: int) -> None:
        self.tokens = 0
        self._texts: list[list[bytes]] = [[] for _ in range(choices)]
        self._token_ids: list[list[int]] = [[] for _ in range(choices)]
        self._reasons: list[FinishReason | None] = [None] * choices
        self._going_on: set[int] = set()  # choices that the present speaker has begun, and not ended

    def new_speaker(self) -> None:
        self._going_on.clear()

    def add(self, frames: list[Frame]) -> None:
        """All of it, or nothing.

        Raises:
            Garbled: a choice that was not asked for, that had ended, or that does not go on where it stopped; or
                the end, before every choice had ended.
        """
        for frame in frames:
            for delta in frame.deltas:
                if delta.choice not in self._going_on:
                    self._check(delta)
        end = frames[-1].end
        if end is not None and end.outcome == "finished":
            self._check_end(frames)
        texts, token_ids, reasons = self._texts, self._token_ids, self._reasons
        for frame in frames:
            for delta in frame.deltas:
                choice = delta.choice
                texts[choice].append(delta.text)
                token_ids[choice] += delta.token_ids
                self.tokens += len(delta.token_ids)
                if delta.finish_reason is not None:
                    reasons[choice] = delta.finish_reason
                    self._going_on.discard(choice)

    def _check(self, delta: Delta) -> None:
        choice = delta.choice
        if not 0 <= choice < len(self._texts):
            raise Garbled(f"the replica speaks of choice {choice} of {len(self._texts)}")
        if self._reasons[choice] is not None:
            raise Garbled(f"the replica goes on with choice {choice}, which had ended")
        stopped = len(self._text(choice).encode())
        if delta.offset != stopped:
            raise Garbled(f"the replica begins choice {choice} at byte {delta.offset}, {stopped} were said")
        self._going_on.add(choice)

    def _check_end(self, frames: list[Frame]) -> None:
        ended = {delta.choice for frame in frames for delta in frame.deltas if delta.finish_reason is not None}
        left = [c for c, reason in enumerate(self._reasons) if reason is None and c not in ended]
        if left:
            raise Garbled(f"the replica ends before choice {left[0]} has ended")

    @property
    def complete(self) -> bool:
        """Whether every choice has ended."""
        return None not in self._reasons

    def outputs(self) -> tuple[ChoiceOutput, ...]:
        """The choices of which something was said, as a request that resumes carries them."""
        outputs = (
            ChoiceOutput(choice, list(self._token_ids[choice]), self._text(choice), self._reasons[choice])
            for choice in range(len(self._texts))
        )
        return tuple(o for o in outputs if o.token_ids or o.text or o.finish_reason)

    def _text(self, choice: int) -> str:
        return unescape_json(b"".join(self._texts[choice]))


def as_frame(outputs: Iterable[ChoiceOutput]) -> Frame:
    """What earlier speakers had said, as if it were said just now."""
    return Frame(
        0,
        [Delta(o.choice, "text", escape_json(o.text), o.token_ids, 0, None, o.finish_reason) for o in outputs],
    )
