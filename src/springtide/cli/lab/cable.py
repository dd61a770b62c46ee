"""A cable between a process and a server, which can be bad: a TCP proxy on loopback. Knows bytes, nothing of what
they mean."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import NamedTuple

_SEGMENT = 65536


class Weather(NamedTuple):
    """How a cable treats each segment: seconds of `delay`, give or take `jitter`; and with the probability `loss`
    another `retransmission` seconds, which is what a lost packet is to those who speak TCP."""

    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    retransmission: float = 0.0


FAIR = Weather()


class Cable:
    """Passes bytes on both ways between whoever connects to `port` and the server at `to`."""

    def __init__(self, to: int, chance: random.Random) -> None:
        self.port = 0
        self.weather = FAIR
        self._to = to
        self._chance = chance
        self._dark = False
        self._server: asyncio.Server | None = None
        self._flows: dict[asyncio.StreamWriter, asyncio.Event] = {}  # each end, and whether bytes pass to it
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._on_connection, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """End everything. Harmless if it was not started."""
        if self._server is not None:
            self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """End all connections; both ends notice, and may connect again."""
        for end in list(self._flows):
            end.transport.abort()

    def freeze(self, *, new_ones_too: bool) -> None:
        """From now on no byte passes on the connections that are there, and nobody is told. `new_ones_too`: nor on
        those that are made meanwhile."""
        self._dark = new_ones_too
        for passes in self._flows.values():
            passes.clear()

    def thaw(self) -> None:
        """Let pass what has come meanwhile, and all that comes."""
        self._dark = False
        for passes in self._flows.values():
            passes.set()

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:  # nobody is there; to the one who asks it looks like a server that hangs up
            writer.transport.abort()
            return
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            passes = self._flows[sink] = asyncio.Event()
            if not self._dark:
                passes.set()
            task = asyncio.get_running_loop().create_task(self._pass_on(source, sink, passes))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, passes: asyncio.Event) -> None:
        try:
            with contextlib.suppress(OSError):
                while data := await source.read(_SEGMENT):
                    await self._endure()
                    await passes.wait()
                    if sink.transport.is_closing():  # cut meanwhile
                        return
                    sink.write(data)
                    await sink.drain()
        finally:
            del self._flows[sink]
            sink.transport.abort()

    async def _endure(self) -> None:
        """What a segment goes through. What comes meanwhile waits, and goes on as one segment."""
        weather = self.weather
        if weather is not FAIR:
            seconds = weather.delay + self._chance.uniform(-1, 1) * weather.jitter
            if self._chance.random() < weather.loss:
                seconds += weather.retransmission
            await asyncio.sleep(max(0.0, seconds))
