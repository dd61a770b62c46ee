"""How a request travels from a gateway to a replica and its answer back. The only door to it.

Core NATS delivers at most once and forgets everything at a restart, so the two ends keep what matters:

- *Open.* The packed request goes to `st.node.<node>.replica.<replica>.open` in parts of at most 512 KiB. A
  replica takes each (request id, attempt) once. Frame 0 answers: accepted, or refused (it then carries `end`).
  The gateway sends the parts again after 1 s without an answer, and gives up after 5 s (more for long prompts).
- *Frames* are numbered per attempt and go to `st.gateway.<gateway>.frames.<node>`: all that one engine step
  gave one gateway in one message. The server lets a node publish under its own name only, so the subject says
  who speaks; frames of another node, replica or attempt than the stream's are dropped, and their sender told.
- *Acknowledgements* are cumulative, gathered for 0.1 s over all streams of a replica, and go to `...control`
  at least once a second while streams are open or requests wait.
- *Replay.* A replica keeps an attempt's frames, encoded, until 60 s after its end (those that were received go
  earlier: when memory is short, or at the end if nobody else can want them). A gap in the numbers, a reconnect of
  either side, or 0.75 s of silence (then 1.5 s, and so on up to 4 s) lead to a replay from the first missing number.
  The answer is the frames, "alive" (nothing new yet), or "unknown": then the stream is lost.
- *Cancel* is repeated until the replica confirms it. So are cancels for streams that somebody still speaks on
  after they are over: a node that was thought dead and comes back can't speak into anything.

Who is dead?

- *A replica* that says nothing at all for 0.25 s is asked whether it lives, by one message for all its streams. When
  two such questions find no answer, all its streams are lost. Each has twice as long as the replica's slowest
  sign of life of late, at least 0.2 and at most 0.5 s (`patience`): one that speaks every 60 ms is lost 0.7 to 0.8 s
  after it was stopped, or its cable died. When the server's disconnect event says that it is gone (`suspect`), it is
  asked at once and has 0.3 s for each answer: enough to come back over a new connection, and to replay.
- *A gateway* that is silent for 6 s is dead. Its streams are cancelled, but for those whose request has a fingerprint:
  they run on, to be taken over.
- *Never because of us.* Patience is measured by a clock that stands still while this process does (`awake`). The time
  for an answer begins when our own server has confirmed that it has the question. After a reconnect patience begins
  anew, with a second more for the others to come back too.

Another gateway may want the answer (its own client has it no longer, because the first gateway died):

- *Find.* It asks the replicas for the request by its id. Who has an attempt of it, with a fingerprint and from frame 0
  on, says so, and with it what earlier attempts had sent; the latest attempt wins.
- *Take over.* That stream then speaks to the asker, from frame 0 on, and the former gateway's is lost with
  `taken_over`; nothing that comes from there later, no acknowledgement and no cancel, has any effect.
- *Let go.* A gateway stops reading and leaves the stream to whom it may concern; all are left so when it stops in
  order. A stream that nobody takes within 60 s is cancelled.

Whose turn is it? A gateway tells each replica its whole *backlog*: at once when it changes, and each second. A replica
answers with *turns*, leave to send one request each; an opening names the turn that it comes on, and turns that nobody
needs are *declined*. All this is told once: a lost turn is the granter's to take back.

Versions: see `stream_wire`. Ends of neighbouring versions work together, with what both know; version 1 knows neither
find nor turns, and its streams can't be let go. An end that can't be understood at all loses the stream with a clear
reason.
"""

from springtide.fabric.stream_client import ClientStream, StreamLost
from springtide.fabric.stream_hub import StreamHub
from springtide.fabric.stream_search import Found
from springtide.fabric.stream_server import StreamServer
from springtide.fabric.stream_wire import FRAME_VERSION, Backlog, Flow, Frame, FrameBatch, StreamKey, Turn

__all__ = [
    "FRAME_VERSION",
    "Backlog",
    "ClientStream",
    "Flow",
    "Found",
    "Frame",
    "FrameBatch",
    "StreamHub",
    "StreamKey",
    "StreamLost",
    "StreamServer",
    "Turn",
]
