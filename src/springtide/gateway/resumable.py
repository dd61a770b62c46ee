"""Streams that a client can pick up where it lost them: each event says how far it reaches, and what the client has
already is not sent again.

Positions count bytes of text, not events: the same answer may come cut into other pieces the second time.
"""

from __future__ import annotations

from springtide.core.request import Delta, TokenCounts, TokenLogprob
from springtide.core.wire import escape_json, unescape_json
from springtide.fabric.streams import Frame
from springtide.gateway.answer import encode
from springtide.gateway.idempotency import ChoicePosition, Position
from springtide.gateway.openai import Call
from springtide.gateway.sse import StreamWriter


class ResumableWriter(StreamWriter):
    """Events with ids, of what comes after `after` (None: of everything).

    `_has` is what the client has of each choice; `_scored` is how many scores have come by, whether sent or not.
    """

    def __init__(self, call: Call, numerics: str, after: Position | None) -> None:
        super().__init__(call, numerics)
        count = call.request.num_choices
        self._id = call.request.id.encode()
        self._has = list(after.choices) if after is not None else [ChoicePosition()] * count
        self._has_usage = after is not None and after.usage
        self._scored = [0] * count

    def write(self, frames: list[Frame]) -> bytes:
        parts: list[bytes] = []
        for frame in frames:
            for delta in frame.deltas:
                self._write(delta, parts)
        return b"".join(parts)

    def usage(self, counts: TokenCounts) -> bytes:
        if self._has_usage:
            return b""
        self._has_usage = True
        return self._event_id() + super().usage(counts)

    def _write(self, delta: Delta, parts: list[bytes]) -> None:
        choice = delta.choice
        head = self._heads.get(choice) or self._begin(choice, parts)
        scores = self._new_scores(choice, delta.logprobs or [])
        text = self._new_text(delta)
        if scores:
            logprobs = encode(self._logprobs.write(choice, scores))
            parts += (self._event_id(), head, text, self._before_logprobs, logprobs, self._unfinished)
        elif text:
            parts += (self._event_id(), head, text, self._tail)
        self.chunks += bool(scores or text)
        if delta.finish_reason is not None and not self._has[choice].finished:
            self._has[choice] = self._has[choice]._replace(finished=True)
            self._finish(choice, delta.finish_reason, parts)

    def _begin(self, choice: int, parts: list[bytes]) -> bytes:
        has_role = self._has[choice].begun
        self._has[choice] = self._has[choice]._replace(begun=True)
        if not has_role:
            parts.append(self._event_id() if self._shape.role is not None else b"")
        return super()._begin(choice, [] if has_role else parts)

    def _finish(self, choice: int, reason: str, parts: list[bytes]) -> None:
        if reason in self._finishes:
            parts.append(self._event_id())
            super()._finish(choice, reason, parts)

    def _new_scores(self, choice: int, scores: list[TokenLogprob]) -> list[TokenLogprob]:
        """Those that the client has not. Those that it has are counted: what follows says where it stands."""
        if not scores:
            return scores
        has = self._has[choice]
        seen = min(max(has.scored - self._scored[choice], 0), len(scores))
        self._logprobs.write(choice, scores[:seen])
        self._scored[choice] += len(scores)
        self._has[choice] = has._replace(scored=max(has.scored, self._scored[choice]))
        return scores[seen:]

    def _new_text(self, delta: Delta) -> bytes:
        """What of a delta's text the client has not."""
        has, text = self._has[delta.choice], delta.text
        size = len(text) if b"\\" not in text else len(unescape_json(text).encode())
        seen, end = has.offset - delta.offset, delta.offset + size
        if seen <= 0:
            self._has[delta.choice] = has._replace(offset=end)
            return text
        if seen >= size:
            return b""
        self._has[delta.choice] = has._replace(offset=end)
        return escape_json(unescape_json(text).encode()[seen:].decode("utf-8", "replace"))

    def _event_id(self) -> bytes:
        position = Position(self._has, self._has_usage)
        return b"id: %b:%b\n" % (self._id, str(position).encode())
