"""Server-sent events in OpenAI's chunk formats. The hot path of the whole gateway: a chunk is a few bytes
objects of which only the text is new, and all that has arrived goes out joined.
"""

from __future__ import annotations

import msgspec

from springtide.core.request import TokenCounts
from springtide.fabric.streams import Frame
from springtide.gateway.answer import LogprobsWriter, encode, fingerprint, usage_object
from springtide.gateway.openai import Call

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": waiting\n\n"


class _Shape(msgspec.Struct, frozen=True):
    """How a dialect writes the part of a choice that changes: `open` text `close`."""

    object: str
    open: bytes
    close: bytes
    role: bytes | None
    nothing: bytes


_SHAPES = {
    "chat": _Shape(
        object="chat.completion.chunk",
        open=b'"delta":{"content":"',
        close=b'"}',
        role=b'"delta":{"role":"assistant","content":""}',
        nothing=b'"delta":{}',
    ),
    "completions": _Shape(object="text_completion", open=b'"text":"', close=b'"', role=None, nothing=b'"text":""'),
}


class StreamWriter:
    """Frames of one request to chunks: for each choice its role once, its text, its end once."""

    def __init__(self, call: Call, numerics: str) -> None:
        shape = self._shape = _SHAPES[call.dialect]
        self._call = call
        end = b'}],"usage":null}\n\n' if call.include_usage else b"}]}\n\n"
        self._unfinished = b',"finish_reason":null' + end
        self._tail = shape.close + b',"logprobs":null' + self._unfinished
        self._before_logprobs = shape.close + b',"logprobs":'
        self._finishes = {
            reason: shape.nothing + b',"logprobs":null,"finish_reason":"' + reason.encode() + b'"' + end
            for reason in ("stop", "length")
        }
        self._logprobs = LogprobsWriter(call.dialect)
        self._heads: dict[int, bytes] = {}  # for each choice that has begun: all that stands before its text
        self.chunks = 0
        self.speak_as(numerics)

    def speak_as(self, numerics: str) -> None:
        """From now on the text is of this numerics class; "": of several, or nobody knows."""
        self.numerics = numerics
        request = self._call.request
        head = {
            "id": request.id,
            "object": self._shape.object,
            "created": int(request.created),
            "model": request.model,
            "system_fingerprint": fingerprint(numerics),
        }
        self._head = b"data: " + encode(head)[:-1]
        self._heads = {choice: self._choice_head(choice) + self._shape.open for choice in self._heads}

    def write(self, frames: list[Frame]) -> bytes:
        """All chunks of these frames, joined; empty if they say nothing to a client yet."""
        parts: list[bytes] = []
        heads, tail = self._heads, self._tail
        chunks = 0
        for frame in frames:
            for delta in frame.deltas:
                head = heads.get(delta.choice)
                if head is None:
                    head = self._begin(delta.choice, parts)
                if delta.logprobs:
                    scores = encode(self._logprobs.write(delta.choice, delta.logprobs))
                    parts += (head, delta.text, self._before_logprobs, scores, self._unfinished)
                    chunks += 1
                elif delta.text:
                    parts += (head, delta.text, tail)
                    chunks += 1
                if delta.finish_reason is not None:
                    self._finish(delta.choice, delta.finish_reason, parts)
        self.chunks += chunks
        return b"".join(parts)

    def _begin(self, choice: int, parts: list[bytes]) -> bytes:
        choice_head = self._choice_head(choice)
        if self._shape.role is not None:
            parts += (choice_head, self._shape.role, b',"logprobs":null', self._unfinished)
            self.chunks += 1
        head = self._heads[choice] = choice_head + self._shape.open
        return head

    def _finish(self, choice: int, reason: str, parts: list[bytes]) -> None:
        """The chunk that says why a choice ended. One that failed has none: an error event follows."""
        finish = self._finishes.get(reason)
        if finish is not None:
            parts += (self._choice_head(choice), finish)
            self.chunks += 1

    def _choice_head(self, choice: int) -> bytes:
        return b'%b,"choices":[{"index":%d,' % (self._head, choice)

    def usage(self, counts: TokenCounts) -> bytes:
        """The chunk without choices that carries the usage."""
        return b'%b,"choices":[],"usage":%b}\n\n' % (self._head, encode(usage_object(counts)))


def error_event(error: bytes) -> bytes:
    """An error object (JSON) as the last event of a stream that could not be finished."""
    return b"data: " + error + b"\n\n"
