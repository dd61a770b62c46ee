"""How a request travels from a gateway to a replica and its answer back. The only door to it.

Core NATS delivers at most once and forgets everything at a restart, so the two ends keep what matters:

- *Open.* The packed request goes to `st.node.<node>.replica.<replica>.open` in parts of at most 512 KiB. A
  replica takes each (request id, attempt) once. Frame 0 answers: accepted, or refused (it then carries `end`).
  The gateway sends the parts again after 1 s without an answer, and gives up after 5 s.
- *Frames* are numbered per attempt and go to `st.gateway.<gateway>.frames.<node>`: all that one engine step
  gave one gateway in one message. The server lets a node publish under its own name only, so the subject says
  who speaks; frames of another node, replica or attempt than the stream's are dropped, and their sender told.
- *Acknowledgements* are cumulative, gathered for 0.1 s over all streams of a replica, and go to `...control`
  at least once a second while streams are open: a gateway that is silent for 15 s is dead, and its streams are
  cancelled.
- *Replay.* A replica keeps an attempt's frames, encoded, until 60 s after its end (acknowledged ones go earlier
  when memory is short). A gap in the numbers, a reconnect of either side, or 2 s of silence lead to a replay
  from the first missing number. The answer is the frames, "alive" (nothing new yet), or "unknown" - then the
  stream is lost, as it is when two questions a second apart find no answer.
- *Cancel* is repeated until the replica confirms it. So are cancels for streams that somebody still speaks on
  after they are over: a node that was thought dead and comes back can't speak into anything.

Silence counts only while our own connection stands: a restart of the server costs a replay, not a stream.
Each message begins with its version; an end that meets another version loses the stream with a clear reason.
"""

from springtide.fabric.stream_hub import ClientStream, StreamHub, StreamLost
from springtide.fabric.stream_server import StreamServer
from springtide.fabric.stream_wire import FRAME_VERSION, Frame, FrameBatch, StreamKey

__all__ = [
    "FRAME_VERSION",
    "ClientStream",
    "Frame",
    "FrameBatch",
    "StreamHub",
    "StreamKey",
    "StreamLost",
    "StreamServer",
]
